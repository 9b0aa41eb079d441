// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// TestParentChain chains two of our own proxies, over plain HTTP/1 and over TLS with and
// without HTTP/2.
func TestParentChain(t *testing.T) {
	const trusting = " {\ntls_insecure_skip_verify\n}"
	for _, tc := range []struct{ name, scheme, global, proto string }{
		{"plain", "http", "", "HTTP/1.1"},
		{"TLS, HTTP/2", "https", "", "HTTP/2.0"},
		{"TLS, HTTP/1", "https", `servers {
	protocols h1
}`, "HTTP/1.1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			parent := binaryStart(t, binaryOptions{secure: true, global: tc.global, site: "allow 127.0.0.0/8\n" + bcryptUsers})
			address, block := parent.proxy, ""
			if tc.scheme == "https" {
				address, block = parent.secure, trusting
			}
			checkThroughParent(t, "upstream "+tc.scheme+"://alice:wonderland@"+address+block, true)
			if line := parent.waitLog("CONNECT tunnel closed", 1)[0]; line["user"] != "alice" || line["proto"] != tc.proto {
				t.Errorf("the parent's line: %v", line)
			}
			checkRefusedByParent(t, "upstream "+tc.scheme+"://alice:rabbit@"+address+block, http.StatusBadGateway, parentWantsOthers)
		})
	}
	t.Run("what it denies", func(t *testing.T) {
		parent := binaryStart(t, binaryOptions{}) // for this parent, the child's clients are on another machine
		w := newWorld(t, "upstream http://"+parent.proxy, nil)
		for _, method := range []string{http.MethodGet, http.MethodConnect} {
			res, body := policyRequest(t, w.proxy, method, w.origin.Listener.Addr().String(), "")
			if res.StatusCode != http.StatusForbidden || body == "" {
				t.Errorf("%s: %s %q", method, res.Status, body)
			}
		}
	})
	t.Run("an untrusted certificate", func(t *testing.T) {
		parent := binaryStart(t, binaryOptions{secure: true})
		checkRefusedByParent(t, "upstream https://"+parent.secure, http.StatusBadGateway, "The certificate of the parent proxy is not trusted")
	})
}

// TestParentStreams checks that tunnels over HTTP/2 share connections to the parent, 16 per
// connection, that resets are passed on, and that no tunnel is left at the end.
func TestParentStreams(t *testing.T) {
	parent := binaryStart(t, binaryOptions{secure: true, site: "allow 127.0.0.0/8"})
	w := newWorld(t, "upstream https://"+parent.secure+` {
	tls_insecure_skip_verify
}`, nil)
	target := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	w.dial().connect(target)
	descriptors, _ := parent.settled()
	var conns []*rawConn
	for range 50 {
		conn := w.dial()
		conn.connect(target)
		conn.send("ping\n")
		if line, err := conn.r.ReadString('\n'); err != nil || line != "ping\r\n" {
			t.Fatalf("%q, %v", line, err)
		}
		conns = append(conns, conn)
	}
	if n := parent.descriptors() - descriptors; n > 53 {
		t.Errorf("50 tunnels use %d descriptors of the parent, want one each for the target, and three for connections", n)
	}
	for i, conn := range conns {
		if i%2 > 0 {
			conn.SetLinger(0)
		}
		conn.Close()
	}
	parent.waitLog("CONNECT tunnel closed", 50)
	eventually(t, "descriptors to be closed", func() bool { return parent.descriptors() <= descriptors+3 })

	// Resets are passed on as resets, in both directions.
	broken := make(chan error, 1)
	listening := listen(t, func(conn *net.TCPConn) {
		_, err := io.Copy(io.Discard, conn)
		broken <- err
	})
	leaving := w.dial()
	leaving.connect(listening)
	leaving.send("x")
	leaving.SetLinger(0)
	leaving.Close()
	if err := <-broken; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the target read %v after the client's reset, want a reset", err)
	}
	resetting := listen(t, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 1))
		conn.SetLinger(0)
	})
	conn := w.dial()
	conn.connect(resetting)
	conn.send("x")
	if _, err := conn.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("after a reset by the target: %v", err)
	}
}

// TestParentStreamsIndependent checks that a tunnel whose target does not read blocks
// neither its client's other tunnels nor new ones, let alone those of other clients.
func TestParentStreamsIndependent(t *testing.T) {
	parent := binaryStart(t, binaryOptions{secure: true, site: "allow 127.0.0.0/8"})
	watchOften(t)
	w := newWorld(t, `tunnel_stall_timeout 2s
upstream https://`+parent.secure+` {
	tls_insecure_skip_verify
}`, nil)
	echo := binaryEcho(t)
	over := make(chan struct{})
	defer close(over)
	deaf := listen(t, func(conn *net.TCPConn) { <-over })
	pings := func(conn *rawConn) {
		t.Helper()
		for range 3 {
			conn.send("ping\n")
			if line, err := conn.r.ReadString('\n'); err != nil || line != "ping\r\n" {
				t.Fatalf("%q, %v", line, err)
			}
		}
	}
	before, stuck := w.dial(), w.dial()
	before.connect(echo)
	pings(before)
	stuck.connect(deaf)
	stuck.SetWriteBuffer(64 << 10)
	for chunk := make([]byte, 64<<10); ; {
		stuck.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := stuck.Write(chunk); err != nil {
			break // every buffer is full
		}
	}
	pings(before)
	for _, from := range []string{"127.0.0.1", "127.0.0.9"} {
		tcp, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", w.proxy)
		if err != nil {
			t.Fatal(err)
		}
		tcp.SetDeadline(time.Now().Add(patience))
		after := &rawConn{TCPConn: tcp.(*net.TCPConn), t: t, r: bufio.NewReader(tcp)}
		defer after.Close()
		after.connect(echo)
		pings(after)
	}
	// It ends with the reason stalled, here and at the parent.
	if line := w.waitLog("CONNECT tunnel closed", 1); !slices.ContainsFunc(line, func(line map[string]any) bool {
		return line["reason"] == tunnel.ReasonStalled && line["target"] == deaf
	}) {
		t.Errorf("log lines %v", line)
	}
	eventually(t, "the parent's end of the tunnel to end", func() bool {
		return slices.ContainsFunc(parent.logLines("CONNECT tunnel closed"), func(line map[string]any) bool { return line["target"] == deaf })
	})
}
