// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// talk writes now and then until a write fails.
func talk(w io.Writer) {
	for {
		if _, err := w.Write(make([]byte, 100)); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// A tunnel that the proxy closes in mid-traffic must be reset: neither the client nor the
// target may take it for complete.
func TestCutTunnelsAreReset(t *testing.T) {
	watchOften(t)
	for reason, cut := range map[string]func(*testing.T, *tunnelWorld){
		tunnel.ReasonMaxDuration: func(*testing.T, *tunnelWorld) {}, // happens by itself
		tunnel.ReasonReload:      func(t *testing.T, w *tunnelWorld) { w.reload(t, tunnelSetup{}) },
		tunnel.ReasonOperator: func(*testing.T, *tunnelWorld) {
			currentProcess().tunnels.CloseIf(tunnel.ReasonOperator, func(*tunnel.Tunnel) bool { return true })
		},
	} {
		t.Run(reason, func(t *testing.T) {
			options := "stream_close_delay 0"
			if reason == tunnel.ReasonMaxDuration {
				options = "tunnel_max_duration 1s"
			}
			w := newTunnelWorld(t, tunnelSetup{options: options})
			talking, begun, failures := listen(t, func(conn *net.TCPConn) { talk(conn) }), make(chan bool), make(chan error)
			listening := listen(t, func(conn *net.TCPConn) {
				io.CopyN(io.Discard, conn, 100)
				begun <- true
				_, err := io.Copy(io.Discard, conn)
				failures <- err
			})
			// A connection that also writes might get the error on a write.
			conns := map[string]tunnelConn{}
			for _, protocol := range tunnelProtocols {
				go talk(w.client(t, protocol).open(listening))
				<-begun
				conns[protocol] = w.client(t, protocol).open(talking)
				hear(t, conns[protocol], string(make([]byte, 100)))
			}
			cut(t, w)
			for _, protocol := range tunnelProtocols {
				if n, err := io.Copy(io.Discard, conns[protocol]); !isReset(protocol, err) {
					t.Errorf("%s: the client read %d bytes and then %v, want a reset", protocol, n, err)
				}
				if err := <-failures; !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("a target read %v, want a reset", err)
				}
			}
			for _, line := range w.waitLog("CONNECT tunnel closed", 2*len(tunnelProtocols)) {
				if line["reason"] != reason {
					t.Errorf("log line %v, want the reason %q", line, reason)
				}
			}
		})
	}
}

// A tunnel that was silent before the proxy closed it ends in order.
func TestSilentTunnelsEndInOrder(t *testing.T) {
	watchOften(t)
	w := newTunnelWorld(t, tunnelSetup{options: "tunnel_idle_timeout 1s"})
	ends := make(chan error, len(tunnelProtocols))
	target := listen(t, func(conn *net.TCPConn) {
		_, err := io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
		ends <- err
	})
	conns := map[string]tunnelConn{}
	for _, protocol := range tunnelProtocols {
		conns[protocol] = w.client(t, protocol).open(target)
		hear(t, conns[protocol], say(t, conns[protocol], "the last word"))
	}
	for _, protocol := range tunnelProtocols {
		hearEnd(t, conns[protocol])
		if err := <-ends; err != nil {
			t.Errorf("a target read %v, want the end", err)
		}
	}
}

// readSlowly reads n bytes at rate bytes per second.
func readSlowly(r io.Reader, n, rate int64) error {
	for read, start := int64(0), time.Now(); read < n; {
		time.Sleep(20 * time.Millisecond)
		m, err := io.CopyN(io.Discard, r, max(0, min(n, int64(time.Since(start).Seconds()*float64(rate)))-read))
		if read += m; err != nil {
			return fmt.Errorf("after %d bytes: %w", read, err)
		}
	}
	return nil
}

// A client that slowly reads what the kernel has buffered for it keeps its tunnel from
// counting as idle or stalled.
func TestSlowReadersAreNeitherIdleNorStalled(t *testing.T) {
	watchOften(t)
	w, other := emptyTunnelWorld(t), emptyTunnelWorld(t)
	_, sites, _ := strings.Cut(other.caddyfile(tunnelSetup{options: "tunnel_stall_timeout 1s"}), "\nhttp://")
	loadCaddyfile(t, w.caddyfile(tunnelSetup{options: "tunnel_idle_timeout 1s\ntunnel_stall_timeout 1s"})+"\nhttp://"+sites)
	w.ready(t)
	other.ready(t)
	t.Run("at the same time", func(t *testing.T) {
		t.Run("idle", func(t *testing.T) {
			t.Parallel()
			readersAreSlow(t, w, tunnelProtocols[:2]) // others' clients have taken what their windows hold
		})
		t.Run("stalled", func(t *testing.T) {
			t.Parallel()
			readersAreSlow(t, other, tunnelProtocols)
		})
	})
}

func readersAreSlow(t *testing.T, w *tunnelWorld, protocols []string) {
	const size, rate = 6 << 20, 2 << 20 // bytes, and bytes per second
	target := listen(t, func(conn *net.TCPConn) {
		conn.SetDeadline(time.Now().Add(tunnelPatience))
		io.CopyN(conn, zeros{}, size)
		io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
	})
	var clients sync.WaitGroup
	for _, protocol := range protocols {
		conn := w.client(t, protocol).open(target)
		clients.Go(func() {
			if err := readSlowly(conn, size, rate); err != nil {
				t.Errorf("%s: %v", protocol, err)
				return
			}
			got := make([]byte, 4)
			if _, err := io.WriteString(conn, "more"); err != nil {
				t.Errorf("%s: afterwards: %v", protocol, err)
			} else if _, err := io.ReadFull(conn, got); err != nil {
				t.Errorf("%s: afterwards: %v", protocol, err)
			}
		})
	}
	clients.Wait()
}

// A tunnel is reset if one end reads nothing although data waits for it. The connection's
// other tunnels go on.
func TestStalledTunnelsAreReset(t *testing.T) {
	watchOften(t)
	w := newTunnelWorld(t, tunnelSetup{options: "tunnel_stall_timeout 500ms"})
	echo := echoTarget(t)
	t.Run("at the same time", func(t *testing.T) {
		for _, protocol := range tunnelProtocols {
			t.Run(protocol+"/target", func(t *testing.T) {
				t.Parallel()
				wait, result := make(chan struct{}), make(chan error, 1)
				deaf := listen(t, func(conn *net.TCPConn) {
					<-wait
					_, err := io.Copy(io.Discard, conn)
					result <- err
				})
				c := w.client(t, protocol)
				c.shared = 2
				lively, stalled := c.open(echo), c.open(deaf)
				if n, err := io.Copy(struct{ io.Writer }{stalled}, zeros{}); err == nil {
					t.Errorf("%d bytes were sent", n)
				}
				close(wait)
				if err := <-result; !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the target reads %v, want a reset", err)
				}
				hear(t, lively, say(t, lively, "the other tunnel"))
				wantReasonFor(t, w, deaf, tunnel.ReasonStalled)
			})
			t.Run(protocol+"/client", func(t *testing.T) {
				t.Parallel()
				failure := make(chan error, 1)
				pouring := listen(t, func(conn *net.TCPConn) {
					_, err := io.Copy(conn, zeros{})
					failure <- err
				})
				stalled := w.client(t, protocol).open(pouring)
				if err := <-failure; err == nil {
					t.Error("the target could send everything")
				}
				if n, err := io.Copy(io.Discard, stalled); err == nil {
					t.Errorf("the client reads %d bytes and then an end in order", n)
				}
				wantReasonFor(t, w, pouring, tunnel.ReasonStalled)
			})
		}
	})
	waitNoTunnels(t)
}

