// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// pipedTunnel is a tunnel between two pipes, for tests in synthetic time.
type pipedTunnel struct {
	*tunnel
	client, target net.Conn // the far ends
	done           chan struct{}
}

// unobserved is the observer of a test's tunnels.
type unobserved struct{}

func (unobserved) Opened(*tunnel) {}
func (unobserved) Closed(*tunnel) {}

// newPipedTunnel runs a tunnel of a registry. Its client and target read everything.
func newPipedTunnel(r *registry, owner tunnelOwner) *pipedTunnel {
	owner.observer = unobserved{}
	near, client := net.Pipe()
	far, target := net.Pipe()
	p := &pipedTunnel{
		tunnel: &tunnel{
			owner: &owner, registry: r, start: time.Now(),
			near: newConnPeer(near), far: newConnPeer(far),
		},
		client: client, target: target, done: make(chan struct{}),
	}
	r.admit(p.limitKey, 0, 0)
	go func() {
		p.run()
		close(p.done)
	}()
	go io.Copy(io.Discard, client)
	go io.Copy(io.Discard, target)
	return p
}

func TestTunnelTimeouts(t *testing.T) {
	const never = 0
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
		{"silent from the start", 10 * time.Second, 0, nil, nil, reasonIdle, 10 * time.Second},
		{"the client sends once", 10 * time.Second, 0, []time.Duration{9 * time.Second}, nil, reasonIdle, 19 * time.Second},
		{"the target sends once", 10 * time.Second, 0, nil, []time.Duration{9 * time.Second}, reasonIdle, 19 * time.Second},
		{"only the client sends", 10 * time.Second, 0, talk(0, time.Minute, 8*time.Second), nil, reasonIdle, 66 * time.Second},
		{"they take turns", 10 * time.Second, 0, talk(0, time.Minute, 15*time.Second), talk(8*time.Second, time.Minute, 15*time.Second), reasonIdle, 70 * time.Second},
		{"busy for too long", 10 * time.Second, time.Minute, talk(0, time.Hour, time.Second), nil, reasonMaxDuration, time.Minute},
		{"silent for less than the limit", time.Hour, time.Minute, nil, nil, reasonMaxDuration, time.Minute},
		{"silent with no limits", -1, 0, nil, nil, "", never},
		{"an hour", time.Hour, 0, nil, nil, reasonIdle, time.Hour},
		{"an hour, with a byte just in time", time.Hour, 0, nil, []time.Duration{59 * time.Minute}, reasonIdle, 119 * time.Minute},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRegistry()
				defer r.stop()
				time.Sleep(watchInterval / 3) // tunnels do not start on a tick of the watch
				p := newPipedTunnel(r, tunnelOwner{idleTimeout: tc.idle, maxDuration: tc.most})
				var wg sync.WaitGroup
				defer wg.Wait()
				speak := func(conn net.Conn, times []time.Duration) {
					for _, at := range times {
						time.Sleep(at - time.Since(p.start))
						if _, err := conn.Write([]byte("a word")); err != nil {
							return
						}
					}
				}
				wg.Go(func() { speak(p.client, tc.up) })
				wg.Go(func() { speak(p.target, tc.down) })
				if tc.after == never {
					time.Sleep(100 * time.Hour)
					if n := r.tunnels.Size(); n != 1 {
						t.Error("the tunnel was closed")
					}
					p.client.Close()
					<-p.done
					return
				}
				<-p.done
				// A byte is noticed within one tick, silence within another.
				if age := time.Since(p.start); *p.reason.Load() != tc.want || age < tc.after || age > tc.after+2*watchInterval {
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
		{"no grace period", 0, 0, reasonShutdown, 0, 0},
		{"the tunnel lasts beyond the grace period", 10 * time.Second, 0, reasonShutdown, 10 * time.Second, 10 * time.Second},
		{"the tunnel ends before", 10 * time.Second, 3 * time.Second, reasonClient, 4 * time.Second, 3 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRegistry()
				defer r.stop()
				p := newPipedTunnel(r, tunnelOwner{})
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
				r.drain(ctx)
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
				late := newPipedTunnel(r, tunnelOwner{}) // its target was being dialed at shutdown
				<-late.done
				if *late.reason.Load() != reasonShutdown {
					t.Errorf("reason %q of a late tunnel, want %q", *late.reason.Load(), reasonShutdown)
				}
			})
		})
	}
}

// The kernel reuses a local port for connections to different destinations, so two tunnels
// may share one.
func TestLoopsOfTunnelsWithOnePort(t *testing.T) {
	r := newRegistry()
	defer r.stop()
	source := netip.MustParseAddrPort("127.0.0.1:40000")
	owner := &tunnelOwner{name: "the-proxy"}
	open := func(address string) *tunnel {
		t := &tunnel{owner: owner, registry: r, localAddr: source, address: netip.MustParseAddrPort(address)}
		r.admit(t.limitKey, 0, 0)
		r.add(t)
		return t
	}
	loops := func(proxy, local string) bool {
		return r.loops(proxy, source, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local)))
	}
	const one, another = "127.0.0.1:8080", "127.0.0.1:8081"
	check := func(when string, wantOne, wantAnother bool) {
		t.Helper()
		if got := loops(owner.name, one); got != wantOne {
			t.Errorf("%s: one loops: %v", when, got)
		}
		if got := loops(owner.name, another); got != wantAnother {
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
