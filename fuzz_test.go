// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fuzzMessage is the essence of a request.
type fuzzMessage struct{ method, target, content string }

// FuzzRequests sends arbitrary bytes to the proxy. The origin must get only well-formed
// requests, each equivalent to one that the client sent, in the same order; and the proxy
// must go on serving.
func FuzzRequests(f *testing.F) {
	for _, rule := range rules {
		f.Add([]byte(strings.ReplaceAll(rule.send, "\n", "\r\n")))
	}
	for _, text := range []string{
		"GET http://ORIGIN/a HTTP/1.1\nHost: ORIGIN\n\nGET http://ORIGIN/b HTTP/1.1\nHost: ORIGIN\n\n",
		"POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 3\nTransfer-Encoding : chunked\n\n0\n\n",
		"POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nTransfer-Encoding: chunked\n\n5;x=\"\n\"\nhello\n0\n\n",
		"GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nX: a\n b\n\n",
		"CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\n\nGET / HTTP/1.1\nHost: ORIGIN\n\n",
		"GET http://user@ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n",
		"PRI * HTTP/2.0\n\nSM\n\n",
		"GET http://ORIGIN/50%b%2FT HTTP/1.1\nHost: ORIGIN\n\n",
		"\n\nGET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\n\n",
	} {
		f.Add([]byte(strings.ReplaceAll(text, "\n", "\r\n")))
	}

	w := newWorld(f, "max_clients 1000\nresponse_header_timeout 2s\nallow 127.0.0.0/8", nil)
	f.Fuzz(func(t *testing.T, input []byte) {
		origin := &fuzzOrigin{} // one per run, since a request may arrive late
		address := listen(t, origin.serve)
		input = bytes.ReplaceAll(input, []byte("ORIGIN"), []byte(address))
		if bytes.Contains(input, []byte("CONNECT")) {
			return // a tunnel's content is up to the client
		}
		conn, err := net.Dial("tcp4", w.proxy)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, _ = conn.Write(input)
		_ = conn.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, conn) // ending in a reset is fine

		sent := fuzzRequests(input)
		next := 0
		for _, got := range origin.requests(t) {
			for next < len(sent) && sent[next] != got {
				next++
			}
			if next == len(sent) {
				t.Fatalf("the origin got %+v, which the client did not send; it sent %+v", got, sent)
			}
			next++
		}

		c := dialRaw(t, w.proxy)
		c.send("GET http://" + address + "/alive HTTP/1.1\nHost: x\n\n")
		if res, body := c.response(http.MethodGet); body != "ok" {
			t.Fatalf("the proxy has stopped serving: %s %q", res.Status, body)
		}
	})
}

// fuzzRequests returns the requests that net/http parses from input, as an origin would get
// them. Unlike net/http, it accepts a % that begins no escape, and empty lines before a
// request.
func fuzzRequests(input []byte) (messages []fuzzMessage) {
	const percent = "\xff" // stands for % in request lines
	r := bufio.NewReader(bytes.NewReader(input))
	for {
		line, _ := r.ReadString('\n')
		if line == "\r\n" { // the proxy skips it (RFC 9112 §2.2)
			continue
		}
		replaced := !strings.Contains(line, percent)
		if replaced {
			method, rest, found := strings.Cut(line, " ")
			if found {
				line = method + " " + strings.ReplaceAll(rest, "%", percent)
			}
		}
		r = bufio.NewReader(io.MultiReader(strings.NewReader(line), r))
		request, err := http.ReadRequest(r)
		if err != nil {
			return messages
		}
		content, err := io.ReadAll(request.Body)
		if err != nil {
			return messages
		}
		target := originForm(request)
		if replaced {
			target = strings.ReplaceAll(target, percent, "%")
		}
		messages = append(messages, fuzzMessage{request.Method, target, string(content)})
	}
}

// fuzzOrigin records requests, and malformed input as faults.
type fuzzOrigin struct {
	mu       sync.Mutex
	messages []fuzzMessage
	faults   []string
}

func (o *fuzzOrigin) serve(c *net.TCPConn) {
	r := bufio.NewReader(c)
	for {
		if _, err := r.Peek(1); err != nil {
			return
		}
		request, err := readRuleRequest(r, io.Discard)
		method, rest, _ := strings.Cut(request.line, " ")
		target, version, _ := strings.Cut(rest, " ")
		o.mu.Lock()
		switch {
		case err != nil:
			// A request whose body the client cuts off is cut off here, too.
			if version != "HTTP/1.1" {
				o.faults = append(o.faults, request.line+": "+err.Error())
			}
		case version != "HTTP/1.1" || target == "" || target[0] != '/' && target != "*" || len(request.fields["Host"]) != 1:
			o.faults = append(o.faults, request.line)
		default:
			o.messages = append(o.messages, fuzzMessage{method, target, request.content})
		}
		o.mu.Unlock()
		if err != nil {
			return
		}
		if method == http.MethodHead {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
		} else {
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	}
}

func (o *fuzzOrigin) requests(t *testing.T) []fuzzMessage {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, fault := range o.faults {
		t.Errorf("the origin got %q", fault)
	}
	return o.messages
}

// FuzzResponses answers with arbitrary bytes. The client must get one response, complete or
// visibly incomplete, and no later exchange may see any of it, on the same client or origin
// connection or not.
func FuzzResponses(f *testing.F) {
	for _, rule := range rules {
		f.Add([]byte(strings.ReplaceAll(rule.answer, "\n", "\r\n")))
	}
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"))
	var answer atomic.Pointer[[]byte] // the response to the next request
	origin := listen(f, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		for {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			text := answer.Swap(nil)
			if text == nil {
				text = new([]byte("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnext"))
			}
			_, _ = c.Write(*text)
			_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)) // an incomplete response stays incomplete
		}
	})
	w := newWorld(f, "response_header_timeout 2s", nil)
	f.Fuzz(func(t *testing.T, input []byte) {
		answer.Store(&input)
		c := dialRaw(t, w.proxy)
		complete := func() bool {
			c.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\n\n")
			for {
				res, err := http.ReadResponse(c.r, &http.Request{Method: http.MethodGet})
				if err != nil {
					return false // cut off
				}
				_, err = io.Copy(io.Discard, res.Body)
				if res.StatusCode == http.StatusSwitchingProtocols {
					t.Fatal("the client got a 101 without asking for one")
				}
				if err != nil || res.Close {
					return false
				}
				if res.StatusCode >= 200 {
					return true
				}
			}
		}()
		next := []*rawConn{dialRaw(t, w.proxy)}
		if complete {
			next = append(next, c)
		}
		for _, c := range next {
			c.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\n\n")
			if res, body := c.response(http.MethodGet); body != "next" {
				t.Fatalf("the next exchange got %s %q", res.Status, body)
			}
			c.Close()
		}
	})
}
