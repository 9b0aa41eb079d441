// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// stalledResponses are responses whose content stops arriving at some point.
var stalledResponses = map[string]string{
	"with a length":                "Content-Length: 1000\r\n\r\nx",
	"without any content":          "Content-Length: 1000\r\n\r\n",
	"large enough to splice":       "Content-Length: 1000000\r\n\r\n" + strings.Repeat("x", 300_000),
	"in chunks":                    "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
	"in the middle of a chunk":     "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n5",
	"to the end of the connection": "\r\nx",
	"in the trailers":              "Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nA: b\r\n",
}

// stallingOrigin answers each request with a response that stalls until more supplies the
// rest.
func stallingOrigin(t *testing.T, response string, more <-chan string) string {
	return listen(t, func(c *net.TCPConn) {
		_ = c.SetDeadline(time.Time{})
		for {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n"+response)
			if _, err := io.WriteString(c, <-more); err != nil {
				return
			}
		}
	})
}

// expectTruncated reads a response that must be visibly incomplete.
func (c *rawConn) expectTruncated(what string) {
	c.t.Helper()
	res, err := http.ReadResponse(c.r, nil)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Errorf("%s: it is not cut off", what)
	}
	if err != nil {
		return // nothing was sent
	}
	if n, err := io.Copy(io.Discard, res.Body); errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Errorf("%s: it is not cut off", what)
	} else if err == nil && res.ContentLength != n && !res.Close {
		c.t.Errorf("%s: %d bytes and an orderly end", what, n)
	}
}

// A response whose origin sends nothing more is cut off after response_idle_timeout.
func TestStalledContent(t *testing.T) {
	w := newWorld(t, "", nil)
	for _, way := range []string{"fast", "ordinary"} {
		site := w.site("response_idle_timeout 100ms")
		if way == "ordinary" {
			site = inRoute(site)
		}
		w.load(site)
		n := 0
		for name, response := range stalledResponses {
			origin := stallingOrigin(t, response, nil)
			c := w.dial()
			c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
			c.expectTruncated(way + ", " + name)
			n++
			_ = c.Close()
		}
		origin := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
			f.headers(stream, false, ":status", "200")
			_ = f.WriteData(stream, false, []byte("x"))
		})
		c := w.dial()
		c.send("GET https://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
		c.expectTruncated(way + ", HTTP/2")
		n++
		lines := w.waitLog("request", n)
		for _, line := range lines[len(lines)-n:] {
			if text, _ := line["error"].(string); !strings.Contains(text, "response_idle_timeout") {
				t.Errorf("%s: the line %v does not say why", way, line)
			}
		}
		w = &world{t: t, proxy: freeAddress(t), logs: w.logs + ".next", origin: w.origin}
	}
}

// Content that arrives slowly is not stalled, nor is content that the client reads slowly.
func TestSlowContent(t *testing.T) {
	w := newWorld(t, "response_idle_timeout 1s", nil)
	get := func(origin string) *rawConn {
		c := w.dial()
		_ = c.SetReadBuffer(64 << 10)
		c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
		return c
	}
	const size = 32 << 20
	huge := listen(t, func(c *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", size, strings.Repeat("x", size))
		}
	})
	slow := listen(t, func(c *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
			for range 6 {
				time.Sleep(300 * time.Millisecond)
				_, _ = io.WriteString(c, "x")
			}
		}
	})
	reader, stalled, other := get(huge), get(stallingOrigin(t, "Content-Length: 6\r\n\r\nx", make(chan string))), get(slow)
	if res, body := other.response(http.MethodGet); body != "xxxxxx" {
		t.Errorf("%s %q", res.Status, body)
	}
	stalled.expectTruncated("beside it")
	// This client has read nothing meanwhile.
	if _, body := reader.response(http.MethodGet); len(body) != size {
		t.Errorf("%d bytes, want %d", len(body), size)
	}
}

