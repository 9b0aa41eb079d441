// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// A connection that is busy while the server shuts down completes its response. The fast
// path serves no connection that arrives later.
func TestClientConnAtShutdown(t *testing.T) {
	t.Parallel()
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
	t.Parallel()
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
	t.Parallel()
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
		Listeners: new(Listeners), Lingering: new(Lingering), Successor: last,
		Prepares: func(any) bool { return false },
		Exiting:  func() bool { return false },

		OnInvalid:        func(net.Conn, Invalid) []byte { return nil },
		OnHandshakeError: func(net.Conn, error) {},
		OnEnd:            func(net.Conn) {},
		OnPanic:          func(string, any, []byte) {},
		OnAcceptError:    func(error) {},
	}
}

func last(accepting []*Listener) *Listener {
	if len(accepting) == 0 {
		return nil
	}
	return accepting[len(accepting)-1]
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
	t.Parallel()
	near, far := tcpPair(t)
	c := newClientConn(unitListener(nil), newReadConn(near, nil), false)
	c.start()
	ctx := c.newRequest(requestLine{method: http.MethodGet, version: "HTTP/1.1"}, nil).Context()
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
	t.Parallel()
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

// A request that something may still use when its handler has returned does not become another
// request of the connection.
func TestKeptRequests(t *testing.T) {
	t.Parallel()
	for name, keep := range map[string]func(context.Context){
		"watched":  func(ctx context.Context) { ctx.Done() },
		"kept":     Keep,
		"prepared": func(ctx context.Context) { ctx.Value("prepared") },
	} {
		t.Run(name, func(t *testing.T) {
			near, far := tcpPair(t)
			var kept []*http.Request
			l := unitListener(func(w http.ResponseWriter, r *http.Request) {
				keep(r.Context())
				kept = append(kept, r)
			})
			l.server.Prepares = func(key any) bool { return key == "prepared" }
			l.server.Prepare = func(r *http.Request, _ http.ResponseWriter, _ any) context.Context { return r.Context() }
			c := newClientConn(l, newReadConn(near, nil), false)
			c.start()
			const requests = 10
			for i := range requests {
				fmt.Fprintf(far, "GET http://a.example/%d HTTP/1.1\r\nHost: x\r\nX-Number: %d\r\n\r\n", i, i)
				if r, _ := c.nextRequest(); r == nil || !c.serveRequest(r) {
					t.Fatal("the connection ends")
				}
			}
			for i, r := range kept {
				if r.RequestURI != fmt.Sprintf("http://a.example/%d", i) || r.Header.Get("X-Number") != fmt.Sprint(i) {
					t.Errorf("request %d has become %s with %v", i, r.RequestURI, r.Header)
				}
			}
		})
	}
}
