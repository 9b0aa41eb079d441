// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// observed enables Caddy features that wrap a handler's connection to see the bytes. The
// handler before the proxy keeps the clients off the fast path, where nothing is wrapped.
var observed = tunnelSetup{global: "metrics", site: "vars way ordinary\nlog"}

// tunnelBehaviours is what a tunnel must do over every protocol.
var tunnelBehaviours = []struct {
	name string
	run  func(t *testing.T, c *tunnelClient)
}{
	{"echo", tunnelEchoes},
	{"early data", tunnelTakesEarlyData},
	{"the target sends first", tunnelLetsTheTargetSpeakFirst},
	{"half-close by the client", tunnelPassesTheClientsEnd},
	{"half-close by the target", tunnelPassesTheTargetsEnd},
	{"reset by the client", tunnelPassesTheClientsReset},
	{"reset by the target", tunnelPassesTheTargetsReset},
	{"bulk both ways", tunnelCarriesBulk},
	{"many at once", tunnelsAreMany},
}

func TestTunnels(t *testing.T) {
	for name, setup := range map[string]tunnelSetup{
		"bare": {}, "net/http": {servers: "keepalive_interval 15s"}, "observed": observed, "access log": {site: "log"}, "metrics": {global: "metrics"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newTunnelWorld(t, setup)
			for _, protocol := range tunnelProtocols {
				behaviours := tunnelBehaviours
				if (setup.site == "") != (setup.global == "") {
					behaviours = behaviours[:len(behaviours)-2] // without the slow ones
				}
				for _, behaviour := range behaviours {
					t.Run(protocol+"/"+behaviour.name, func(t *testing.T) {
						behaviour.run(t, w.client(t, protocol))
					})
				}
			}
		})
	}
}

// A client's connection is then of the PROXY protocol wrapper's type.
func TestTunnelsBehindTheProxyProtocol(t *testing.T) {
	wrapped := tunnelSetup{servers: `listener_wrappers {
	proxy_protocol {
		allow 127.0.0.0/8
	}
	tls
}`}
	wrappedObserved := wrapped
	wrappedObserved.global, wrappedObserved.site = observed.global, observed.site
	served := tunnelSetup{servers: strings.Replace(wrapped.servers, "tls\n", "tls\nasync_proxy\n", 1)}
	for name, setup := range map[string]tunnelSetup{"bare": wrapped, "observed": wrappedObserved, "on the fast path": served} {
		t.Run(name, func(t *testing.T) {
			w := newTunnelWorld(t, setup)
			for _, protocol := range []string{"h1", "h1-tls", "h2", "h2c"} {
				for _, behaviour := range tunnelBehaviours {
					t.Run(protocol+"/"+behaviour.name, func(t *testing.T) {
						c := w.client(t, protocol)
						c.preface = "PROXY TCP4 127.0.0.9 127.0.0.1 4711 80\r\n"
						behaviour.run(t, c)
					})
				}
			}
			for _, line := range w.logLines("CONNECT tunnel") {
				if line["client"] != "127.0.0.9" {
					t.Fatalf("log line %v, want the client from the PROXY header", line)
				}
			}
		})
	}
}

// With HTTP/2 disabled, Caddy hides a plain connection's socket behind a type without
// half-close. The socket underneath has it.
func TestTunnelsOfAServerForHTTP1(t *testing.T) {
	for name, setup := range map[string]tunnelSetup{"bare": {}, "observed": observed} {
		setup.protocols, setup.servers = "h1", "keepalive_interval 15s" // without the listener wrapper
		t.Run(name, func(t *testing.T) {
			w := newTunnelWorld(t, setup)
			for _, behaviour := range tunnelBehaviours {
				t.Run(behaviour.name, func(t *testing.T) {
					c := w.client(t, "h1")
					behaviour.run(t, c)
				})
			}
		})
	}
}

func tunnelEchoes(t *testing.T, c *tunnelClient) {
	conn := c.open(echoTarget(t))
	for i := range 100 {
		hear(t, conn, say(t, conn, fmt.Sprintf("message %d", i)))
	}
}

