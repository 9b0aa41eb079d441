// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

// startScriptedParent runs a parent that responds to each request line with what answer
// returns for it, and echoes what follows a CONNECT. "silence" means no response, "close"
// closes the connection.
func startScriptedParent(t *testing.T, answer func(line string) string) (address string) {
	return listen(t, func(conn *net.TCPConn) {
		r := bufio.NewReader(conn)
		for {
			line, err := r.ReadString('\n')
			for field := line; err == nil && strings.TrimRight(field, "\r\n") != ""; {
				field, err = r.ReadString('\n')
			}
			if err != nil {
				return
			}
			switch text := answer(strings.TrimRight(line, "\r\n")); text {
			case "silence":
				_, _ = io.Copy(io.Discard, conn)
				return
			case "close":
				return
			default:
				_, _ = io.WriteString(conn, strings.ReplaceAll(text, "\n", "\r\n"))
			}
			if strings.HasPrefix(line, "CONNECT ") {
				_, _ = io.Copy(conn, r)
				return
			}
		}
	})
}

// TestParentTunnelHeads checks that a 2xx to CONNECT opens the tunnel whatever its fields
// say about content.
func TestParentTunnelHeads(t *testing.T) {
	heads := []string{
		"HTTP/1.0 200 OK\nTransfer-Encoding: chunked\n", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n", "HTTP/1.1 200 OK\nTransfer-Encoding: identity\n",
		"HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked\n", "HTTP/1.1 200 OK\nContent-Length: 0\nTransfer-Encoding: chunked\n", "HTTP/1.1 200 OK\nContent-Length: 5\n",
		"HTTP/1.1 200 OK\nContent-Length: 3\nContent-Length: 4\n", "HTTP/1.1 200 OK\nContent-Length:\n", "HTTP/1.1 200 OK\nContent-Length: x\nConnection: close\n",
		"HTTP/1.1 204 No Content\nContent-Length: 7\n", "HTTP/1.1 299 OK\nTransfer-Encoding: x\n", "HTTP/1.1 100 Continue\nContent-Length: x\n\nHTTP/1.1 200 OK\n",
		"HTTP/1.1 103 Early Hints\nTransfer-Encoding: identity\n\nHTTP/1.1 200 OK\n",
	}
	address := startScriptedParent(t, func(line string) string {
		var n int
		_, _ = fmt.Sscanf(line, "CONNECT a%d.example", &n)
		return heads[n] + "\n"
	})
	w := newWorld(t, "upstream http://"+address, nil)
	for n, head := range heads {
		conn := w.dial()
		conn.connect(fmt.Sprintf("a%d.example:443", n))
		conn.send("hello\n")
		if got, err := conn.r.ReadString('\n'); got != "hello\r\n" {
			t.Errorf("%q: the tunnel carries %q, %v", head, got, err)
		}
		conn.Close()
	}
}

