// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/dnstest"
)

// resolverAt returns a resolver for the given servers. After resend it asks the next
// server, or the same one again.
func resolverAt(t *testing.T, resend time.Duration, servers ...string) *Resolver {
	t.Helper()
	var list []DNSAddress
	for _, address := range servers {
		network, rest, found := strings.Cut(address, "/")
		if !found {
			network, rest = "udp", address
		}
		list = append(list, DNSAddress{network, rest})
	}
	r := NewResolver(list)
	r.resend = resend
	return r
}

// closedTCP returns an address at which nothing listens.
func closedTCP(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func lookupContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// A question whose answer is lost or late is repeated, and an answer to the first copy
// still counts.
func TestResolverRepeatsQuestions(t *testing.T) {
	var mu sync.Mutex
	asked := make(map[string]chan struct{})
	r := resolverAt(t, 20*time.Millisecond, dnstest.Serve(t, func(q dnstest.Query) dnstest.Reply {
		mu.Lock()
		secondSeen, repeated := asked[q.From]
		if !repeated {
			secondSeen = make(chan struct{})
			asked[q.From] = secondSeen
		}
		mu.Unlock()
		if repeated {
			select {
			case <-secondSeen:
			default:
				close(secondSeen)
			}
			return dnstest.Reply{Silent: true}
		}
		select {
		case <-secondSeen:
		case <-t.Context().Done():
		}
		return dnstest.Reply{Addrs: []string{"192.0.2.1", "2001:db8::1"}}
	}))
	addrs, err := r.lookup(lookupContext(t), "slow.test.")
	if slices.SortFunc(addrs, netip.Addr.Compare); err != nil || !slices.Equal(addrs, addrsOf("192.0.2.1 2001:db8::1")) {
		t.Errorf("%v, %v", addrs, err)
	}
	if mu.Lock(); len(asked) != 2 {
		t.Errorf("questions came from %d sockets, want one for each family", len(asked))
	}
	mu.Unlock()
}

// One server that is silent, unreachable or failing does not make a lookup fail, whichever
// server is asked first.
func TestResolverAsksNextServer(t *testing.T) {
	good := dnstest.Serve(t, func(dnstest.Query) dnstest.Reply { return dnstest.Reply{Addrs: []string{"192.0.2.1"}} })
	silent := dnstest.Serve(t, func(dnstest.Query) dnstest.Reply { return dnstest.Reply{Silent: true} })
	broken := dnstest.Serve(t, func(dnstest.Query) dnstest.Reply { return dnstest.Reply{RCode: dnsmessage.RCodeServerFailure} })
	for name, servers := range map[string][]string{
		"silent": {silent, good}, "closed": {dnstest.Closed(t), good}, "broken": {broken, good},
		"all": {dnstest.Closed(t), silent, broken, "tcp/" + closedTCP(t), good},
	} {
		t.Run(name, func(t *testing.T) {
			r := resolverAt(t, 50*time.Millisecond, servers...)
			for i := range 8 { // the order in which servers are asked varies
				addrs, err := r.lookup(lookupContext(t), fmt.Sprintf("name%d.test.", i))
				if err != nil || !slices.Equal(addrs, addrsOf("192.0.2.1")) {
					t.Errorf("%v, %v", addrs, err)
				}
			}
		})
	}
	// NXDOMAIN is an answer: no other server is asked.
	r := resolverAt(t, time.Hour, dnstest.Serve(t, func(dnstest.Query) dnstest.Reply { return dnstest.Reply{RCode: dnsmessage.RCodeNameError} }), silent)
	r.silent.put(1, struct{}{})
	if addrs, err := r.lookup(lookupContext(t), "nowhere.test."); err == nil || !err.(*ResolveError).noSuchName() {
		t.Errorf("%v, %v", addrs, err)
	}
}

// A server that was silent is asked last for a while.
func TestResolverRemembersSilence(t *testing.T) {
	r := resolverAt(t, time.Second, "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
	r.silent.put(1, struct{}{})
	first := make(map[int]int)
	for range 100 {
		order := r.order()
		if first[order[0]]++; order[2] != 1 {
			t.Fatalf("order %v, and 1 was silent", order)
		}
	}
	if first[0] == 0 || first[2] == 0 {
		t.Errorf("first %v, want a random one", first)
	}
}

// Requests for a name share a lookup that has just begun, but do not join one that hangs.
func TestResolverJoinsLookups(t *testing.T) {
	var mu sync.Mutex
	sources := make(map[string]bool)
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(sources)
	}
	var answers atomic.Bool
	release := make(chan struct{})
	server := dnstest.Serve(t, func(q dnstest.Query) dnstest.Reply {
		mu.Lock()
		first := len(sources) < 2 // one socket per family
		old := sources[q.From]
		sources[q.From] = true
		mu.Unlock()
		if first || old {
			<-release
			return dnstest.Reply{Silent: !answers.Load()}
		}
		return dnstest.Reply{Addrs: []string{"192.0.2.1"}}
	})
	defer close(release)
	r := resolverAt(t, time.Hour, server)
	hung := make(chan dnsAnswer, 4)
	defer r.ask("hung.test.", hung)()
	defer r.ask("hung.test.", hung)()
	for count() < 2 { // both questions
		time.Sleep(time.Millisecond)
	}
	r.mu.Lock()
	for _, l := range r.pending {
		if len(l.waiting) != 2 {
			t.Errorf("%d requests wait for %v, want 2", len(l.waiting), l.question)
		}
		l.began = time.Now().Add(-2 * time.Hour)
	}
	r.mu.Unlock()
	if addrs, err := r.lookup(lookupContext(t), "hung.test."); err != nil || !slices.Equal(addrs, addrsOf("192.0.2.1")) {
		t.Errorf("%v, %v", addrs, err)
	}
	if len(hung) > 0 {
		t.Errorf("the lookup that hangs returned %v", <-hung)
	}
}

// earlyClose is a connection to a DNS server that reports whether it was closed before its
// deadline.
type earlyClose struct {
	net.Conn
	deadline atomic.Int64 // Unix nanoseconds; 0: none
	closed   chan<- bool
	once     sync.Once
}

func (c *earlyClose) SetDeadline(t time.Time) error {
	c.deadline.Store(t.UnixNano())
	return c.Conn.SetDeadline(t)
}

func (c *earlyClose) Close() error {
	c.once.Do(func() {
		deadline := c.deadline.Load()
		c.closed <- deadline == 0 || time.Now().UnixNano() < deadline
	})
	return c.Conn.Close()
}

// earlyPackets is an earlyClose that net.Resolver uses for datagrams.
type earlyPackets struct{ *earlyClose }

func (c earlyPackets) ReadFrom([]byte) (int, net.Addr, error) { return 0, nil, net.ErrClosed }
func (c earlyPackets) WriteTo([]byte, net.Addr) (int, error)  { return 0, net.ErrClosed }

// The question is repeated early enough even for timeouts below a second.
func TestResolverRepeatsInTime(t *testing.T) {
	for timeout, want := range map[time.Duration]time.Duration{time.Hour: time.Second, 300 * time.Millisecond: 100 * time.Millisecond, 1: time.Millisecond} {
		r := resolverAt(t, time.Second)
		NewDialer(new(access.Control), timeout, r)
		NewDialer(new(access.Control), time.Hour, r) // policies share the resolver
		if r.resend != want {
			t.Errorf("within %v after %v, want %v", timeout, r.resend, want)
		}
	}
}

// A lookup that no request waits for any more keeps no socket open.
func TestResolverCanceled(t *testing.T) {
	asked := make(chan struct{}, 100)
	server := dnstest.Serve(t, func(dnstest.Query) dnstest.Reply {
		asked <- struct{}{}
		return dnstest.Reply{Silent: true}
	})
	for _, network := range []string{"udp", "tcp"} {
		t.Run(network, func(t *testing.T) {
			closed := make(chan bool, 100)
			old := net.DefaultResolver
			net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
				conn, err := queryDialer.DialContext(ctx, network, server)
				if early := (&earlyClose{Conn: conn, closed: closed}); network == "udp" {
					return earlyPackets{early}, err
				} else {
					return early, err
				}
			}}
			r := resolverAt(t, time.Hour)
			answers := make(chan dnsAnswer, 4)
			leave := r.ask("silent.test.", answers)
			other := r.ask("silent.test.", answers)
			net.DefaultResolver = old
			<-asked
			<-asked
			pending := func() int {
				r.mu.Lock()
				defer r.mu.Unlock()
				return len(r.pending)
			}
			leave()
			if n := pending(); n != 2 {
				t.Errorf("%d lookups, want 2 for the request that still waits", n)
			}
			other()
			if n := pending(); n != 0 {
				t.Errorf("%d lookups that no request waits for", n)
			}
			for range 2 {
				if early := <-closed; !early {
					t.Error("a socket was kept open until its deadline")
				}
			}
			if len(answers) != 0 {
				t.Errorf("got the answer %v, though canceled", <-answers)
			}
		})
	}
}

