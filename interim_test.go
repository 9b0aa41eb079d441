// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/net/http2"
)

const hint = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"

// A client that does not read its interim responses does not block other clients' requests
// on the same HTTP/2 connection to the origin.
func TestUnreadInterimBlocksNoOthers(t *testing.T) {
	onBothPaths(t, "", func(t *testing.T, w *world) {
		origin := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
			for range 8 {
				f.headers(stream, false, ":status", "103", "link", strings.Repeat("x", 8000))
			}
			f.headers(stream, true, ":status", "200")
		})
		request := "GET https://" + origin + "/ HTTP/1.1\nHost: x\n\n"
		stuck := w.dial()
		_ = stuck.SetReadBuffer(4 << 10)
		go func() { _, _ = io.WriteString(stuck, strings.Repeat(strings.ReplaceAll(request, "\n", "\r\n"), 2000)) }()
		eventually(t, "an interim response that is blocked by its client", func() bool {
			stacks := make([]byte, 4<<20)
			for stack := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
				if strings.Contains(stack, "passInterim") && strings.Contains(stack, "waitWrite") {
					return true
				}
			}
			return false
		})
		c := w.dial()
		c.send(strings.Replace(request, "\n\n", "\nConnection: close\n\n", 1))
		if got := c.readAll(); !strings.Contains(got, "HTTP/1.1 200 OK\r\n") {
			t.Errorf("another client got %.100q", got)
		}
	})
}

// A client that expects a 100 (Continue) gets one, and before the origin's early hints,
// which are written while the content is being requested.
func TestContinueAndHints(t *testing.T) {
	const hints = 30
	plain := listen(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n"+strings.Repeat(hint, hints))
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	secure := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
		f.headers(stream, false, ":status", "100")
		for range hints {
			f.headers(stream, false, ":status", "103", "link", "</a>")
		}
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				return
			}
			if data, ok := frame.(*http2.DataFrame); ok && data.StreamEnded() {
				break
			}
		}
		f.headers(stream, true, ":status", "200", "content-length", "0")
	})
	onBothPaths(t, "via off", func(t *testing.T, w *world) {
		for _, url := range []string{"http://" + plain, "https://" + secure} {
			for range 20 {
				c := w.dial()
				c.send("POST " + url + "/ HTTP/1.1\nHost: x\nExpect: 100-continue\nContent-Length: 5\n\n")
				asked := 0
				for {
					res, err := http.ReadResponse(c.r, &http.Request{Method: http.MethodPost})
					if err != nil {
						t.Fatalf("%s: not a response: %v", url, err)
					}
					if res.StatusCode == http.StatusContinue {
						asked++
						c.send("hello")
					}
					if link := res.Header.Get("Link"); res.StatusCode == http.StatusEarlyHints && link != "</a>" {
						t.Fatalf("%s: a hint with the link %q", url, link)
					}
					if res.StatusCode >= 200 {
						if res.StatusCode != 200 || asked != 1 {
							t.Fatalf("%s: %s after %d 100s", url, res.Status, asked)
						}
						break
					}
				}
				c.Close()
			}
		}
	})
}

// If an origin does not ask for content, the proxy asks the client for it and sends it
// after a while.
func TestContinueWithoutOrigin(t *testing.T) {
	plain := listen(t, func(c *net.TCPConn) {
		if req, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			content, _ := io.ReadAll(req.Body)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"+string(content))
		}
	})
	onBothPaths(t, "", func(t *testing.T, w *world) {
		c := w.dial()
		c.send("POST http://" + plain + "/ HTTP/1.1\nHost: x\nExpect: 100-continue\nContent-Length: 5\n\n")
		if got := c.readUntil("\r\n\r\n"); got != "HTTP/1.1 100 Continue\r\n\r\n" {
			t.Fatalf("got %q", got)
		}
		c.send("hello")
		if res, body := c.response(http.MethodPost); body != "hello" {
			t.Errorf("%s %q", res.Status, body)
		}
	})
}

// interimBurst is how many interim responses an origin may send at once.
const interimBurst = 100

// The number of interim responses is bounded, whatever the origin's protocol, and each gets
// exactly one Via entry.
func TestInterimResponsesAreBounded(t *testing.T) {
	plain := listen(t, func(c *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			for range 10 * interimBurst {
				if _, err := io.WriteString(c, hint); err != nil {
					return
				}
			}
		}
	})
	secure := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
		for range 10 * interimBurst {
			f.headers(stream, false, ":status", "103", "link", "</a>", "via", "1.1 other")
		}
	})
	onBothPaths(t, "via tester", func(t *testing.T, w *world) {
		for url, via := range map[string]string{"http://" + plain: "1.1 tester", "https://" + secure: "1.1 other, 2.0 tester"} {
			c := w.dial()
			c.send("GET " + url + "/ HTTP/1.1\nHost: x\n\n")
			for n := 0; ; n++ {
				res, err := http.ReadResponse(c.r, nil)
				if err != nil {
					t.Fatalf("%s: %v", url, err)
				}
				if res.StatusCode == http.StatusBadGateway && strings.Contains(res.Header.Get("Proxy-Status"), "http_protocol_error") {
					break
				}
				if got := strings.Join(res.Header["Via"], ", "); res.StatusCode != http.StatusEarlyHints || got != via || n > 2*interimBurst {
					t.Fatalf("%s: number %d is %s, Via %q, want %q", url, n, res.Status, got, via)
				}
			}
		}
	})
}
