// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// descriptors counts a process's open descriptors.
func descriptors(t testing.TB, pid string) int {
	t.Helper()
	names, err := os.ReadDir("/proc/" + pid + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	if pid == "self" {
		return len(names) - 1 // without the directory's own
	}
	return len(names)
}

func TestTunnelsLeaveNothingBehind(t *testing.T) {
	const n = 2000
	w := newTunnelWorld(t, tunnelSetup{})
	target := echoTarget(t)
	openAndClose := func(protocol string, n int) {
		t.Run(fmt.Sprintf("%d over %s", n, protocol), func(t *testing.T) {
			c := w.client(t, protocol)
			c.shared = n
			if err := concurrently(n, 32, func(i int) error {
				conn, err := c.try(target, "")
				if err != nil {
					return err
				}
				defer conn.Close()
				if i%4 == 0 {
					return nil // closed without a response
				}
				if _, err := io.WriteString(conn, "hello"); err != nil {
					return err
				}
				if _, err = io.ReadFull(conn, make([]byte, 5)); err != nil || i%4 == 1 {
					return err
				}
				if i%4 == 2 {
					conn.Reset()
					return nil
				}
				if err := conn.CloseWrite(); err != nil {
					return err
				}
				_, err = io.Copy(io.Discard, conn)
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
	for _, protocol := range tunnelProtocols {
		openAndClose(protocol, 1)
	}
	waitNoTunnels(t)
	files, goroutines := descriptors(t, "self"), runtime.NumGoroutine()
	for _, protocol := range tunnelProtocols {
		openAndClose(protocol, n/len(tunnelProtocols))
	}
	waitNoTunnels(t)
	eventually(t, "the earlier numbers of descriptors and goroutines", func() bool {
		return descriptors(t, "self") <= files && runtime.NumGoroutine() <= goroutines
	})
}

// A tunnel that has carried bulk data returns its pipes.
func TestTunnelHoldsTwoDescriptorsAfterBulk(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{})
	target := echoTarget(t)
	w.client(t, "h1").open(target).Close()
	waitNoTunnels(t)
	before := descriptors(t, "self")
	const n, size = 50, 2 << 20
	conns := make([]tunnelConn, n)
	for i := range conns {
		conns[i] = w.client(t, "h1").open(target)
	}
	if err := concurrently(n, n, func(i int) error {
		go io.Copy(conns[i], conntest.Bulk(1, size))
		_, err := io.CopyN(io.Discard, conns[i], size)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	// Unused pipes are kept for the next burst, up to a limit.
	spare := 2 * cap(tcpconn.Pipes)
	held := 0
	eventually(t, "the pipes to be returned", func() bool {
		held = descriptors(t, "self") - before
		return held <= 4*n+spare
	})
	if held < 4*n {
		t.Errorf("%d tunnels with their clients and targets hold only %d descriptors: this test counts wrong", n, held)
	}
	for _, conn := range conns {
		conn.Close()
	}
	waitNoTunnels(t)
	eventually(t, "the earlier number of descriptors", func() bool { return descriptors(t, "self") <= before })
}

// The kernel reuses a local port for connections to different destinations, so a client on
// this machine may have the port of a tunnel's other side.
func TestClientWithTunnelPortIsNoLoop(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{})
	target := echoTarget(t)
	first := w.client(t, "h1").open(target)
	hear(t, first, say(t, first, "hello"))
	source := openTunnels()[0].LocalAddr
	if !source.IsValid() {
		t.Fatal("the tunnel has no local address")
	}
	conn, err := dialFrom(source, w.plain)
	if err != nil {
		t.Fatalf("connecting from %v: %v", source, err)
	}
	defer conn.Close()
	second := newH1Tunnel(conn, conn.(*net.TCPConn))
	res, err := second.connect(target, "", "")
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusOK {
		t.Fatalf("a client at %v, the local address of a tunnel to %s: status %d, want 200", source, target, res.StatusCode)
	}
	hear(t, second, say(t, second, "hello"))
}

// dialFrom connects from a port that another connection already uses.
func dialFrom(source netip.AddrPort, address string) (net.Conn, error) {
	dialer := net.Dialer{Timeout: patience, ControlContext: func(_ context.Context, _, _ string, c syscall.RawConn) error {
		var errOption error
		err := c.Control(func(fd uintptr) {
			port := int(source.Port())
			errOption = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, port|port<<16)
		})
		if err != nil {
			return err
		}
		return errOption
	}}
	return dialer.DialContext(context.Background(), "tcp4", address)
}
