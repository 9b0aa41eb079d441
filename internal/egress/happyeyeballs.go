// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// The delays of RFC 8305 §8, and a limit on the addresses of a name that are tried: a DNS
// server must not be able to make one request cost any number of connections.
const (
	resolutionDelay = 50 * time.Millisecond  // how long the IPv4 addresses wait for the IPv6 answer
	attemptDelay    = 250 * time.Millisecond // from one attempt to the start of the next
	maxAttempts     = 16
)

// lateAnswerDelay is how long to wait for an outstanding DNS answer once everything else
// has failed. It leaves time to repeat the query.
const lateAnswerDelay = 2 * resendDelay

// dnsAnswer is the result of looking up one address family.
type dnsAnswer struct {
	ipv6  bool
	addrs []netip.Addr
	err   error
}

// race connects to the addresses of one name as RFC 8305 recommends: it starts with the
// first answer, alternates between IPv6 and IPv4, and starts another attempt whenever one
// fails or takes too long. The first connection wins.
type race struct {
	answers <-chan dnsAnswer
	lookups int                                                 // how many answers are outstanding
	dial    func(context.Context, netip.Addr) (net.Conn, error) // called concurrently
	isDead  func(netip.Addr) bool                               // whether to try an address last; nil: none
	winner  netip.Addr                                          // the address to try first; may be invalid

	queue    candidates
	attempts []started
	running  int
	err      error // the most informative error so far
}

// started is an attempt that has been started.
type started struct {
	addr netip.Addr
	err  error // nil: it has not failed yet
}

// finished is the result of an attempt.
type finished struct {
	index int // in race.attempts
	conn  net.Conn
	err   error
}

// run returns the first connection and its address. If there is none, it returns the most
// informative error of the attempts and look-ups. When ctx ends, run returns at once, and
// connections that are established later are closed.
func (r *race) run(ctx context.Context) (net.Conn, netip.Addr, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // cancels the attempts that lost
	results := make(chan finished)
	r.queue.isDead, r.queue.winner = r.isDead, r.winner
	timer := time.NewTimer(resolutionDelay)
	timer.Stop()
	defer timer.Stop()
	startNext, finalWait := false, false // the next attempt may start; the timer ends the race
	for {
		if startNext && r.start(ctx, results) {
			startNext, finalWait = false, false
			timer.Reset(attemptDelay)
		}
		if r.running == 0 && r.exhausted() {
			if r.lookups == 0 {
				return nil, netip.Addr{}, cmp.Or(r.err, error(errNoAddress))
			}
			if !finalWait && isDefinite(r.err) {
				finalWait = true
				timer.Reset(lateAnswerDelay)
			}
		}
		select {
		case a := <-r.answers:
			r.lookups--
			r.add(a)
			switch {
			case len(r.attempts) > 0:
			case a.ipv6, r.lookups == 0, r.queue.first:
				startNext = true
			case !finalWait:
				timer.Reset(resolutionDelay)
			}
		case f := <-results:
			r.running--
			if f.err == nil {
				return f.conn, r.attempts[f.index].addr, nil
			}
			r.attempts[f.index].err = f.err
			r.err = moreInformative(r.err, f.err)
			startNext = true
		case <-timer.C:
			if finalWait && r.running == 0 && r.exhausted() {
				return nil, netip.Addr{}, r.err
			}
			startNext = true
		case <-ctx.Done():
			return nil, netip.Addr{}, r.contextErr(ctx)
		}
	}
}

// exhausted reports whether there is no address left to try now.
func (r *race) exhausted() bool { return len(r.attempts) == maxAttempts || r.queue.empty() }

// add queues the addresses of an answer, and records its error.
func (r *race) add(a dnsAnswer) {
	if a.err != nil {
		r.err = moreInformative(r.err, a.err)
	}
	r.queue.add(a)
}