// wantReasonFor waits for the closing line of the tunnel to a target.
func wantReasonFor(t *testing.T, w *tunnelWorld, target, reason string) {
	t.Helper()
	var line map[string]any
	eventually(t, "the tunnel's closing line", func() bool {
		lines := w.logLines("CONNECT tunnel closed")
		i := slices.IndexFunc(lines, func(line map[string]any) bool { return line["target"] == target })
		if i >= 0 {
			line = lines[i]
		}
		return i >= 0
	})
	if line["reason"] != reason {
		t.Errorf("log line %v, want the reason %q", line, reason)
	}
}

// wantReason waits for a tunnel's closing line and checks its reason.
func wantReason(t *testing.T, w *tunnelWorld, reason string) {
	t.Helper()
	if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != reason {
		t.Errorf("log line %v, want the reason %q", line, reason)
	}
}

// A target that reads nothing stalls its tunnel, no matter whether the unread data is in
// the kernel or in the proxy.
func TestStalledTunnelsAfterClientEnd(t *testing.T) {
	watchOften(t)
	w := newTunnelWorld(t, tunnelSetup{options: "tunnel_stall_timeout 500ms"})
	wait := make(chan struct{})
	defer close(wait)
	deaf := listen(t, func(conn *net.TCPConn) {
		conn.SetReadBuffer(4 << 10)
		<-wait
	})
	conn := w.client(t, "h1").open(deaf)
	if _, err := io.CopyN(conn, zeros{}, 400<<10); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	waitNoTunnels(t)
}

