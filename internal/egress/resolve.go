// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// resendDelay is how long to wait for a DNS server before repeating the query or asking
// another server. For the same time, further requests for a name share its look-up.
const resendDelay = time.Second

// Resolver looks up the addresses of names, using the configured DNS servers or the
// system's resolver. It looks up the two address families separately, so that a late or
// lost answer for one does not delay the other.
//
// All methods are safe for concurrent use.
type Resolver struct {
	servers []DNSAddress             // none: the system's
	resend  time.Duration            // see resendDelay
	silent  *ttlCache[int, struct{}] // servers that recently did not answer in time

	mu      sync.Mutex
	pending map[question]*lookup
}

// question is the name and address family of a look-up.
type question struct {
	name string // with a trailing dot if no search list applies
	ipv6 bool
}

// lookup is a look-up in progress, with the channels that wait for its answer.
type lookup struct {
	question
	began   time.Time
	cancel  context.CancelFunc
	waiting []chan<- dnsAnswer // guarded by resolver.mu
}

// setTimeout shortens the resend delay for look-ups with the given timeout, so that there is time
// to repeat a query.
func (r *Resolver) setTimeout(timeout time.Duration) {
	r.resend = max(min(r.resend, timeout/3), time.Millisecond)
}

// DNSAddress is the address of a DNS server.
type DNSAddress struct {
	Network string // udp or tcp; udp may change to tcp for a long answer
	Address string // IP address and port
}

// NewResolver returns a resolver that asks the given servers, or the system's if there
// are none.
func NewResolver(servers []DNSAddress) *Resolver {
	return &Resolver{
		servers: servers,
		resend:  resendDelay,
		silent:  newTTLCache[int, struct{}](len(servers)+1, 30*time.Second),
		pending: make(map[question]*lookup),
	}
}

// ask starts looking up both address families of a name. It sends the two answers to a
// channel, which must have room for them. The caller must call leave in the end; after
// that nothing more is sent.
func (r *Resolver) ask(name string, answers chan<- dnsAnswer) (leave func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ipv6 := r.join(question{name, true}, answers)
	ipv4 := r.join(question{name, false}, answers)
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.leave(ipv6, answers)
		r.leave(ipv4, answers)
	}
}

// join adds a channel to the look-up of q, and starts one if there is none. A look-up
// that began more than r.resend ago may hang, so join starts another one instead.
func (r *Resolver) join(q question, answers chan<- dnsAnswer) *lookup {
	l := r.pending[q]
	if l == nil || time.Since(l.began) >= r.resend {
		ctx, cancel := context.WithCancel(context.Background())
		l = &lookup{question: q, began: time.Now(), cancel: cancel}
		r.pending[q] = l
		system := net.DefaultResolver
		go func() { r.deliver(l, r.resolve(ctx, q, system)) }()
	}
	l.waiting = append(l.waiting, answers)
	return l
}

// leave removes a channel from a look-up, and cancels the look-up if no other waits.
func (r *Resolver) leave(l *lookup, answers chan<- dnsAnswer) {
	i := slices.Index(l.waiting, answers)
	if i < 0 {
		return // already answered
	}
	if l.waiting = slices.Delete(l.waiting, i, i+1); len(l.waiting) == 0 {
		r.forget(l)
	}
}

// forget cancels a look-up, and makes sure that no further request joins it.
func (r *Resolver) forget(l *lookup) {
	l.cancel()
	if r.pending[l.question] == l {
		delete(r.pending, l.question)
	}
}

// deliver sends the answer of a look-up to all channels that wait for it.
func (r *Resolver) deliver(l *lookup, a dnsAnswer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forget(l)
	for _, answers := range l.waiting {
		answers <- a
	}
	l.waiting = nil
}

// lookup returns the addresses of a name, of both families.
func (r *Resolver) lookup(ctx context.Context, name string) (addrs []netip.Addr, err error) {
	err = r.lookupEach(ctx, name, func(a dnsAnswer) { addrs = append(addrs, a.addrs...) })
	return addrs, err
}

