// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// onBothPaths runs a test twice: with clients on the fast path, and with clients served by
// Caddy's HTTP server.
func onBothPaths(t *testing.T, options string, test func(t *testing.T, w *world)) {
	for _, way := range []string{"own", "net/http"} {
		t.Run(way, func(t *testing.T) {
			w := newWorld(t, "", nil)
			if way == "own" {
				w.load(w.site(options))
			} else {
				w.load(inRoute(w.site(options)))
			}
			test(t, w)
		})
	}
}

// startFixedOrigin starts an HTTP/1 origin that sends the same bytes in response to each request,
// and returns its address.
func startFixedOrigin(t testing.TB, answer string) string {
	return listen(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		for {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			if _, err := io.WriteString(c, strings.ReplaceAll(answer, "\n", "\r\n")); err != nil {
				return
			}
		}
	})
}

// A head, and likewise the trailers, is limited in bytes and in lines, however the lines
// are formed.
func TestHeadsAreBounded(t *testing.T) {
	const head, end = "HTTP/1.1 200 OK\nContent-Length: 2\n", "\nok"
	const trailers = "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\n"
	names := strings.Repeat("a,", h1.MaxFields)
	rows := []struct {
		name, answer string
		ok           bool
	}{
		{"the maximum of lines", head + strings.Repeat("a:\n", h1.MaxFields-1) + end, true},
		{"one line more", head + strings.Repeat("a:\n", h1.MaxFields) + end, false},
		{"one name more", head + numbered(h1.MaxFields) + end, false},
		{"too many folded lines", head + "a: b\n" + strings.Repeat(" x\n", h1.MaxFields) + end, false},
		{"a long value", head + "a: " + strings.Repeat("x", h1.MaxHead-100) + "\n" + end, true},
		{"a longer value", head + "a: " + strings.Repeat("x", h1.MaxHead) + "\n" + end, false},
		{"too many options", head + "Connection: " + names + "a\n" + end, false},
		{"too many names of trailers", strings.Replace(trailers, "\n\n", "\nTrailer: "+names+"a\n\n", 1) + "\n", false},
		{"the maximum of trailers", trailers + numbered(h1.MaxFields) + "\n", true},
		{"one trailer more", trailers + numbered(h1.MaxFields+1) + "\n", false},
		{"longer trailers", trailers + "a: " + strings.Repeat("x", h1.MaxHead) + "\n\n", false},
	}
	onBothPaths(t, "", func(t *testing.T, w *world) {
		for _, row := range rows {
			c := w.dial()
			c.send("GET http://" + startFixedOrigin(t, row.answer) + "/ HTTP/1.1\nHost: x\n\n")
			res, err := http.ReadResponse(bufio.NewReaderSize(c, h1.MaxHead), nil) // the trailers must fit too
			if err != nil {
				t.Fatalf("%s: %v", row.name, err)
			}
			body, err := io.ReadAll(res.Body)
			complete := err == nil && res.StatusCode == http.StatusOK
			if complete != row.ok {
				t.Errorf("%s: %s, %.100q, %v", row.name, res.Status, body, err)
			}
			if res.StatusCode == http.StatusBadGateway && !strings.Contains(res.Header.Get("Proxy-Status"), "http_response_header_section_size") {
				t.Errorf("%s: Proxy-Status %q", row.name, res.Header.Get("Proxy-Status"))
			}
		}
	})
}

// numbered returns n fields with different names.
func numbered(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "x%d: 1\n", i)
	}
	return b.String()
}

// The same limits apply to an origin that speaks HTTP/2.
func TestHTTP2HeadsAreBounded(t *testing.T) {
	onBothPaths(t, "", func(t *testing.T, w *world) {
		for _, row := range []struct {
			name          string
			lines, length int
			trailers      int
			status        int
		}{
			{"few lines", 10, 10, 0, 200},
			{"one line too many", h1.MaxFields + 1, 1, 0, 502},
			{"long lines", 10, h1.MaxHead / 10, 0, 502},
			{"the maximum of trailers", 1, 1, h1.MaxFields, 200},
			{"one trailer more", 1, 1, h1.MaxFields + 1, 0},
		} {
			origin := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
				fields := []string{":status", "200"}
				for i := range row.lines {
					fields = append(fields, fmt.Sprint("x", i), strings.Repeat("x", row.length))
				}
				f.longHeaders(stream, false, fields...)
				fields = nil
				for i := range row.trailers {
					fields = append(fields, fmt.Sprint("t", i), "1")
				}
				_ = f.WriteData(stream, len(fields) == 0, []byte("ok"))
				if len(fields) > 0 {
					f.longHeaders(stream, true, fields...)
				}
			})
			c := w.dial()
			c.send("GET https://" + origin + "/ HTTP/1.1\nHost: x\n\n")
			res, err := http.ReadResponse(bufio.NewReaderSize(c, h1.MaxHead), nil) // the trailers must fit too
			if err != nil {
				t.Fatalf("%s: %v", row.name, err)
			}
			_, err = io.ReadAll(res.Body)
			if row.status == 0 && err == nil || row.status != 0 && (err != nil || res.StatusCode != row.status) {
				t.Errorf("%s: %s, %v", row.name, res.Status, err)
			}
			if row.status == 502 && !strings.Contains(res.Header.Get("Proxy-Status"), "http_response_header_section_size") {
				t.Errorf("%s: Proxy-Status %q", row.name, res.Header.Get("Proxy-Status"))
			}
		}
	})
}

