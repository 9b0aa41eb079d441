// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The tests of a race run in a synctest bubble, with DNS answers and dials that follow a
// script.

const never = time.Duration(math.MaxInt64)

// scripted describes a race: when which DNS answers arrive, and the outcome of each
// attempt.
type scripted struct {
	answers map[time.Duration]dnsAnswer
	dials   map[string]scriptedDial // addresses not listed connect at once
	winner  string
	dead    string
	limit   time.Duration // the context's timeout; 0: none
}

type scriptedDial struct {
	after time.Duration
	err   error
}

// raced is the outcome of a race.
type raced struct {
	starts []string // address@milliseconds
	addr   netip.Addr
	err    error
	took   time.Duration
	left   int // connections still open
}

// scriptedConn decrements a counter when it is closed.
type scriptedConn struct {
	net.Conn
	open *int
}

func (c *scriptedConn) Close() error { *c.open--; return nil }

// runScript runs a race in its own bubble, in which no goroutine may be left behind.
func runScript(t *testing.T, s scripted) (got raced) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		if s.limit > 0 {
			ctx, cancel = context.WithTimeout(t.Context(), s.limit)
		}
		defer cancel()
		start := time.Now()
		answers := make(chan dnsAnswer, len(s.answers))
		for after, a := range s.answers {
			if after < never {
				time.AfterFunc(after, func() { answers <- a })
			}
		}
		starting := make(chan struct{}, 1) // a mutex that synctest treats as durably blocking
		r := &race{answers: answers, lookups: len(s.answers)}
		if s.winner != "" {
			r.winner = netip.MustParseAddr(s.winner)
		}
		r.isDead = func(addr netip.Addr) bool { return slices.Contains(strings.Fields(s.dead), addr.String()) }
		r.dial = func(ctx context.Context, addr netip.Addr) (net.Conn, error) {
			starting <- struct{}{}
			got.starts = append(got.starts, fmt.Sprintf("%s@%d", addr, time.Since(start).Milliseconds()))
			<-starting
			d := s.dials[addr.String()]
			if d.after == never {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			// A connection may be established after the race has ended.
			time.Sleep(d.after)
			if d.err != nil {
				return nil, d.err
			}
			starting <- struct{}{}
			got.left++
			<-starting
			return &scriptedConn{open: &got.left}, nil
		}
		var conn net.Conn
		conn, got.addr, got.err = r.run(ctx)
		got.took = time.Since(start)
		if (conn == nil) == (got.err == nil) {
			t.Errorf("connection %v, error %v", conn, got.err)
		}
		cancel()
		time.Sleep(time.Hour) // for late events
		synctest.Wait()
	})
	return got
}

func addrsOf(list string) (addrs []netip.Addr) {
	for s := range strings.FieldsSeq(list) {
		addrs = append(addrs, netip.MustParseAddr(s))
	}
	return addrs
}

func ip4(list string) dnsAnswer { return dnsAnswer{addrs: addrsOf(list)} }
func ip6(list string) dnsAnswer { return dnsAnswer{ipv6: true, addrs: addrsOf(list)} }

// failed returns a DNS answer without addresses.
func failed(ipv6 bool, rcode int) dnsAnswer {
	dns := &net.DNSError{Err: "no such host", IsNotFound: rcode == rcodeNameError || rcode == 0}
	return dnsAnswer{ipv6: ipv6, err: &ResolveError{Err: dns, rcode: rcode, ipv6: ipv6}}
}

