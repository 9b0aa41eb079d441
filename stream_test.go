// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// readUntil reads until the text read ends with end.
func (c *rawConn) readUntil(end string) string {
	c.t.Helper()
	var b strings.Builder
	for !strings.HasSuffix(b.String(), end) {
		one, err := c.r.ReadByte()
		if err != nil {
			c.t.Fatalf("reading up to %q: %v (so far %q)", end, err, b.String())
		}
		b.WriteByte(one)
	}
	return b.String()
}

// streamRequest reads the head of a request, for an origin.
func streamRequest(c *net.TCPConn) *bufio.Reader {
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil || line == "\r\n" {
			return r
		}
	}
}

// TestStreamDown checks that each byte is passed on as it arrives: the origin waits until
// the client has the previous bytes.
func TestStreamDown(t *testing.T) {
	for name, framing := range map[string][3]string{
		"chunks":            {"Transfer-Encoding: chunked\r\n\r\n", "3\r\none\r\n", "3\r\ntwo\r\n0\r\n\r\n"},
		"half a line end":   {"Transfer-Encoding: chunked\r\n\r\n", "3\r\none\r", "\n3\r\ntwo\r\n0\r\n\r\n"},
		"half a size":       {"Transfer-Encoding: chunked\r\n\r\n", "3\r\none\r\n0", "3\r\ntwo\r\n0\r\n\r\n"},
		"a size in advance": {"Transfer-Encoding: chunked\r\n\r\n", "3\r\none\r\n3\r\n", "two\r\n0\r\n\r\n"},
		"part of a chunk":   {"Transfer-Encoding: chunked\r\n\r\n", "6\r\none", "two\r\n0\r\n\r\n"},
		"known length":      {"Content-Length: 6\r\n\r\n", "one", "two"},
		"to the end":        {"\r\n", "one", "two"},
		"an event stream":   {"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n", "3\r\none\r\n", "3\r\ntwo\r\n0\r\n\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			next := make(chan struct{})
			origin := listen(t, func(c *net.TCPConn) {
				streamRequest(c)
				for _, part := range []string{"HTTP/1.1 200 OK\r\n" + framing[0], framing[1], framing[2]} {
					if _, err := io.WriteString(c, part); err != nil {
						return
					}
					<-next
				}
			})
			c := newWorld(t, "", nil).dial()
			c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
			c.readUntil("\r\n\r\n")
			next <- struct{}{}
			c.readUntil("one")
			next <- struct{}{}
			c.readUntil("two")
			next <- struct{}{}
		})
	}
}

// TestStreamBothWays checks that request and response bodies stream at the same time: each
// chunk is echoed before the next is sent. The connection then closes, because the response
// began before the request was complete.
func TestStreamBothWays(t *testing.T) {
	origin := listen(t, func(c *net.TCPConn) {
		r := streamRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		_, _ = io.Copy(c, r)
	})
	c := newWorld(t, "", nil).dial()
	c.send("POST http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\nTransfer-Encoding: chunked\n\n")
	if head := c.readUntil("\r\n\r\n"); !strings.Contains(head, "\r\nConnection: close\r\n") {
		t.Errorf("the response lacks Connection: close: %s", head)
	}
	for i := range 10 {
		chunk := fmt.Sprintf("chunk %d", i)
		c.send(fmt.Sprintf("%x\n%s\n", len(chunk), chunk))
		c.readUntil(chunk)
	}
	c.send("0\n\n")
	c.readUntil("0\r\n\r\n")
	if rest := c.readAll(); rest != "" {
		t.Errorf("after the response: got %q", rest)
	}
}

// TestStreamKeepAlive checks that a connection is reused after a body of known length.
func TestStreamKeepAlive(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(body)
	}))
	c := w.dial()
	for i := range 50 {
		body := strings.Repeat("x", i*997)
		c.send(fmt.Sprintf("POST %s/ HTTP/1.1\nHost: x\nContent-Length: %d\n\n%s", w.origin.URL, len(body), body))
		if res, got := c.response(http.MethodPost); got != body || res.Close {
			t.Fatalf("request %d: %s, %d bytes, close: %t", i, res.Status, len(got), res.Close)
		}
	}
}