// TestSwitchWithFraming checks that a 101 has no content either, whatever its fields say.
func TestSwitchWithFraming(t *testing.T) {
	origin := listen(t, func(conn *net.TCPConn) {
		r := bufio.NewReader(conn)
		if _, err := http.ReadRequest(r); err == nil {
			_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\nTransfer-Encoding: identity\r\nContent-Length: 5, 6\r\n\r\n")
			_, _ = io.Copy(conn, r)
		}
	})
	w := newWorld(t, "", nil)
	conn := w.dial()
	conn.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\nConnection: upgrade\nUpgrade: x\n\nhello\n")
	res, err := http.ReadResponse(conn.r, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols || res.ContentLength > 0 || len(res.TransferEncoding) > 0 {
		t.Fatalf("%v, %v", res, err)
	}
	if got, err := conn.r.ReadString('\n'); got != "hello\r\n" {
		t.Errorf("the tunnel carries %q, %v", got, err)
	}
}

// failure is how a request must fail.
type failure struct {
	status int
	kind   string // error type in Proxy-Status
	text   string
}

// expectFailure sends CONNECT and GET for a target and checks how they fail.
func (w *world) expectFailure(target string, want failure, methods ...string) {
	w.t.Helper()
	for _, method := range methods {
		conn := w.dial()
		if method == http.MethodConnect {
			conn.send("CONNECT " + target + " HTTP/1.1\nHost: x\n\n")
		} else {
			conn.send(method + " http://" + target + "/ HTTP/1.1\nHost: x\n\n")
		}
		res, body := conn.response(method)
		conn.Close()
		if status := ownStatus(w.t, res.Header)["error"]; res.StatusCode != want.status || status != want.kind || !strings.HasPrefix(body, want.text) {
			w.t.Errorf("%s %s: %s, %q, %q, want %v", method, target, res.Status, status, body, want)
		}
	}
}

// TestParentFailurePhases checks that a parent that accepts the connection and then fails
// is not reported as unreachable.
func TestParentFailurePhases(t *testing.T) {
	wantsTLS := failure{502, "http_protocol_error", "The parent proxy expects https://"}
	cases := []struct {
		answer string
		want   failure
	}{
		{"silence", failure{504, "http_response_timeout", "The parent proxy did not answer in time"}},
		{"close", failure{502, "http_response_incomplete", "The parent proxy closed the connection before its answer was complete"}},
		{"HTTP/1.1 200", failure{502, "http_response_incomplete", "The parent proxy closed the connection before its answer was complete"}},
		{"SSH-2.0-OpenSSH_9.6\n", failure{502, "http_protocol_error", "The parent proxy did not answer with a valid HTTP response"}},
		{"HTTP/1.1 999999 x\n\n", failure{502, "http_protocol_error", "The parent proxy did not answer with a valid HTTP response"}},
		{"HTTP/1.1 101 Switching Protocols\nConnection: upgrade\nUpgrade: x\n\n", failure{502, "http_protocol_error", "The parent proxy did not answer with a valid HTTP response"}},
		{strings.Repeat("HTTP/1.1 103 Early Hints\n\n", 300), failure{502, "http_protocol_error", "The parent proxy did not answer with a valid HTTP response"}},
		{"\x15\x03\x01\x00\x02\x02\x46", wantsTLS},
		{"\x15\x03\x03\x00\x02\x01\x00", wantsTLS},
	}
	closing := make(chan struct{})
	t.Cleanup(func() { close(closing) })
	address := listen(t, func(conn *net.TCPConn) {
		req, err := http.ReadRequest(bufio.NewReader(conn))
		if err != nil {
			return
		}
		var n int
		_, _ = fmt.Sscanf(req.Host, "a%d.example", &n)
		switch answer := cases[n].answer; answer {
		case "silence":
			<-closing
		case "close":
		default:
			_, _ = io.WriteString(conn, strings.ReplaceAll(answer, "\n", "\r\n"))
			if strings.HasPrefix(answer, "HTTP/1.1 101") {
				<-closing // the proxy must not wait for this
			}
		}
	})
	w := newWorld(t, "dial_timeout 1s\nresponse_header_timeout 300ms\nupstream http://"+address, nil)
	for n, tc := range cases {
		w.expectFailure(fmt.Sprintf("a%d.example:80", n), tc.want, http.MethodConnect)
		if !strings.HasPrefix(tc.answer, "HTTP/1.1 1") { // HTTP clients never see a final response of 1xx
			w.expectFailure(fmt.Sprintf("a%d.example:80", n), tc.want, http.MethodPost)
		}
	}
}

// TestParentTLSPhases checks that a failed handshake is reported as one, even if the parent
// rejects this proxy's certificate after it.
func TestParentTLSPhases(t *testing.T) {
	for name, tc := range map[string]struct {
		serve func(*net.TCPConn)
		want  failure
	}{
		"closes":  {func(conn *net.TCPConn) { _, _ = conn.Read(make([]byte, 1<<10)) }, failure{502, "tls_protocol_error", "The parent proxy closed the connection during the TLS handshake"}},
		"silence": {func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) }, failure{504, "connection_timeout", "The parent proxy did not complete the TLS handshake in time"}},
		"plain": {func(conn *net.TCPConn) {
			_, _ = conn.Read(make([]byte, 1<<10))
			_, _ = io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
		}, failure{502, "tls_protocol_error", "The parent proxy"}},
	} {
		t.Run(name, func(t *testing.T) {
			timeout := "10s"
			if name == "silence" {
				timeout = "300ms"
			}
			w := newWorld(t, "dial_timeout "+timeout+"\nupstream https://"+listen(t, tc.serve), nil)
			w.expectFailure("a.example:80", tc.want, http.MethodConnect, http.MethodGet)
		})
	}
	t.Run("wants a certificate", func(t *testing.T) {
		config := &tls.Config{Certificates: []tls.Certificate{tlsCertificate}, ClientAuth: tls.RequireAnyClientCert}
		w := newWorld(t, "upstream https://"+listen(t, func(conn *net.TCPConn) {
			_ = tls.Server(conn, config).Handshake()
		}), nil)
		for _, method := range []string{http.MethodConnect, http.MethodGet} {
			res, body := policyRequest(t, w.proxy, method, "a.example:80", "")
			if res.StatusCode != http.StatusBadGateway || !strings.Contains(res.Header.Get("Proxy-Status"), "error=tls_alert_received; alert-id=") || !strings.HasPrefix(body, "The parent proxy ended the TLS connection with the alert") {
				t.Errorf("%s: %s, %q, %q", method, res.Status, res.Header.Get("Proxy-Status"), body)
			}
		}
	})
}

