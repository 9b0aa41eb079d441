// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bufio"
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
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/wire"
)

// serve starts a server on the loopback interface. It ends with the test.
func serve(t *testing.T, handle func(conn net.Conn)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer conn.Close()
				handle(conn)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		serving.Wait()
	})
	return listener.Addr().String()
}

// answering starts a server that gives the same answer to each request, and counts them.
func answering(t *testing.T, raw string) (address string, answered *atomic.Int64) {
	answered = new(atomic.Int64)
	address = serve(t, func(conn net.Conn) {
		requests := bufio.NewReader(conn)
		for {
			request, err := http.ReadRequest(requests)
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, request.Body)
			answered.Add(1)
			if _, err := io.WriteString(conn, raw); err != nil {
				return
			}
			if !strings.HasPrefix(raw, "HTTP/1.1") || strings.Contains(raw, "close") {
				return
			}
		}
	})
	return address, answered
}

func startOrigin(t *testing.T) *origin.Origin {
	t.Helper()
	o, err := origin.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	return o
}

// relay starts a proxy that has nothing but CONNECT. What passes to the client is changed by
// change.
func relay(t *testing.T, change func([]byte)) string {
	return serve(t, func(client net.Conn) {
		request, err := http.ReadRequest(bufio.NewReader(client))
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", request.Host)
		if err != nil {
			return
		}
		defer server.Close()
		if _, err := io.WriteString(client, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
			return
		}
		go func() {
			_, _ = io.Copy(server, client)
			server.Close()
		}()
		buf := make([]byte, 32<<10)
		for {
			n, err := server.Read(buf)
			if err != nil {
				return
			}
			change(buf[:n])
			if _, err := client.Write(buf[:n]); err != nil {
				return
			}
		}
	})
}

func unchanged([]byte) {}

// brief is a load that takes a moment.
func brief(kind Kind) Load {
	return Load{Kind: kind, Clients: 4, Path: "/128", Status: 200, Want: wire.Content(128), Duration: 50 * time.Millisecond}
}

