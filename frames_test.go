// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// framesWorld is a world that also forwards plain requests over HTTP/2 and HTTP/3.
func framesWorld(t *testing.T) (w *world, secure string) {
	w = newWorld(t, "", nil)
	secure = freeAddress(t)
	_, port, _ := net.SplitHostPort(secure)
	site := strings.SplitN(w.site("hosts localhost\nvia off\nforwarded_for off"), "{", 2)
	loadCaddyfile(t, "{\ngrace_period 1s\nservers "+strings.TrimPrefix(w.proxy, "127.0.0.1")+" {\nprotocols h1 h2c\n}\nskip_install_trust\n"+
		strings.TrimPrefix(w.globals(), "{\n")+site[0]+"{"+site[1]+"https://:"+port+" {\ntls internal {\non_demand\n}\n"+site[1])
	dialTLS(t, secure, "http/1.1").Close() // the certificate is there
	return w, secure
}

// framesRequest sends a request in the given frames and returns the status of the response,
// or 0 if the stream is reset.
func framesRequest(t *testing.T, address string, fields []string, data string) string {
	t.Helper()
	c := dialRaw(t, address)
	defer c.Close()
	_, _ = io.WriteString(c, http2.ClientPreface)
	f := http2.NewFramer(c, c.r)
	_, _ = f.WriteSettings(), f.WriteSettingsAck()
	var head bytes.Buffer
	e := hpack.NewEncoder(&head)
	for i := 0; i < len(fields); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head.Bytes(), EndHeaders: true, EndStream: data == ""})
	if data != "" {
		_ = f.WriteData(1, true, []byte(data))
	}
	d := hpack.NewDecoder(4096, nil)
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			t.Fatalf("%v: %v", fields, err)
		}
		switch frame := frame.(type) {
		case *http2.HeadersFrame:
			got, err := d.DecodeFull(frame.HeaderBlockFragment())
			if err != nil {
				t.Fatal(err)
			}
			return got[0].Value
		case *http2.RSTStreamFrame, *http2.GoAwayFrame:
			return "reset"
		}
	}
}

// Requests that frames can express but HTTP/1 cannot are refused: the origin gets nothing,
// or one request and no part of another (RFC 9113 §8.1.1, §8.2.1, §8.3.1, §10.3).
func TestFramesInexpressibleInHTTP1(t *testing.T) {
	w, _ := framesWorld(t)
	for _, row := range []struct {
		name    string
		fields  []string // after :scheme and :authority
		data    string
		answers string // possible responses
	}{
		{"a request", []string{":method", "POST", ":path", "/", "content-length", "5"}, "hello", "200"},
		{"no content, with a length", []string{":method", "POST", ":path", "/", "content-length", "0"}, "", "200"},
		{"no content, with a wrong length", []string{":method", "POST", ":path", "/", "content-length", "44"}, "", "400 reset"},
		{"no content, with two lengths", []string{":method", "POST", ":path", "/", "content-length", "0", "content-length", "6"}, "", "400 reset"},
		{"content with two lengths", []string{":method", "POST", ":path", "/", "content-length", "5", "content-length", "6"}, "hello", "400 reset"},
		{"a length with a sign", []string{":method", "POST", ":path", "/", "content-length", "+5"}, "hello", "400 reset"},
		{"content that is too short", []string{":method", "POST", ":path", "/", "content-length", "9"}, "hello", "400 reset"},
		{"content that is too long", []string{":method", "POST", ":path", "/", "content-length", "3"}, "hello", "400 reset"},
		{"a space in the target", []string{":method", "GET", ":path", "/a HTTP/1.1 b"}, "", "400 reset"},
		{"a tab in the target", []string{":method", "GET", ":path", "/a\tb"}, "", "400 reset"},
		{"a line end in the target", []string{":method", "GET", ":path", "/a\r\nX: y"}, "", "400 reset"},
		{"another URL as the target", []string{":method", "GET", ":path", "http://other.example/x"}, "", "400 reset"},
		{"a space in the method", []string{":method", "GET /admin HTTP/1.1", ":path", "/a"}, "", "400 reset"},
		{"a line end in a value", []string{":method", "GET", ":path", "/", "x", "a\r\ny: z"}, "", "400 reset"},
		{"a transfer coding", []string{":method", "POST", ":path", "/", "transfer-encoding", "chunked"}, "0\r\n\r\n", "400 reset"},
		{"connection options", []string{":method", "GET", ":path", "/", "connection", "close"}, "", "400 reset"},
		{"an upgrade", []string{":method", "GET", ":path", "/", "upgrade", "x"}, "", "400 reset"},
		{"cookies in pieces", []string{":method", "GET", ":path", "/", "cookie", "a=1", "cookie", "b=2"}, "", "200"},
	} {
		t.Run(row.name, func(t *testing.T) {
			origin := newRuleOrigin(t, "")
			fields := append([]string{":scheme", "http", ":authority", origin.address}, row.fields...)
			answer := framesRequest(t, w.proxy, fields, row.data)
			if !strings.Contains(row.answers, answer) {
				t.Errorf("answer %s, want %s", answer, row.answers)
			}
			got, any := origin.request()
			if any != (row.answers == "200") {
				t.Errorf("the origin got %v", got)
			}
			if row.name == "cookies in pieces" && got.fields.Get("Cookie") != "a=1; b=2" { // RFC 9113 §8.2.3
				t.Errorf("the origin got the cookies %q", got.fields["Cookie"])
			}
		})
	}
}

