// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

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

// The number of interim responses is bounded, whatever the origin's protocol, and each gets
// exactly one Via entry.
func TestInterimResponsesAreBounded(t *testing.T) {
	plain := listen(t, func(c *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
			for range 10 * maxInterim {
				if _, err := io.WriteString(c, hint); err != nil {
					return
				}
			}
		}
	})
	secure := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
		for range 10 * maxInterim {
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
				if got := strings.Join(res.Header["Via"], ", "); res.StatusCode != http.StatusEarlyHints || got != via || n > 2*maxInterim {
					t.Fatalf("%s: number %d is %s, Via %q, want %q", url, n, res.Status, got, via)
				}
			}
		}
	})
}

// A queue passes on its contents before it ends, drops what exceeds its size, and reports a
// panic to the caller of end.
func TestInterimQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []int
		slow := make(chan struct{})
		q := &interimQueue{write: func(status int, _ http.Header) { <-slow; got = append(got, status) }}
		for range 3 * maxInterimWaiting {
			if err := q.got1xx(http.StatusEarlyHints, nil); err != nil {
				t.Fatal(err)
			}
		}
		go close(slow)
		q.end()
		if n := len(got); n < maxInterimWaiting || n > maxInterimWaiting+1 {
			t.Errorf("%d responses were passed on", n)
		}
		q.sendContinue() // must not block
		if err := q.got1xx(http.StatusEarlyHints, nil); err != nil || q.writing != nil {
			t.Errorf("it continues after its end: %v", err)
		}
		q = &interimQueue{write: func(int, http.Header) { panic("wrong") }}
		_ = q.got1xx(http.StatusEarlyHints, nil)
		q.sendContinue()
		defer func() {
			if recover() != "wrong" {
				t.Error("the panic was lost")
			}
		}()
		q.end()
	})
}

// pipeExchange sends a request to an origin at the other end of a pipe. It returns the
// outcome and the synthetic time that it took.
func pipeExchange(ctx context.Context, timeout time.Duration, answer func(w io.Writer)) (*http.Response, time.Duration, error) {
	ended := make(chan struct{})
	dial := func(context.Context, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go func() {
			defer close(ended)
			defer theirs.Close()
			if _, err := http.ReadRequest(bufio.NewReader(theirs)); err == nil {
				answer(theirs)
			}
		}()
		return ours, nil
	}
	x := &exchange{pool: newOriginPool(dial), ctx: ctx, limits: &originLimits{headerTimeout: timeout}, request: &outgoing{
		method: http.MethodGet, authority: "origin:80", target: "/", host: "origin", header: http.Header{},
		interim: func(int, http.Header, int, int) {},
	}}
	start := time.Now()
	res, err := x.doHTTP1()
	took := time.Since(start)
	x.close()
	<-ended
	return res, took, err
}

// A 102 or 103 restarts the response-header timeout, up to ten times the timeout in total.
func TestProgressRestartsTimeout(t *testing.T) {
	const timeout = 3 * time.Second
	for _, row := range []struct {
		interim string
		pause   time.Duration
		n       int
		want    time.Duration
		err     error
	}{
		{"102 Processing", 2 * time.Second, 5, 10 * time.Second, nil},
		{"103 Early Hints", 2 * time.Second, 5, 10 * time.Second, nil},
		{"102 Processing", 2 * time.Second, 100, maxTimeouts * timeout, os.ErrDeadlineExceeded},
		{"102 Processing", 4 * time.Second, 5, timeout, os.ErrDeadlineExceeded},
		{"100 Continue", 2 * time.Second, 5, timeout, os.ErrDeadlineExceeded},
		{"102 Processing", 200 * time.Millisecond, 110, 22 * time.Second, nil},
		{"102 Processing", 0, maxInterim + 1, 0, errInterim},
	} {
		synctest.Test(t, func(t *testing.T) {
			_, took, err := pipeExchange(t.Context(), timeout, func(w io.Writer) {
				for range row.n {
					if _, err := io.WriteString(w, "HTTP/1.1 "+row.interim+"\r\n\r\n"); err != nil {
						return
					}
					time.Sleep(row.pause)
				}
				_, _ = io.WriteString(w, "HTTP/1.1 204 No Content\r\n\r\n")
			})
			if !errors.Is(err, row.err) || took < row.want || took > row.want+timeout/8 {
				t.Errorf("%d of %s, every %v: %v after %v, want %v after %v", row.n, row.interim, row.pause, err, took, row.err, row.want)
			}
		})
	}
}

// The same applies to origins that speak HTTP/2.
func TestHTTP2ProgressRestartsTimeout(t *testing.T) {
	const timeout = 3 * time.Second
	for _, row := range []struct {
		pause time.Duration
		want  time.Duration
	}{
		{0, timeout}, {2 * time.Second, maxTimeouts * timeout}, {4 * time.Second, timeout},
	} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			wait := newHeadTimer(t.Context(), timeout)
			defer wait.end()
			wait.setTurn(true)
			for row.pause > 0 && wait.ctx.Err() == nil {
				select {
				case <-wait.ctx.Done():
				case <-time.After(row.pause):
					wait.recordProgress()
				}
			}
			<-wait.ctx.Done()
			if took := time.Since(start); took < row.want || took > row.want+row.pause || !wait.expired() {
				t.Errorf("progress every %v: ended after %v, want %v", row.pause, took, row.want)
			}
		})
	}
}