func tunnelTakesEarlyData(t *testing.T, c *tunnelClient) {
	const early, late = "what does not wait for an answer", ", and what does"
	conn := c.openEarly(echoTarget(t), early)
	say(t, conn, late)
	hear(t, conn, early+late)
}

func tunnelLetsTheTargetSpeakFirst(t *testing.T, c *tunnelClient) {
	target := listen(t, func(conn *net.TCPConn) {
		io.WriteString(conn, "220 ready\n")
		io.Copy(conn, conn)
	})
	conn := c.open(target)
	hear(t, conn, "220 ready\n")
	hear(t, conn, say(t, conn, "HELO"))
}

func tunnelPassesTheClientsEnd(t *testing.T, c *tunnelClient) {
	const answer = 1 << 20
	target := listen(t, func(conn *net.TCPConn) {
		asked, err := io.ReadAll(conn)
		if err != nil {
			t.Errorf("the target reads %v, want the end", err)
			return
		}
		fmt.Fprintf(conn, "asked %q: %s", asked, strings.Repeat("x", answer))
	})
	conn := c.open(target)
	say(t, conn, "how much?")
	closeWrite(t, conn)
	hear(t, conn, `asked "how much?": `+strings.Repeat("x", answer))
	hearEnd(t, conn)
}

func tunnelPassesTheTargetsEnd(t *testing.T, c *tunnelClient) {
	heard := make(chan string, 1)
	target := listen(t, func(conn *net.TCPConn) {
		io.WriteString(conn, "goodbye")
		conn.CloseWrite()
		rest, err := io.ReadAll(conn)
		if err != nil {
			t.Errorf("the target reads %v, want the end", err)
		}
		heard <- string(rest)
	})
	conn := c.open(target)
	hear(t, conn, "goodbye")
	hearEnd(t, conn)
	want := ""
	if c.halfCloses() {
		want = say(t, conn, "I had something to add")
		closeWrite(t, conn)
	}
	if got := <-heard; got != want {
		t.Errorf("after its half-close the target reads %q, want %q", got, want)
	}
}

// Over HTTP/2 and HTTP/3 the target's end also ends the client's stream, which cannot
// finish what it was sending.
func TestTargetEndsWhileTheClientSends(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{})
	for _, protocol := range []string{"h2", "h2c", "h3"} {
		t.Run(protocol, func(t *testing.T) {
			failure := make(chan error, 1)
			target := listen(t, func(conn *net.TCPConn) {
				io.CopyN(io.Discard, conn, 1<<20)
				conn.CloseWrite()
				_, err := io.Copy(io.Discard, conn)
				failure <- err
			})
			conn := w.client(t, protocol).open(target)
			var sender sync.WaitGroup
			sender.Go(func() { io.Copy(struct{ io.Writer }{conn}, zeros{}) })
			if err := <-failure; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the target reads %v, want a reset", err)
			}
			hearEnd(t, conn)
			conn.Close()
			sender.Wait()
		})
	}
}

func tunnelPassesTheClientsReset(t *testing.T, c *tunnelClient) {
	failure := make(chan error, 1)
	target := listen(t, func(conn *net.TCPConn) {
		_, err := io.Copy(conn, conn)
		failure <- err
	})
	conn := c.open(target)
	hear(t, conn, say(t, conn, "hello"))
	conn.Reset()
	if err := <-failure; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the target reads %v, want a reset", err)
	}
}

func tunnelPassesTheTargetsReset(t *testing.T, c *tunnelClient) {
	target := listen(t, func(conn *net.TCPConn) {
		io.CopyN(conn, conn, int64(len("hello")))
		io.CopyN(io.Discard, conn, int64(len("break off")))
		conn.SetLinger(0)
	})
	conn := c.open(target)
	hear(t, conn, say(t, conn, "hello")) // otherwise the reset might overtake it
	say(t, conn, "break off")
	rest, err := io.ReadAll(conn)
	if len(rest) > 0 || !isReset(c.protocol, err) {
		t.Errorf("the client reads %q and then %v, want a reset", rest, err)
	}
}