// TestStreamSlowRequest checks that the response-header timeout starts once the origin has
// the whole request, so that a slow upload may take longer; but an origin that stops
// reading the request times out.
func TestStreamSlowRequest(t *testing.T) {
	w := newWorld(t, "response_header_timeout 1s", nil)
	origin := newRuleOrigin(t, "")
	c := w.dial()
	c.send("POST http://" + origin.address + "/ HTTP/1.1\nHost: x\nContent-Length: 6\n\n")
	for range 6 {
		time.Sleep(200 * time.Millisecond)
		c.send("x")
	}
	if res, body := c.response(http.MethodPost); body != "ok" {
		t.Errorf("%s %q", res.Status, body)
	}
	deaf := listen(t, func(c *net.TCPConn) {
		streamRequest(c)
		<-t.Context().Done()
	})
	c = w.dial()
	c.send("POST http://" + deaf + "/ HTTP/1.1\nHost: x\nContent-Length: 1000000000\n\n")
	go func() { _, _ = io.CopyN(c, zeros{}, 1000000000) }()
	if res, body := c.response(http.MethodPost); res.StatusCode != http.StatusGatewayTimeout {
		t.Errorf("an origin that stopped reading: %s %q", res.Status, body)
	}
}

// TestStreamSteadyOrigin checks that for an origin that reads a request slowly, the timeout
// starts when it has read nearly all of it: little is left in kernel buffers.
func TestStreamSteadyOrigin(t *testing.T) {
	const size, rate = 4 << 20, 1200 << 10 // bytes, and bytes per second
	origin := listen(t, func(c *net.TCPConn) {
		_ = c.SetReadBuffer(256 << 10)
		r := streamRequest(c)
		for read, start := int64(0), time.Now(); read < size; {
			time.Sleep(10 * time.Millisecond)
			n, err := io.CopyN(io.Discard, r, min(size, int64(time.Since(start).Seconds()*rate))-read)
			if read += n; err != nil {
				return
			}
		}
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	})
	c := newWorld(t, "response_header_timeout 1500ms", nil).dial()
	c.send(fmt.Sprintf("POST http://%s/ HTTP/1.1\nHost: x\nContent-Length: %d\n\n", origin, size))
	if _, err := io.CopyN(c, zeros{}, size); err != nil {
		t.Error(err)
	}
	if res, body := c.response(http.MethodPost); body != "ok" {
		t.Errorf("%s %q", res.Status, body)
	}
}

// TestStreamHeadInPieces checks a response head that arrives slowly, however early its
// first byte came.
func TestStreamHeadInPieces(t *testing.T) {
	origin := listen(t, func(c *net.TCPConn) {
		streamRequest(c)
		for _, piece := range []string{"HTTP/1.1 200 OK\r\n", "Content-Length: 2\r\n", "\r\n", "o", "k"} {
			_, _ = io.WriteString(c, piece)
			time.Sleep(2 * disconnectWatchDelay)
		}
	})
	c := newWorld(t, "", nil).dial()
	c.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\n\n")
	if res, body := c.response(http.MethodGet); body != "ok" {
		t.Errorf("%s %q", res.Status, body)
	}
}

