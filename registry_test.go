// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

func TestTunnelIsClosedAfterSilenceAndNotBefore(t *testing.T) {
	const limit = time.Second
	watchOften(t)
	w := newTunnelWorld(t, tunnelSetup{options: fmt.Sprintf("tunnel_idle_timeout %v", limit)})
	target := echoTarget(t)
	lively := map[string]tunnelConn{}
	var silent sync.WaitGroup
	for _, protocol := range tunnelProtocols {
		lively[protocol] = w.client(t, protocol).open(target)
		conn, opened := w.client(t, protocol).open(target), time.Now()
		silent.Go(func() {
			io.Copy(io.Discard, conn)
			if age := time.Since(opened); age < limit-oftenInterval {
				t.Errorf("%s: closed after %v, want %v of silence", protocol, age, limit)
			}
		})
	}
	over := make(chan struct{})
	go func() {
		silent.Wait()
		close(over)
	}()
	for last := false; !last; {
		select {
		case <-over:
			last = true
		case <-time.After(100 * time.Millisecond):
		}
		for protocol, conn := range lively {
			hear(t, conn, say(t, conn, "I am still here, over "+protocol))
		}
	}
	// The client sees the end slightly before the registry does.
	eventually(t, "the silent tunnels to be closed", func() bool { return len(openTunnels()) == len(lively) })
}

// countingTarget is an echo server that counts its connections.
func countingTarget(t *testing.T) (address string, accepted func() int64) {
	t.Helper()
	var n atomic.Int64
	address = listen(t, func(conn *net.TCPConn) {
		n.Add(1)
		io.Copy(conn, conn)
	})
	return address, func() int64 {
		// Connections are accepted in order: ours comes after all earlier ones.
		conn := dialRaw(t, address)
		conn.send("done")
		hear(t, conn, "done")
		conn.Close()
		return n.Add(-1)
	}
}

func TestMaxTunnels(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{options: "max_tunnels 2"})
	for _, protocol := range tunnelProtocols {
		t.Run(protocol, func(t *testing.T) {
			target, accepted := countingTarget(t)
			c := w.client(t, protocol)
			first, second := c.open(target), c.open(target)
			refused := c.refused(target)
			if refused.status != http.StatusServiceUnavailable || !strings.Contains(refused.proxyStatus, "error=connection_limit_reached") {
				t.Errorf("status %d, Proxy-Status %q; want 503, connection_limit_reached", refused.status, refused.proxyStatus)
			}
			if n := accepted(); n != 2 {
				t.Errorf("the target got %d connections, want 2", n)
			}
			hear(t, second, say(t, second, "none the worse for it"))
			first.Close()
			eventually(t, "room for another tunnel", func() bool {
				conn, err := c.try(target, "")
				if err == nil {
					hear(t, conn, say(t, conn, "there is room again"))
					conn.Close()
				}
				return err == nil
			})
		})
		waitNoTunnels(t)
	}
}

func TestMaxTunnelsPerClient(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{options: "max_tunnels 4 per_client 2"})
	for _, protocol := range tunnelProtocols {
		t.Run(protocol, func(t *testing.T) {
			target, accepted := countingTarget(t)
			c, other := w.client(t, protocol), w.client(t, protocol)
			c.local, other.local = netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2")
			first, _ := c.open(target), c.open(target)
			refused := c.refused(target)
			if refused.status != http.StatusTooManyRequests || !strings.Contains(refused.proxyStatus, "error=connection_limit_reached") {
				t.Errorf("status %d, Proxy-Status %q; want 429, connection_limit_reached", refused.status, refused.proxyStatus)
			}
			if n := accepted(); n != 2 {
				t.Errorf("the target got %d connections, want 2", n)
			}
			conn := other.open(target)
			hear(t, conn, say(t, conn, "another client"))
			first.Close()
			eventually(t, "room for another tunnel of the client", func() bool {
				conn, err := c.try(target, "")
				if err == nil {
					conn.Close()
				}
				return err == nil
			})
		})
		waitNoTunnels(t)
	}
}