// lookupEach looks up both address families of a name, and calls yield with each answer. It
// returns an error if neither has addresses, or ctx ends first.
func (r *Resolver) lookupEach(ctx context.Context, name string, yield func(dnsAnswer)) (err error) {
	answers := make(chan dnsAnswer, 2)
	defer r.ask(name, answers)()
	found := false
	for range 2 {
		select {
		case a := <-answers:
			yield(a)
			found, err = found || len(a.addrs) > 0, moreInformative(err, a.err)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if found {
		return nil
	}
	return err
}

// resolve answers a question. It asks another server when one fails, and an additional
// one each time r.resend has passed.
func (r *Resolver) resolve(ctx context.Context, q question, system *net.Resolver) dnsAnswer {
	switch len(r.servers) {
	case 0:
		return r.query(ctx, q, system, nil)
	case 1:
		return r.query(ctx, q, system, &r.servers[0])
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	order := r.order()
	results := make(chan dnsAnswer, len(order))
	asked, failed := 0, 0
	var failure error
	askNext := func() {
		if asked < len(order) {
			server := &r.servers[order[asked]]
			asked++
			go func() { results <- r.query(ctx, q, system, server) }()
		}
	}
	askNext()
	tick := time.NewTicker(r.resend)
	defer tick.Stop()
	for {
		select {
		case a := <-results:
			if a.err == nil || a.err.(*ResolveError).notFound() {
				return a
			}
			failure = moreInformative(failure, a.err)
			if failed++; failed == len(order) {
				return dnsAnswer{ipv6: q.ipv6, err: failure}
			}
			if asked == failed {
				askNext()
			}
		case <-tick.C:
			r.silent.put(order[asked-1], struct{}{})
			askNext()
		}
	}
}

// order returns the indices of the servers in random order, with those that recently did
// not answer last.
func (r *Resolver) order() []int {
	order := rand.Perm(len(r.servers))
	slices.SortStableFunc(order, func(a, b int) int { return r.rank(a) - r.rank(b) })
	return order
}

func (r *Resolver) rank(server int) int {
	if _, silent := r.silent.get(server); silent {
		return 1
	}
	return 0
}

// query sends a question to one server, or to the system's resolver if server is nil. It
// uses a net.Resolver of its own, because a shared one merges look-ups of the same name.
func (r *Resolver) query(ctx context.Context, q question, system *net.Resolver, server *DNSAddress) dnsAnswer {
	w := &queryWatch{server: server, resend: r.resend, dial: system.Dial}
	asker := &net.Resolver{PreferGo: server != nil || system.PreferGo, Dial: w.connect}
	network := "ip4"
	if q.ipv6 {
		network = "ip6"
	}
	addrs, err := asker.LookupNetIP(ctx, network, q.name)
	if q.ipv6 && errors.As(err, new(*net.AddrError)) {
		// There are addresses, but none of that family. They may be v4-mapped
		// addresses in AAAA records, which are usable like any others.
		if addrs, err = asker.LookupNetIP(ctx, "ip", q.name); err != nil {
			err = &net.DNSError{Err: err.Error(), Name: q.name, IsNotFound: true}
		}
	}
	if err != nil {
		return dnsAnswer{ipv6: q.ipv6, err: &ResolveError{Err: err, rcode: int(w.rcode.Load()), ipv6: q.ipv6}}
	}
	return dnsAnswer{ipv6: q.ipv6, addrs: addrs}
}

// queryWatch opens the connections of a query, and records the RCODE of the responses,
// which net.Resolver does not expose.
type queryWatch struct {
	server *DNSAddress // nil: the address that net.Resolver chooses
	resend time.Duration
	dial   func(ctx context.Context, network, address string) (net.Conn, error) // nil: queryDialer's
	rcode  atomic.Int32                                                         // of the last response
}

// queryDialer has its own resolver, because net.DefaultResolver may be replaced while an
// abandoned look-up is still running.
var queryDialer = net.Dialer{Resolver: new(net.Resolver)}

func (w *queryWatch) connect(ctx context.Context, network, address string) (net.Conn, error) {
	dial := w.dial
	if w.server != nil {
		dial, address = nil, w.server.Address
		if w.server.Network != "udp" {
			network = w.server.Network
		}
	}
	if dial == nil {
		dial = queryDialer.DialContext
	}
	conn, err := dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c := &queryConn{Conn: conn, watch: w}
	// net.Resolver ignores the cancellation of ctx while it waits for a response.
	c.stop = context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.Canceled) {
			_ = conn.Close()
		}
	})
	if _, ok := conn.(net.PacketConn); ok {
		return &packetConn{queryConn: c, interval: w.resend}, nil
	}
	return c, nil
}

// queryConn is a TCP connection of a query.
type queryConn struct {
	net.Conn
	watch *queryWatch
	stop  func() bool
	head  []byte // the first bytes of the response: its length and part of its header
}

// rcodeAt is the offset of the byte of a DNS message that has the RCODE in its lower four
// bits (RFC 1035 §4.1.1).
const rcodeAt = 3