// TestStreamInterim checks that interim responses do not extend the response-header
// timeout, and that a request that has got one is not retried.
func TestStreamInterim(t *testing.T) {
	endless := listen(t, func(c *net.TCPConn) {
		streamRequest(c)
		for {
			if _, err := io.WriteString(c, "HTTP/1.1 102 Processing\r\n\r\n"); err != nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
	c := newWorld(t, "response_header_timeout 150ms", nil).dial()
	c.send("GET http://" + endless + "/ HTTP/1.1\nHost: x\n\n")
	for {
		if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusProcessing {
			if res.StatusCode != http.StatusGatewayTimeout {
				t.Errorf("after interim responses: %s", res.Status)
			}
			break
		}
	}
	var requests atomic.Int64
	hinting := listen(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		for i := range 2 {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			requests.Add(1)
			_, _ = io.WriteString(c, []string{"HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"}[i])
		}
	})
	c = newWorld(t, "", nil).dial()
	for _, want := range []int{http.StatusNoContent, http.StatusEarlyHints, http.StatusBadGateway} {
		if want != http.StatusBadGateway {
			c.send("DELETE http://" + hinting + "/ HTTP/1.1\nHost: x\n\n")
		}
		if res, _ := c.response(http.MethodDelete); res.StatusCode != want {
			t.Errorf("got %s, want %d", res.Status, want)
		}
	}
	if n := requests.Load(); n != 2 {
		t.Errorf("the origin got %d requests, want 2", n)
	}
}

// TestStreamEarlyResponse checks that a response sent before the request body is complete
// reaches the client whole.
func TestStreamEarlyResponse(t *testing.T) {
	origin := listen(t, func(c *net.TCPConn) {
		streamRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
	})
	c := newWorld(t, "", nil).dial()
	c.send("POST http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\nContent-Length: 1000000000\n\nfirst")
	if res, body := c.response(http.MethodPost); res.StatusCode != http.StatusRequestEntityTooLarge || body != "big" {
		t.Errorf("got %s %q", res.Status, body)
	}
}

// TestStreamClientLeaves checks that a client's disconnect ends its exchange with the
// origin, whatever stage that has reached.
func TestStreamClientLeaves(t *testing.T) {
	silent, err := net.ListenPacket("udp4", "127.0.0.1:0") // a resolver
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	w := newWorld(t, "resolvers "+silent.LocalAddr().String(), nil)
	leaves := func(c *rawConn) {
		t.Helper()
		c.Close()
		if line := w.waitLog("request", 1)[0]; line["status"] != 499.0 {
			t.Errorf("status %v in the log, want 499", line["status"])
		}
		w.forgetLogs()
		eventually(t, "the connection to end", func() bool { return fastPathConns() == 0 })
	}
	for name, answer := range map[string]string{
		"before the response": "",
		"in the response":     "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
		"in a stream":         "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
		"after an interim":    "HTTP/1.1 103 Early Hints\r\nLink: ab\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			ended := make(chan error, 1)
			began := make(chan struct{})
			origin := listen(t, func(c *net.TCPConn) {
				r := streamRequest(c)
				_, _ = io.WriteString(c, answer)
				close(began)
				_, err := r.ReadByte()
				ended <- err
			})
			c := w.dial()
			c.get("http://"+origin+"/", "")
			<-began
			if answer != "" {
				c.readUntil("ab")
			}
			leaves(c)
			if err := <-ended; err == nil || os.IsTimeout(err) {
				t.Errorf("the origin read %v, want the end", err)
			}
		})
	}
	t.Run("in a dial", func(t *testing.T) {
		c := w.dial()
		c.get("http://silent.example/", "")
		if _, _, err := silent.ReadFrom(make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
		leaves(c)
	})
}

// streamSum reads n bytes into h.
func streamSum(t *testing.T, h hash.Hash, r io.Reader) string {
	t.Helper()
	if _, err := io.Copy(h, r); err != nil {
		t.Error(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// TestStreamLarge passes 50 MiB up and down unchanged, in constant memory.
func TestStreamLarge(t *testing.T) {
	const size = 50 << 20
	body := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{1}), size) }
	want := streamSum(t, sha256.New(), body())
	var got atomic.Value
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got.Store(streamSum(t, sha256.New(), r.Body))
		if r.URL.Path == "/length" {
			w.Header().Set("Content-Length", fmt.Sprint(size))
		}
		_, _ = io.Copy(w, body())
	}))
	for _, path := range []string{"/length", "/chunks"} {
		for _, known := range []bool{true, false} {
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			req, err := http.NewRequest(http.MethodPost, w.origin.URL+path, body())
			if err != nil {
				t.Fatal(err)
			}
			if known {
				req.ContentLength = size
			}
			res, err := w.client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			if sum := streamSum(t, sha256.New(), res.Body); sum != want {
				t.Errorf("%s: the response's checksum is %s, want %s", path, sum, want)
			}
			res.Body.Close()
			if got.Load() != want {
				t.Errorf("%s: the request's checksum is %s, want %s", path, got.Load(), want)
			}
			runtime.ReadMemStats(&after)
			if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 24<<20 {
				t.Errorf("%s: the heap grew by %d MiB", path, grown>>20)
			}
		}
	}
}