// An upgrade beyond the tunnel limit is not sent to the origin, and one that the origin
// declines frees its slot.
func TestMaxTunnelsOfUpgrades(t *testing.T) {
	var requests atomic.Int64
	w := newWorld(t, "max_tunnels 1", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { requests.Add(1) }))
	upgrade := "GET " + w.origin.URL + "/ HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: echo\n\n"
	tunnel, c := w.dial(), w.dial()
	tunnel.connect(echoTarget(t))
	c.send(upgrade)
	if res, body := c.response(http.MethodGet); res.StatusCode != http.StatusServiceUnavailable || requests.Load() != 0 {
		t.Errorf("%s %q after %d requests to the origin, want 503 and none", res.Status, body, requests.Load())
	}
	tunnel.Close()
	waitNoTunnels(t)
	c.send(upgrade)
	if res, body := c.response(http.MethodGet); res.StatusCode != http.StatusOK || requests.Load() != 1 {
		t.Errorf("%s %q after %d requests to the origin, want 200 and one", res.Status, body, requests.Load())
	}
	waitNoTunnels(t)
}

// A tunnel that fails to open frees its slot.
func TestFailedTunnelsAreNotCounted(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{options: "max_tunnels 1 per_client 1"})
	closedPort := freeAddress(t)
	for _, protocol := range tunnelProtocols {
		for range 3 {
			if refused := w.client(t, protocol).refused(closedPort); refused.status != http.StatusBadGateway {
				t.Errorf("%s: status %d, want 502", protocol, refused.status)
			}
		}
	}
	waitNoTunnels(t)
}

// watchOften has the worlds of this test check the timeouts of tunnels twenty times a
// second, and wait only briefly for a client's last bytes.
func watchOften(t *testing.T) {
	t.Helper()
	eventually(t, "the previous registry to be released", func() bool {
		p, used, err := program.processes.LoadOrNew(processKey, func() (caddy.Destructor, error) {
			return newProcess(tunnel.NewPacedRegistry(oftenInterval, oftenLastWords)), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if used && p.(*process).tunnels.Interval != oftenInterval {
			_ = releaseProcess()
			return false
		}
		return true
	})
	t.Cleanup(func() {
		if err := releaseProcess(); err != nil {
			t.Error(err)
		}
	})
}

const (
	oftenInterval  = 50 * time.Millisecond
	oftenLastWords = 500 * time.Millisecond
)

// waitNoTunnels waits until every part of the registry is empty.
func waitNoTunnels(t *testing.T) {
	t.Helper()
	p, err := acquireProcess()
	if err != nil {
		t.Fatal(err)
	}
	defer releaseProcess()
	r := p.tunnels
	eventually(t, "an empty registry", func() bool {
		return r.IsEmpty()
	})
}

func TestReloadWithStreamCloseDelay(t *testing.T) {
	for _, tc := range []struct {
		name    string
		options string
		reload  tunnelSetup
		after   time.Duration // when the tunnel is closed; negative: never
	}{
		{"not set", "", tunnelSetup{options: "max_tunnels 777"}, -1},
		{"at once", "stream_close_delay 0", tunnelSetup{}, 0},
		{"a second", "stream_close_delay 1s", tunnelSetup{}, time.Second},
		{"of the new config", "", tunnelSetup{options: "stream_close_delay 0"}, -1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newTunnelWorld(t, tunnelSetup{options: tc.options})
			target := echoTarget(t)
			old := map[string]tunnelConn{}
			for _, protocol := range tunnelProtocols {
				old[protocol] = w.client(t, protocol).open(target)
				hear(t, old[protocol], say(t, old[protocol], "before"))
			}
			begun := time.Now()
			w.reload(t, tc.reload)
			if tc.after != 0 {
				for _, protocol := range tunnelProtocols {
					hear(t, old[protocol], say(t, old[protocol], "after the reload"))
				}
			}
			for _, protocol := range tunnelProtocols {
				if tc.after < 0 {
					closeWrite(t, old[protocol])
				}
				io.Copy(io.Discard, old[protocol])
				if age := time.Since(begun); age < tc.after {
					t.Errorf("%s: closed after %v, want %v", protocol, age, tc.after)
				}
			}
			want := tunnel.ReasonReload
			if tc.after < 0 {
				want = tunnel.ReasonClient
			}
			for _, line := range w.waitLog("CONNECT tunnel closed", len(tunnelProtocols)) {
				if line["reason"] != want {
					t.Errorf("log line %v, want the reason %q", line, want)
				}
			}
			conn := w.client(t, "h1").open(target) // through the new config
			hear(t, conn, say(t, conn, "hello"))
		})
	}
}

func TestReloadWithoutAProxyClosesTunnels(t *testing.T) {
	w := newWorld(t, "", nil)
	conn := w.dial()
	conn.connect(echoTarget(t))
	w.load("http://" + freeAddress(t) + ` {
	respond hello
}
`)
	hearReset(t, "h1", conn.r)
	if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != tunnel.ReasonReload {
		t.Errorf("log line %v, want the reason %q", line, tunnel.ReasonReload)
	}
}

func TestRecheckTunnels(t *testing.T) {
	for _, tc := range []struct {
		name, options string // after the reload
		closed        bool   // the remote client's tunnel, for which loopback was allowed
	}{
		{"rules that forbid it", "recheck_tunnels", true},
		{"rules that still allow it", "recheck_tunnels\nallow 127.0.0.1", false},
		{"no check", "", false},
		{"rules of another zone", "recheck_tunnels\nzone another", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newTunnelWorld(t, tunnelSetup{options: "allow 127.0.0.0/8"})
			target := echoTarget(t)
			local, remote := w.client(t, "h1"), w.client(t, "h1")
			remote.header = "X-Forwarded-For: 8.8.8.8\r\n"
			conns := []tunnelConn{local.open(target), remote.open(target)}
			for _, conn := range conns {
				hear(t, conn, say(t, conn, "before"))
			}
			w.reload(t, tunnelSetup{options: tc.options})
			hear(t, conns[0], say(t, conns[0], "a client on this machine may go on"))
			if !tc.closed {
				hear(t, conns[1], say(t, conns[1], "one from elsewhere too"))
				return
			}
			hearReset(t, "h1", conns[1])
			if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != tunnel.ReasonForbidden {
				t.Errorf("log line %v, want the reason %q", line, tunnel.ReasonForbidden)
			}
			if refused := remote.refused(target); refused.status != http.StatusForbidden {
				t.Errorf("status %d, want 403", refused.status)
			}
		})
	}
}