func TestRace(t *testing.T) {
	const ms = time.Millisecond
	silent := scriptedDial{after: never}
	refuses := scriptedDial{err: &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}}
	unroutable := scriptedDial{err: &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ENETUNREACH)}}
	full := scriptedDial{err: os.NewSyscallError("socket", syscall.EMFILE)}
	type answers = map[time.Duration]dnsAnswer
	type dials = map[string]scriptedDial
	for name, tc := range map[string]struct {
		scripted
		starts string
		want   any // the address that wins, or the error
		took   time.Duration
	}{
		"IPv6 first":              {scripted{answers: answers{1: ip6("::6"), 2: ip4("0.0.0.4")}}, "::6@0", "::6", 1},
		"IPv4 waits for IPv6":     {scripted{answers: answers{0: ip4("0.0.0.4"), 49 * ms: ip6("::6")}}, "::6@49", "::6", 49 * ms},
		"IPv4 does not wait long": {scripted{answers: answers{0: ip4("0.0.0.4"), 51 * ms: ip6("::6")}}, "0.0.0.4@50", "0.0.0.4", 50 * ms},
		"AAAA is lost":            {scripted{answers: answers{0: ip4("0.0.0.4"), never: ip6("::6")}}, "0.0.0.4@50", "0.0.0.4", 50 * ms},
		"A is lost":               {scripted{answers: answers{0: ip6("::6"), never: ip4("0.0.0.4")}}, "::6@0", "::6", 0},
		"there is no AAAA":        {scripted{answers: answers{0: ip4("0.0.0.4"), 10 * ms: failed(true, 0)}}, "0.0.0.4@10", "0.0.0.4", 10 * ms},
		"AAAA fails":              {scripted{answers: answers{0: ip4("0.0.0.4"), 10 * ms: failed(true, rcodeServerFailure)}}, "0.0.0.4@10", "0.0.0.4", 10 * ms},
		"AAAA fails first":        {scripted{answers: answers{0: failed(true, rcodeServerFailure), 10 * ms: ip4("0.0.0.4")}}, "0.0.0.4@10", "0.0.0.4", 10 * ms},
		"AAAA says no such name":  {scripted{answers: answers{0: failed(true, rcodeNameError), 3000 * ms: ip4("0.0.0.4")}}, "0.0.0.4@3000", "0.0.0.4", 3000 * ms},

		"IPv6 is silent": {scripted{answers: answers{0: ip6("::6"), 1: ip4("0.0.0.4")}, dials: dials{"::6": silent}}, "::6@0 0.0.0.4@250", "0.0.0.4", 250 * ms},
		"IPv6 is slow": {scripted{answers: answers{0: ip6("::6"), 1: ip4("0.0.0.4")}, dials: dials{"::6": {after: 300 * ms}, "0.0.0.4": {after: 100 * ms}}},
			"::6@0 0.0.0.4@250", "::6", 300 * ms},
		"both answer": {scripted{answers: answers{0: ip6("::6"), 1: ip4("0.0.0.4")}, dials: dials{"::6": {after: 300 * ms}, "0.0.0.4": {after: 51 * ms}}},
			"::6@0 0.0.0.4@250", "::6", 300 * ms},
		"within a family": {scripted{answers: answers{0: ip4("1.1.1.1 1.1.1.2 1.1.1.3"), 1: failed(true, 0)}, dials: dials{"1.1.1.1": silent, "1.1.1.2": silent}},
			"1.1.1.1@0 1.1.1.2@250 1.1.1.3@500", "1.1.1.3", 500*ms + 1},
		"families take turns": {scripted{answers: answers{0: ip6("::1 ::2 ::3"), 1: ip4("1.1.1.1 1.1.1.2")},
			dials: dials{"::1": silent, "::2": silent, "1.1.1.1": silent, "1.1.1.2": silent}},
			"::1@0 1.1.1.1@250 ::2@500 1.1.1.2@750 ::3@1000", "::3", 1000 * ms},
		"one attempt fails": {scripted{answers: answers{0: ip6("::1 ::2"), 1: ip4("1.1.1.1")}, dials: dials{"::1": {100 * ms, refuses.err}, "1.1.1.1": unroutable}},
			"::1@0 1.1.1.1@100 ::2@100", "::2", 100 * ms},
		"no address twice": {scripted{answers: answers{0: ip6("::1 ::1 ::ffff:1.1.1.1"), 1: ip4("1.1.1.1 1.1.1.1 1.1.1.2")}, dials: dials{"::1": refuses, "1.1.1.1": refuses}},
			"::1@0 1.1.1.1@0 1.1.1.2@0", "1.1.1.2", 1},

		"late IPv6": {scripted{answers: answers{0: ip4("1.1.1.1 1.1.1.2"), 400 * ms: ip6("::1")}, dials: dials{"1.1.1.1": silent, "1.1.1.2": silent}},
			"1.1.1.1@50 1.1.1.2@300 ::1@550", "::1", 550 * ms},
		"late IPv6 is waited for": {scripted{answers: answers{0: ip4("1.1.1.1"), 700 * ms: ip6("::1")}, dials: dials{"1.1.1.1": silent}},
			"1.1.1.1@50 ::1@700", "::1", 700 * ms},
		"late IPv6 after failures": {scripted{answers: answers{0: ip4("1.1.1.1"), 1500 * ms: ip6("::1")}, dials: dials{"1.1.1.1": refuses}},
			"1.1.1.1@50 ::1@1500", "::1", 1500 * ms},
		"late IPv6 times out": {scripted{answers: answers{0: ip4("1.1.1.1"), never: ip6("::1")}, dials: dials{"1.1.1.1": refuses}},
			"1.1.1.1@50", syscall.ECONNREFUSED, 50*ms + lateAnswerDelay},
		"late IPv4": {scripted{answers: answers{0: ip6("::1"), 500 * ms: ip4("1.1.1.1")}, dials: dials{"::1": unroutable}},
			"::1@0 1.1.1.1@500", "1.1.1.1", 500 * ms},

		"the last winner is first": {scripted{answers: answers{0: ip6("::1 ::2"), 1: ip4("1.1.1.1")}, winner: "::2", dials: dials{"::2": silent, "1.1.1.1": silent}},
			"::2@0 1.1.1.1@250 ::1@500", "::1", 500 * ms},
		"the last winner needs no delay": {scripted{answers: answers{0: ip4("1.1.1.1 1.1.1.2"), never: ip6("::1")}, winner: "1.1.1.2"}, "1.1.1.2@0", "1.1.1.2", 0},
		"the last winner fails":          {scripted{answers: answers{0: ip4("1.1.1.1"), 1: failed(true, 0)}, winner: "1.1.1.2"}, "1.1.1.1@0", "1.1.1.1", 1},
		"the dead are last": {scripted{answers: answers{0: ip6("::1 ::2"), 1: ip4("1.1.1.1 1.1.1.2")}, dead: "::1 1.1.1.1", dials: dials{"::2": silent, "1.1.1.2": silent}},
			"::2@0 1.1.1.2@250 ::1@500", "::1", 500 * ms},
		"all are dead": {scripted{answers: answers{0: ip4("1.1.1.1"), 1: failed(true, 0)}, dead: "1.1.1.1"}, "1.1.1.1@0", "1.1.1.1", 1},

		"all fail": {scripted{answers: answers{0: ip6("::1"), 1: ip4("1.1.1.1")}, dials: dials{"::1": unroutable, "1.1.1.1": refuses}},
			"::1@0 1.1.1.1@0", syscall.ECONNREFUSED, 1},
		"no descriptors": {scripted{answers: answers{0: ip6("::1"), 1: ip4("1.1.1.1")}, dials: dials{"::1": refuses, "1.1.1.1": full}},
			"::1@0 1.1.1.1@0", syscall.EMFILE, 1},
		"no route, and no answer": {scripted{answers: answers{0: ip6("::1"), 1: failed(false, rcodeServerFailure)}, dials: dials{"::1": unroutable}},
			"::1@0", syscall.ENETUNREACH, 1},
		"no such name":             {scripted{answers: answers{0: failed(true, rcodeNameError), 1: failed(false, rcodeNameError)}}, "", "NXDOMAIN", 1},
		"no such name, AAAA lost":  {scripted{answers: answers{0: failed(false, rcodeNameError), never: ip6("::1")}}, "", "NXDOMAIN", lateAnswerDelay},
		"no such name, AAAA fails": {scripted{answers: answers{0: failed(true, rcodeServerFailure), 1: failed(false, rcodeNameError)}}, "", "NXDOMAIN", 1},
		"no A, AAAA fails":         {scripted{answers: answers{0: failed(false, 0), 1: failed(true, rcodeServerFailure)}}, "", "SERVFAIL", 1},
		"an empty answer":          {scripted{answers: answers{0: ip4(""), 1: ip6("")}}, "", errNoAddress, 1},

		"no answer in time": {scripted{answers: answers{0: failed(true, 0), never: ip4("1.1.1.1")}, limit: 5 * time.Second}, "", "no answer in time", 5 * time.Second},
		"no connection in time": {scripted{answers: answers{0: ip4("1.1.1.1"), never: ip6("::1")}, dials: dials{"1.1.1.1": silent}, limit: 5 * time.Second},
			"1.1.1.1@50", os.ErrDeadlineExceeded, 5 * time.Second},
		"one refuses, one is silent": {scripted{answers: answers{0: ip4("1.1.1.1 1.1.1.2"), 1: failed(true, 0)}, dials: dials{"1.1.1.1": refuses, "1.1.1.2": silent}, limit: 5 * time.Second},
			"1.1.1.1@0 1.1.1.2@0", syscall.ECONNREFUSED, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			got := runScript(t, tc.scripted)
			if starts := strings.Join(got.starts, " "); starts != tc.starts {
				t.Errorf("attempts %q, want %q", starts, tc.starts)
			}
			ok, left := false, 0
			switch want := tc.want.(type) {
			case error:
				ok = errors.Is(got.err, want)
			case string:
				if addr, err := netip.ParseAddr(want); err == nil {
					ok, left = got.err == nil && got.addr == addr, 1
				} else {
					ok = got.err != nil && strings.Contains(got.err.Error(), want)
				}
			}
			if !ok || got.took != tc.took {
				t.Errorf("%v, %v after %v; want %v after %v", got.addr, got.err, got.took, tc.want, tc.took)
			}
			if got.left != left {
				t.Errorf("%d connections were left open, want %d", got.left, left)
			}
		})
	}
}