// TestStreamSlowReader checks that a slow client applies back-pressure to its own origin
// and delays no other client.
func TestStreamSlowReader(t *testing.T) {
	var sent atomic.Int64
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/other" {
			fmt.Fprint(w, "other")
			return
		}
		block := make([]byte, 64<<10)
		for range 4096 { // 256 MiB
			n, err := w.Write(block)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	}))
	origin := strings.TrimPrefix(w.origin.URL, "http://")
	slow := w.dial()
	slow.send("GET http://" + origin + "/slow HTTP/1.1\nHost: " + origin + "\n\n")
	slow.readUntil("\r\n\r\n")
	var last int64
	eventually(t, "back-pressure on the origin", func() bool {
		time.Sleep(100 * time.Millisecond)
		now := sent.Load()
		stopped := now == last && now > 0
		last = now
		return stopped
	})
	if last > 64<<20 {
		t.Errorf("the proxy read %d MiB from the origin for a client that does not read", last>>20)
	}
	res, err := w.client().Get(w.origin.URL + "/other")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, _ := io.ReadAll(res.Body); string(body) != "other" {
		t.Errorf("meanwhile another client got %q", body)
	}
}

// TestStreamWriteTimeout checks that the operator's write timeout ends a response to a
// client that does not read, on each path that copies a body.
func TestStreamWriteTimeout(t *testing.T) {
	const size = 64 << 20
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		_, _ = io.CopyN(w, zeros{}, size)
	}))
	loadCaddyfile(t, "{\nservers {\ntimeouts {\nwrite 100ms\n}\n}\n"+strings.TrimPrefix(w.globals(), "{\n")+w.site(""))
	c := w.dial()
	c.send("GET " + w.origin.URL + "/ HTTP/1.1\nHost: x\n\n")
	if line := w.waitLog("request", 1)[0]; line["error"] == nil {
		t.Errorf("the line of the request is %v", line)
	}
	if n, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) || n >= size {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// TestStreamSteadyReader checks that a client that reads slowly but steadily gets the whole
// response: what the kernel buffers for it never delays the next write beyond the timeout.
func TestStreamSteadyReader(t *testing.T) {
	const size, rate = 5 << 20, 400 << 10 // bytes, and bytes per second
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/known" {
			w.Header().Set("Content-Length", fmt.Sprint(size))
		}
		_, _ = io.CopyN(w, zeros{}, size)
	}))
	defer origin.Close()
	w := newTunnelWorld(t, tunnelSetup{options: "hosts proxy.example", servers: `listener_wrappers {
	async_proxy
	tls
}
timeouts {
	write_idle 1500ms
}`})
	var clients sync.WaitGroup
	for _, row := range []struct{ protocol, alpn, content string }{
		{"h1", "", ""},
		{"h1", "", "content"},
		{"tls", "http/1.1", ""},
		{"tls", "h2", ""},
	} {
		for _, path := range []string{"/known", "/unknown"} {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			tcp, conn, err := w.client(t, row.protocol).dial(ctx, row.alpn)
			if err != nil {
				t.Fatal(err)
			}
			defer tcp.Close()
			_ = tcp.SetReadBuffer(64 << 10)
			conn = &steadyConn{Conn: conn, rate: rate, start: time.Now()}
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, origin.URL+path, strings.NewReader(row.content))
			if err != nil {
				t.Fatal(err)
			}
			clients.Go(func() {
				read := int64(0)
				res, err := steadyRoundTrip(conn, request, row.alpn == "h2")
				if err == nil {
					read, err = io.Copy(io.Discard, res.Body)
				}
				if err != nil || read != size {
					t.Errorf("%s of %q: %d bytes, %v", path, row, read, err)
				}
			})
		}
	}
	eventually(t, "four clients on the fast path", func() bool { return fastPathConns() == 4 })
	clients.Wait()
}

