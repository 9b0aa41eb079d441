// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

//lint:file-ignore SA1019 the frames of x/net are all that writes frames

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// The tests in this file complement binary_test.go: they run tunnels of all protocols
// through cmd/caddy as a process.

// everyProtocol makes a binaryCaddy speak all of tunnelProtocols.
const everyProtocol = `servers {
	protocols h1 h2 h2c h3
}
`

// tunnels returns a client of the process.
func (c *binaryCaddy) tunnels(t testing.TB, protocol string) *tunnelClient {
	client := &tunnelClient{t: t, protocol: protocol, proxy: c.secure, shared: 100}
	if protocol == "h1" || protocol == "h2c" {
		client.proxy = c.proxy
	}
	return client
}

// floodTarget is a target that sends as long as its peer reads.
func floodTarget(t *testing.T) string {
	t.Helper()
	return listen(t, func(conn *net.TCPConn) {
		conn.SetDeadline(time.Now().Add(tunnelPatience))
		for data := make([]byte, 64<<10); ; {
			if _, err := conn.Write(data); err != nil {
				return
			}
		}
	})
}

// Caddy exits when told to, however many tunnels are open, over whatever protocol, idle or
// stuck.
func TestProcessExitsWithLiveTunnels(t *testing.T) {
	const each = 100
	for _, row := range []struct {
		name, global string
		least        time.Duration
	}{
		{"at once", "", 0},
		{"after the grace period", "grace_period 2s", 1500 * time.Millisecond},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := binaryStart(t, binaryOptions{global: everyProtocol + row.global, secure: true})
			target := echoTarget(t)
			var some []tunnelConn   // one per protocol
			var open sync.WaitGroup // until each client has seen the end
			for _, protocol := range tunnelProtocols {
				client := c.tunnels(t, protocol)
				for i := range each {
					conn := client.open(target)
					hear(t, conn, say(t, conn, "hello"))
					if i == 0 {
						some = append(some, conn)
					} else {
						open.Go(func() { io.Copy(io.Discard, conn) })
					}
				}
			}
			took := c.timeExit(t, func() {
				if row.least > 0 {
					c.waitLog("servers shutting down; grace period initiated", 1)
				}
				for _, conn := range some {
					if row.least > 0 {
						hear(t, conn, say(t, conn, "still here, in the grace period"))
					}
					open.Go(func() { io.Copy(io.Discard, conn) })
				}
			})
			if took < row.least {
				t.Errorf("Caddy exits after %v, want at least %v", took, row.least)
			}
			open.Wait()
			c.checkAllShutDown(t, each*len(tunnelProtocols))
		})
	}
}

// A client that does not read must not prevent Caddy from exiting.
func TestProcessExitsWithStuckTunnels(t *testing.T) {
	const each = 3
	for _, protocol := range tunnelProtocols {
		t.Run(protocol, func(t *testing.T) {
			c := binaryStart(t, binaryOptions{global: everyProtocol, secure: true})
			target := floodTarget(t)
			client := c.tunnels(t, protocol)
			client.shared = 1 // so that no tunnel waits for another's window
			for range each {
				conn := client.open(target)
				if _, err := io.CopyN(io.Discard, conn, 1<<20); err != nil {
					t.Fatal(err)
				}
			}
			c.timeExit(t, func() {})
			c.checkAllShutDown(t, each)
		})
	}
}

// An HTTP/2 client that grants the largest windows and then does not even read its socket
// also blocks the frames that would end its stream.
func TestProcessClosesTunnelsOfDeafClients(t *testing.T) {
	protocols := []string{"h2", "h2c"}
	c := binaryStart(t, binaryOptions{global: everyProtocol, site: "tunnel_idle_timeout 1s", secure: true})
	for _, protocol := range protocols {
		c.openDeaf(t, protocol)
	}
	for _, line := range c.waitLog("CONNECT tunnel closed", len(protocols)) {
		if line["reason"] != tunnel.ReasonIdle {
			t.Errorf("closing line %v, want %q", line, tunnel.ReasonIdle)
		}
	}

	c = binaryStart(t, binaryOptions{global: everyProtocol, secure: true})
	for _, protocol := range protocols {
		c.openDeaf(t, protocol)
	}
	c.timeExit(t, func() {})
	c.checkAllShutDown(t, len(protocols))
}