// A client that does not read responses to the end can make the proxy hold only a bounded
// amount of large heads. Other clients are not affected, nor is this one afterwards.
func TestHeldHeadsAreBounded(t *testing.T) {
	const size, maxHeldHeads = 200 << 10, 4 << 20
	proceed := make(chan struct{})
	plain := listen(t, func(c *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nX-Large: "+strings.Repeat("x", size)+"\r\nContent-Length: 2\r\n\r\no")
			<-proceed
			_, _ = io.WriteString(c, "k")
		}
	})
	secure := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
		f.longHeaders(stream, false, ":status", "200", "x-large", strings.Repeat("x", size))
		_ = f.WriteData(stream, false, []byte("o"))
	})
	for _, url := range []string{"http://" + plain, "https://" + secure} {
		onBothPaths(t, "", func(t *testing.T, w *world) {
			var conns []*rawConn
			for i := range maxHeldHeads/size + 2 {
				c := w.dial()
				conns = append(conns, c)
				c.send("GET " + url + "/ HTTP/1.1\nHost: x\n\n")
				res, err := http.ReadResponse(c.r, nil)
				if err != nil {
					t.Fatal(err)
				}
				if want := i < maxHeldHeads/size; (res.StatusCode == http.StatusOK) != want || !want && res.StatusCode != http.StatusBadGateway {
					t.Errorf("%s: response %d is %s", url, i, res.Status)
				}
			}
			for _, c := range conns {
				_ = c.Close()
			}
			eventually(t, "the heads to be released", func() bool {
				c := w.dial()
				defer c.Close()
				c.send("GET " + url + "/ HTTP/1.1\nHost: x\n\n")
				res, err := http.ReadResponse(c.r, nil)
				return err == nil && res.StatusCode == http.StatusOK
			})
		})
	}
	close(proceed)
}

// A request is limited in lines, too.
func TestRequestLinesAreBounded(t *testing.T) {
	onBothPaths(t, "", func(t *testing.T, w *world) {
		for n, want := range map[int]int{h1.MaxFields - 10: 200, h1.MaxFields + 10: 431} {
			c := w.dial()
			c.send("GET " + w.origin.URL + "/ HTTP/1.1\nHost: x\n" + strings.Repeat("a:\n", n) + "\n")
			if res, _ := c.response(http.MethodGet); res.StatusCode != want {
				t.Errorf("%d lines: %s, want %d", n, res.Status, want)
			}
		}
	})
}

// The largest expressible chunk size is accepted, even behind another chunk in the same
// buffer.
func TestLargestChunk(t *testing.T) {
	chunks := &h1.ChunkReader{R: bufio.NewReader(strings.NewReader(fmt.Sprintf("5\r\nhello\r\n%x\r\nx", int64(math.MaxInt64))))}
	got, err := io.ReadAll(chunks)
	if string(got) != "hellox" || err != io.ErrUnexpectedEOF {
		t.Errorf("%q, %v", got, err)
	}
}

// A request that ends in a handler's panic is logged and counted like any other.
func TestPanicIsLoggedAndCounted(t *testing.T) {
	for _, value := range []any{"out of range", http.ErrAbortHandler} {
		w := newWorld(t, "", nil)
		shared, err := acquireProcess()
		if err != nil {
			t.Fatal(err)
		}
		defer releaseProcess()
		var h *proxy
		for h = range shared.proxies.All() {
		}
		failed := func() int64 { return program.metrics.Read().Requests[metrics.Other][metrics.Failed] }
		before := failed()
		next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { panic(value) })
		func() {
			defer func() {
				if got := recover(); got != value {
					t.Errorf("the panic continued as %v, want %v", got, value)
				}
			}()
			r, _ := http.NewRequest(http.MethodGet, "/panics", nil)
			r.RequestURI, r.RemoteAddr = "/panics", "127.0.0.1:1234"
			_ = h.config.ServeHTTP(nil, r, next)
		}()
		line := w.waitLog("request", 1)[0]
		if line["path"] != "/panics" || !strings.Contains(fmt.Sprint(line["error"]), fmt.Sprint(value)) {
			t.Errorf("log line %v", line)
		}
		if n := failed() - before; n != 1 {
			t.Errorf("%v requests were counted as failed, want 1", n)
		}
	}
}