// TestStreamStalledReader checks that the response to a client that has stopped reading is
// cut off, however much it has read before.
func TestStreamStalledReader(t *testing.T) {
	const size = 64 << 20
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/known" {
			w.Header().Set("Content-Length", fmt.Sprint(size))
		}
		_, _ = io.CopyN(w, zeros{}, size)
	}))
	defer origin.Close()
	w := newTunnelWorld(t, tunnelSetup{servers: `listener_wrappers {
	async_proxy
	tls
}
timeouts {
	write_idle 200ms
}`})
	for i, request := range []struct{ protocol, alpn, path, content string }{
		{"h1", "", "/known", ""},
		{"h1", "", "/unknown", ""},
		{"h1", "", "/known", "content"},
		{"h1", "", "/unknown", "content"},
		{"tls", "http/1.1", "/unknown", ""},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		tcp, conn, err := w.client(t, request.protocol).dial(ctx, request.alpn)
		if err != nil {
			t.Fatal(err)
		}
		defer tcp.Close()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, origin.URL+request.path, strings.NewReader(request.content))
		if err == nil {
			err = r.WriteProxy(conn)
		}
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.CopyN(io.Discard, conn, 8<<20)
		expectFastPath(t, fmt.Sprintf("%q", request), oneIf(request.protocol == "h1"))
		if line := w.waitLog("request", i+1)[i]; line["status"] != 499. {
			t.Errorf("%q: the line is %v", request, line)
		}
		if n, err := io.Copy(io.Discard, conn); err == nil && n >= size-8<<20 {
			t.Errorf("%q: %d more bytes, %v", request, n, err)
		}
	}
}

func steadyRoundTrip(conn net.Conn, request *http.Request, overHTTP2 bool) (*http.Response, error) {
	if overHTTP2 {
		c, err := newH2Conn(conn)
		if err != nil {
			return nil, err
		}
		return c.RoundTrip(request)
	}
	if err := request.WriteProxy(conn); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(conn), nil)
}

// steadyConn reads slowly for three and a half seconds, so that buffered data has by then waited for
// longer than the test's timeout.
type steadyConn struct {
	net.Conn
	rate, read float64 // bytes per second, and bytes
	start      time.Time
}

func (c *steadyConn) Read(b []byte) (int, error) {
	for time.Since(c.start) < 3500*time.Millisecond && c.read > time.Since(c.start).Seconds()*c.rate {
		time.Sleep(10 * time.Millisecond)
	}
	n, err := c.Conn.Read(b)
	c.read += float64(n)
	return n, err
}

