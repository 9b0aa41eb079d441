// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
)

// refusalEvil follows each CONNECT that must fail. It must never be parsed as a request.
const refusalEvil = "GET http://ORIGIN/evil HTTP/1.1\nHost: ORIGIN\n\n"

const (
	refusalBad    = "http_request_error"
	refusalDenied = "destination_ip_prohibited"
)

// refusalBench is a world with the named addresses that its requests use.
type refusalBench struct {
	*world
	t      *testing.T
	target *policyOrigin // ORIGIN, which must get no connection
	whole  atomic.Int64  // requests that ECHO has read completely
	places []string      // old and new strings for strings.NewReplacer
	logged int           // log lines "request" expected so far
	custom bool          // the site has error routes
}

func newRefusalBench(t *testing.T, options string) *refusalBench {
	b := &refusalBench{t: t, target: newPolicyOrigin(t)}
	b.world = newWorld(t, options, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			b.whole.Add(1)
		}
		fmt.Fprintf(w, "Via %q", r.Header["Via"])
	}))
	b.places = []string{"ECHO", b.origin.Listener.Addr().String(), "ORIGIN", b.target.address, "PORT", b.target.port, "REFUSED", freeAddress(t)}
	return b
}

func (b *refusalBench) place(name, address string) { b.places = append(b.places, name, address) }

// in replaces the names of addresses in a text.
func (b *refusalBench) in(text string) string { return strings.NewReplacer(b.places...).Replace(text) }

// request completes a request of which text is the first line or more.
func (b *refusalBench) request(text string) string {
	if !strings.Contains(text, "\n") {
		text += " HTTP/1.1\nHost: proxy.test\n\n"
	}
	return b.in(text)
}

// passed waits for the log line of a request that was not refused.
func (b *refusalBench) passed() { b.logged++; b.waitLog("request", b.logged) }

// refuses checks the response to each request, sent on its own connection: its status, its
// error type ("" for net/http's own responses) and a part of its body. ORIGIN must not get
// a connection.
func (b *refusalBench) refuses(status int, kind, text string, requests ...string) {
	b.t.Helper()
	for _, request := range requests {
		b.refusesOne(status, kind, b.in(text), request)
	}
	if n := b.target.connections(b.t); n != 0 {
		b.t.Errorf("%q: %d connections to the origin", requests, n)
	}
}

func (b *refusalBench) refusesOne(status int, kind, text, row string) {
	b.t.Helper()
	request := b.request(row)
	method, rest, _ := strings.Cut(request, " ")
	target, _, _ := strings.Cut(rest, " ")
	connect, head := method == http.MethodConnect, method == http.MethodHead
	if connect {
		request += b.in(refusalEvil)
	}
	conn := b.dial()
	conn.send(request)
	res, body := conn.response(method)
	wrong := func(format string, args ...any) {
		b.t.Helper()
		b.t.Errorf("%q: %s, Proxy-Status %q, body %q: %s", row, res.Status, res.Header["Proxy-Status"], body, fmt.Sprintf(format, args...))
	}
	if res.StatusCode != status {
		wrong("want status %d", status)
	}
	// http.ReadResponse removes Connection: close, and sets Close too if the body ends with
	// the connection.
	if connect && (!res.Close || kind != "" && res.ContentLength < 0) {
		wrong("want Connection: close")
	} else if connect {
		if rest := conn.readAll(); rest != "" {
			wrong("then %q", rest)
		}
	}
	if head && body != "" || !head && !strings.Contains(body, text) {
		wrong("want a body with %q", text)
	}
	got, values := "", res.Header["Proxy-Status"]
	if len(values) > 0 {
		own := ownStatus(b.t, res.Header)
		if phrase := fmt.Sprint(status, " ", own["details"]); connect && res.Status != phrase || !connect && res.Status == phrase {
			wrong("the status line should have the details in it only if the method is CONNECT")
		}
		if got = own["error"]; !b.custom && !head && reasonPhrase(strings.TrimSuffix(body, "\n")) != own["details"] {
			wrong("the details are other words than the body")
		}
	}
	if got != kind || len(values) > 0 && kind == "" {
		wrong("want error=%s", kind)
	}
	if len(values) == 0 || status == http.StatusTooManyRequests && kind == "http_request_denied" {
		return // logs no line "request"
	}
	if !b.custom && !head && (!strings.HasSuffix(body, ".\n") || strings.Count(body, "\n") != 1 || strings.Contains(body, "secret")) {
		wrong("want a body of one sentence without secrets")
	}
	if got := res.Header.Get("Content-Type"); got != "text/plain; charset=utf-8" {
		wrong("Content-Type %q", got)
	}
	b.logged++
	line := b.waitLog("request", b.logged)[b.logged-1]
	latency, ok := line["latency"].(float64)
	path, hasPath := line["path"].(string)
	host, hasHost := line["host"].(string)
	if line["method"] != method || line["status"] != float64(status) || line["reason"] != kind || line["client"] != "127.0.0.1" || !ok || latency < 0 ||
		!hasHost || connect && status > 400 && host != target || !connect && (!hasPath || !strings.Contains(target, path)) {
		wrong("log line %v", line)
	}
}

