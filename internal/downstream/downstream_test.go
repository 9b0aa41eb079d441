// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// A connection that is busy while the server shuts down completes its response. The fast
// path serves no connection that arrives later.
func TestClientConnAtShutdown(t *testing.T) {
	l := unitListener(nil)
	p := &l.conns
	near, far := tcpPair(t)
	c := newClientConn(l, newReadConn(near, nil), false)
	if !p.add(c) {
		t.Error("the connection is not accepted")
	}
	c.state.Store(connBusy)
	p.shutdown(false)
	if _, err := io.WriteString(near, "the answer"); err != nil {
		t.Errorf("before the response is complete: %v", err)
	}
	if p.add(newClientConn(l, newReadConn(far, nil), false)) {
		t.Error("a server that has shut down accepts a connection")
	}
	if c.enterIdle() {
		t.Error("after its response the connection waits for another request")
	}
	c.state.Store(connIdle) // as if it had just become idle
	p.shutdown(false)
	c.limitRead(time.Hour, time.Hour)
	_, _ = io.WriteString(far, "a request")
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection that must move still waits: %v", err)
	}
}

// Bytes read ahead on a connection that moves go with it, even if it moves again before
// anything reads them.
func TestClientConnMovesTwice(t *testing.T) {
	near, far := tcpPair(t)
	const request = "GET http://a.example/ HTTP/1.1\r\nHost: x\r\n\r\n"
	_, _ = io.WriteString(far, request[20:])
	second, third := unitListener(nil), unitListener(nil)
	third.conns.closed.Store(true) // makes net/http serve it there
	c := newClientConn(second, newReadConn(near, []byte(request[:20])), false)
	second.conns.add(c)
	second.conns.shutdown(false)
	second.server.Listeners = third.server.Listeners
	third.server.Listeners.add(third)
	go c.run()
	moved := <-third.netHTTPConns
	_ = far.Close()
	if got, _ := io.ReadAll(moved); string(got) != request {
		t.Errorf("got %q, want %q", got, request)
	}
}

// A handler that panics ends its own connection and no other.
func TestClientConnPanic(t *testing.T) {
	near, far := tcpPair(t)
	l := unitListener(func(http.ResponseWriter, *http.Request) { panic("in a test") })
	var panicked any
	l.server.OnPanic = func(_ string, value any, _ []byte) { panicked = value }
	_, _ = io.WriteString(far, "GET http://a.example/ HTTP/1.1\r\nHost: x\r\n\r\n")
	l.serveConn(near, true)
	await(t, "the connection to end", func() bool { return len(l.Clients()) == 0 })
	if n, err := io.Copy(io.Discard, far); n > 0 || err != nil {
		t.Errorf("%d bytes, %v, want the end", n, err)
	}
	if panicked != "in a test" {
		t.Errorf("OnPanic was told of %v", panicked)
	}
}

type noListener struct{ net.Listener }

func (noListener) Addr() net.Addr { return &net.TCPAddr{} }

// unitListener returns a listener that accepts nothing. Its requests get handle's responses.
func unitListener(handle http.HandlerFunc) *Listener {
	return newListener(noListener{}, unitServer(handle))
}

// unitServer returns a server without timeouts that logs nothing.
func unitServer(handle http.HandlerFunc) *Server {
	return &Server{
		Handle: handle, BaseContext: context.Background(),
		Listeners: new(Listeners), Lingering: new(Lingering),
		Prepares: func(any) bool { return false },
		Exiting:  func() bool { return false },

		OnInvalid:     func(net.Conn, Invalid) []byte { return nil },
		OnEnd:         func(net.Conn) {},
		OnPanic:       func(string, any, []byte) {},
		OnAcceptError: func(error) {},
	}
}

// tcpPair returns the two ends of a TCP connection.
func tcpPair(t testing.TB) (near, far *net.TCPConn) {
	t.Helper()
	inside, outside := conntest.Pair(t)
	_ = outside.SetDeadline(time.Now().Add(20 * time.Second))
	return inside.(*net.TCPConn), outside.(*net.TCPConn)
}