// isReset reports whether err is how a protocol reports a reset.
func isReset(protocol string, err error) bool {
	switch protocol {
	case "h2", "h2c":
		return errors.As(err, new(http2.StreamError))
	case "h3":
		failure := new(http3.Error)
		return errors.As(err, &failure) && failure.Remote && failure.ErrorCode == http3.ErrCodeConnectError // RFC 9114 §4.4
	default:
		return errors.Is(err, syscall.ECONNRESET)
	}
}

func tunnelCarriesBulk(t *testing.T, c *tunnelClient) {
	const upSeed, downSeed = 1, 2
	size := int64(64 << 20)
	if conntest.Race {
		size = 16 << 20
	}
	target := listen(t, func(conn *net.TCPConn) {
		conn.SetDeadline(time.Now().Add(tunnelPatience))
		var wg sync.WaitGroup
		wg.Go(func() { conntest.SendBulk(t, "the target", conn, downSeed, size) })
		conntest.ReceiveBulk(t, "the target", conn, upSeed, size)
		wg.Wait()
	})
	conn := c.open(target)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		conntest.SendBulk(t, "the client", conn, upSeed, size)
		if err := conn.CloseWrite(); err != nil {
			t.Errorf("ending: %v", err)
		}
	})
	conntest.ReceiveBulk(t, "the client", conn, downSeed, size)
}