// FuzzHeads reads arbitrary responses and bounds the cost to a multiple of their size:
// bytes allocated, allocations and reads.
func FuzzHeads(f *testing.F) {
	const head = "HTTP/1.1 200 OK\n"
	chunks := head + "Transfer-Encoding: chunked\n"
	for _, answer := range []string{
		head + "a:b\n" + strings.Repeat(" x\n", 50_000) + "\n",
		head + "a:b\n" + strings.Repeat(" x\n", h1.MaxFields-1) + "\n",
		head + strings.Repeat("a:\n", h1.MaxFields) + "\n",
		head + strings.Repeat("a:\n", h1.MaxHead/3) + "\n",
		head + numbered(h1.MaxFields) + "\n",
		head + "Connection: " + strings.Repeat("a,", h1.MaxFields-1) + "\n\n",
		head + "Content-Length: " + strings.Repeat("2,", h1.MaxFields) + "2\n\nok",
		chunks + "Trailer: " + strings.Repeat("a,", h1.MaxFields-1) + "\n\n0\n" + numbered(h1.MaxFields) + "\n",
		chunks + "Connection: " + strings.Repeat("a,", h1.MaxFields-1) + "\n\n0\n" + numbered(h1.MaxFields) + "\n",
		chunks + "\n" + strings.Repeat("1\nx\n", 10_000) + "0\n\n",
		chunks + "\n1;" + strings.Repeat("x", h1.MaxChunkLine) + "\nx\n0\n\n",
		chunks + "\n5\nhello\n7fffffffffffffff\nx",
		chunks + "\n0\n" + "a:b\n" + strings.Repeat(" x\n", h1.MaxFields-1) + "\n",
		strings.Repeat("HTTP/1.1 103 Early Hints\n\n", interimBurst) + head + "\n",
	} {
		f.Add([]byte(strings.ReplaceAll(answer, "\n", "\r\n")))
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		var least work
		for i := range 3 { // other goroutines may allocate at the same time
			if w := measure(func(r *bufio.Reader) { readAnswer(r) }, input); i == 0 || w.bytes < least.bytes {
				least = w
			}
		}
		size, lines := uint64(len(input)), uint64(bytes.Count(input, []byte("\n")))
		if most := 32<<10 + 8*size + 768*min(lines, 2*h1.MaxFields); least.bytes > most {
			t.Errorf("%d bytes of input allocate %d bytes, want at most %d", size, least.bytes, most)
		}
		if most := 100 + size; least.allocations > most {
			t.Errorf("%d bytes of input take %d allocations, want at most %d", size, least.allocations, most)
		}
		if most := 10 + size/1024; least.reads > most {
			t.Errorf("%d bytes of input take %d reads, want at most %d", size, least.reads, most)
		}
	})
}

// readAnswer reads a response and processes its trailers as an exchange does, to its end or
// to an error.
func readAnswer(r *bufio.Reader) {
	for range interimBurst {
		var res http.Response
		if h1.ReadResponse(r, http.MethodGet, &res, new(h1.Body)) != nil {
			return
		}
		if res.StatusCode < 200 {
			continue
		}
		connection := res.Header["Connection"]
		announced := trailingNames(res.Trailer, connection)
		removeHopByHop(res.Header)
		buf := tcpconn.GetBuffer()
		defer buf.Free()
		var err error
		for err == nil {
			_, err = res.Body.Read(buf[:])
		}
		if err == io.EOF {
			_ = passTrailers(fieldsOnly(res.Header), &res, announced, connection)
		}
		return
	}
}

// fieldsOnly is a ResponseWriter that keeps nothing but the fields.
type fieldsOnly http.Header

func (f fieldsOnly) Header() http.Header       { return http.Header(f) }
func (fieldsOnly) Write(p []byte) (int, error) { return len(p), nil }
func (fieldsOnly) WriteHeader(int)             {}

// work is the cost of reading something.
type work struct{ bytes, allocations, reads uint64 }

// measure returns the cost of read for input, without the buffer.
func measure(read func(*bufio.Reader), input []byte) (w work) {
	source := &countedReads{r: bytes.NewReader(input)}
	r := bufio.NewReaderSize(source, 16<<10)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	read(r)
	runtime.ReadMemStats(&after)
	return work{after.TotalAlloc - before.TotalAlloc, after.Mallocs - before.Mallocs, source.n}
}

type countedReads struct {
	r io.Reader
	n uint64
}

func (c *countedReads) Read(p []byte) (int, error) {
	c.n++
	return c.r.Read(p)
}