// A client that sends STOP_SENDING over HTTP/3 has disconnected, even if its target sends
// nothing, so that no write can fail.
func TestStopSendingEndsTheTunnel(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{})
	failure := make(chan error, 1)
	target := listen(t, func(conn *net.TCPConn) {
		io.CopyN(conn, conn, 5)
		_, err := io.Copy(io.Discard, conn)
		failure <- err
	})
	conn := w.client(t, "h3").open(target)
	hear(t, conn, say(t, conn, "hello"))
	conn.(*h3Tunnel).CancelRead(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
	if err := <-failure; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the target reads %v, want a reset", err)
	}
	wantReason(t, w, tunnel.ReasonClient)
}

// A client that disconnects while its target reads nothing ends the tunnel at once.
func TestDisconnectWithStuckTarget(t *testing.T) {
	watchOften(t)
	w := newTunnelWorld(t, tunnelSetup{options: "tunnel_stall_timeout off"})
	for _, protocol := range []string{"h2", "h3"} {
		wait := make(chan struct{})
		deaf := listen(t, func(*net.TCPConn) { <-wait })
		conn := w.client(t, protocol).open(deaf)
		go io.Copy(struct{ io.Writer }{conn}, zeros{})
		waitForStall(t)
		conn.Close()
		waitNoTunnels(t)
		close(wait)
		wantReason(t, w, tunnel.ReasonClient)
		w.forgetLogs()
	}
}

// waitForStall waits until no tunnel carries any more upstream bytes.
func waitForStall(t *testing.T) {
	t.Helper()
	last, same := int64(-1), 0
	eventually(t, "the target to accept no more data", func() bool {
		sum := int64(0)
		for _, t := range openTunnels() {
			sum += t.BytesUp()
		}
		if same++; sum != last || sum == 0 {
			last, same = sum, 0
		}
		time.Sleep(10 * time.Millisecond)
		return same > 20
	})
}

// Uploads to targets that read nothing leave other streams of the HTTP/2 connection their
// windows.
func TestStuckUploadsLeaveRoomForOthers(t *testing.T) {
	const stuck = 20
	w := newTunnelWorld(t, tunnelSetup{})
	for _, protocol := range []string{"h2", "h2c"} {
		t.Run(protocol, func(t *testing.T) {
			wait := make(chan struct{})
			deaf := listen(t, func(conn *net.TCPConn) {
				conn.SetReadBuffer(4 << 10)
				<-wait
			})
			defer close(wait)
			c := w.client(t, protocol)
			c.shared = 2 * stuck
			for range stuck {
				conn := c.open(deaf)
				go io.Copy(struct{ io.Writer }{conn}, zeros{})
			}
			waitForStall(t)
			lively := c.open(echoTarget(t))
			hear(t, lively, say(t, lively, "is there room?"))
		})
	}
}

// Upgraded connections, and tunnels that are streams to a parent proxy, stall like others.
func TestStalledTunnelsOfOtherKinds(t *testing.T) {
	watchOften(t)
	deaf := func(t *testing.T, answer string) string {
		wait := make(chan struct{})
		t.Cleanup(func() { close(wait) })
		return listen(t, func(conn *net.TCPConn) {
			if answer != "" {
				streamRequest(conn)
				io.WriteString(conn, answer)
			}
			<-wait
		})
	}
	stalls := func(t *testing.T, w *world, conn *rawConn) {
		t.Helper()
		if n, err := io.Copy(struct{ io.Writer }{conn}, zeros{}); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("the client sends %d bytes and then fails with %v, want a reset", n, err)
		}
		if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != tunnel.ReasonStalled {
			t.Errorf("log line %v, want the reason %q", line, tunnel.ReasonStalled)
		}
	}
	t.Run("upgrade", func(t *testing.T) {
		w := newWorld(t, "tunnel_stall_timeout 500ms", nil)
		conn := w.dial()
		origin := deaf(t, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: silence\r\n\r\n")
		conn.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: silence\n\n")
		conn.readUntil("\r\n\r\n")
		stalls(t, w, conn)
	})
	t.Run("stream to a parent", func(t *testing.T) {
		parent := binaryStart(t, binaryOptions{secure: true, site: "allow 127.0.0.0/8"})
		w := newWorld(t, `tunnel_stall_timeout 500ms
upstream https://`+parent.secure+` {
	tls_insecure_skip_verify
}`, nil)
		conn := w.dial()
		conn.connect(deaf(t, ""))
		stalls(t, w, conn)
	})
}