// The number of attempts is bounded, however many addresses a name has.
func TestRaceIsBounded(t *testing.T) {
	var many dnsAnswer
	refuses := make(map[string]scriptedDial)
	for i := range 4000 {
		addr := netip.AddrFrom4([4]byte{1, 1, byte(i >> 8), byte(i)})
		many.addrs = append(many.addrs, addr)
		refuses[addr.String()] = scriptedDial{err: syscall.ECONNREFUSED}
	}
	for _, other := range []dnsAnswer{failed(true, 0), ip6("::1")} {
		got := runScript(t, scripted{answers: map[time.Duration]dnsAnswer{0: many, 1: other}, dials: refuses, limit: time.Minute})
		if len(got.starts) > maxAttempts {
			t.Errorf("%d attempts, want at most %d", len(got.starts), maxAttempts)
		}
	}
	// An answer that is still pending changes nothing.
	got := runScript(t, scripted{answers: map[time.Duration]dnsAnswer{0: many, never: ip6("::1")}, dials: refuses})
	if len(got.starts) != maxAttempts || got.took != resolutionDelay || !errors.Is(got.err, syscall.ECONNREFUSED) {
		t.Errorf("%d attempts, %v after %v", len(got.starts), got.err, got.took)
	}
}

// A canceled race ends at once, with the reason.
func TestRaceIsCanceled(t *testing.T) {
	gone := errors.New("gone")
	for name, answers := range map[string][]dnsAnswer{"in a look-up": nil, "in an attempt": {ip6("::1")}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				ch := make(chan dnsAnswer, 2)
				for _, a := range answers {
					ch <- a
				}
				start := time.Now()
				time.AfterFunc(time.Second, func() { cancel(gone) })
				r := &race{answers: ch, lookups: 2, dial: func(ctx context.Context, _ netip.Addr) (net.Conn, error) {
					<-ctx.Done()
					return nil, ctx.Err()
				}}
				if _, _, err := r.run(ctx); err != gone || time.Since(start) != time.Second {
					t.Errorf("%v after %v", err, time.Since(start))
				}
			})
		})
	}
}