// TestParentSOCKSPhases does the same for a SOCKS parent.
func TestParentSOCKSPhases(t *testing.T) {
	var answer atomic.Value
	address := listen(t, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 100))
		if text := answer.Load().(string); text != "" {
			_, _ = io.WriteString(conn, text)
		} else {
			_, _ = io.Copy(io.Discard, conn)
		}
	})
	w := newWorld(t, "dial_timeout 500ms\nupstream socks5h://"+address, nil)
	for text, want := range map[string]failure{
		"":                       {504, "connection_read_timeout", "The parent proxy did not answer in time"},
		"\x05":                   {502, "connection_terminated", "The parent proxy closed the connection before its answer was complete"},
		"HTTP/1.1 400 x\r\n\r\n": {502, "destination_unavailable", "The parent proxy did not give a valid SOCKS answer"},
	} {
		answer.Store(text)
		w.expectFailure("a.example:80", want, http.MethodConnect, http.MethodGet)
	}
}

// TestParentReasonIsPassedOn checks that when the parent refuses, the client gets the parent's
// reasons (Proxy-Status) and Retry-After.
func TestParentReasonIsPassedOn(t *testing.T) {
	cases := []struct {
		answer string // the parent's status and fields
		status int
		before string // the Proxy-Status members before ours
		retry  string
	}{
		{"429 x\nRetry-After: 17\nProxy-Status: parent; error=http_request_denied\n", 429, "parent; error=http_request_denied", "17"},
		{"503 x\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT\n", 503, "", "Fri, 31 Dec 1999 23:59:59 GMT"},
		{"502 x\nRetry-After: 17\nProxy-Status: \"a, b\"; error=dns_error; details=\"x\\\"y;,\", c\nProxy-Status: d;received-status=502\n", 502, `"a, b"; error=dns_error; details="x\"y;,", c, d;received-status=502`, ""},
		{"429 x\nRetry-After: -1\nProxy-Status: parent; error=\n", 429, "", ""},
		{"429 x\nRetry-After: 1\nRetry-After: 2\nProxy-Status: a b\n", 429, "", ""},
		{"503 x\nRetry-After: 12345678901\nProxy-Status: " + strings.Repeat("a, ", 500) + "a\n", 503, "", ""},
		{"403 x\nProxy-Status: parent; error=http_request_denied\n", 403, "parent; error=http_request_denied", ""},
		{"407 x\nProxy-Status: parent; error=http_request_denied\nRetry-After: 3\n", 502, "parent; error=http_request_denied", ""},
		{"504 x\nProxy-Status: \"unfinished\n", 504, "", ""},
	}
	address := startScriptedParent(t, func(line string) string {
		var n int
		_, _ = fmt.Sscanf(line, "CONNECT a%d.example", &n)
		return "HTTP/1.1 " + cases[n].answer + "Content-Length: 0\n\n"
	})
	w := newWorld(t, "via tester\nupstream http://"+address, nil)
	for n, tc := range cases {
		res, body := policyRequest(t, w.proxy, http.MethodConnect, fmt.Sprintf("a%d.example:443", n), "")
		before, _, _ := strings.Cut(res.Header.Get("Proxy-Status"), "tester; error=")
		if res.StatusCode != tc.status || strings.TrimSuffix(before, ", ") != tc.before || res.Header.Get("Retry-After") != tc.retry {
			t.Errorf("%q: %s %q, Proxy-Status %q, Retry-After %q", tc.answer, res.Status, body, res.Header["Proxy-Status"], res.Header["Retry-After"])
		}
	}
}

