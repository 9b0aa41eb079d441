// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"strings"
	"testing"
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
		{"a bare LF", get + "X-One: 1␊X-Two: 2\n\n", 400, 200, "a line of its head does not end with CRLF"},
		{"a bare LF at the end", get + "X-One: 1␊\n", 400, 200, "a line of its head does not end with CRLF"},
		{"bare LF alone", "GET http://" + host + "/ HTTP/1.1␊Host: x␊␊", 400, 200, "a line of its head does not end with CRLF"},
		{"a folded field", get + "X-One: 1\n 2\n\n", 400, 200, "a field is folded onto another line"},
		{"1001 fields", get + strings.Repeat("X-One: 1\n", 1001) + "\n", 431, 431, "too large"},
		{"CONNECT with 1001 fields", "CONNECT " + host + " HTTP/1.1\nHost: x\n" + strings.Repeat("X-One: 1\n", 1001) + "\n", 431, 200, "too large"},
		{"no colon", get + "X-One\n\n", 400, 400, "a line of its head has no colon"},
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