// TestStreamLateEnd checks that the end of a response gets its own write deadline, even if
// the deadline of its last part has long passed.
func TestStreamLateEnd(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "all")
		_ = http.NewResponseController(w).Flush()
		time.Sleep(300 * time.Millisecond)
	}))
	loadCaddyfile(t, "{\nservers {\ntimeouts {\nwrite_idle 150ms\n}\n}\n"+strings.TrimPrefix(w.globals(), "{\n")+w.site(""))
	c := w.dial()
	c.send("GET " + w.origin.URL + "/ HTTP/1.1\nHost: x\n\n")
	if _, body := c.response(http.MethodGet); body != "all" {
		t.Errorf("got %q", body)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// TestStreamStaleConnection checks what happens when the origin has closed an idle
// connection: a request that may be retried is, any other gets a 502.
func TestStreamStaleConnection(t *testing.T) {
	var conns atomic.Int64
	closeIdle := make(chan struct{})
	origin := listen(t, func(c *net.TCPConn) {
		conns.Add(1)
		r := streamRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		if conns.Load() == 1 {
			// Reset as soon as the second request arrives.
			_, _ = r.ReadByte()
			_ = c.SetLinger(0)
			close(closeIdle)
			return
		}
		_, _ = io.Copy(io.Discard, r)
	})
	w := newWorld(t, "", nil)
	c := w.dial()
	for range 2 {
		c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
		if res, body := c.response(http.MethodGet); body != "ok" {
			t.Fatalf("%s %q", res.Status, body)
		}
	}
	<-closeIdle
	if n := conns.Load(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}

func TestStreamStalePost(t *testing.T) {
	var requests atomic.Int64
	origin := listen(t, func(c *net.TCPConn) {
		r := streamRequest(c)
		requests.Add(1)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		if line, _ := r.ReadString('\n'); strings.HasPrefix(line, "POST") {
			requests.Add(1)
		}
		_ = c.SetLinger(0)
	})
	c := newWorld(t, "", nil).dial()
	c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
	c.response(http.MethodGet)
	c.send("POST http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\nContent-Length: 5\n\nhello")
	if res, body := c.response(http.MethodPost); res.StatusCode != http.StatusBadGateway {
		t.Errorf("%s %q, want 502", res.Status, body)
	}
	if n := requests.Load(); n != 2 {
		t.Errorf("the origin saw %d requests, want the POST once", n-1)
	}
}

// TestStreamPipelined checks that pipelined requests are answered in order.
func TestStreamPipelined(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
	origin := strings.TrimPrefix(w.origin.URL, "http://")
	c := w.dial()
	var all strings.Builder
	for i := range 5 {
		fmt.Fprintf(&all, "GET http://%s/%d HTTP/1.1\nHost: %s\n\n", origin, i, origin)
	}
	c.send(all.String())
	for i := range 5 {
		if _, body := c.response(http.MethodGet); body != fmt.Sprintf("/%d", i) {
			t.Errorf("response %d is %q", i, body)
		}
	}
}

// streamUpgrade is an origin that accepts every upgrade, sends bytes right behind its 101,
// and then echoes.
func streamUpgrade(t *testing.T) string {
	return listen(t, func(c *net.TCPConn) {
		r := streamRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\nX-One: 1\r\n\r\nhello ")
		_, _ = io.Copy(c, r)
		_ = c.CloseWrite()
	})
}

// TestStreamUpgrade checks that an upgraded connection is a tunnel that includes the bytes
// behind the request and behind the 101, whether the proxy or the next handler served the
// request.
func TestStreamUpgrade(t *testing.T) {
	for _, name := range []string{"absolute form", "next handler"} {
		t.Run(name, func(t *testing.T) {
			origin := streamUpgrade(t)
			w := newWorld(t, "", nil)
			target := "http://" + origin + "/"
			if name == "next handler" {
				target = "/"
				site := strings.TrimSpace(w.site(""))
				w.load(strings.TrimSuffix(site, "}") + "\treverse_proxy " + origin + "\n}\n")
			}
			c := w.dial()
			c.send("GET " + target + " HTTP/1.1\nHost: " + origin + "\nConnection: Upgrade\nUpgrade: echo\n\nearly ")
			head := c.readUntil("\r\n\r\n")
			if !strings.HasPrefix(head, "HTTP/1.1 101 ") || !strings.Contains(head, "Upgrade: echo\r\n") || !strings.Contains(head, "X-One: 1\r\n") {
				t.Errorf("answer %q", head)
			}
			c.send("late")
			_ = c.CloseWrite()
			if got := c.readAll(); got != "hello early late" {
				t.Errorf("got %q, want %q", got, "hello early late")
			}
			if name == "absolute form" {
				line := w.waitLog("CONNECT tunnel closed", 1)[0]
				if line["bytes_up"] != float64(len("early late")) || line["bytes_down"] != float64(len("hello early late")) {
					t.Errorf("closing line %v, want all bytes behind the heads", line)
				}
			}
		})
	}
}

// TestStreamPool checks that all origin connections that were busy at once stay open, are
// reused, and are closed when their config is replaced.
func TestStreamPool(t *testing.T) {
	var opened, open atomic.Int64
	busy := make(chan struct{})
	var arrived atomic.Int64
	origin := listen(t, func(c *net.TCPConn) {
		opened.Add(1)
		open.Add(1)
		defer open.Add(-1)
		r := bufio.NewReader(c)
		for {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			if arrived.Add(1) == 8 {
				close(busy)
			}
			<-busy
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	w := newWorld(t, "", nil)
	var clients []*rawConn
	for range 8 {
		clients = append(clients, w.dial())
	}
	for range 3 {
		for _, c := range clients {
			c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
		}
		for _, c := range clients {
			if res, body := c.response(http.MethodGet); body != "ok" {
				t.Fatalf("%s %q", res.Status, body)
			}
		}
	}
	if n := opened.Load(); n != 8 {
		t.Errorf("%d connections were opened for 8 clients, want 8", n)
	}
	w.load("http://" + strings.TrimPrefix(freeAddress(t), "127.0.0.1") + ` {
}
`)
	eventually(t, "the connections to be closed", func() bool { return open.Load() == 0 })
}
