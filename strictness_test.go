// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// The fast path and Caddy's HTTP server differ as docs/reference.md says, and in every case the connection is
// in order afterwards.
func TestStrictness(t *testing.T) {
	w, ways, _ := uploadWorld(t)
	host := strings.TrimPrefix(w.origin.URL, "http://")
	get := "GET http://" + host + "/ HTTP/1.1\nHost: x\n"
	chunks := "Transfer-Encoding: chunked\n\n0\n\n"
	for _, row := range []struct {
		name, send     string
		fast, ordinary int
		says           string // in the response of the fast path
	}{
		{"length beside chunks", get + "Content-Length: 5\n" + chunks, 400, 200, "it has both Content-Length and Transfer-Encoding"},
		{"length beside chunks, for the server itself", "POST / HTTP/1.1\nHost: x\nContent-Length: 5\n" + chunks, 400, 421, "it has both Content-Length and Transfer-Encoding"},
		{"chunks from HTTP/1.0", "POST http://" + host + "/ HTTP/1.0\n" + chunks, 400, 200, "HTTP/1.0 has no Transfer-Encoding"},
		{"another coding", get + "Transfer-Encoding: gzip\n\n", 501, 501, "does not support the transfer coding"},
		{"two codings", get + "Transfer-Encoding: gzip, chunked\n\n", 501, 501, "does not support the transfer coding"},
		{"lengths that differ", get + "Content-Length: 5\nContent-Length: 6\n\n", 400, 400, "its Content-Length is not one number"},
		{"a list of lengths", get + "Content-Length: 5, 5\n\n", 400, 400, "its Content-Length is not one number"},
		{"an empty length", get + "Content-Length:\n\n", 400, 400, "its Content-Length is not one number"},
		{"a trailer that frames", get + "Trailer: Content-Length\n" + chunks, 400, 400, "its Trailer field names Content-Length"},
		{"another expectation", get + "Expect: miracles\n\n", 417, 417, "does not support the expectation"},
		{"CONNECT without Host", "CONNECT " + host + " HTTP/1.1\n\n", 400, 200, "missing required Host header"},
		{"no Host", "GET http://" + host + "/ HTTP/1.1\n\n", 400, 400, "missing required Host header"},
		{"a bare LF", get + "X-One: 1␊X-Two: 2\n\n", 400, 200, "a line does not end with CRLF"},
		{"a bare LF at the end", get + "X-One: 1␊\n", 400, 200, "a line does not end with CRLF"},
		{"bare LF alone", "GET http://" + host + "/ HTTP/1.1␊Host: x␊␊", 400, 200, "a line does not end with CRLF"},
		{"a folded field", get + "X-One: 1\n 2\n\n", 400, 200, "a field is folded onto another line"},
		{"1001 fields", get + strings.Repeat("X-One: 1\n", 1001) + "\n", 431, 431, "too large"},
		{"CONNECT with 1001 fields", "CONNECT " + host + " HTTP/1.1\nHost: x\n" + strings.Repeat("X-One: 1\n", 1001) + "\n", 431, 200, "too large"},
		{"no colon", get + "X-One\n\n", 400, 400, "a field line has no colon"},
		{"a name with a space", get + "X One: 1\n\n", 400, 400, "invalid header name"},
		{"a value with a NUL", get + "X-One: \x00\n\n", 400, 400, "invalid header value"},
		{"another version", "GET http://" + host + "/ HTTP/3.0\nHost: x\n\n", 505, 505, "does not support the HTTP version"},
		{"no version", "GET http://" + host + "/\n\n", 400, 400, "its first line is not a method, a target and a version"},
		{"not a version", "GET http://" + host + "/ HTTP/1\n\n", 400, 400, "does not end with a version such as HTTP/1.1"},
		{"not a method", "G[T http://" + host + "/ HTTP/1.1\nHost: x\n\n", 400, 400, "its method is not a token"},
		{"not a URL", "GET http://[::1/ HTTP/1.1\nHost: x\n\n", 400, 400, "its target is not a valid URL"},
		{"a host of dots", "GET http://.../ HTTP/1.1\nHost: x\n\n", 400, 400, "its target has no valid host"},
		{"a long method", strings.Repeat("M", 33) + " http://" + host + "/ HTTP/1.1\nHost: x\n\n", 200, 405, ""},
	} {
		for way, proxy := range ways {
			want := row.ordinary
			if way == "fast path" {
				want = row.fast
			}
			c := dialRaw(t, proxy)
			_, _ = c.Write([]byte(crlf(row.send)))
			method, _, _ := strings.Cut(row.send, " ")
			res, err := http.ReadResponse(c.r, &http.Request{Method: method})
			if err != nil {
				t.Errorf("%s, %s: %v", row.name, way, err)
				continue
			}
			if res.StatusCode != want {
				t.Errorf("%s, %s: %s, want %d", row.name, way, res.Status, want)
			}
			if way == "fast path" && want >= 400 {
				if got := c.readAll(); !res.Close || !strings.Contains(got, row.says) || res.Header.Get("Proxy-Status") == "" {
					t.Errorf("%s: %q, Close %t, Proxy-Status %q, want %q", row.name, got, res.Close, res.Header.Get("Proxy-Status"), row.says)
				}
			}
			_ = c.Close()
		}
	}
}