// openDeaf opens a tunnel on its own connection, reads nothing, and waits until no more
// data moves.
func (c *binaryCaddy) openDeaf(t *testing.T, protocol string) {
	t.Helper()
	var sent atomic.Int64
	target := listen(t, func(conn *net.TCPConn) {
		conn.SetDeadline(time.Now().Add(tunnelPatience))
		for data := make([]byte, 64<<10); ; {
			n, err := conn.Write(data)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	})
	alpn := map[string]string{"h2": "h2"}[protocol]
	ctx, cancel := context.WithTimeout(t.Context(), tunnelPatience)
	defer cancel()
	_, conn, err := c.tunnels(t, protocol).dial(ctx, alpn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	var head bytes.Buffer
	fields := hpack.NewEncoder(&head)
	fields.WriteField(hpack.HeaderField{Name: ":method", Value: http.MethodConnect})
	fields.WriteField(hpack.HeaderField{Name: ":authority", Value: target})
	const most = 1<<31 - 1
	say(t, conn, http2.ClientPreface)
	framer := http2.NewFramer(conn, nil)
	if err := errors.Join(
		framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: most}),
		framer.WriteWindowUpdate(0, most-65535),
		framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head.Bytes(), EndHeaders: true}),
	); err != nil {
		t.Fatal(err)
	}
	last := int64(0)
	eventually(t, "back-pressure on the target", func() bool {
		time.Sleep(100 * time.Millisecond)
		now := sent.Load()
		stopped := now == last && now > 0
		last = now
		return stopped
	})
}

// timeExit tells Caddy to exit and returns how long that took.
func (c *binaryCaddy) timeExit(t *testing.T, meanwhile func()) time.Duration {
	t.Helper()
	begun := time.Now()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	meanwhile()
	select {
	case <-c.exited:
	case <-time.After(patience):
		t.Fatal("Caddy did not exit")
	}
	took := time.Since(begun)
	t.Logf("Caddy exits after %v", took)
	if code := c.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	return took
}

// checkAllShutDown checks that there are n closing lines, all with the reason shutdown.
func (c *binaryCaddy) checkAllShutDown(t *testing.T, n int) {
	t.Helper()
	closed := map[string]int{}
	for _, line := range c.logLines("CONNECT tunnel closed") {
		reason := fmt.Sprint(line["reason"])
		if reason != tunnel.ReasonShutdown {
			reason = fmt.Sprint(line["proto"], " ", reason)
		}
		closed[reason]++
	}
	if closed[tunnel.ReasonShutdown] != n || len(closed) != 1 {
		t.Errorf("closing lines by reason: %v, want %d for %s", closed, n, tunnel.ReasonShutdown)
	}
}