// start starts the next attempt, and reports whether there was an address to try.
func (r *race) start(ctx context.Context, results chan<- finished) bool {
	if r.exhausted() {
		if len(r.attempts) == maxAttempts {
			r.lookups = 0 // further addresses would not be tried
		}
		return false
	}
	addr, index := r.queue.next(), len(r.attempts)
	r.attempts = append(r.attempts, started{addr: addr})
	r.running++
	go func() {
		conn, err := r.dial(ctx, addr)
		select {
		case results <- finished{index, conn, err}:
		case <-ctx.Done():
			if conn != nil {
				_ = conn.Close()
			}
		}
	}()
	return true
}

// contextErr returns the error of a race whose context has ended.
func (r *race) contextErr(ctx context.Context) error {
	switch {
	case !errors.Is(ctx.Err(), context.DeadlineExceeded):
		return context.Cause(ctx)
	case isDefinite(r.err):
		return r.err
	case len(r.attempts) > 0:
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded}
	}
	return &ResolveError{Err: &net.DNSError{Err: "no answer in time", IsTimeout: true}}
}

// Connector connects to names and addresses. For a while it remembers which addresses did
// not answer, and which address of a name answered when others did not.
//
// All methods are safe for concurrent use.
type Connector struct {
	resolver *Resolver
	winners  *ttlCache[hostPort, netip.Addr]
	dead     *ttlCache[netip.AddrPort, struct{}]
}

// hostPort is the destination of a connection.
type hostPort struct {
	host string
	port uint16
}

// newConnector returns a connector that asks r for addresses.
func newConnector(r *Resolver) *Connector {
	return &Connector{
		resolver: r,
		winners:  newTTLCache[hostPort, netip.Addr](4096, 10*time.Minute),
		dead:     newTTLCache[netip.AddrPort, struct{}](4096, time.Minute),
	}
}

// dial connects to a host: an address, or a name exactly as the resolver gets it. The
// dialer's timeout covers the look-up and all attempts together.
func (c *Connector) dial(ctx context.Context, dialer *net.Dialer, host string, port uint16) (net.Conn, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, port).String())
	}
	answers := make(chan dnsAnswer, 2)
	defer c.resolver.ask(host, answers)()
	return c.connect(ctx, dialer, hostPort{host, port}, &race{answers: answers, lookups: 2})
}

// dialAddresses connects to one of the addresses of a name.
func (c *Connector) dialAddresses(ctx context.Context, dialer *net.Dialer, to hostPort, addrs []netip.Addr) (net.Conn, error) {
	answers := make(chan dnsAnswer, 1)
	answers <- dnsAnswer{addrs: addrs}
	return c.connect(ctx, dialer, to, &race{answers: answers, lookups: 1})
}

// connect runs a race, and remembers its result.
func (c *Connector) connect(ctx context.Context, dialer *net.Dialer, to hostPort, r *race) (net.Conn, error) {
	if dialer.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, dialer.Timeout)
		defer cancel()
	}
	r.winner, _ = c.winners.get(to)
	r.isDead = func(addr netip.Addr) bool {
		_, dead := c.dead.get(netip.AddrPortFrom(addr, to.port))
		return dead
	}
	r.dial = func(ctx context.Context, addr netip.Addr) (net.Conn, error) {
		return dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, to.port).String())
	}
	conn, winner, err := r.run(ctx)
	if err == nil || !errors.Is(ctx.Err(), context.Canceled) {
		c.remember(to, r, winner)
	}
	return conn, err
}

// remember remembers the result of a race. It does not record a winner if the first attempt
// succeeded: then no address is better than others, and clients stay spread over all
// addresses of a name.
func (c *Connector) remember(to hostPort, r *race, winner netip.Addr) {
	delayed := r.lookups > 0 && winner.Is4() // IPv4 had to wait for the IPv6 answer
	for _, a := range r.attempts {
		switch {
		case a.addr == winner && delayed:
			c.winners.put(to, winner)
			return
		case a.addr == winner:
			return
		case errors.As(a.err, new(*access.DeniedError)), noDescriptors(a.err): // says nothing about the address
		default:
			delayed = true
			c.dead.put(netip.AddrPortFrom(a.addr, to.port), struct{}{})
		}
	}
}

// errNoAddress reports that a name has no address.
var errNoAddress = &ResolveError{Err: &net.DNSError{Err: "no address", IsNotFound: true}}