// refusesMalformed sends requests that reach no handler, or reach one only on the fast
// path.
func (b *refusalBench) refusesMalformed(rows ...string) {
	b.t.Helper()
	for _, row := range rows {
		request := b.request(row)
		method, _, _ := strings.Cut(request, " ")
		conn := b.dial()
		conn.send(request)
		res, body := conn.response(method)
		status := res.Header.Get("Proxy-Status")
		ours := status != "" && ownStatus(b.t, res.Header)["error"] == refusalBad && strings.HasSuffix(body, ".\n") && strings.Count(body, "\n") == 1
		if res.StatusCode != http.StatusBadRequest || !ours && (!*byNetHTTP || !strings.HasPrefix(body, "400 Bad Request")) {
			b.t.Errorf("%q: %s, Proxy-Status %q, body %q", row, res.Status, status, body)
		}
	}
	b.logged = len(b.logLines("request"))
}

func TestRefusalRequest(t *testing.T) {
	b := newRefusalBench(t, "")
	b.refuses(400, refusalBad, "CONNECT needs a host and a port, such as example.com:443: the port is missing",
		"CONNECT 127.0.0.1", "CONNECT [::1]", "CONNECT localhost", "CONNECT /", "CONNECT *")
	b.refuses(400, refusalBad, "is not a number from 1 to 65535",
		"CONNECT 127.0.0.1:", "CONNECT 127.0.0.1:0", "CONNECT 127.0.0.1:65536", "CONNECT 127.0.0.1:99999999999999999999",
		"CONNECT ORIGIN/", "CONNECT ORIGIN/path", "CONNECT ORIGIN?query",
		"GET http://127.0.0.1:0/", "GET https://127.0.0.1:0/", "GET http://127.0.0.1:65536/")
	b.refuses(400, refusalBad, `the port "0" is`, "CONNECT 127.0.0.1:0", "HEAD http://127.0.0.1:0/")
	b.refuses(400, refusalBad, "the host is missing", "CONNECT :PORT", "GET http:///", "GET http://:PORT/", "GET http:ORIGIN/", "GET http:/ORIGIN/")
	b.refuses(400, refusalBad, "is not a host name",
		"CONNECT //ORIGIN", "CONNECT http://ORIGIN", "CONNECT http://ORIGIN/", "CONNECT local..host:PORT", "CONNECT .localhost:PORT",
		"CONNECT "+strings.Repeat("a", 64)+".test:PORT", "GET http://local..host:PORT/", "GET http://ORI!GIN:PORT/")
	b.refuses(400, refusalBad, "too long", "CONNECT "+strings.Repeat("a.", 130)+"test:PORT", "GET http://"+strings.Repeat("a.", 130)+"test/")
	b.refuses(400, refusalBad, "is not an IPv6 address", "CONNECT [::1%25lo]:PORT", "GET http://[::1%25lo]:PORT/")
	b.refuses(400, refusalBad, "A CONNECT request must not have content",
		"CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nContent-Length: 5\n\nhello",
		"CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nTransfer-Encoding: chunked\n\n0\n\n",
		"CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nTransfer-Encoding: chunked\n\n")
	b.refuses(400, refusalBad, `the scheme "ftp" is neither http nor https`, "GET ftp://ORIGIN/", "GET ftp:ORIGIN", "HEAD ftp://ORIGIN/")
	b.refuses(400, refusalBad, "is neither http nor https", "GET ws://ORIGIN/", "GET mailto:someone", "GET httpx://ORIGIN/")
	b.refuses(400, refusalBad, "user names and passwords do not belong in a request target", "CONNECT user@ORIGIN", "CONNECT user:word@ORIGIN", "GET http://user@ORIGIN/", "GET http://user:secret@ORIGIN/", "GET https://user:secret@ORIGIN/", "GET http://@ORIGIN/")
	b.refuses(400, refusalBad, "a fragment does not belong", "GET http://ORIGIN/#fragment", "GET http://ORIGIN/?a#b")
	b.refuses(400, refusalBad, "the target * is for OPTIONS", "GET *", "POST *")
	b.refuses(400, refusalBad, "A TRACE request must not have content", "TRACE http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 0\nContent-Length: 5\n\nhello")
	b.refusesMalformed(
		"CONNECT 127.0.0.1:+PORT", "CONNECT local%68ost:PORT", "CONNECT 127.0.0.1:http", "CONNECT ::1:PORT", "CONNECT [::1:PORT", "CONNECT [127.0.0.1]:PORT", "CONNECT [localhost]:PORT", "CONNECT ORIGIN#fragment",
		"CONNECT ORIGIN HTTP/1.1\nHost: a\nHost: b\n\n", "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nContent-Length: 5\nContent-Length: 6\n\nhello",
		"GET http://127.0.0.1:http/", "GET http://::1:PORT/", "GET http://ORIGIN#fragment", "GET http://ORIGIN,localhost:PORT/", "GET ORIGIN", "GET ?", "GET http://ORIGIN/ HTTP/1.1\n\n",
		"GET http://ORIGIN/ HTTP/1.1\nHost: a\nContent-Length: x\n\n", "GET http://ORIGIN/ HTTP/1.1\nHost: a\nContent-Length : 5\n\nhello", "GET http://ORIGIN/ HTTP/1.1\nHost: a\n folded: x\n\n")
	b.refuses(403, "http_request_denied", "Denied by proxy: port 25 (mail) is closed.", "CONNECT 127.0.0.1:25", "GET http://127.0.0.1:25/", "GET https://127.0.0.1:25/")
	b.refuses(403, refusalDenied, "169.254.169.254", "CONNECT 169.254.169.254:PORT", "GET http://169.254.169.254/", "GET https://169.254.169.254/")
	b.refuses(403, refusalDenied, " (it is an address of the proxy itself).", "CONNECT "+b.proxy, "GET http://"+b.proxy+"/")

	// After the refusal of any other request, the connection can be reused.
	conn := b.dial()
	for range 3 {
		conn.send(b.request("GET ftp://ECHO/") + b.request("GET http://ECHO/"))
		if res, _ := conn.response(http.MethodGet); res.StatusCode != http.StatusBadRequest {
			t.Errorf("the refused request: %s", res.Status)
		}
		if res, body := conn.response(http.MethodGet); res.StatusCode != http.StatusOK || !strings.HasPrefix(body, "Via ") {
			t.Errorf("the request after it: %s %q", res.Status, body)
		}
	}
}