// await waits until condition holds.
func await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for start := time.Now(); !condition(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// A context that is still waited on after its request has ended reads nothing of the next
// request from the connection, and does not touch its deadline.
func TestClientConnLateWatch(t *testing.T) {
	near, far := tcpPair(t)
	c := newClientConn(unitListener(nil), newReadConn(near, nil), false)
	c.start()
	ctx := c.newRequest(http.MethodGet).Context()
	early := ctx.Done()
	const requests = 100
	var late sync.WaitGroup
	for range requests {
		c.mu.Lock()
		c.serving = true
		c.mu.Unlock()
		late.Go(func() { <-ctx.Done() })
		late.Go(func() {
			_, cancel := context.WithCancel(ctx)
			cancel()
		})
		c.stopWatch()
	}
	if ctx.Err() != nil {
		t.Errorf("stopping the watch counts as a disconnect: %v", ctx.Err())
	}
	late.Go(func() { <-ctx.Done() })
	if ctx.Done(); c.watchDone != nil {
		t.Fatal("the watch runs between two requests")
	}
	for range requests {
		_, _ = io.WriteString(far, "GET http://a.example/ HTTP/1.1\r\nHost: x\r\n\r\n")
		if r, back := c.nextRequest(); r == nil || back {
			t.Error("the next request is lost")
		}
	}
	c.cancel()
	late.Wait()
	<-early
}

// An idle connection holds no memory of earlier responses.
func TestClientConnIdleMemory(t *testing.T) {
	near, far := tcpPair(t)
	l := unitListener(func(w http.ResponseWriter, r *http.Request) {
		for i := range 500 {
			w.Header().Set(fmt.Sprint("X-Large-", i), strings.Repeat("x", 1000))
		}
	})
	c := newClientConn(l, newReadConn(near, nil), false)
	l.conns.add(c)
	go c.run()
	_, _ = io.WriteString(far, "GET http://a.example/ HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := http.ReadResponse(bufio.NewReaderSize(far, 1<<20), nil); err != nil {
		t.Fatal(err)
	}
	await(t, "the connection to be idle", func() bool { return c.state.Load() == connIdle })
	names := strings.Join(c.w.names[:cap(c.w.names)], "")
	if size := cap(c.w.buf); size > maxKeptBuffer || c.w.header != nil || names != "" {
		t.Errorf("%d bytes, %d fields and %d bytes of names", size, len(c.w.header), len(names))
	}
}

// A request that arrives when its config has ended is the new config's, also on a connection that
// the old listener has not yet moved.
func TestClientConnOfEndedConfig(t *testing.T) {
	near, far := tcpPair(t)
	answer := func(name string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.Header()["X-Config"] = []string{name} }
	}
	first, second := unitListener(answer("first")), unitListener(answer("second"))
	second.server.Listeners = first.server.Listeners
	done := make(chan struct{})
	first.server.ConfigDone = done
	first.server.Listeners.add(first)
	first.serveConn(near, true)
	r := bufio.NewReader(far)
	for _, want := range []string{"first", "first", "second", "second"} {
		_, _ = io.WriteString(far, "GET http://a.example/ HTTP/1.1\r\nHost: x\r\n\r\n")
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := res.Header.Get("X-Config"); got != want {
			t.Errorf("served by the %s config, want the %s", got, want)
		}
		if done != nil && len(first.server.Listeners.All()) == 2 {
			close(done)
			done = nil
		} else if done != nil {
			first.server.Listeners.add(second) // during a reload, both accept
		}
	}
}

// A connection that should go to a server that has shut down is closed.
func TestClientConnHandOffAtShutdown(t *testing.T) {
	near, far := tcpPair(t)
	l := unitListener(nil)
	l.stopServing()
	l.handToNetHTTP(near)
	if n, err := io.Copy(io.Discard, far); n > 0 || err != nil {
		t.Errorf("%d bytes, %v, want the end", n, err)
	}
}

// failingListener is a listener whose Accept fails until failures is used up, and for good
// after two connections.
type failingListener struct {
	net.Listener
	failures atomic.Int64
	accepted int
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.failures.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	conn, err := l.Listener.Accept()
	if l.accepted++; l.accepted == 2 {
		l.failures.Store(1 << 40)
	}
	return conn, err
}