// A client keeps its connection behind content in chunks, and the origin gets Pragma as it was sent.
func TestFieldsAndChunksStay(t *testing.T) {
	w := newWorld(t, "", nil)
	c := w.dialFastPath()
	for range 3 {
		origin := newRuleOrigin(t, "HTTP/1.1 200 OK\nContent-Length: 2\n\nok")
		c.send("POST http://" + origin.address + "/ HTTP/1.1\nHost: x\nPragma: no-cache\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n")
		if res, _ := c.response(http.MethodPost); res.StatusCode != http.StatusOK || res.Close {
			t.Errorf("%s, Close %t", res.Status, res.Close)
		}
		got, _ := origin.request()
		if got.fields.Get("Pragma") != "no-cache" || got.fields.Get("Cache-Control") != "" || got.content != "ok" {
			t.Errorf("the origin got %v, %q", got.fields, got.content)
		}
	}
}

// The trailers of a request are read as strictly as its head. Whichever server reads them, what follows a
// malformed line is never taken for another request.
func TestStrictnessOfTrailers(t *testing.T) {
	w, ways, _ := uploadWorld(t)
	var smuggled atomic.Int64
	origin := listen(t, func(conn *net.TCPConn) {
		r := bufio.NewReader(conn)
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			if req.URL.Path == "/smuggled" {
				smuggled.Add(1)
			}
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				return
			}
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	for _, row := range []struct{ trailers, says string }{
		{"␊", "a line does not end with CRLF"},
		{"X-One: 1␊\n", "a line does not end with CRLF"},
		{"X-One: 1\n␊", "a line does not end with CRLF"},
		{"X-One: 1␊␊", "a line does not end with CRLF"},
		{"X-One: 1␊X-Two: 2\n\n", "a line does not end with CRLF"},
		{"X-One: 1\n 2\n\n", "a field is folded onto another line"},
		{" X-One: 1\n\n", "a field is folded onto another line"},
		{"X-One : 1\n\n", "invalid header name"},
		{"X-One\n\n", "a field line has no colon"},
		{": 1\n\n", "invalid header name"},
		{"X-One: \x00\n\n", "invalid header value"},
		{"X-One: \x01\n\n", "invalid header value"},
		{strings.Repeat("X-One: 1\n", 1001) + "\n", "more than 1000 fields"},
		{"X-One: 1\n\n", ""},
		{"\n", ""},
	} {
		for way, proxy := range ways {
			for _, pause := range []time.Duration{0, 10 * time.Millisecond} {
				w.forgetLogs()
				c := dialRaw(t, proxy)
				c.send("POST http://" + origin + "/ HTTP/1.1\nHost: x\nTrailer: X-One\nTransfer-Encoding: chunked\n\n2\nok\n0\n")
				time.Sleep(pause) // the trailers arrive with the content, or after it
				isValid := row.says == ""
				_, _ = c.Write([]byte(crlf(row.trailers)))
				if !isValid {
					_, _ = c.Write([]byte("GET http://" + origin + "/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"))
				}
				res, err := http.ReadResponse(c.r, nil)
				if err != nil {
					t.Errorf("%.20q, %s: %v", row.trailers, way, err)
					continue
				}
				if isValid && res.StatusCode != 200 || !isValid && (!res.Close || way == "fast path" && res.StatusCode != 400) {
					t.Errorf("%.20q, %s: %s, Close %t", row.trailers, way, res.Status, res.Close)
				}
				if line := w.waitLog("request", 1)[0]; way == "fast path" && !strings.Contains(fmt.Sprint(line["error"]), row.says) {
					t.Errorf("%.20q: the log says %v", row.trailers, line)
				}
				_ = c.Close()
			}
		}
	}
	if n := smuggled.Load(); n > 0 {
		t.Errorf("the origin got %d requests from behind malformed trailers", n)
	}
}