// A request over HTTP/3 with less content than announced is cut off towards the origin, and
// a response that the origin cuts off is cut off towards the client (RFC 9114 §4.1.2).
func TestFramesOfHTTP3(t *testing.T) {
	_, secure := framesWorld(t)
	transport := &http3.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}}
	defer transport.Close()
	do := func(address, body string, length int64) (*http.Response, error) {
		r, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+secure+"/", io.MultiReader(strings.NewReader(body)))
		r.Host, r.ContentLength = address, length
		return transport.RoundTrip(r)
	}
	got := make(chan string, 1)
	recording := listen(t, func(c *net.TCPConn) {
		all, _ := io.ReadAll(c)
		got <- string(all)
	})
	if res, err := do(recording, "hello", 30); err == nil && res.StatusCode != http.StatusBadRequest {
		t.Errorf("content that is too short: %s", res.Status)
	}
	select {
	case all := <-got:
		if head, content, _ := strings.Cut(all, "\r\n\r\n"); !strings.Contains(head, "Content-Length: 30") || content != "hello" {
			t.Errorf("the origin got %q", all)
		}
	case <-time.After(patience):
		t.Error("the origin's connection stays open")
	}
	for answer, complete := range map[string]bool{ruleOK: true, "HTTP/1.1 200 OK\nContent-Length: 5\n\nokCLOSE": false, "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\nCLOSE": false} {
		origin := newRuleOrigin(t, answer)
		var body []byte
		res, err := do(origin.address, "hello", 5)
		if err == nil { // otherwise the reset has overtaken the data before it
			body, err = io.ReadAll(res.Body)
			res.Body.Close()
		}
		if (err == nil) != complete || complete && string(body) != "ok" {
			t.Errorf("%q: got %q, %v", answer, body, err)
		}
	}
}

// HTTP/3 requests may lack content without announcing it. The proxy must not announce
// content to the origin then, nor tell the client that a response has none when that is
// unknown.
func TestFramesOfHTTP3WithoutContent(t *testing.T) {
	_, secure := framesWorld(t)
	transport := &http3.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}}
	defer transport.Close()
	for _, row := range []struct{ method, path, content, answer string }{
		{http.MethodGet, "/", "", ruleOK},
		{http.MethodGet, "/", "some", ruleOK},
		{http.MethodDelete, "/", "", ruleOK},
		{http.MethodOptions, "*", "", ruleOK},
		{http.MethodHead, "/", "", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n"},
		{http.MethodGet, "/", "", "HTTP/1.1 304 Not Modified\n\n"},
		{http.MethodGet, "/", "", "HTTP/1.1 204 No Content\n\n"},
	} {
		origin := newRuleOrigin(t, row.answer)
		r, _ := http.NewRequestWithContext(t.Context(), row.method, "https://"+secure+"/", nil)
		r.Host, r.URL.Path = origin.address, row.path
		if row.content != "" {
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader(row.content)), -1
		}
		res, err := transport.RoundTrip(r)
		if err != nil {
			t.Errorf("%v: %v", row, err)
			continue
		}
		res.Body.Close()
		if length, has := res.Header["Content-Length"]; has && row.answer != ruleOK {
			t.Errorf("%v: the length is %q", row, length)
		}
		got, _ := origin.request()
		if coding := got.fields.Get("Transfer-Encoding"); got.content != row.content || (coding != "") != (row.content != "") {
			t.Errorf("%v: the origin got the coding %q and %q", row, coding, got.content)
		}
		if want := row.method + " " + row.path + " HTTP/1.1"; got.line != want {
			t.Errorf("the origin got %q, want %q", got.line, want)
		}
	}
}