// A listener recovers when Accept fails for a while, without spinning.
func TestListenerAcceptErrors(t *testing.T) {
	inner, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := &failingListener{Listener: inner}
	ln.failures.Store(4)
	l := unitListener(nil)
	l.Listener = ln
	start := time.Now()
	go l.accept()
	c, err := net.Dial("tcp4", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = io.WriteString(c, "POST / HTTP/1.1\r\n\r\n") // goes to net/http
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if took := time.Since(start); took < (5+10+20+40)*time.Millisecond {
		t.Errorf("4 failures were over in %v", took)
	}
	c2, err := net.Dial("tcp4", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c2.Close()
	await(t, "failures", func() bool { n := ln.failures.Load(); return n > 0 && n < 1<<40-2 })
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if conn, err := l.Accept(); err != nil { // accepted, no request yet
		t.Error(err)
	} else {
		conn.Close()
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accepting from a closed listener: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
}

// A server that has stopped accepting but was not yet told to shut down does not hold
// connections open.
func TestListenerWithoutAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := unitListener(nil)
		l.conns.pristine.Add(1)
		near, far := net.Pipe()
		go l.handToNetHTTP(near)
		go l.stopServing()
		start := time.Now()
		if _, err := far.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the client read %v, want the end", err)
		}
		if took := time.Since(start); took != firstRequestTimeout {
			t.Errorf("the connection was kept for %v, want %v", took, firstRequestTimeout)
		}
		l.conns.pristine.Done()
	})
}