// Each site checks its own tunnels only, not those of another site that shares the zone.
func TestRecheckTunnelsOfOneSite(t *testing.T) {
	const open = "allow 127.0.0.0/8"
	w := newWorld(t, open, nil)
	other := *w
	other.proxy = freeAddress(t)
	w.load(w.site(open) + other.site(open))
	target := echoTarget(t)
	stays, goes := w.dial(), other.dial()
	for _, c := range []*rawConn{stays, goes} {
		c.send("CONNECT " + target + " HTTP/1.1\nHost: x\nX-Forwarded-For: 8.8.8.8\n\n")
		c.response(http.MethodConnect)
	}
	w.load(w.site(open) + other.site("recheck_tunnels"))
	hearReset(t, "h1", goes.r)
	if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != tunnel.ReasonForbidden {
		t.Errorf("closing line %v, want the reason %q", line, tunnel.ReasonForbidden)
	}
	hear(t, stays.r, say(t, stays, "the other site has other rules"))
}

// A tunnel that leads back to the proxy is a loop. Via does not show it, because the tunnel
// hides the earlier hop.
func TestTunnelLoops(t *testing.T) {
	for _, tc := range []struct {
		name, options string
		status        int
	}{
		{"one proxy on two addresses", "via the-proxy", http.StatusLoopDetected},
		{"two proxies in one process", "", http.StatusOK},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newTunnelWorld(t, tunnelSetup{options: tc.options})
			target := echoTarget(t)
			outer := w.client(t, "h1").open(w.tls).(*h1Tunnel)
			over := tls.Client(outer, clientTLS("http/1.1"))
			inner := newH1Tunnel(over, outer.tcp)
			res, err := inner.connect(target, "", "")
			if err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != tc.status {
				t.Errorf("status %d, want %d", res.StatusCode, tc.status)
			}
			if tc.status == http.StatusOK {
				hear(t, inner, say(t, inner, "through both"))
			} else if status := res.Header.Get("Proxy-Status"); !strings.Contains(status, "error=proxy_loop_detected") {
				t.Errorf("Proxy-Status %q, want proxy_loop_detected", status)
			}
		})
	}
}

type tunnelEnding struct {
	reason string
	target func(conn *net.TCPConn) // echoes one word first
	client func(conn tunnelConn)
}