// Tunnels continue while configs replace each other.
func TestProcessReloadsUnderTraffic(t *testing.T) {
	const size = 32 << 20
	for name, reload := range map[string]func(c *binaryCaddy, site string) error{
		"POST load": func(c *binaryCaddy, site string) error {
			req, err := http.NewRequest(http.MethodPost, "http://"+c.admin+"/load", strings.NewReader(c.caddyfile(site)))
			if err != nil {
				return err
			}
			req.Close = true
			req.Header.Set("Content-Type", "text/caddyfile")
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			defer res.Body.Close()
			if res.StatusCode != http.StatusOK {
				return errors.New(res.Status)
			}
			return nil
		},
		"caddy reload": func(c *binaryCaddy, site string) error {
			c.write(c.caddyfile(site))
			out, err := c.command("reload", "--config", c.config, "--adapter", "caddyfile", "--address", c.admin).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := binaryStart(t, binaryOptions{global: everyProtocol, secure: true})
			target := echoTarget(t)
			const least = 3 // reloads during every transfer
			var reloads atomic.Int64
			var wg sync.WaitGroup
			for _, protocol := range tunnelProtocols {
				conn := c.tunnels(t, protocol).open(target)
				wg.Go(func() { conntest.ReceiveBulk(t, "the client over "+protocol, conn, 1, size) })
				wg.Go(func() {
					data := conntest.Bulk(1, size)
					for sent := int64(0); sent < size; {
						// The last quarter is sent after the reloads.
						for sent >= size*3/4 && reloads.Load() < least {
							time.Sleep(time.Millisecond)
						}
						n, err := io.CopyN(struct{ io.Writer }{conn}, data, 256<<10)
						if sent += n; err != nil {
							t.Errorf("%s: sending: %v", protocol, err)
							break
						}
					}
					if err := conn.CloseWrite(); err != nil {
						t.Errorf("%s: ending: %v", protocol, err)
					}
				})
			}
			done := make(chan struct{})
			go func() {
				wg.Wait()
				close(done)
			}()
			failures := 0
			for over := false; !over; {
				err := reload(c, fmt.Sprintf("max_tunnels %d", 1000+reloads.Load()))
				// Each load also replaces the admin endpoint, and a connection to it at
				// that moment is lost.
				if failures++; err == nil {
					reloads.Add(1)
					failures = 0
				} else if failures > 10 {
					t.Fatalf("reload: %v", err)
				}
				select {
				case <-done:
					over = true
				default:
				}
			}
			t.Logf("%d reloads", reloads.Load())
			for _, line := range c.waitLog("CONNECT tunnel closed", len(tunnelProtocols)) {
				if line["bytes_up"] != float64(size) || line["bytes_down"] != float64(size) || line["reason"] != tunnel.ReasonClient {
					t.Errorf("closing line %v, want %d bytes each way and %q", line, size, tunnel.ReasonClient)
				}
			}
		})
	}
}

// A target may accept a connection and never send anything. Its tunnel lasts until the
// client or the target closes.
func TestProcessWithSilentTarget(t *testing.T) {
	c := binaryStart(t, binaryOptions{global: everyProtocol, secure: true})
	heard, release := make(chan error), make(chan struct{})
	silent := listen(t, func(conn *net.TCPConn) {
		conn.SetDeadline(time.Now().Add(tunnelPatience))
		_, err := io.Copy(io.Discard, conn)
		heard <- err
		<-release
	})
	for i, protocol := range tunnelProtocols {
		t.Run(protocol, func(t *testing.T) {
			client := c.tunnels(t, protocol)
			leaves, waits := client.open(silent), client.open(silent)
			for _, conn := range []tunnelConn{leaves, waits} {
				say(t, conn, "anybody there?")
			}
			leaves.Reset()
			if err := <-heard; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("a client disconnects: the target read %v, want a reset", err)
			}
			closeWrite(t, waits)
			if err := <-heard; err != nil {
				t.Errorf("a client half-closes: the target read %v, want the end", err)
			}
			lines := c.waitLog("CONNECT tunnel closed", 2*i+1)
			want := tunnel.ReasonClient // a canceled stream
			if strings.HasPrefix(protocol, "h1") {
				want = tunnel.ReasonClientError
			}
			if len(lines) != 2*i+1 || lines[2*i]["reason"] != want {
				t.Errorf("closing lines %v, want one more, of the client that disconnected, with %q", lines, want)
			}
			release <- struct{}{}
			release <- struct{}{}
			hearEnd(t, waits)
			if line := c.waitLog("CONNECT tunnel closed", 2*i+2)[2*i+1]; line["reason"] != tunnel.ReasonClient {
				t.Errorf("closing line %v, want %q", line, tunnel.ReasonClient)
			}
		})
	}
}