func runLoad(t *testing.T, target Target, load Load) *Result {
	t.Helper()
	result, err := Run(t.Context(), target, load)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// TestCounts compares what the load maker counts with what a server has answered. The server
// answers when the measurement has begun. Each client may have one request under way when it
// ends.
func TestCounts(t *testing.T) {
	for _, kind := range []Kind{Requests, Connections} {
		var answered atomic.Int64
		runs := make(chan *run, 1)
		address := serve(t, func(conn net.Conn) {
			r := <-runs
			runs <- r
			for requests := bufio.NewReader(conn); ; answered.Add(1) {
				if _, err := http.ReadRequest(requests); err != nil {
					return
				}
				for r.phase.Load() == warming {
					time.Sleep(time.Millisecond)
				}
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 128\r\n\r\n"+string(wire.Content(128)))
			}
		})
		r, err := newRun(Target{Server: address, Origin: "127.0.0.1:1"}, brief(kind))
		if err != nil {
			t.Fatal(err)
		}
		runs <- r
		result := r.drive(t.Context())
		if result.Errors > 0 {
			t.Errorf("%d errors: %s", result.Errors, result.FirstError)
		}
		if missing := answered.Load() - result.Operations; missing < -int64(r.Clients) || missing > int64(r.Clients) {
			t.Errorf("%d operations, while the server answered %d requests", result.Operations, answered.Load())
		}
		if result.Bytes != 128*result.Operations {
			t.Errorf("%d bytes in %d operations", result.Bytes, result.Operations)
		}
		if result.Latency.Total() != uint64(result.Operations) {
			t.Errorf("%d latencies of %d operations", result.Latency.Total(), result.Operations)
		}
		if result.Reopened > 0 {
			t.Errorf("%d connections reopened", result.Reopened)
		}
	}
}

// TestWarmUp checks that what happens before the measurement does not count.
func TestWarmUp(t *testing.T) {
	address, answered := answering(t, "HTTP/1.1 200 OK\r\nContent-Length: 128\r\n\r\n"+string(wire.Content(128)))
	load := brief(Requests)
	var before int64
	load.Begin = func() {
		for before = answered.Load(); before < 100; before = answered.Load() {
			time.Sleep(time.Millisecond)
		}
	}
	result := runLoad(t, Target{Server: address, Origin: "127.0.0.1:1"}, load)
	if during := answered.Load() - before; result.Operations > during+int64(load.Clients) {
		t.Errorf("%d operations, while the server answered %d requests", result.Operations, during)
	}
}

// TestAnswers sends one request each, to servers that answer rightly and wrongly.
func TestAnswers(t *testing.T) {
	content := string(wire.Content(128))
	wrong := strings.Replace(content, content[100:101], "!", 1)
	tests := []struct{ name, raw, err string }{
		{"a length", "HTTP/1.1 200 OK\r\ncontent-length:128\r\n\r\n" + content, ""},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40;x=y\r\n" + content[:64] + "\r\n40\r\n" + content[64:] + "\r\n0\r\nA: b\r\n\r\n", ""},
		{"until the end", "HTTP/1.0 200 OK\r\n\r\n" + content, ""},
		{"another status", "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 128\r\n\r\n" + content, "status 502 instead of 200"},
		{"other content", "HTTP/1.1 200 OK\r\nContent-Length: 128\r\n\r\n" + wrong, "wrong content"},
		{"other content in chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n80\r\n" + wrong + "\r\n0\r\n\r\n", "wrong content"},
		{"less content", "HTTP/1.1 200 OK\r\nContent-Length: 127\r\n\r\n" + content[:127], "127 bytes of content instead of 128"},
		{"no content", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "0 bytes of content"},
		{"more content", "HTTP/1.1 200 OK\r\nContent-Length: 129\r\n\r\n" + content + "a", "wrong content"},
		{"more than it says", "HTTP/1.1 200 OK\r\nContent-Length: 128\r\n\r\n" + content + "HTTP/1.1", "more content than the answer has"},
		{"cut off", "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 128\r\n\r\n" + content[:64], "unexpected EOF"},
		{"cut off in the head", "HTTP/1.0 200 OK\r\nContent", "unexpected EOF"},
		{"cut off in chunks", "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n80\r\n" + content, "unexpected EOF"},
		{"a wrong chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n80\r\n" + content + "xx0\r\n\r\n", "a chunk does not end"},
		{"a wrong chunk size", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-80\r\n" + content + "\r\n0\r\n\r\n", "chunk size"},
		{"a wrong length", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "Content-Length"},
		{"not HTTP", "SSH-2.0-OpenSSH_9.2\r\n\r\n", "not an HTTP answer"},
		{"a long head", "HTTP/1.1 200 OK\r\nA: " + strings.Repeat("a", 20<<10), "head of the answer is too long"},
	}
	for _, test := range tests {
		address, _ := answering(t, test.raw)
		err := Probe(t.Context(), Target{Server: address, Origin: "127.0.0.1:1"}, brief(Requests))
		if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

// TestErrors checks that wrong answers are counted as errors and not as operations.
func TestErrors(t *testing.T) {
	address, answered := answering(t, "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
	result := runLoad(t, Target{Server: address, Origin: "127.0.0.1:1"}, brief(Requests))
	if result.Operations != 0 || result.Errors == 0 || result.Errors != answered.Load() {
		t.Errorf("%d operations, %d errors, %d answers", result.Operations, result.Errors, answered.Load())
	}
	if result.FirstError != "status 503 instead of 200" {
		t.Error(result.FirstError)
	}
	load := brief(Requests)
	load.Status, load.AnyBytes = 503, true
	if result = runLoad(t, Target{Server: address, Origin: "127.0.0.1:1"}, load); result.Errors > 0 || result.Operations == 0 {
		t.Errorf("%d operations, %d errors, where 503 is right", result.Operations, result.Errors)
	}
}

// TestNobodyThere checks that an address without a server is an error.
func TestNobodyThere(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	for _, kind := range []Kind{Requests, Connections, Connects, Download, Upload} {
		if result := runLoad(t, Target{Server: address, Origin: "127.0.0.1:1"}, brief(kind)); result.Errors == 0 || result.Operations > 0 {
			t.Errorf("kind %d: %d operations, %d errors", kind, result.Operations, result.Errors)
		}
	}
}

// TestReopened checks that a server may close connections after answers, saying so or not.
func TestReopened(t *testing.T) {
	content := string(wire.Content(128))
	says, _ := answering(t, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 128\r\n\r\n"+content)
	silent := serve(t, func(conn net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 128\r\n\r\n"+content)
		}
	})
	for _, address := range []string{says, silent} {
		result := runLoad(t, Target{Server: address, Origin: "127.0.0.1:1"}, brief(Requests))
		if result.Errors > 0 || result.Operations == 0 || result.Reopened+4 < result.Operations {
			t.Errorf("%d operations, %d errors (%s), %d reopened", result.Operations, result.Errors, result.FirstError, result.Reopened)
		}
	}
}

// slow starts a server that waits before each answer.
func slow(t *testing.T, wait time.Duration) Target {
	return Target{Origin: "127.0.0.1:1", Server: serve(t, func(conn net.Conn) {
		requests := bufio.NewReader(conn)
		for {
			if _, err := http.ReadRequest(requests); err != nil {
				return
			}
			time.Sleep(wait)
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 128\r\n\r\n"+string(wire.Content(128)))
		}
	})}
}

// TestLatency checks that a latency includes what the server waits.
func TestLatency(t *testing.T) {
	const wait = 10 * time.Millisecond
	result := runLoad(t, slow(t, wait), brief(Requests))
	if shortest := result.Latency.Quantile(0); shortest < wait-wait/steps {
		t.Errorf("a latency of %v", shortest)
	}
}

// TestSlow measures a server that takes longer for an answer than the measurement should.
func TestSlow(t *testing.T) {
	load := brief(Requests)
	load.Duration = time.Millisecond
	result, err := Run(t.Context(), slow(t, 100*time.Millisecond), load)
	if err != nil || result.Operations == 0 || result.Errors > 0 {
		t.Errorf("%v, %d operations, %d errors: %s", err, result.Operations, result.Errors, result.FirstError)
	}
	if result.Elapsed < 50*time.Millisecond {
		t.Errorf("a measurement of %v", result.Elapsed)
	}
}

// TestOrigin sends all kinds of requests to the origin itself, which checks them.
func TestOrigin(t *testing.T) {
	o := startOrigin(t)
	target := Target{Server: o.Address(), Origin: o.Address()}
	for _, length := range []int{128, 10 << 10, 1 << 20} {
		for _, content := range []int{0, 1 << 10, 64 << 10} {
			for _, reverse := range []bool{false, true} {
				load := brief(Requests)
				load.Path, load.Want, load.Content = fmt.Sprintf("/%d", length), wire.Content(length), content
				target.Reverse = reverse
				if result := runLoad(t, target, load); result.Errors > 0 || result.Operations == 0 {
					t.Errorf("%d, %d: %d operations, %d errors: %s", length, content, result.Operations, result.Errors, result.FirstError)
				}
			}
		}
	}
}

// TestTunnels opens tunnels, and sends content through them in both directions.
func TestTunnels(t *testing.T) {
	o := startOrigin(t)
	target := Target{Server: relay(t, unchanged), Origin: o.Address()}
	result := runLoad(t, target, brief(Connects))
	if result.Errors > 0 || result.Operations == 0 {
		t.Errorf("%d tunnels, %d errors: %s", result.Operations, result.Errors, result.FirstError)
	}
	result = runLoad(t, target, brief(Download))
	if result.Errors > 0 || result.Bytes == 0 {
		t.Errorf("%d bytes down, %d errors: %s", result.Bytes, result.Errors, result.FirstError)
	}
	load := brief(Upload)
	load.Received = o.Received
	result = runLoad(t, target, load)
	if result.Errors > 0 || result.Bytes == 0 || result.Bytes > o.Received() {
		t.Errorf("%d bytes up of %d, %d errors: %s", result.Bytes, o.Received(), result.Errors, result.FirstError)
	}
}

// TestWrongTunnels checks that tunnels that change content or do not open are errors.
func TestWrongTunnels(t *testing.T) {
	o := startOrigin(t)
	wrong := Target{Server: relay(t, func(b []byte) { b[0]++ }), Origin: o.Address()}
	if result := runLoad(t, wrong, brief(Download)); result.Errors == 0 || !strings.Contains(result.FirstError, "wrong content") {
		t.Errorf("%d errors: %s", result.Errors, result.FirstError)
	}
	if tunnels, err := OpenTunnels(wrong, 4); err == nil || !strings.Contains(err.Error(), "came back") {
		t.Errorf("idle tunnels: %v", err)
	} else {
		tunnels.Close()
	}
	address, _ := answering(t, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
	refused := Target{Server: address, Origin: o.Address()}
	for _, kind := range []Kind{Connects, Download, Upload} {
		if result := runLoad(t, refused, brief(kind)); result.Errors == 0 || result.FirstError != "status 403 instead of 200" {
			t.Errorf("kind %d: %d errors: %s", kind, result.Errors, result.FirstError)
		}
	}
}

// TestIdleTunnels checks that all tunnels are open at the same time.
func TestIdleTunnels(t *testing.T) {
	o := startOrigin(t)
	var open atomic.Int64
	through := relay(t, unchanged)
	counting := serve(t, func(conn net.Conn) {
		open.Add(1)
		defer open.Add(-1)
		server, err := net.Dial("tcp", through)
		if err != nil {
			return
		}
		defer server.Close()
		go func() { _, _ = io.Copy(conn, server) }()
		_, _ = io.Copy(server, conn)
	})
	tunnels, err := OpenTunnels(Target{Server: counting, Origin: o.Address()}, 50)
	if err != nil {
		t.Fatal(err)
	}
	defer tunnels.Close()
	if tunnels.Len() != 50 || open.Load() != 50 {
		t.Errorf("%d tunnels, of which the proxy has %d", tunnels.Len(), open.Load())
	}
}

// TestLoopbackOnly checks that no other machine gets any load.
func TestLoopbackOnly(t *testing.T) {
	for _, target := range []Target{
		{Server: "192.0.2.1:80", Origin: "127.0.0.1:80"},
		{Server: "127.0.0.1:80", Origin: "192.0.2.1:80"},
		{Server: "[2001:db8::1]:80", Origin: "127.0.0.1:80"},
		{Server: "localhost:80", Origin: "127.0.0.1:80"},
		{Server: "0.0.0.0:80", Origin: "127.0.0.1:80"},
	} {
		if _, err := Run(t.Context(), target, brief(Requests)); err == nil {
			t.Errorf("%v got load", target)
		}
		if err := Probe(t.Context(), target, brief(Requests)); err == nil || strings.Contains(err.Error(), "dial") {
			t.Errorf("%v was probed: %v", target, err)
		}
		if _, err := OpenTunnels(target, 1); err == nil || strings.Contains(err.Error(), "dial") {
			t.Errorf("tunnels to %v: %v", target, err)
		}
	}
}

// TestCancel checks that a run ends early when its context does.
func TestCancel(t *testing.T) {
	o := startOrigin(t)
	ctx, cancel := context.WithCancel(t.Context())
	load := brief(Requests)
	load.Duration = time.Hour
	load.Begin = cancel
	if _, err := Run(ctx, Target{Server: o.Address(), Origin: o.Address()}, load); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// FuzzAnswer reads answers in pieces of any size: the result must not depend on the pieces.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n\x00\x01\x02"), 1)
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n\x00\x01\x02\r\n0\r\n\r\n"), 7)
	f.Add([]byte("HTTP/1.0 200 OK\r\n\r\n\x00\x01\x02"), 5)
	f.Fuzz(func(t *testing.T, raw []byte, size int) {
		read := func(source io.Reader) string {
			r := reader{source: source, buf: make([]byte, 4<<10)}
			head, err := r.head()
			if err != nil {
				return "no head"
			}
			check := checker{want: wire.Content(3)}
			err = r.rest(&head, &check)
			return fmt.Sprintf("%+v %v", head, err == nil)
		}
		if len(raw) > 1<<10 {
			return
		}
		whole := read(bytes.NewReader(raw))
		if parts := read(&pieces{raw, max(size%64, 1)}); parts != whole {
			t.Errorf("%s in pieces, %s at once", parts, whole)
		}
	})
}

// pieces is a reader of a few bytes at a time.
type pieces struct {
	rest []byte
	size int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(len(b), p.size)], p.rest)
	p.rest = p.rest[n:]
	return n, nil
}