// Chunk framing, too, may arrive slowly and in pieces.
func TestSlowChunks(t *testing.T) {
	w := newWorld(t, "", nil)
	h := provisioned(t)[0]
	h.directive.originLimits.ContentGrace = 40 * time.Millisecond
	long := "A: " + strings.Repeat("a", 20<<10) // more than the buffer holds
	for name, parts := range map[string][]string{
		"everything":             {"5", "\r", "\n", "he", "llo", "\r", "\n0", "\r\n", "A: b\r\n", "\r", "\n"},
		"lines that end in LF":   {"5\r\n", "hello\r\n", "0\r\n", "A: b\n\n"},
		"no trailers, and LF":    {"5\r\n", "hello\r\n", "0\r\n", "\n"},
		"trailers that are long": {"5\r\nhello\r\n", "0\r\n", long, "\r\n", "\r\n"},
	} {
		more := make(chan string)
		origin := listen(t, func(c *net.TCPConn) {
			_ = c.SetDeadline(time.Time{})
			_ = c.SetNoDelay(true)
			if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			for part := range more {
				_, _ = io.WriteString(c, part)
			}
		})
		c := w.dial()
		c.r = bufio.NewReaderSize(c, h1.MaxHead) // the trailers must fit too
		c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
		go func() {
			defer close(more)
			for i, part := range parts {
				if i%2 == 0 {
					time.Sleep(h.directive.originLimits.ContentGrace / 4) // the wait ends before it counts
				} else {
					time.Sleep(3 * h.directive.originLimits.ContentGrace)
				}
				more <- part
			}
		}()
		if res, body := c.response(http.MethodGet); body != "hello" {
			t.Errorf("%s: %s %q", name, res.Status, body)
		}
		_ = c.Close()
	}
}

// A response that waits for its content counts as one of the client's tunnels meanwhile.
func TestStalledContentCountsAsTunnel(t *testing.T) {
	w := newWorld(t, "max_tunnels 1", nil)
	h := provisioned(t)[0]
	h.directive.originLimits.ContentGrace = 20 * time.Millisecond
	more := make(chan string)
	origin := stallingOrigin(t, "Content-Length: 3\r\n\r\nx", more)
	get := func() *rawConn {
		c := w.dial()
		c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
		return c
	}
	admitted := func(n int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d to count", n), func() bool { return h.tunnels.Reserved() == n })
	}
	first := get()
	admitted(1)
	c := w.dial()
	c.send("CONNECT " + origin + " HTTP/1.1\nHost: " + origin + "\n\n")
	if res, _ := c.response(http.MethodConnect); res.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a tunnel at the same time: %s", res.Status)
	}
	get().expectTruncated("one more that waits")
	more <- "yz"
	if res, body := first.response(http.MethodGet); body != "xyz" {
		t.Errorf("%s %q: the wait broke the response", res.Status, body)
	}
	admitted(0)
	left := get()
	admitted(1)
	_ = left.Close()
	admitted(0)
	w.dial().connect(origin)
}

// A response that waits for its content does not delay the proxy's exit.
func TestStalledContentAtExit(t *testing.T) {
	w := newWorld(t, "", nil)
	h := provisioned(t)[0]
	h.directive.originLimits.ContentGrace = 20 * time.Millisecond
	origin := stallingOrigin(t, "Content-Length: 3\r\n\r\nx", nil)
	c := w.dial()
	c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
	if _, err := c.r.Peek(1); err != nil {
		t.Fatal(err)
	}
	secure := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
		f.headers(stream, false, ":status", "200", "content-length", "3")
		_ = f.WriteData(stream, false, []byte("x"))
	})
	other := w.dial()
	other.send("GET https://" + secure + "/ HTTP/1.1\nHost: " + secure + "\n\n")
	eventually(t, "both responses to be waiting", func() bool { return h.tunnels.Reserved() == 2 })
	w.load("http://127.0.0.1:" + strings.Split(freeAddress(t), ":")[1] + ` {
	respond hi
}
`)
	c.expectTruncated("when no proxy is left")
	other.expectTruncated("over HTTP/2, when no proxy is left")
}

// Timeouts of centuries do not overflow.
func TestHugeTimeouts(t *testing.T) {
	config := &Handler{ResponseIdleTimeout: math.MaxInt64}
	config.ResponseHeaderTimeout = math.MaxInt64
	limits := (&policy{proxy: &proxy{config: config}, options: &config.Options}).newOriginLimits()
	for _, timeout := range []time.Duration{limits.HeaderTimeout, limits.ContentTimeout} {
		if timeout+timeout/8 < timeout {
			t.Errorf("%v overflows", timeout)
		}
	}
}
