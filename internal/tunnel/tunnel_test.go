// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// pipedTunnel is a tunnel between two pipes, for tests in synthetic time.
type pipedTunnel struct {
	*Tunnel
	client, target net.Conn // the far ends
	done           chan struct{}
}

// unobserved is the observer of a test's tunnels.
type unobserved struct{}

func (unobserved) Opened(*Tunnel) {}
func (unobserved) Closed(*Tunnel) {}

// newPipedTunnel runs a tunnel of a registry. Its client and target read everything.
func newPipedTunnel(r *Registry, owner Owner) *pipedTunnel {
	near, client := net.Pipe()
	return runPipedTunnel(r, owner, NewConnEnd(near), client)
}

// runPipedTunnel is newPipedTunnel with a given end and client.
func runPipedTunnel(r *Registry, owner Owner, near End, client net.Conn) *pipedTunnel {
	p := preparePipedTunnel(r, owner, near, client)
	p.start()
	return p
}

// preparePipedTunnel is runPipedTunnel without start.
func preparePipedTunnel(r *Registry, owner Owner, near End, client net.Conn) *pipedTunnel {
	owner.Observer = unobserved{}
	far, target := net.Pipe()
	p := &pipedTunnel{
		Tunnel: &Tunnel{
			Owner: &owner, Registry: r, Start: time.Now(),
			Near: near, Far: NewConnEnd(far),
		},
		client: client, target: target, done: make(chan struct{}),
	}
	r.Admit(p.Owner, p.LimitKey, Limits{})
	return p
}

// start runs the tunnel.
func (p *pipedTunnel) start() {
	go func() {
		p.Run()
		close(p.done)
	}()
	go io.Copy(io.Discard, p.client)
	go io.Copy(io.Discard, p.target)
}

func TestTunnelTimeouts(t *testing.T) {
	const never = 0
	long := 100 * time.Hour
	if conntest.Race { // which takes long over so many ticks
		long = 3 * time.Hour
	}
	talk := func(from, to, every time.Duration) (at []time.Duration) {
		for ; from <= to; from += every {
			at = append(at, from)
		}
		return at
	}
	for _, tc := range []struct {
		name       string
		idle, most time.Duration
		up, down   []time.Duration // when the client and the target send something
		want       string
		after      time.Duration // or slightly later; 0: never
	}{
		{"silent from the start", 10 * time.Second, 0, nil, nil, ReasonIdle, 10 * time.Second},
		{"the client sends once", 10 * time.Second, 0, []time.Duration{9 * time.Second}, nil, ReasonIdle, 19 * time.Second},
		{"the target sends once", 10 * time.Second, 0, nil, []time.Duration{9 * time.Second}, ReasonIdle, 19 * time.Second},
		{"only the client sends", 10 * time.Second, 0, talk(0, time.Minute, 8*time.Second), nil, ReasonIdle, 66 * time.Second},
		{"they take turns", 10 * time.Second, 0, talk(0, time.Minute, 15*time.Second), talk(8*time.Second, time.Minute, 15*time.Second), ReasonIdle, 70 * time.Second},
		{"busy for too long", 10 * time.Second, time.Minute, talk(0, time.Hour, time.Second), nil, ReasonMaxDuration, time.Minute},
		{"silent for less than the limit", time.Hour, time.Minute, nil, nil, ReasonMaxDuration, time.Minute},
		{"silent with no limits", -1, 0, nil, nil, "", never},
		{"an hour", time.Hour, 0, nil, nil, ReasonIdle, time.Hour},
		{"an hour, with a byte just in time", time.Hour, 0, nil, []time.Duration{59 * time.Minute}, ReasonIdle, 119 * time.Minute},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := NewRegistry()
				defer r.Stop()
				time.Sleep(WatchInterval / 3) // tunnels do not start on a tick of the watch
				p := newPipedTunnel(r, Owner{IdleTimeout: tc.idle, MaxDuration: tc.most})
				var wg sync.WaitGroup
				defer wg.Wait()
				speak := func(conn net.Conn, times []time.Duration) {
					for _, at := range times {
						time.Sleep(at - time.Since(p.Start))
						if _, err := conn.Write([]byte("a word")); err != nil {
							return
						}
					}
				}
				wg.Go(func() { speak(p.client, tc.up) })
				wg.Go(func() { speak(p.target, tc.down) })
				if tc.after == never {
					time.Sleep(long)
					if n := r.tunnels.Size(); n != 1 {
						t.Error("the tunnel was closed")
					}
					p.client.Close()
					<-p.done
					return
				}
				<-p.done
				// A byte is noticed within one tick, silence within another.
				if age := time.Since(p.Start); *p.reason.Load() != tc.want || age < tc.after || age > tc.after+2*WatchInterval {
					t.Errorf("closed after %v for the reason %q, want %v and %q", age, *p.reason.Load(), tc.after, tc.want)
				}
				p.client.Close()
				p.target.Close()
			})
		})
	}
}

