// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

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
)

// The delays of RFC 8305 §8, and how many addresses of a name are tried: a request
// must not cost as many connections as a name server cares to list.
const (
	resolutionDelay = 50 * time.Millisecond  // from the IPv4 addresses until the IPv6 ones are not waited for
	attemptDelay    = 250 * time.Millisecond // from one attempt until the next one starts beside it
	maxAttempts     = 16
)

// lateAnswerDelay is how long an outstanding DNS answer is still waited for once
// all else has failed: long enough for the question to be repeated.
const lateAnswerDelay = 2 * resendDelay

// dnsAnswer is what a look-up of one address family has returned.
type dnsAnswer struct {
	ipv6  bool
	addrs []netip.Addr
	err   error
}

// race connects to the addresses of one name as RFC 8305 says: it starts with the
// answer that is there, alternates between IPv6 and IPv4, and starts another
// attempt whenever one fails or has taken too long. The first connection wins.
type race struct {
	answers <-chan dnsAnswer
	lookups int                                                 // how many answers are still to come
	dial    func(context.Context, netip.Addr) (net.Conn, error) // called concurrently
	isDead  func(netip.Addr) bool                               // whether to try an address after the others; nil: none
	winner  netip.Addr                                          // an address to start with; may be invalid

	queue    candidates
	attempts []started
	running  int
	err      error // the most telling one so far
}

// started is an attempt that was begun.
type started struct {
	addr netip.Addr
	err  error // nil: it has not failed yet
}

// finished is the end of an attempt.
type finished struct {
	index int // in race.attempts
	conn  net.Conn
	err   error
}

// run returns the first connection and its address. If there is none, the error is
// that of the attempt or the look-up that says most. When ctx ends, run returns at
// once; connections that come later are closed.
func (r *race) run(ctx context.Context) (net.Conn, netip.Addr, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the attempts that have lost
	results := make(chan finished)
	r.queue.isDead, r.queue.winner = r.isDead, r.winner
	timer := time.NewTimer(resolutionDelay)
	timer.Stop()
	defer timer.Stop()
	next, last := false, false // the next attempt may start; the timer is the last that is waited for
	for {
		if next && r.start(ctx, results) {
			next, last = false, false
			timer.Reset(attemptDelay)
		}
		if r.running == 0 && r.exhausted() {
			if r.lookups == 0 {
				return nil, netip.Addr{}, cmp.Or(r.err, error(errNoAddress))
			}
			if !last && isDefinite(r.err) {
				last = true
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
				next = true
			case !last:
				timer.Reset(resolutionDelay)
			}
		case f := <-results:
			r.running--
			if f.err == nil {
				return f.conn, r.attempts[f.index].addr, nil
			}
			r.attempts[f.index].err = f.err
			r.err = moreTelling(r.err, f.err)
			next = true
		case <-timer.C:
			if last && r.running == 0 && r.exhausted() {
				return nil, netip.Addr{}, r.err
			}
			next = true
		case <-ctx.Done():
			return nil, netip.Addr{}, r.ended(ctx)
		}
	}
}

// exhausted reports whether there is no address to try now.
func (r *race) exhausted() bool { return len(r.attempts) == maxAttempts || r.queue.empty() }

// add takes an answer.
func (r *race) add(a dnsAnswer) {
	if a.err != nil {
		r.err = moreTelling(r.err, a.err)
	}
	r.queue.add(a)
}

// start begins an attempt, if there is an address for one.
func (r *race) start(ctx context.Context, results chan<- finished) bool {
	if r.exhausted() {
		if len(r.attempts) == maxAttempts {
			r.lookups = 0 // whatever comes would not be tried
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

// ended returns the error of a race that was ended by its context.
func (r *race) ended(ctx context.Context) error {
	switch {
	case !errors.Is(ctx.Err(), context.DeadlineExceeded):
		return context.Cause(ctx)
	case isDefinite(r.err):
		return r.err
	case len(r.attempts) > 0:
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded}
	}
	return &resolveError{err: &net.DNSError{Err: "no answer in time", IsTimeout: true}}
}

// connector connects to names and addresses, and remembers for a while what was of
// use: which address of a name answered where others did not, and which did not.
//
// All methods are safe for concurrent use.
type connector struct {
	resolver *resolver
	winners  *memory[hostPort, netip.Addr]
	dead     *memory[netip.AddrPort, struct{}]
}

// hostPort is what a connection is to.
type hostPort struct {
	host string
	port uint16
}

func newConnector(r *resolver) *connector {
	return &connector{
		resolver: r,
		winners:  newMemory[hostPort, netip.Addr](4096, 10*time.Minute),
		dead:     newMemory[netip.AddrPort, struct{}](4096, time.Minute),
	}
}

// dial connects to a host: an address, or a name exactly as the resolver gets it. The dialer's time limit is for the look-up and all attempts
// together.
func (c *connector) dial(ctx context.Context, dialer *net.Dialer, host string, port uint16) (net.Conn, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, port).String())
	}
	answers := make(chan dnsAnswer, 2)
	defer c.resolver.ask(host, answers)()
	return c.connect(ctx, dialer, hostPort{host, port}, &race{answers: answers, lookups: 2})
}