// Whatever the answers and the outcomes of the attempts, at most one connection remains, no
// address is tried twice, and a race with nothing to wait for ends.
func FuzzRace(f *testing.F) {
	f.Add([]byte{0, 0, 1, 2, 3}, []byte{1, 0, 4, 5, 6}, []byte{0, 1, 2, 3, 0, 1, 2})
	f.Add([]byte{10, 1}, []byte{0, 0, 1, 1, 1}, []byte{3, 3, 3})
	f.Add([]byte{0, 0, 9, 9, 9, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13, 14, 15, 16, 17}, []byte{40, 0, 1}, []byte{1})
	f.Fuzz(func(t *testing.T, v4, v6, dials []byte) {
		if len(v4)+len(v6) > 200 || len(dials) == 0 {
			return
		}
		s := scripted{answers: make(map[time.Duration]dnsAnswer), dials: make(map[string]scriptedDial), limit: 10 * time.Second}
		possible := false
		for family, list := range [][]byte{v4, v6} {
			if len(list) < 2 {
				return
			}
			a := dnsAnswer{ipv6: family == 1}
			for _, b := range list[2:] {
				addr := netip.AddrFrom4([4]byte{1, 1, 1, b})
				if a.ipv6 {
					addr = netip.AddrFrom16([16]byte{0: 0x20, 15: b})
				}
				a.addrs = append(a.addrs, addr)
				d := [...]scriptedDial{{}, {err: syscall.ECONNREFUSED}, {after: never}, {after: 10 * time.Millisecond}, {after: 260 * time.Millisecond}, {after: time.Second, err: syscall.EHOSTUNREACH}}[dials[int(b)%len(dials)]%6]
				s.dials[addr.String()] = d
				possible = possible || d.err == nil && d.after < never
			}
			if len(a.addrs) == 0 {
				a = failed(a.ipv6, int(list[1])%6)
			}
			s.answers[time.Duration(list[0]%190)*10*time.Millisecond+time.Duration(family)] = a
		}
		got := runScript(t, s)
		tried := make(map[string]bool)
		for _, start := range got.starts {
			addr, _, _ := strings.Cut(start, "@")
			if tried[addr] {
				t.Errorf("%s was tried twice", addr)
			}
			tried[addr] = true
		}
		switch {
		case len(tried) > maxAttempts:
			t.Errorf("%d attempts", len(tried))
		case got.err == nil && (got.left != 1 || !tried[got.addr.String()]):
			t.Errorf("connected to %v, %d connections left, tried %v", got.addr, got.left, got.starts)
		case got.err != nil && (got.left != 0 || possible && len(s.dials) <= maxAttempts):
			t.Errorf("%v, %d connections left, tried %v", got.err, got.left, got.starts)
		}
	})
}