// TestParentSecretsAreNotEchoed checks that no response shows the client the fields meant for the
// parent, which answers some requests itself.
func TestParentSecretsAreNotEchoed(t *testing.T) {
	heads := make(chan string, 10)
	address := listen(t, func(conn *net.TCPConn) {
		r := bufio.NewReader(conn)
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			var head strings.Builder
			_ = req.Header.Write(&head)
			heads <- head.String()
			fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", head.Len(), head.String())
		}
	})
	for _, secret := range []string{"upstream http://alice:rabbit@" + address, "upstream http://" + address + ` {
	header X-Key rabbit
}`} {
		w := newWorld(t, secret, nil)
		for _, tc := range []struct {
			request string
			status  int
		}{
			{"TRACE http://a.example/ HTTP/1.1\nMax-Forwards: 1\n", 403},
			{"TRACE http://a.example/ HTTP/1.1\nMax-Forwards: x\n", 403},
			{"TRACE http://a.example/ HTTP/1.1\n", 403},
			{"trace http://a.example/ HTTP/1.1\n", 403},
			{"TRACK http://a.example/ HTTP/1.1\n", 403},
			{"OPTIONS http://a.example/ HTTP/1.1\nMax-Forwards: 1\n", 403},
			{"OPTIONS http://a.example/ HTTP/1.1\nMax-Forwards: 1\nMax-Forwards: 2\n", 403},
			{"GET http://" + address + "/printenv HTTP/1.1\n", 403},
			{"TRACE http://a.example/ HTTP/1.1\nMax-Forwards: 0\n", 200}, // answered by this proxy
			{"OPTIONS http://a.example/ HTTP/1.1\nMax-Forwards: 0\n", 200},
		} {
			conn := w.dial()
			conn.send(tc.request + "Host: x\n\n")
			res, body := conn.response("")
			conn.Close()
			if res.StatusCode != tc.status || strings.Contains(body, "rabbit") || strings.Contains(body, "Basic") || strings.Contains(body, address) && tc.status == 200 {
				t.Errorf("%q: %s %q", tc.request, res.Status, body)
			}
		}
		if len(heads) > 0 {
			t.Errorf("the parent was asked: %q", <-heads)
		}
		// Later hops must not answer other requests with an echo either.
		if res, _ := policyRequest(t, w.proxy, http.MethodGet, "a.example:80", "Max-Forwards: 1\n"); res.StatusCode != http.StatusOK {
			t.Error(res.Status)
		}
		if head := <-heads; strings.Contains(head, "Max-Forwards") {
			t.Errorf("the parent got %q", head)
		}
	}
	w := newWorld(t, "upstream http://"+address, nil) // no secrets here
	conn := w.dial()
	conn.send("TRACE http://a.example/ HTTP/1.1\nMax-Forwards: 2\nHost: x\n\n")
	if res, _ := conn.response(""); res.StatusCode != http.StatusOK {
		t.Error(res.Status)
	}
	if head := <-heads; !strings.Contains(head, "Max-Forwards: 1") {
		t.Errorf("the parent got %q", head)
	}
}