// dialAddresses connects to one of the addresses of a name.
func (c *connector) dialAddresses(ctx context.Context, dialer *net.Dialer, to hostPort, addrs []netip.Addr) (net.Conn, error) {
	answers := make(chan dnsAnswer, 1)
	answers <- dnsAnswer{addrs: addrs}
	return c.connect(ctx, dialer, to, &race{answers: answers, lookups: 1})
}

// connect runs a race.
func (c *connector) connect(ctx context.Context, dialer *net.Dialer, to hostPort, r *race) (net.Conn, error) {
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
		c.learn(to, r, winner)
	}
	return conn, err
}

// learn remembers what came of a race. Where the first attempt has succeeded there is
// nothing to prefer, and clients stay spread over all addresses of a name.
func (c *connector) learn(to hostPort, r *race, winner netip.Addr) {
	late := r.lookups > 0 && winner.Is4() // IPv6 addresses were waited for
	for _, a := range r.attempts {
		switch {
		case a.addr == winner && late:
			c.winners.put(to, winner)
			return
		case a.addr == winner:
			return
		case errors.As(a.err, new(*deniedError)), noDescriptors(a.err): // nothing is known of the address
		default:
			late = true
			c.dead.put(netip.AddrPortFrom(a.addr, to.port), struct{}{})
		}
	}
}

// errNoAddress is of a name without any.
var errNoAddress = &resolveError{err: &net.DNSError{Err: "no address", IsNotFound: true}}

// candidates are the addresses that have not been tried.
type candidates struct {
	live   [2][]netip.Addr // IPv4, IPv6
	dead   []netip.Addr    // what did not answer lately
	seen   []netip.Addr
	ipv4   bool // whose turn it is
	isDead func(netip.Addr) bool
	winner netip.Addr
	first  bool // the winner is one of the addresses and was not taken
}

// add takes the addresses of an answer, each once, and no more of a family than
// could be tried.
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

// next removes and returns the next address to try: the last winner first, the
// families in turns, IPv6 first, and what is dead last. There must be one.
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

// moreTelling returns which of two errors says more about why there is no
// connection; was, if they say as much. Either may be nil.
func moreTelling(was, is error) error {
	if was == nil || telling(is) > telling(was) {
		return is
	}
	return was
}

// telling ranks the errors of attempts and look-ups.
func telling(err error) int {
	var failed *resolveError
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

// isDefinite reports whether an error is the answer to a client even if there is
// a DNS answer missing: some address could not be connected to, or the DNS server
// knows that there is none.
func isDefinite(err error) bool {
	var failed *resolveError
	return err != nil && (!errors.As(err, &failed) || failed.noSuchName())
}

// noDescriptors reports whether it is this process or machine that can open no
// more.
func noDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// isUnroutable reports whether an address could not be reached since there is no
// way to it from this machine.
func isUnroutable(err error) bool {
	for _, errno := range [...]error{syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ENETDOWN, syscall.EAFNOSUPPORT} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return errors.Is(err, syscall.EADDRNOTAVAIL) && lacksIPv6(err)
}

// lacksIPv6 reports whether err is of a dial to an IPv6 address, and this machine
// has none to dial from. For IPv4, EADDRNOTAVAIL means that all ports are taken.
func lacksIPv6(err error) bool {
	var dial *net.OpError
	if !errors.As(err, &dial) {
		return false
	}
	to := addrPort(dial.Addr).Addr()
	addrs, err := net.InterfaceAddrs()
	return to.Is6() && err == nil && !slices.ContainsFunc(addrs, func(a net.Addr) bool {
		prefix, err := netip.ParsePrefix(a.String())
		own := prefix.Addr()
		return err == nil && own.Is6() && (own.IsGlobalUnicast() || own.IsLoopback() && to.IsLoopback())
	})
}