func tunnelsAreMany(t *testing.T, c *tunnelClient) {
	n := 1000
	if conntest.Race {
		n = 200
	}
	c.shared = 100
	target := echoTarget(t)
	conns := make([]tunnelConn, n)
	defer func() {
		for _, conn := range conns {
			if conn != nil {
				conn.Close()
			}
		}
	}()
	err := concurrently(n, 64, func(i int) (err error) {
		conns[i], err = c.try(target, "")
		return err
	})
	if err != nil {
		t.Fatalf("opening: %v", err)
	}
	if open := registryOf(t).Size(); open < n {
		t.Errorf("%d tunnels are open, want %d", open, n)
	}
	err = concurrently(n, n, func(i int) error {
		message := fmt.Sprintf("this is tunnel %d", i)
		_, err := io.WriteString(conns[i], message)
		err = errors.Join(err, conns[i].CloseWrite())
		echo, err2 := io.ReadAll(conns[i])
		if err = errors.Join(err, err2); err != nil || string(echo) != message {
			return fmt.Errorf("tunnel %d echoes %q, %v", i, echo, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestTunnelsOfOneConnectionDoNotWaitForEachOther(t *testing.T) {
	const size = 32 << 20
	w := newTunnelWorld(t, tunnelSetup{})
	for _, protocol := range []string{"h2", "h2c", "h3"} {
		t.Run(protocol, func(t *testing.T) {
			c := w.client(t, protocol)
			c.shared = 2
			begun := make(chan struct{})
			slow := c.open(listen(t, func(conn *net.TCPConn) {
				conn.SetDeadline(time.Now().Add(tunnelPatience))
				data := conntest.Bulk(1, size)
				io.CopyN(conn, data, 1<<20)
				close(begun)
				io.Copy(conn, data)
			}))
			<-begun
			lively := c.open(echoTarget(t))
			for i := range 1000 {
				hear(t, lively, say(t, lively, fmt.Sprintf("message %d", i)))
			}
			conntest.ReceiveBulk(t, "the slow client", slow, 1, size)
		})
	}
}

// A client whose connection breaks may not have sent everything: its targets must see a
// reset.
func TestTunnelsOfABrokenConnection(t *testing.T) {
	const each = 3
	w := newTunnelWorld(t, tunnelSetup{})
	for _, protocol := range []string{"h2", "h2c", "h3"} {
		t.Run(protocol, func(t *testing.T) {
			failures := make(chan error, each)
			target := listen(t, func(conn *net.TCPConn) {
				_, err := io.Copy(conn, conn)
				failures <- err
			})
			c := w.client(t, protocol)
			c.shared = each
			for range each {
				conn := c.open(target)
				hear(t, conn, say(t, conn, "hello"))
			}
			c.breakConnection()
			for range each {
				if err := <-failures; !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the target reads %v, want a reset", err)
				}
			}
		})
	}
}

// Caddy cuts off requests and responses that stall, by default after a minute. A tunnel may
// be silent, and its client may read slowly.
func TestTunnelsOutliveCaddysStallLimits(t *testing.T) {
	const limit, size = 400 * time.Millisecond, 32 << 20
	for name, setup := range map[string]tunnelSetup{"bare": {}, "observed": observed} {
		setup.servers = fmt.Sprintf(`timeouts {
	read_body_idle %v
	write_idle %[1]v
}`, limit)
		t.Run(name, func(t *testing.T) {
			w := newTunnelWorld(t, setup)
			target := echoTarget(t)
			pouring := listen(t, func(conn *net.TCPConn) {
				conn.SetDeadline(time.Now().Add(tunnelPatience))
				conntest.SendBulk(t, "the target", conn, 1, size)
			})
			silent, stalled := map[string]tunnelConn{}, map[string]tunnelConn{}
			for _, protocol := range tunnelProtocols {
				silent[protocol] = w.client(t, protocol).open(target)
				hear(t, silent[protocol], say(t, silent[protocol], "hello"))
				stalled[protocol] = w.client(t, protocol).open(pouring)
			}
			time.Sleep(5 * limit / 2)
			for _, protocol := range tunnelProtocols {
				t.Run(protocol, func(t *testing.T) {
					hear(t, silent[protocol], say(t, silent[protocol], "are you still there?"))
					closeWrite(t, silent[protocol])
					hearEnd(t, silent[protocol])
					conntest.ReceiveBulk(t, "the client", stalled[protocol], 1, size)
				})
			}
		})
	}
}

func TestTunnelsOutliveAReload(t *testing.T) {
	const size, reloads = 8 << 20, 3
	for name, setup := range map[string]tunnelSetup{"bare": {}, "observed": observed} {
		t.Run(name, func(t *testing.T) {
			w := newTunnelWorld(t, setup)
			target := echoTarget(t)
			halves := make(chan struct{})
			var sent, wg sync.WaitGroup
			for _, protocol := range tunnelProtocols {
				conn := w.client(t, protocol).open(target)
				sent.Add(1)
				wg.Go(func() {
					data := conntest.Bulk(1, size)
					sendSome := func(n int64) {
						if _, err := io.CopyN(conn, data, n); err != nil {
							t.Errorf("%s: sending: %v", protocol, err)
						}
					}
					sendSome(size / 2)
					sent.Done()
					<-halves
					sendSome(size / 2)
					if err := conn.CloseWrite(); err != nil {
						t.Errorf("%s: ending: %v", protocol, err)
					}
				})
				wg.Go(func() { conntest.ReceiveBulk(t, "the client over "+protocol, conn, 1, size) })
			}
			// The first reload happens while the tunnels are busy, the last one when
			// everything has been echoed or is in flight.
			for i := range reloads {
				if i == reloads-1 {
					sent.Wait()
				}
				w.reload(t, setup)
			}
			close(halves)
			wg.Wait()
		})
	}
}

// An extended CONNECT is the next handler's. If none responds, the client must not conclude
// that the protocol is supported.
func TestExtendedConnect(t *testing.T) {
	for name, tc := range map[string]struct {
		site    string
		matcher string // of async_proxy
		status  int
		body    string
	}{
		"no handler responds":       {"", "*", http.StatusNotImplemented, "The protocol of this CONNECT request is not supported here.\n"},
		"no async_proxy matches":    {"", "/none", http.StatusMisdirectedRequest, "No proxy here handles this request.\n"},
		"the next handler responds": {"respond here", "*", http.StatusOK, "here"},
	} {
		t.Run(name, func(t *testing.T) {
			w := emptyTunnelWorld(t)
			loadCaddyfile(t, strings.ReplaceAll(w.caddyfile(tunnelSetup{site: tc.site, servers: "trusted_proxies static 192.0.2.1"}), "async_proxy {", "async_proxy "+tc.matcher+" {"))
			w.ready(t)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			conn, err := w.client(t, "h3").h3Conn(ctx)
			if err != nil {
				t.Fatal(err)
			}
			stream, err := conn.OpenRequestStream(ctx)
			if err != nil {
				t.Fatal(err)
			}
			host := "localhost"
			if err := stream.SendRequestHeader(&http.Request{
				Method: http.MethodConnect, Proto: "connect-udp", Host: host, Header: http.Header{},
				URL: &url.URL{Scheme: "https", Host: host, Path: "/.well-known/masque/udp/192.0.2.6/443/"},
			}); err != nil {
				t.Fatal(err)
			}
			res, err := stream.ReadResponse()
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != tc.status || string(body) != tc.body {
				t.Errorf("%s %q, %v; want %d %q", res.Status, body, err, tc.status, tc.body)
			}
			if refused := strings.Contains(res.Header.Get("Proxy-Status"), "error=proxy_internal_response"); refused != (tc.status == http.StatusNotImplemented) {
				t.Errorf("Proxy-Status %q", res.Header.Get("Proxy-Status"))
			}
		})
	}
}

func TestTunnelsInTheAccessLog(t *testing.T) {
	w := newTunnelWorld(t, observed)
	target := echoTarget(t)
	for i, protocol := range tunnelProtocols {
		t.Run(protocol, func(t *testing.T) {
			conn := w.client(t, protocol).open(target)
			closeWrite(t, conn)
			hearEnd(t, conn)
			line := w.waitLog("handled request", i+1)[i]
			if line["status"] != 200.0 {
				t.Errorf("status %v, want 200", line["status"])
			}
		})
	}
}

// echoTarget returns the address of an echo server. It uses no pipes, as io.Copy between
// sockets would.
func echoTarget(t testing.TB) string {
	t.Helper()
	return listen(t, func(conn *net.TCPConn) {
		conn.SetDeadline(time.Now().Add(tunnelPatience))
		io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
	})
}

// say writes a text and returns it.
func say(t *testing.T, w io.Writer, text string) string {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatalf("writing %.40q: %v", text, err)
	}
	return text
}

// hear reads a text and compares it.
func hear(t *testing.T, r io.Reader, text string) {
	t.Helper()
	got := make([]byte, len(text))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != text {
		t.Fatalf("read %.40q, %v; want %.40q", got[:n], err, text)
	}
}

// hearEnd reads an orderly end.
func hearEnd(t *testing.T, r io.Reader) {
	t.Helper()
	if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
		t.Fatalf("read %.40q, %v; want the end", rest, err)
	}
}

// hearReset reads a reset and nothing before it.
func hearReset(t *testing.T, protocol string, r io.Reader) {
	t.Helper()
	if rest, err := io.ReadAll(r); !isReset(protocol, err) || len(rest) > 0 {
		t.Fatalf("read %.40q, %v; want a reset", rest, err)
	}
}

func closeWrite(t *testing.T, conn tunnelConn) {
	t.Helper()
	if err := conn.CloseWrite(); err != nil {
		t.Fatalf("half-closing: %v", err)
	}
}

// concurrently calls f for all numbers below n, in the given number of goroutines, and
// returns the first error.
func concurrently(n, goroutines int, f func(i int) error) error {
	var next, failed atomic.Int64
	failure := make(chan error, 1)
	var wg sync.WaitGroup
	for range goroutines {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n) && failed.Load() == 0; i = next.Add(1) - 1 {
				if err := f(int(i)); err != nil && failed.Add(1) == 1 {
					failure <- err
				}
			}
		})
	}
	wg.Wait()
	close(failure)
	return <-failure
}

// registryOf returns the registry of the running config.
func registryOf(t *testing.T) *tunnel.Registry {
	t.Helper()
	p, err := acquireProcess()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := releaseProcess(); err != nil {
			t.Error(err)
		}
	})
	return p.tunnels
}