func (c *queryConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if missing := 2 + rcodeAt + 1 - len(c.head); missing > 0 {
		if c.head = append(c.head, b[:min(n, missing)]...); n >= missing {
			c.watch.rcode.Store(int32(c.head[2+rcodeAt] & 0xf))
		}
	}
	return n, err
}

func (c *queryConn) Close() error {
	c.stop()
	return c.Conn.Close()
}

// packetConn is a UDP connection of a query. It repeats the query until there is a
// response, at intervals that double, because either packet may have been lost.
type packetConn struct {
	*queryConn
	question []byte
	interval time.Duration // until the query is repeated
	deadline time.Time     // zero: none
}

func (c *packetConn) SetDeadline(t time.Time) error {
	c.deadline = t
	return c.Conn.SetDeadline(t)
}

func (c *packetConn) Write(b []byte) (int, error) {
	c.question = b
	return c.Conn.Write(b)
}

func (c *packetConn) Read(b []byte) (int, error) {
	for {
		resendAt := time.Now().Add(c.interval)
		repeats := c.deadline.IsZero() || resendAt.Before(c.deadline)
		if !repeats {
			resendAt = c.deadline
		}
		if err := c.Conn.SetReadDeadline(resendAt); err != nil {
			return 0, err
		}
		n, err := c.Conn.Read(b)
		if repeats && errors.Is(err, os.ErrDeadlineExceeded) {
			if _, err := c.Conn.Write(c.question); err != nil {
				return 0, err
			}
			c.interval *= 2
			continue
		}
		if n > rcodeAt && len(c.question) > 2 && [2]byte(b) == [2]byte(c.question) { // the ID
			c.watch.rcode.Store(int32(b[rcodeAt] & 0xf))
		}
		return n, err
	}
}

// ReadFrom implements net.PacketConn, by which net.Resolver recognizes a UDP connection.
func (c *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, err := c.Read(b)
	return n, c.RemoteAddr(), err
}

// WriteTo implements net.PacketConn.
func (c *packetConn) WriteTo(b []byte, _ net.Addr) (int, error) { return c.Write(b) }

// ResolveError reports why a name could not be resolved.
type ResolveError struct {
	Err   error // usually a *net.DNSError
	rcode int   // of the last response of a DNS server
	ipv6  bool  // the look-up was for IPv6 addresses
}

func (e *ResolveError) Error() string {
	if name := e.Failure(); name != "" {
		return e.Err.Error() + " (" + name + ")"
	}
	return e.Err.Error()
}

// Unwrap returns the wrapped errors. A *net.DNSError has only the text of its cause, from
// which Unwrap restores EMFILE.
func (e *ResolveError) Unwrap() []error {
	if strings.Contains(e.Err.Error(), syscall.EMFILE.Error()) {
		return []error{e.Err, syscall.EMFILE}
	}
	return []error{e.Err}
}

const (
	rcodeServerFailure = 2
	rcodeNameError     = 3
)

// rcodeNames are the names of IANA's registry of DNS RCODEs.
var rcodeNames = [...]string{1: "FORMERR", rcodeServerFailure: "SERVFAIL", rcodeNameError: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED",
	6: "YXDOMAIN", 7: "YXRRSET", 8: "NXRRSET", 9: "NOTAUTH", 10: "NOTZONE"}

// Failure returns the name of the RCODE with which the look-up failed, or "" if it failed
// for another reason.
func (e *ResolveError) Failure() string {
	switch {
	case e.rcode == 0 || e.timeout():
		return ""
	case e.rcode < len(rcodeNames):
		return rcodeNames[e.rcode]
	}
	return "RCODE" + strconv.Itoa(e.rcode)
}

// notFound reports whether DNS says that the name has no address of the family.
func (e *ResolveError) notFound() bool {
	var dns *net.DNSError
	return errors.As(e.Err, &dns) && dns.IsNotFound || errors.As(e.Err, new(*net.AddrError))
}

// noSuchName reports whether the name does not exist, so that it has no address of either
// family. It ignores NXDOMAIN for IPv6, which some servers send for a name that has only
// IPv4 addresses (RFC 4074 §4.2).
func (e *ResolveError) noSuchName() bool {
	return e.rcode == rcodeNameError && !e.ipv6 && e.notFound()
}

func (e *ResolveError) timeout() bool {
	var timeout net.Error
	return errors.As(e.Err, &timeout) && timeout.Timeout()
}