// TestLingeringIsBounded checks that a connection that is closed in stages always ends, and
// that a client can have only a limited number of them.
func TestLingeringIsBounded(t *testing.T) {
	client := netip.MustParseAddr("192.0.2.1")
	for name, tc := range map[string]struct {
		send func(conn net.Conn)
		want time.Duration
	}{
		"closes":         {func(conn net.Conn) { _ = conn.Close() }, 0},
		"silent":         {func(net.Conn) {}, lingerIdle},
		"sends and ends": {func(conn net.Conn) { _, _ = conn.Write(make([]byte, 1<<20)); time.Sleep(time.Second); _ = conn.Close() }, time.Second},
		"trickles": {func(conn net.Conn) {
			for _, err := conn.Write([]byte{0}); err == nil; _, err = conn.Write([]byte{0}) {
				time.Sleep(time.Second)
			}
		}, lingerTime},
		"floods": {func(conn net.Conn) {
			for p := make([]byte, 1<<20); ; {
				if _, err := conn.Write(p); err != nil {
					return
				}
			}
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var l Lingering
				near, far := net.Pipe()
				start := time.Now()
				sent := make(chan struct{})
				go func() { tc.send(far); close(sent) }()
				l.Close(near, client)
				if took := time.Since(start); took != tc.want {
					t.Errorf("closed after %v, want %v", took, tc.want)
				}
				if len(l.n) != 0 {
					t.Errorf("%v connections are left", l.n)
				}
				_ = far.Close()
				<-sent
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		var l Lingering
		start := time.Now()
		for range lingerPerClient {
			near, _ := net.Pipe()
			go l.Close(near, client)
		}
		synctest.Wait()
		near, _ := net.Pipe()
		l.Close(near, client)
		if took := time.Since(start); took != 0 {
			t.Errorf("one too many was closed after %v", took)
		}
		other, _ := net.Pipe()
		l.Close(other, netip.MustParseAddr("192.0.2.2"))
		if took := time.Since(start); took != lingerIdle {
			t.Errorf("another client's was closed after %v", took)
		}
	})
}

// countingBody is endless content that counts reads.
type countingBody struct{ reads int }

func (b *countingBody) Read([]byte) (int, error) { b.reads++; return 0, io.EOF }

// The content of refused requests is read for a limited number of a client's requests at a
// time.
func TestDroppedContentIsBounded(t *testing.T) {
	var l Lingering
	client := netip.MustParseAddr("192.0.2.1")
	reads := func() int {
		body := new(countingBody)
		l.Drop(client, body, func(time.Time) error { return nil })
		return body.reads
	}
	if n := reads(); n != 1 || len(l.n) != 0 {
		t.Errorf("%d reads, and %v requests are left", n, l.n)
	}
	for range lingerPerClient {
		l.enter(client)
	}
	if n := reads(); n != 0 {
		t.Errorf("%d reads of one too many", n)
	}
}

// TestListenerBelowTLS guards against a change of the listener type in crypto/tls.
func TestListenerBelowTLS(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if listenerBelowTLS(ln).IsValid() {
		t.Error("a TCP listener counts as a TLS listener")
	}
	if over := tls.NewListener(ln, &tls.Config{}); !listenerBelowTLS(over).IsValid() {
		t.Error("a TLS listener is not recognized")
	}
}

// A connection reads the same however its bytes are split.
func TestReadConnFirst(t *testing.T) {
	for _, text := range []string{"\r\n\r\nGET /", "GET /\r\n", "\r\rGET", "\rG", "\r\n\n", "\n\r\n"} {
		for size := 1; size <= len(text); size++ {
			near, far := tcpPair(t)
			c := newReadConn(near, nil)
			c.isFirstRead, c.server = true, unitServer(nil)
			go func() {
				_, _ = io.WriteString(far, text[:size])
				_, _ = io.WriteString(far, text[size:])
				_ = far.CloseWrite()
			}()
			got, err := io.ReadAll(c)
			want := text
			for strings.HasPrefix(want, "\r\n") {
				want = want[2:]
			}
			if err != nil || !bytes.Equal(got, []byte(want)) {
				t.Errorf("%q in pieces of %d: %q, %v, want %q", text, size, got, err, want)
			}
		}
	}
}

// FuzzNetHTTPRefusal checks that only a response in exactly net/http's form is replaced.
func FuzzNetHTTPRefusal(f *testing.F) {
	for _, line := range []string{"400 Bad Request", "400 Bad Request: x", "431 Request Header Fields Too Large", "200 OK"} {
		f.Add([]byte("HTTP/1.1 " + line + string(errorFields) + line))
	}
	f.Add([]byte("HTTP/1.1 417 Expectation Failed\r\nConnection: close\r\nDate: Mon, 30 Nov 2026 07:00:00 GMT\r\nContent-Length: 0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		status, _, ok := isNetHTTPRefusal(p)
		if ok && (len(status) < 3 || !bytes.HasPrefix(p, []byte("HTTP/1.1 "+status[:3]))) {
			t.Errorf("%q counts as %q", p, status)
		}
	})
}

// Each line of a request is scanned once, however its bytes arrive.
func TestRequestLinesAreReadOnce(t *testing.T) {
	near, _ := tcpPair(t)
	head := "GET http://a.example/ HTTP/1.1\r\n" + strings.Repeat("a:\r\n", 900) + "\r\n"
	c := newClientConn(unitListener(nil), newReadConn(near, nil), false)
	c.r = bufio.NewReaderSize(iotest.OneByteReader(strings.NewReader(head)), 4<<10)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	n, err := c.readHead()
	runtime.ReadMemStats(&after)
	if n != len(head)-len(h1.HeadEnd) || err != nil {
		t.Errorf("a head of %d bytes, %v", n, err)
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > 2<<20 {
		t.Errorf("a head of %d bytes allocates %d bytes", len(head), took)
	}
}

// FuzzParseURL checks that a target that net/http accepts is parsed alike here, and that
// any other accepted target differs from a valid one only in its use of %.
func FuzzParseURL(f *testing.F) {
	for _, target := range []string{"http://a/50%", "http://a%/", "http://a/%zz?%", "http://a?%", "http://a/%41%", "http://[::1%25lo]/%", "http://u:%@a/", "http://", "http:///?\x05", "http://a/%?\x05", "http://a/%\x7f"} {
		f.Add(target)
	}
	f.Fuzz(func(t *testing.T, target string) {
		if !strings.HasPrefix(target, "http://") {
			return
		}
		want, err := url.ParseRequestURI(target)
		got, err2 := parseURL(target)
		switch {
		case err == nil && (err2 != nil || *got != *want && got.User == nil):
			t.Errorf("%q: %v, %v, want %v", target, got, err2, want)
		case err2 == nil && strings.ContainsFunc(target, isControl):
			t.Errorf("%q is accepted: it has a control character", target)
		case err != nil && err2 == nil:
			if _, rest, _ := strings.Cut(target[len("http://"):], "/"); !strings.Contains(rest, "%") {
				t.Errorf("%q is accepted: %v", target, got)
			}
		}
	})
}
