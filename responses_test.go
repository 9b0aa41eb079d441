// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// Content that cannot be decoded from its start gives an error response as long as nothing
// was passed on, and the error names what is wrong.
func TestUndecodableResponses(t *testing.T) {
	const chunks = "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n"
	rows := []struct{ name, answer, says string }{
		{"an invalid size", chunks + "zz\nhello\n0\n\n", "a chunk does not begin with a valid size line"},
		{"no size", chunks + "\nhello\n0\n\n", "a chunk does not begin with a valid size line"},
		{"an endless extension", chunks + "5;" + strings.Repeat("x", 2*h1.MaxChunkLine) + "\nhello\n0\n\n", "a chunk does not begin with a valid size line"},
		{"no content and an invalid trailer", chunks + "0\nnonsense\n\n", `"nonsense"`},
		{"a line without a field", "HTTP/1.1 200 OK\nsh not found\nContent-Length: 2\n\nok", `"sh not found"`},
		{"a line that looks like an error of TLS", "HTTP/1.1 200 OK\ntls : x y: z\ntls: \x00\nContent-Length: 2\n\nok", "NUL"},
		{"an unknown coding", "HTTP/1.1 200 OK\nTransfer-Encoding: tls: x\n\nok", "transfer coding"},
		{"two lengths", "HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 3\n\nok", "Content-Length"},
		{"an invalid status", "HTTP/1.1 20 OK\n\n", "status"},
		{"no HTTP", "SSH-2.0-OpenSSH\n\n", "HTTP/1"},
		{"a login to a proxy", "HTTP/1.1 407 Proxy Authentication Required\nProxy-Authenticate: Basic realm=x\nContent-Length: 2\n\nno", "(407)"},
	}
	onBothPaths(t, "", func(t *testing.T, w *world) {
		for _, row := range rows {
			c := w.dial()
			c.send("GET http://" + startFixedOrigin(t, row.answer) + "/ HTTP/1.1\nHost: x\n\n")
			res, body := c.response(http.MethodGet)
			if res.StatusCode != http.StatusBadGateway || !strings.Contains(body, row.says) || !strings.Contains(res.Header.Get("Proxy-Status"), "http_protocol_error") {
				t.Errorf("%s: %s, %q, Proxy-Status %q", row.name, res.Status, body, res.Header.Get("Proxy-Status"))
			}
			if len(res.Header["Proxy-Authenticate"]) > 0 || len(res.Header["Transfer-Encoding"]) > 0 {
				t.Errorf("%s: the origin's fields are in the head of the error response: %v", row.name, res.Header)
			}
		}
	})
}

// An HTTP/2 origin may not ask for proxy credentials either.
func TestHTTP2OriginAsksForProxyCredentials(t *testing.T) {
	origin := newFramesOrigin(t, func(f *framesOrigin, stream uint32) {
		f.headers(stream, true, ":status", "407", "proxy-authenticate", "Basic realm=x")
	})
	onBothPaths(t, "", func(t *testing.T, w *world) {
		c := w.dial()
		c.send("GET https://" + origin + "/ HTTP/1.1\nHost: x\n\n")
		if res, body := c.response(http.MethodGet); res.StatusCode != http.StatusBadGateway || !strings.Contains(body, "(407)") {
			t.Errorf("%s %q", res.Status, body)
		}
	})
}

// A Content-Length next to chunked coding does not reach the client, and the origin's
// connection is not reused.
func TestLengthBesideChunks(t *testing.T) {
	origin, heads := startRecordingOrigin(t, "HTTP/1.1 200 OK\nContent-Length: 9\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n")
	onBothPaths(t, "", func(t *testing.T, w *world) {
		c := w.dial()
		for range 2 {
			c.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\n\n")
			res, body := c.response(http.MethodGet)
			<-heads
			if length := res.Header.Get("Content-Length"); body != "ok" || length == "9" {
				t.Errorf("%s %q %v", res.Status, body, res.Header)
			}
			for _, p := range provisioned(t) {
				if n := p.idleConnections(); n != 0 {
					t.Errorf("%d connections to the origin are kept", n)
				}
			}
		}
	})
}

// The proxy's own responses carry no Alt-Svc, because only the requested host may advertise
// alternatives.
func TestRefusalsHaveNoAltSvc(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(strings.Replace(inRoute(w.site("")), "route {", "route {\nheader Alt-Svc `h3=\":443\"`", 1))
	closed := freeAddress(t)
	for request, want := range map[string]bool{
		"GET http://" + closed + "/ HTTP/1.1": false, "CONNECT " + closed + " HTTP/1.1": false, "GET / HTTP/1.1": true,
	} {
		c := w.dial()
		c.send(request + "\nHost: x\n\n")
		res, err := http.ReadResponse(c.r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := res.Header["Alt-Svc"]; ok != want {
			t.Errorf("%s: %s, Alt-Svc %q", request, res.Status, res.Header["Alt-Svc"])
		}
	}
}