// answers makes an address answer the first request on each connection.
func (b *refusalBench) answers(name, answer string) {
	b.place(name, listen(b.t, func(conn *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			_, _ = io.WriteString(conn, answer) // fails if the proxy has closed, having read enough
		}
	}))
}

func TestRefusalOrigin(t *testing.T) {
	refusalResolver(t)
	b := newRefusalBench(t, "")
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	t.Cleanup(func() { closeServer(t, secure) })
	b.place("SECURE", secure.Listener.Addr().String())
	b.place("CLOSES", listen(t, func(*net.TCPConn) {}))
	b.place("GREETS", listen(t, func(conn *net.TCPConn) {
		_, _ = io.WriteString(conn, "SSH-2.0-nonsense\r\n")
		_, _ = io.Copy(io.Discard, conn)
	}))
	b.answers("LEAVES", "")
	b.answers("PARTIAL", "HTTP/1.1 200 OK\r\nContent-Le")
	b.answers("NONSENSE", "SSH-2.0-nonsense\r\n\r\n")
	b.answers("BANNER", "SSH-2.0-nonsense\r\n")
	b.answers("FIELDS", "HTTP/1.1 200 OK\r\nno field\r\n\r\n")
	b.answers("LENGTHS", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab")
	b.answers("UNASKED", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
	b.answers("LARGE", "HTTP/1.1 200 OK\r\n"+strings.Repeat("X: "+strings.Repeat("x", 1<<10)+"\r\n", 1<<10)+"\r\n")
	b.answers("LONG", "HTTP/1.1 200 OK\r\nX: "+strings.Repeat("x", 1<<20)+"\r\n\r\n")

	b.refuses(502, "connection_refused", "REFUSED refused the connection", "CONNECT REFUSED", "GET http://REFUSED/", "HEAD http://REFUSED/", "GET https://REFUSED/", "POST http://REFUSED/ HTTP/1.1\nHost: x\nContent-Length: 5\n\nhello")
	b.refuses(502, "dns_error", "nonexistent.invalid could not be resolved", "CONNECT nonexistent.invalid:PORT", "GET http://nonexistent.invalid/", "GET https://nonexistent.invalid/")
	b.refuses(502, "http_response_incomplete", "closed the connection before its response was complete",
		"GET http://CLOSES/", "GET https://CLOSES/", "GET http://LEAVES/", "HEAD http://LEAVES/", "GET http://PARTIAL/", "POST http://LEAVES/ HTTP/1.1\nHost: x\nContent-Length: 5\n\nhello")
	b.refuses(502, "http_protocol_error", "did not answer with a valid HTTP response", "GET http://NONSENSE/", "GET http://BANNER/", "GET http://FIELDS/", "GET http://LENGTHS/", "GET http://UNASKED/")
	b.refuses(502, "http_response_header_section_size", "are larger than 256 KiB", "GET http://LARGE/", "GET http://LONG/")
	b.refuses(502, "tls_certificate_error", "The certificate of SECURE is not trusted", "GET https://SECURE/")
	b.refuses(502, "tls_protocol_error", "does not speak TLS", "GET https://ECHO/", "GET https://GREETS/")
	b.refuses(400, refusalBad, "The content of the request is incomplete or malformed",
		"POST http://ECHO/ HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n5\nhello\nzz\n",
		"POST http://ECHO/ HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n5\nhello, world\n0\n\n",
		"POST http://ECHO/ HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\nhello\n")
	if n := b.whole.Load(); n != 0 {
		t.Errorf("the origin got %d truncated requests as complete ones", n)
	}
}

// TestTLSAlerts checks that an alert is reported as tls_alert_received, whichever origin
// sends it (RFC 9209 §2.3.15): an origin that sends alerts does speak TLS.
func TestTLSAlerts(t *testing.T) {
	b := newRefusalBench(t, "")
	for id, name := range map[byte]string{40: "handshake_failure", 70: "protocol_version", 80: "internal_error",
		112: "unrecognized_name", 116: "certificate_required", 120: "no_application_protocol", 200: "unknown alert 200"} {
		origin := listen(t, func(conn *net.TCPConn) {
			_, _ = conn.Read(make([]byte, 4<<10))
			_, _ = conn.Write([]byte{21, 3, 3, 0, 2, 2, id})
		})
		b.refuses(502, "tls_alert_received", origin+" ended the TLS connection with the alert "+name+".", "GET https://"+origin+"/")
		c := b.dial()
		c.send("HEAD https://" + origin + "/ HTTP/1.1\nHost: x\n\n")
		res, _ := c.response(http.MethodHead)
		if own := ownStatus(t, res.Header); own["error"] != "tls_alert_received" || own["alert-id"] != fmt.Sprint(id) || own["alert-message"] != name {
			t.Errorf("Proxy-Status %q", res.Header["Proxy-Status"])
		}
		b.passed()
	}
}

// TestRefusalOfTruncatedRequest checks that a client that half-closes amid its request body gets no
// response with a status that exists only in logs (499).
func TestRefusalOfTruncatedRequest(t *testing.T) {
	b := newRefusalBench(t, "")
	for _, lines := range []string{"Content-Length: 10\n\nhello", "Transfer-Encoding: chunked\n\n5\nhello\n"} {
		conn := b.dial()
		conn.send(b.in("POST http://ECHO/ HTTP/1.1\nHost: x\n" + lines))
		_ = conn.CloseWrite()
		if answer := conn.readAll(); answer != "" && !strings.HasPrefix(answer, "HTTP/1.1 400 ") {
			t.Errorf("%q: %q", lines, answer)
		}
	}
	if n := b.whole.Load(); n != 0 {
		t.Errorf("the origin got %d truncated requests as complete ones", n)
	}
}

// TestRefusalLoop checks that the proxy recognizes itself by its name in Via.
func TestRefusalLoop(t *testing.T) {
	b := newRefusalBench(t, "")
	for _, via := range []string{"", "via my-name", "via off"} {
		b.load(b.site("allow 127.0.0.0/8\n" + via)) // requests with Via do not count as local ones
		get := func(lines string) string {
			_, body := policyRequest(t, b.proxy, http.MethodGet, b.in("ECHO"), lines)
			b.passed()
			return body
		}
		received := regexp.MustCompile(`^Via \["1\.1 ([^ "]+)"\]$`).FindStringSubmatch(get(""))
		if via == "via off" {
			if body := get("Via: 1.1 my-name\n"); received != nil || body != `Via ["1.1 my-name"]` {
				t.Errorf("%s: the origin received %q, and with another proxy's Via %q", via, received, body)
			}
			continue
		}
		if received == nil || via != "" && via != "via "+received[1] || via == "" && !strings.HasPrefix(received[1], "caddy-async-proxy-") {
			t.Fatalf("%s: the origin received %q", via, received)
		}
		name := received[1]
		for _, value := range []string{"1.1 " + name, "HTTP/1.1 " + name, "1.0 other, 1.1 " + name + " (comment)", "2.0 other\nVia: 1.1 " + name + ",1.1 more"} {
			lines := " HTTP/1.1\nHost: x\nVia: " + value + "\n\n"
			b.refuses(508, "proxy_loop_detected", "already passed through "+name, "GET http://ORIGIN/"+lines, "GET https://ORIGIN/"+lines, "CONNECT ORIGIN"+lines)
		}
		for _, value := range []string{"1.1 " + name + "x", "1.1 x" + name, "1.1 other (" + name + ")"} {
			if body := get("Via: " + value + "\n"); body != fmt.Sprintf("Via [%q %q]", value, "1.1 "+name) && body != fmt.Sprintf("Via [%q]", value+", 1.1 "+name) {
				t.Errorf("Via %q of another proxy: %q", value, body)
			}
		}
	}
}

func TestRefusalLimits(t *testing.T) {
	b := newRefusalBench(t, "")
	for i, row := range []struct {
		options string
		status  int
		rule    string
	}{{"max_tunnels 1", 503, "max_tunnels"}, {"max_tunnels 1000 per_client 1", 429, "max_tunnels per_client"}} {
		b.load(b.site(row.options))
		conn := b.dial()
		conn.connect(b.in("ECHO"))
		b.refuses(row.status, "connection_limit_reached", "limit of open tunnels", "CONNECT ORIGIN")
		if lines := b.waitLog("request", 1); lines[len(lines)-1]["level"] != "warn" || lines[len(lines)-1]["rule"] != row.rule {
			t.Errorf("log line %v", lines[len(lines)-1])
		}
		_ = conn.Close()
		b.waitLog("CONNECT tunnel closed", i+1)
		waitNoTunnels(t)
	}
	b.load(b.site("burst 1\nrefill 0.00001"))
	policyRequest(t, b.proxy, http.MethodGet, b.in("ECHO"), "")
	b.refuses(429, "http_request_denied", "", "GET http://ORIGIN/", "HEAD http://ORIGIN/", "GET https://ORIGIN/", "CONNECT ORIGIN", "CONNECT ORIGIN/", "GET ftp://ORIGIN/")
	if res, _ := policyRequest(t, b.proxy, http.MethodConnect, b.target.address, ""); res.StatusCode != http.StatusTooManyRequests || res.Header.Get("Retry-After") == "" {
		t.Errorf("%s, Retry-After %q", res.Status, res.Header.Get("Retry-After"))
	}
	if line := b.waitLog("rate limited", 1)[0]; line["level"] != "warn" || line["ip"] != "127.0.0.1" {
		t.Errorf("log line %v", line)
	}
}

// TestRefusalErrorRoutes checks that error routes replace the body and nothing else.
func TestRefusalErrorRoutes(t *testing.T) {
	b := newRefusalBench(t, "")
	b.custom = true
	b.load(strings.TrimSuffix(b.site(""), "}\n") + "\thandle_errors {\n\t\trespond \"{err.status_code} custom\"\n\t}\n}\n")
	b.refuses(502, "connection_refused", "502 custom", "CONNECT REFUSED", "GET http://REFUSED/", "HEAD http://REFUSED/")
	b.refuses(400, refusalBad, "400 custom", "CONNECT ORIGIN/", "CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nContent-Length: 5\n\nhello", "GET ftp://ORIGIN/")
	b.refuses(403, "http_request_denied", "403 custom", "CONNECT 127.0.0.1:25", "GET http://127.0.0.1:25/")
	b.refuses(403, refusalDenied, "403 custom", "CONNECT 0.0.0.0:PORT", "GET http://0.0.0.0:PORT/")
}

// TestErrorRoutesPlaceholders checks that error routes get the explanation once, without internal
// errors, and the cause and the rule in placeholders of their own.
func TestErrorRoutesPlaceholders(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(strings.TrimSuffix(w.site("deny ads.example"), "}\n") +
		"\thandle_errors {\n\t\trespond \"{err.message}|{http.async_proxy.message}|{http.async_proxy.cause}|{http.async_proxy.rule}\"\n\t}\n}\n")
	closed := freeAddress(t)
	for target, want := range map[string]string{
		"ads.example:443": "|rule|deny ads.example",
		"169.254.1.1:80":  "|default|default",
		"127.0.0.1:25":    "|port|ports",
		closed:            "||",
	} {
		_, body := policyRequest(t, w.proxy, http.MethodConnect, target, "")
		message, rest, _ := strings.Cut(body, "|")
		if rest != message+want || !strings.HasSuffix(message, ".") || strings.Contains(message, "dial") || strings.Contains(message, "ads.example:443 is denied") {
			t.Errorf("%s: %q, want the sentence twice and %q", target, body, want)
		}
	}
}

// TestRefusalsShareNoFields checks that edits by Caddy's header directive to one response's
// fields, in place, do not show in the next response.
func TestRefusalsShareNoFields(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(strings.Replace(w.site("burst 1\nrefill 0.00001"), "\tasync_proxy",
		"\theader {\n>Retry-After ^ 0\n>Ratelimit ^ x\n>Ratelimit-Policy ^ x\n>Proxy-Status ^ x\n>Content-Type ^ x\n>Connection ^ x\n}\n\tasync_proxy", 1))
	var first http.Header
	for range 4 {
		conn := w.dial()
		conn.send("CONNECT 127.0.0.1:25 HTTP/1.1\nHost: 127.0.0.1:25\n\n")
		res, _ := conn.response(http.MethodConnect)
		if res.Header.Del("Date"); res.StatusCode != http.StatusTooManyRequests {
			continue // this request got the one token
		}
		if first == nil {
			if first = res.Header; first.Get("Retry-After")[0] != '0' || first.Get("Content-Type")[0] != 'x' {
				t.Fatalf("the directive changed nothing: %v", first)
			}
		}
		// Two of the values change with time.
		for _, name := range []string{"Retry-After", "Ratelimit"} {
			if got := res.Header.Get(name); len(got) != len(first.Get(name)) {
				t.Errorf("%s: %s, at first %s", name, got, first.Get(name))
			}
		}
		for _, name := range []string{"Ratelimit-Policy", "Proxy-Status", "Content-Type", "Connection"} {
			if got := res.Header.Get(name); got != first.Get(name) {
				t.Errorf("%s: %s, at first %s", name, got, first.Get(name))
			}
		}
	}
}

// refusalResolver makes a loopback server the resolver. It answers NXDOMAIN for every name
// but silent.invalid, for which it never answers.
func refusalResolver(t *testing.T) {
	server, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for buf := make([]byte, 1500); ; {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			if n > 12 && !strings.Contains(string(buf[:n]), "\x06silent") {
				buf[2], buf[3] = buf[2]|0x80, 0x83 // a response, NXDOMAIN
				_, _ = server.WriteTo(buf[:n], from)
			}
		}
	}()
	t.Cleanup(func() { systemDNS.Store(nil); server.Close() })
	address := server.LocalAddr().String()
	systemDNS.Store(&address)
}

// systemDNS is the address of a server in place of the system's DNS servers; nil: those.
var systemDNS atomic.Pointer[string]

// net.DefaultResolver is replaced once and for all, because goroutines that have nothing to do with a
// test may read the variable.
func init() {
	dialer := net.Dialer{Resolver: new(net.Resolver)}
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		if server := systemDNS.Load(); server != nil {
			network, address = "udp4", *server
		}
		return dialer.DialContext(ctx, network, address)
	}}
}