func TestDrain(t *testing.T) {
	for _, tc := range []struct {
		name         string
		grace        time.Duration // 0: none
		ends         time.Duration // when the client closes by itself, if not 0
		reason       string
		after, least time.Duration
	}{
		{"no grace period", 0, 0, ReasonShutdown, 0, 0},
		{"the tunnel lasts beyond the grace period", 10 * time.Second, 0, ReasonShutdown, 10 * time.Second, 10 * time.Second},
		{"the tunnel ends before", 10 * time.Second, 3 * time.Second, ReasonClient, 4 * time.Second, 3 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := NewRegistry()
				defer r.Stop()
				p := newPipedTunnel(r, Owner{})
				synctest.Wait()
				if tc.ends > 0 {
					time.AfterFunc(tc.ends, func() { p.client.Close() })
				}
				ctx := t.Context()
				if tc.grace > 0 {
					var cancel func()
					ctx, cancel = context.WithTimeout(ctx, tc.grace)
					defer cancel()
				}
				begun := time.Now()
				r.Drain(ctx)
				if took := time.Since(begun); took < tc.least || took > tc.after+time.Second {
					t.Errorf("took %v, want at least %v and at most a second more than %v", took, tc.least, tc.after)
				}
				if n := r.tunnels.Size(); n != 0 {
					t.Errorf("%d tunnels are still open", n)
				}
				<-p.done
				if *p.reason.Load() != tc.reason {
					t.Errorf("reason %q, want %q", *p.reason.Load(), tc.reason)
				}
				late := newPipedTunnel(r, Owner{}) // its target was being dialed at shutdown
				<-late.done
				if *late.reason.Load() != ReasonShutdown {
					t.Errorf("reason %q of a late tunnel, want %q", *late.reason.Load(), ReasonShutdown)
				}
			})
		})
	}
}

// interruptedEnd is an end that calls a function before it closes.
type interruptedEnd struct {
	End
	before func()
}

func (e interruptedEnd) Abort() error { e.before(); return e.End.Abort() }
func (e interruptedEnd) Close() error { e.before(); return e.End.Close() }

// A tunnel whose client's connection ends while all tunnels are being closed, because Caddy
// closes it, was closed for the same reason as the others.
func TestReasonOfTunnelsClosedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRegistry()
		defer r.Stop()
		var tunnels []*pipedTunnel
		var closed atomic.Bool
		closeClients := func() {
			if closed.CompareAndSwap(false, true) {
				for _, p := range tunnels {
					p.client.Close()
				}
				time.Sleep(time.Second) // the tunnels notice
			}
		}
		for range 2 {
			near, client := net.Pipe()
			tunnels = append(tunnels, runPipedTunnel(r, Owner{}, interruptedEnd{NewConnEnd(near), closeClients}, client))
		}
		synctest.Wait()
		r.CloseAll(ReasonShutdown)
		for _, p := range tunnels {
			<-p.done
			if got := p.EndReason(); got != ReasonShutdown {
				t.Errorf("reason %q, want %q", got, ReasonShutdown)
			}
		}
	})
}

// streamOnPipe is a stream whose context ends as soon as it is aborted, as that of an HTTP/2
// stream may, and whose Abort returns a while later.
type streamOnPipe struct {
	*ConnEnd
	ctx    context.Context
	cancel func()
}

func (s streamOnPipe) Context() context.Context { return s.ctx }
func (streamOnPipe) StopReading()               {}
func (streamOnPipe) WasCanceled(error) bool     { return false }
func (streamOnPipe) IsAborted() bool            { return true }
func (streamOnPipe) CloseConnection()           {}
func (streamOnPipe) Server() io.Closer          { return nil }

func (s streamOnPipe) Abort() error {
	err := s.ConnEnd.Abort()
	s.cancel()
	time.Sleep(time.Second)
	return err
}

// endLog is an end that records how it was ended first.
type endLog struct {
	End
	first *atomic.Value
}

func (e endLog) CloseWrite() error {
	e.first.CompareAndSwap(nil, "half-closed")
	return e.End.CloseWrite()
}
func (e endLog) Close() error { e.first.CompareAndSwap(nil, "closed"); return e.End.Close() }
func (e endLog) Abort() error { e.first.CompareAndSwap(nil, "aborted"); return e.End.Abort() }

// The target of a tunnel that the proxy cuts sees a reset, even if the client's stream ends before
// the proxy has come to the target.
func TestCutReachesTheTargetAsAReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRegistry()
		defer r.Stop()
		near, client := net.Pipe()
		stream := streamOnPipe{ConnEnd: NewConnEnd(near)}
		stream.ctx, stream.cancel = context.WithCancel(t.Context())
		p := preparePipedTunnel(r, Owner{}, stream, client)
		far := endLog{p.Far, new(atomic.Value)}
		p.Far = far
		p.start()
		synctest.Wait()
		p.Close(ReasonOperator) // the tunnel is too young to be at rest
		<-p.done
		if first := far.first.Load(); first != "aborted" {
			t.Errorf("the target's connection was first %v, want aborted", first)
		}
	})
}

// The kernel reuses a local port for connections to different destinations, so two tunnels
// may share one.
func TestLoopsOfTunnelsWithOnePort(t *testing.T) {
	r := NewRegistry()
	defer r.Stop()
	source := netip.MustParseAddrPort("127.0.0.1:40000")
	owner := &Owner{Name: "the-proxy"}
	open := func(address string) *Tunnel {
		t := &Tunnel{Owner: owner, Registry: r, LocalAddr: source, Address: netip.MustParseAddrPort(address)}
		r.Admit(t.Owner, t.LimitKey, Limits{})
		r.add(t)
		return t
	}
	loops := func(proxy, local string) bool {
		return r.Loops(proxy, source, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local)))
	}
	const one, another = "127.0.0.1:8080", "127.0.0.1:8081"
	check := func(when string, wantOne, wantAnother bool) {
		t.Helper()
		if got := loops(owner.Name, one); got != wantOne {
			t.Errorf("%s: one loops: %v", when, got)
		}
		if got := loops(owner.Name, another); got != wantAnother {
			t.Errorf("%s: the other loops: %v", when, got)
		}
		if loops("another-proxy", one) || loops("another-proxy", another) {
			t.Errorf("%s: another proxy's requests count as loops", when)
		}
	}
	check("before", false, false)
	first := open(one)
	check("with one tunnel", true, false)
	second := open(another)
	check("with two tunnels", true, true)
	r.remove(second)
	check("without the second", true, false)
	r.remove(first)
	check("without both", false, false)
}