// Running out of descriptors is an error of this proxy, not of the name, even if it hits a
// lookup.
func TestNoDescriptorsForDNS(t *testing.T) {
	old := net.DefaultResolver
	t.Cleanup(func() { net.DefaultResolver = old })
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE} {
		net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Net: "udp", Err: os.NewSyscallError("socket", errno)}
		}}
		_, err := resolverAt(t, time.Second).lookup(lookupContext(t), "name.test.")
		if cause := CauseOf(err); cause != DialNoResources {
			t.Errorf("%v has the cause %s", err, cause)
		}
	}
}

// The connector remembers which addresses won and lost a race, but not a denial by a rule,
// and nothing when all goes well, so that clients stay spread over all addresses.
func TestConnectorLearns(t *testing.T) {
	to := hostPort{"name.test.", 443}
	for name, tc := range map[string]struct {
		attempts []started
		lookups  int // still running
		winner   string
		first    string // the address that the next race starts with
		dead     string
	}{
		"the first wins":        {[]started{{addr: addrsOf("::1")[0]}, {addr: addrsOf("::2")[0]}}, 0, "::1", "", ""},
		"another one wins":      {[]started{{addr: addrsOf("::1")[0]}, {addr: addrsOf("::2")[0]}, {addr: addrsOf("::3")[0]}}, 0, "::2", "::2", "::1"},
		"another one fails":     {[]started{{addrsOf("::1")[0], syscall.ECONNREFUSED}, {addr: addrsOf("::2")[0]}}, 0, "::2", "::2", "::1"},
		"another one is denied": {[]started{{addrsOf("::1")[0], &access.DeniedError{}}, {addr: addrsOf("::2")[0]}}, 0, "::2", "", ""},
		"no descriptors":        {[]started{{addrsOf("::1")[0], syscall.EMFILE}}, 0, "", "", ""},
		"all fail":              {[]started{{addrsOf("::1")[0], syscall.ECONNREFUSED}, {addr: addrsOf("::2")[0]}}, 0, "", "", "::1 ::2"},
		"IPv6 was waited for":   {[]started{{addr: addrsOf("1.1.1.1")[0]}}, 1, "1.1.1.1", "1.1.1.1", ""},
		"IPv4 had no answer":    {[]started{{addr: addrsOf("::1")[0]}}, 1, "::1", "", ""},
		"nothing has happened":  {},
	} {
		t.Run(name, func(t *testing.T) {
			c := newConnector(resolverAt(t, time.Second))
			winner, _ := netip.ParseAddr(tc.winner)
			c.remember(to, &race{attempts: tc.attempts, lookups: tc.lookups}, winner)
			if got, ok := c.winners.get(to); ok != (tc.first != "") || ok && got.String() != tc.first {
				t.Errorf("%v is preferred, want %s", got, tc.first)
			}
			for _, a := range tc.attempts {
				_, dead := c.dead.get(netip.AddrPortFrom(a.addr, to.port))
				if want := slices.Contains(strings.Fields(tc.dead), a.addr.String()); dead != want {
					t.Errorf("%v is remembered as dead: %v", a.addr, dead)
				}
			}
		})
	}
}

func TestMemoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newTTLCache[int, int](10, time.Minute)
		for i := range 1000 {
			m.put(i, -i)
			if value, ok := m.get(i); !ok || value != -i || len(m.values) > 10 {
				t.Fatalf("%d: %d, %v, %d values", i, value, ok, len(m.values))
			}
		}
		m.put(5, 5)
		time.Sleep(time.Minute - 1)
		if _, ok := m.get(5); !ok {
			t.Error("forgotten too early")
		}
		m.put(6, 6)
		time.Sleep(2 * time.Nanosecond)
		if _, ok := m.get(5); ok {
			t.Error("remembered for too long")
		}
		// Expired entries make room for live ones.
		for i := 100; len(m.values) < 10; i++ {
			m.values[i] = ttlEntry[int]{}
		}
		m.put(7, 7)
		if _, ok := m.get(6); !ok {
			t.Error("forgotten although there was room")
		}
	})
}

// The response code is found however the response is split into pieces.
func FuzzQueryConn(f *testing.F) {
	f.Add([]byte("\x00\x0c\x12\x34\x81\x83\x00\x01\x00\x00\x00\x00\x00\x00"), []byte{1, 1, 9})
	f.Add([]byte("\x00"), []byte{2})
	f.Add([]byte("\x00\x0c\x12\x34\x81"), []byte{})
	f.Fuzz(func(t *testing.T, stream, sizes []byte) {
		near, far := net.Pipe()
		go func() {
			defer far.Close()
			_, _ = far.Write(stream)
		}()
		c := &queryConn{Conn: near, watch: new(queryWatch), stop: func() bool { return true }}
		defer c.Close()
		var got []byte
		for i := 0; ; i++ {
			size := 3
			if len(sizes) > 0 {
				size = 1 + int(sizes[i%len(sizes)])%16
			}
			b := make([]byte, size)
			n, err := c.Read(b)
			if got = append(got, b[:n]...); err != nil {
				break
			}
		}
		want := byte(0)
		if len(stream) > 5 {
			want = stream[5] & 0xf
		}
		if rcode := c.watch.rcode.Load(); rcode != int32(want) || !bytes.Equal(got, stream) {
			t.Errorf("rcode %d, want %d; %x of %x", rcode, want, got, stream)
		}
	})
}

// Errors keep what callers match on.
func TestResolveErrors(t *testing.T) {
	err := error(&ResolveError{Err: &net.DNSError{Err: "server misbehaving"}, rcode: rcodeServerFailure})
	var dns *net.DNSError
	if !errors.As(err, &dns) || errors.Is(err, syscall.EMFILE) || !strings.HasSuffix(err.Error(), "(SERVFAIL)") {
		t.Errorf("%v", err)
	}
	late := &ResolveError{Err: &net.DNSError{IsTimeout: true}, rcode: rcodeServerFailure}
	if late.Failure() != "" || late.notFound() {
		t.Errorf("%v", late)
	}
}