// tunnelEndings are the ways in which a tunnel can end, with the reason in its closing
// line.
var tunnelEndings = []tunnelEnding{
	{tunnel.ReasonClient, func(conn *net.TCPConn) { io.Copy(conn, conn) }, func(conn tunnelConn) { conn.CloseWrite() }},
	{tunnel.ReasonTarget, func(*net.TCPConn) {}, func(conn tunnelConn) { io.Copy(io.Discard, conn); conn.CloseWrite() }},
	{tunnel.ReasonClientError, func(conn *net.TCPConn) { io.Copy(conn, conn) }, tunnelConn.Reset},
	{tunnel.ReasonTargetError, func(conn *net.TCPConn) { conn.SetLinger(0) }, func(tunnelConn) {}},
}

// streamEndings are the ways in which a stream can end. Resetting it with CANCEL means that
// the client no longer needs it; a broken connection is an error.
func streamEndings(c *tunnelClient) []tunnelEnding {
	endings := slices.Clone(tunnelEndings)
	endings[2].reason = tunnel.ReasonClient
	return append(endings, tunnelEnding{tunnel.ReasonClientError, endings[0].target, func(tunnelConn) { c.breakConnection() }})
}

func TestClosingLines(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{})
	n := 0
	for _, protocol := range tunnelProtocols {
		c, endings := w.client(t, protocol), tunnelEndings
		if !c.halfCloses() {
			endings = streamEndings(c)
		}
		for _, ending := range endings {
			t.Run(protocol+"/"+ending.reason, func(t *testing.T) {
				const word = "a word"
				target := listen(t, func(conn *net.TCPConn) {
					io.CopyN(conn, conn, int64(len(word)))
					io.ReadFull(conn, make([]byte, 1)) // confirms that the word was received
					ending.target(conn)
				})
				conn := c.open(target)
				hear(t, conn, say(t, conn, word))
				say(t, conn, ".")
				eventually(t, "the sign to be counted", func() bool {
					up := int64(0)
					for _, t := range openTunnels() {
						up += t.BytesUp()
					}
					return up == int64(len(word))+1 || len(openTunnels()) == 0
				})
				ending.client(conn)
				n++
				closed := w.waitLog("CONNECT tunnel closed", n)[n-1]
				opened := w.logLines("CONNECT tunnel")[n-1]
				want := map[string]any{
					"level": "info", "logger": "http.handlers.async_proxy",
					"id": opened["id"], "target": target, "client": "127.0.0.1",
					"proto":    map[string]string{"h1": "HTTP/1.1", "h1-tls": "HTTP/1.1", "h2": "HTTP/2.0", "h2c": "HTTP/2.0", "h3": "HTTP/3.0"}[protocol],
					"bytes_up": float64(len(word) + 1), "bytes_down": float64(len(word)),
					"reason": ending.reason,
				}
				for name, want := range want {
					if closed[name] != want {
						t.Errorf("closing line: %s = %v, want %v", name, closed[name], want)
					}
				}
				for _, name := range []string{"level", "logger", "target", "client", "proto"} {
					if opened[name] != want[name] {
						t.Errorf("opening line: %s = %v, want %v", name, opened[name], want[name])
					}
				}
				if opened["address"] != target {
					t.Errorf("opening line: address = %v, want %v", opened["address"], target)
				}
				if duration, ok := closed["duration"].(float64); !ok || duration <= 0 || duration > patience.Seconds() {
					t.Errorf("closing line: duration = %v", closed["duration"])
				}
			})
			waitNoTunnels(t)
		}
	}
}

// openTunnels returns the tunnels in the registry.
func openTunnels() (open []*tunnel.Tunnel) {
	for t := range eachTunnel {
		open = append(open, t)
	}
	return open
}

// A timeout's closing line names the timeout, over every protocol.
func TestClosingLinesOfTimeouts(t *testing.T) {
	watchOften(t)
	for reason, options := range map[string]string{
		tunnel.ReasonIdle:        "tunnel_idle_timeout 1s",
		tunnel.ReasonMaxDuration: "tunnel_max_duration 1s",
	} {
		t.Run(reason, func(t *testing.T) {
			w := newTunnelWorld(t, tunnelSetup{options: options})
			target := echoTarget(t)
			for _, protocol := range tunnelProtocols {
				conn := w.client(t, protocol).open(target)
				hear(t, conn, say(t, conn, "hello"))
			}
			for _, line := range w.waitLog("CONNECT tunnel closed", len(tunnelProtocols)) {
				if line["reason"] != reason {
					t.Errorf("log line %v, want the reason %q", line, reason)
				}
			}
		})
	}
}
