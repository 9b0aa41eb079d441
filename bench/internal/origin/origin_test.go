// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/wire"
)

// TestRequests sends bytes to the origin and looks at how its answers begin and end.
func TestRequests(t *testing.T) {
	content := string(wire.Content(1 << 10))
	const again = "GET /128 HTTP/1.0\r\n\r\n"
	tests := []struct {
		name, raw string
		statuses  string
	}{
		{"a path", "GET /128 HTTP/1.1\r\n\r\n" + again, "200 200"},
		{"a URL", "GET http://127.0.0.1:80/128 HTTP/1.1\r\n\r\n" + again, "200 200"},
		{"content", "POST /128 HTTP/1.1\r\nContent-Length: 1024\r\n\r\n" + content + again, "200 200"},
		{"close", "GET /128 HTTP/1.1\r\nConnection: Close\r\n\r\n" + again, "200"},
		{"keep-alive of HTTP/1.0", "GET /128 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + again, "200 200"},
		{"other content", "POST /128 HTTP/1.1\r\nContent-Length: 1024\r\n\r\n" + strings.Replace(content, "a", "b", 1) + again, "400"},
		{"too much content", "POST /128 HTTP/1.1\r\nContent-Length: 2000000\r\n\r\n" + strings.Repeat("a", 2_000_000), "400"},
		{"another path", "GET /129 HTTP/1.1\r\nConnection: close\r\n\r\n", "400"},
		{"chunks", "POST /128 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "400"},
		{"a wrong length", "POST /128 HTTP/1.1\r\nContent-Length: x\r\n\r\n", "400"},
		{"no request", "GET\r\n\r\n", "400"},
		{"a long head", "GET /128 HTTP/1.1\r\nA: " + strings.Repeat("a", 20<<10), "400"},
		{"half a head", "GET /128 HTTP/1.1\r\n", ""},
	}
	o := start(t)
	for _, test := range tests {
		conn := dial(t, o)
		go func() {
			_, _ = io.WriteString(conn, test.raw)
			_ = conn.(*net.TCPConn).CloseWrite()
		}()
		answer, _ := io.ReadAll(conn) // a reset is allowed after the answer
		var statuses []string
		for _, part := range strings.Split(string(answer), "HTTP/1.1 ")[1:] {
			statuses = append(statuses, part[:3])
		}
		if got := strings.Join(statuses, " "); got != test.statuses {
			t.Errorf("%s: %q instead of %q", test.name, got, test.statuses)
		}
	}
}

// TestReceived counts the bytes of uploads that are as they should be.
func TestReceived(t *testing.T) {
	o := start(t)
	send := func(content string) {
		conn := dial(t, o)
		_, _ = io.WriteString(conn, string(wire.Upload)+content)
		_ = conn.(*net.TCPConn).CloseWrite()
		_, _ = io.ReadAll(conn)
	}
	send(string(wire.Content(1000)))
	if o.Received() != 1000 {
		t.Errorf("%d bytes received", o.Received())
	}
	send("x")
	if o.Received() != 1000 {
		t.Errorf("%d bytes received after wrong ones", o.Received())
	}
}

// TestClose checks that nothing of an origin is left, although clients are connected.
func TestClose(t *testing.T) {
	before := runtime.NumGoroutine()
	o := start(t)
	for _, first := range []string{"", string(wire.Echo), string(wire.Download), string(wire.Upload), "GET "} {
		_, _ = io.WriteString(dial(t, o), first)
	}
	o.Close()
	for runtime.NumGoroutine() > before {
		time.Sleep(time.Millisecond)
	}
}

// TestLoopbackOnly checks that other machines cannot reach the origin.
func TestLoopbackOnly(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", "[::]:0", "192.0.2.1:0", ":0", "localhost:0"} {
		if o, err := Listen(address); err == nil {
			o.Close()
			t.Errorf("it listens on %s", address)
		}
	}
}

func start(t *testing.T) *Origin {
	t.Helper()
	o, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	return o
}

func dial(t *testing.T, o *Origin) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", o.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