// candidates are the addresses that have not been tried yet.
type candidates struct {
	live   [2][]netip.Addr // IPv4, IPv6
	dead   []netip.Addr    // addresses that recently did not answer
	seen   []netip.Addr
	ipv4   bool // the next address is preferably IPv4
	isDead func(netip.Addr) bool
	winner netip.Addr
	first  bool // the winner is among the addresses and has not been tried
}

// add adds the addresses of an answer, each only once, and at most maxAttempts of them.
func (c *candidates) add(a dnsAnswer) {
	added := 0
	for _, addr := range a.addrs {
		addr = addr.Unmap()
		if addr == c.winner && !slices.Contains(c.seen, addr) {
			c.first = true
			c.seen = append(c.seen, addr)
			continue
		}
		if added == maxAttempts || slices.Contains(c.seen, addr) {
			continue
		}
		added++
		c.seen = append(c.seen, addr)
		list := &c.live[1]
		switch {
		case c.isDead != nil && c.isDead(addr):
			list = &c.dead
		case addr.Is4():
			list = &c.live[0]
		}
		*list = append(*list, addr)
	}
}

func (c *candidates) empty() bool {
	return !c.first && len(c.live[0]) == 0 && len(c.live[1]) == 0 && len(c.dead) == 0
}

// next removes and returns the next address to try: the last winner, then the families in
// turns, IPv6 first, and dead addresses last. There must be one.
func (c *candidates) next() (addr netip.Addr) {
	if c.first {
		c.first = false
		c.ipv4 = c.winner.Is6()
		return c.winner
	}
	family := 1
	if c.ipv4 && len(c.live[0]) > 0 || len(c.live[1]) == 0 {
		family = 0
	}
	list := &c.live[family]
	if len(*list) == 0 {
		list = &c.dead
	}
	addr, *list = (*list)[0], (*list)[1:]
	c.ipv4 = addr.Is6()
	return addr
}

// moreInformative returns the error that says more about why there is no connection, and the
// earlier one if they are equal. Either may be nil.
func moreInformative(earlier, later error) error {
	if earlier == nil || informativeness(later) > informativeness(earlier) {
		return later
	}
	return earlier
}

// informativeness ranks the errors of attempts and look-ups by how much they say.
func informativeness(err error) int {
	var failed *ResolveError
	switch {
	case err == nil:
		return 0
	case noDescriptors(err):
		return 7
	case !errors.As(err, &failed) && !isUnroutable(err):
		return 6
	case failed == nil:
		return 5
	case failed.noSuchName():
		return 4
	case !failed.notFound(): // there may be addresses
		return 3
	}
	return 2
}

// isDefinite reports whether an error is conclusive even while a DNS answer is
// outstanding: a connection attempt failed, or DNS says that the name does not exist.
func isDefinite(err error) bool {
	var failed *ResolveError
	return err != nil && (!errors.As(err, &failed) || failed.noSuchName())
}

// noDescriptors reports whether this process or machine has run out of file descriptors.
func noDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// isUnroutable reports whether a dial failed because this machine has no route to the
// address.
func isUnroutable(err error) bool {
	for _, errno := range [...]error{syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, syscall.EAFNOSUPPORT} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return errors.Is(err, syscall.EADDRNOTAVAIL) && lacksIPv6(err)
}

// lacksIPv6 reports whether err is from a dial to an IPv6 address while this machine has
// no IPv6 address to dial from. For IPv4, EADDRNOTAVAIL means that all local ports are in
// use.
func lacksIPv6(err error) bool {
	var dial *net.OpError
	if !errors.As(err, &dial) {
		return false
	}
	to := hostport.AddrPortOf(dial.Addr).Addr()
	addrs, err := net.InterfaceAddrs()
	return to.Is6() && err == nil && !slices.ContainsFunc(addrs, func(a net.Addr) bool {
		prefix, err := netip.ParsePrefix(a.String())
		local := prefix.Addr()
		return err == nil && local.Is6() && (local.IsGlobalUnicast() || local.IsLoopback() && to.IsLoopback())
	})
}
