// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

var tlsCertificate = conntest.Certificate

// An https URL in absolute form goes over TLS, with HTTP/2 if the origin speaks it, and
// keeps everything that the HTTP/1 request carried.
func TestTLSForward(t *testing.T) {
	for _, version := range []string{"HTTP/1.1", "HTTP/2.0"} {
		t.Run(version, func(t *testing.T) {
			origin := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				w.Header().Set("Link", "</a>; rel=preload")
				w.WriteHeader(http.StatusEarlyHints)
				w.Header().Set("Trailer", "X-Sum")
				fmt.Fprintf(w, "%s %s %s %q %q", r.Proto, r.Method, r.RequestURI, body, r.Header["Via"])
				w.Header().Set("X-Sum", "42")
			}))
			origin.EnableHTTP2 = version == "HTTP/2.0"
			origin.TLS = &tls.Config{Certificates: []tls.Certificate{tlsCertificate}}
			origin.StartTLS()
			defer origin.Close()
			address := origin.Listener.Addr().String()
			c := newWorld(t, "via tester", nil).dial()
			for range 2 {
				c.send("POST https://" + address + "/a|b?c HTTP/1.1\nHost: " + address + "\nTE: trailers\nConnection: TE\nContent-Length: 5\n\nhello")
				if res, _ := c.response(http.MethodPost); res.StatusCode != http.StatusEarlyHints {
					t.Fatalf("got %s, want 103", res.Status)
				}
				res, body := c.response(http.MethodPost)
				if want := version + ` POST /a|b?c "hello" ["1.1 tester"]`; body != want {
					t.Errorf("got %s %q, want %q", res.Status, body, want)
				}
				if sum := res.Trailer.Get("X-Sum"); sum != "42" {
					t.Errorf("trailers %v", res.Trailer)
				}
			}
		})
	}
}

// An upgrade over TLS is a tunnel, as without TLS.
func TestTLSUpgrade(t *testing.T) {
	ln, err := tls.Listen("tcp4", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{tlsCertificate}, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		r := bufio.NewReader(conn)
		if _, err := http.ReadRequest(r); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nhello ")
		_, _ = io.Copy(conn, r)
	}()
	c := newWorld(t, "", nil).dial()
	c.send("GET https://" + ln.Addr().String() + "/ HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: echo\n\n")
	c.readUntil("\r\n\r\n")
	c.send("world")
	_ = c.CloseWrite()
	if got := c.readAll(); got != "hello world" {
		t.Errorf("got %q", got)
	}
}

// header_up and header_down apply last, but cannot change message framing.
func TestHeaderOps(t *testing.T) {
	origin := newRuleOrigin(t, "HTTP/1.1 200 OK\nX-Down: 1\nX-Gone: 1\nContent-Length: 2\n\nok")
	w := newWorld(t, `header_up X-Up {http.request.method}
		header_up -X-Drop
		header_up Host other.example
		header_up X-Evil {http.request.uri.query.evil}
		header_up Transfer-Encoding chunked
		header_down X-Down 2
		header_down -X-Gone
		header_down X-Client {http.async_proxy.client}`, nil)
	c := w.dial()
	c.send("GET http://" + origin.address + "/?evil=a%0d%0aX-Smuggled:%201 HTTP/1.1\nHost: x\nX-Drop: 1\n\n")
	res, body := c.response(http.MethodGet)
	if body != "ok" {
		t.Fatalf("%s %q", res.Status, body)
	}
	same := func(s string) string { return s }
	var d differences
	ruleFields(&d, "response", res.Header, []string{"X-Down: 2", "X-Client: 127.0.0.1"}, []string{"X-Gone"}, same)
	got, _ := origin.request()
	ruleFields(&d, "request", got.fields, []string{"X-Up: GET", "Host: other.example"}, []string{"X-Drop", "X-Evil", "X-Smuggled", "Transfer-Encoding"}, same)
	for _, difference := range d {
		t.Error(difference)
	}
}

// Client input in header_up cannot break out of Host or of a field name.
func TestHeaderOpsWithClientInput(t *testing.T) {
	w := newWorld(t, "header_up Host {http.request.uri.query.h}\nheader_up {http.request.uri.query.n} x", nil)
	for query, status := range map[string]int{
		"h=other.example&n=X-Name":                http.StatusOK,
		"h=a%0d%0aX-Smuggled:%201&n=X-Name":       http.StatusBadRequest,
		"h=a%20b&n=X-Name":                        http.StatusBadRequest,
		"h=other.example&n=X%0d%0aX-Smuggled:%20": http.StatusOK,
		"h=other.example&n=X%20Y":                 http.StatusOK,
	} {
		origin := newRuleOrigin(t, "")
		c := w.dial()
		c.send("GET http://" + origin.address + "/?" + query + " HTTP/1.1\nHost: x\n\n")
		if res, body := c.response(http.MethodGet); res.StatusCode != status {
			t.Errorf("%s: %s %q, want %d", query, res.Status, body, status)
		}
		if got, any := origin.request(); any != (status == http.StatusOK) || any && (got.fields["X-Smuggled"] != nil || got.fields.Get("Host") != "other.example") {
			t.Errorf("%s: the origin got %v", query, got)
		}
	}
}

// The placeholders give the access log a request's outcome.
func TestPlaceholders(t *testing.T) {
	w := newWorld(t, "", nil)
	want := map[string]any{"method": "GET", "host": "127.0.0.1:25", "status": 403.0, "client": "127.0.0.1", "reason": "http_request_denied"}
	site := strings.TrimSuffix(strings.TrimSpace(w.site("")), "}") + "\tlog\n"
	for name := range want {
		site += fmt.Sprintf("\tlog_append proxy_%s {http.async_proxy.%s}\n", name, name)
	}
	w.load(site + "\tlog_append proxy_latency {http.async_proxy.latency}\n}\n")
	c := w.dial()
	c.send("GET http://127.0.0.1:25/ HTTP/1.1\nHost: x\n\n")
	c.response(http.MethodGet)
	line := w.waitLog("handled request", 1)[0]
	for name, value := range want {
		if line["proxy_"+name] != value {
			t.Errorf("the access log has %s %v, want %v", name, line["proxy_"+name], value)
		}
	}
	if latency, _ := line["proxy_latency"].(float64); latency <= 0 {
		t.Errorf("the access log has the latency %v", line["proxy_latency"])
	}
}