// TestWarnsAboutParentSecret checks the warning about secrets in the config, which the
// admin endpoint and Caddy's debug log show.
func TestWarnsAboutParentSecret(t *testing.T) {
	t.Setenv("PARENT_KEY", "rabbit")
	for option, want := range map[string]int{
		"upstream http://alice:rabbit@a.example":   1,
		"upstream socks5://alice:rabbit@a.example": 1,
		`upstream http://a.example {
	header X-Api-Key rabbit
}`: 1,
		`upstream http://a.example {
	header Proxy-Authorization "Basic cmFiYml0"
}`: 1,
		`upstream http://alice:{env.PARENT_KEY}@a.example {
	header X-Api-Key {env.PARENT_KEY}
	header X-A b
}`: 0,
		"upstream http://alice@a.example": 0,
	} {
		w := newWorld(t, option, nil)
		warned := 0
		for _, line := range w.logLines("the option upstream contains a password or a key in plain text, which Caddy's debug log and admin endpoint show with the rest of the config; use a placeholder such as {env.PROXY_PASSWORD} or {file./run/secrets/proxy}") {
			if warned++; line["level"] != "warn" {
				t.Errorf("%v", line)
			}
		}
		if warned != want {
			t.Errorf("%q: %d warnings, want %d", option, warned, want)
		}
	}
}

// TestParentOverHTTP2 checks that a parent's responses over HTTP/2 are treated as over
// HTTP/1.
func TestParentOverHTTP2(t *testing.T) {
	abort := func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }
	cases := []struct {
		serve  http.HandlerFunc
		want   failure
		before string // the Proxy-Status members before ours
		retry  string
	}{
		{func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "17")
			w.Header().Set("Proxy-Status", "parent; error=http_request_denied")
			w.WriteHeader(http.StatusTooManyRequests)
		}, failure{429, "destination_unavailable", "The parent proxy limits requests"}, "parent; error=http_request_denied", "17"},
		{func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusForbidden) }, failure{403, deniedRequest, "Denied by the parent proxy"}, "", ""},
		{abort, failure{502, "http_response_incomplete", "The parent proxy closed the connection before its answer was complete"}, "", ""},
		{func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, failure{504, "http_response_timeout", "The parent proxy did not answer in time"}, "", ""},
	}
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 || len(r.Header["Accept-Encoding"]) > 0 || len(r.Header["User-Agent"]) > 0 {
			t.Errorf("the parent got %s with %v", r.Proto, r.Header)
		}
		var n int
		_, _ = fmt.Sscanf(r.Host, "a%d.example", &n)
		cases[n].serve(w, r)
	}))
	secure.EnableHTTP2 = true
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{tlsCertificate}}
	secure.StartTLS()
	defer secure.Close()
	w := newWorld(t, "via tester\ndial_timeout 1s\nupstream "+secure.URL, nil)
	t.Run("cases", func(t *testing.T) {
		for n, tc := range cases {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				t.Parallel()
				target := fmt.Sprintf("a%d.example:443", n)
				w := &world{t: t, proxy: w.proxy}
				w.expectFailure(target, tc.want, http.MethodConnect)
				res, _ := policyRequest(t, w.proxy, http.MethodConnect, target, "")
				before, _, _ := strings.Cut(res.Header.Get("Proxy-Status"), "tester; error=")
				if strings.TrimSuffix(before, ", ") != tc.before || res.Header.Get("Retry-After") != tc.retry {
					t.Errorf("%s: Proxy-Status %q, Retry-After %q", target, res.Header["Proxy-Status"], res.Header["Retry-After"])
				}
			})
		}
	})
}
