// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
)

// invalidCount returns a value of caddy_async_proxy_invalid_requests_total.
func invalidCount(t *testing.T, reason invalidReason) float64 {
	t.Helper()
	return gatherMetrics(t)[fmt.Sprintf(`invalid_requests_total{reason="%s"}`, reason)]
}

// forgetInvalidLines resets the log limit, so that the next lines appear at once.
func forgetInvalidLines() {
	program.invalidLines.mu.Lock()
	defer program.invalidLines.mu.Unlock()
	clear(program.invalidLines.lines)
}

// clientHello returns the first bytes that a TLS client sends.
func clientHello(t *testing.T) string {
	t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	go func() { _ = tls.Client(far, clientTLS("h2")).Handshake() }()
	buf := make([]byte, 4096)
	n, err := near.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	far.Close()
	return string(buf[:n])
}

// contactRow is what a client sends first, why it is refused, and the end of the response.
type contactRow struct {
	name, send string
	reason     invalidReason
	says       string
}

// A client of another protocol is recognized by its first bytes. It is logged and counted,
// gets a response if it may understand one, and its connection is closed, on every serving
// path.
func TestFirstContact(t *testing.T) {
	hello := clientHello(t)
	plain := []contactRow{
		{"TLS", hello, invalidTLS, "This proxy does not speak TLS on this port: use http:// in the proxy URL.\n"},
		{"the first byte of TLS", "\x16", invalidTLS, "use http:// in the proxy URL.\n"},
		{"SOCKS 5", "\x05\x01\x00", invalidSOCKS, "\x05\xff"},
		{"the first byte of SOCKS 5", "\x05", invalidSOCKS, "\x05\xff"},
		{"SOCKS 4", "\x04\x01\x01\xbb\x7f\x00\x00\x01user\x00", invalidSOCKS, "\x00\x5b\x00\x00\x00\x00\x00\x00"},
		{"SSH", "SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u10\r\n", invalidSSH, string(foreignAnswers[downstream.SSH])},
		{"SSH without a comment", "SSH-2.0-OpenSSH_9.2\r\n", invalidSSH, string(foreignAnswers[downstream.SSH])},
		{"PROXY for IPv4", "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET / HTTP/1.1\r\n", invalidPROXY, "begins with a header of the PROXY protocol, which this proxy does not expect.\n"},
		{"PROXY for IPv6", "PROXY TCP6 ::1 ::1 1 2\r\n", invalidPROXY, "begins with a header of the PROXY protocol, which this proxy does not expect.\n"},
		{"PROXY for nothing", "PROXY UNKNOWN\r\n", invalidPROXY, "begins with a header of the PROXY protocol, which this proxy does not expect.\n"},
		{"PROXY, version 2", "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x09\x7f\x00\x00\x01\x12\x67\x00\x50", invalidPROXY, "begins with a header of the PROXY protocol, which this proxy does not expect.\n"},
	}
	secure := slices.Clone(plain[2:])
	plain = append(plain, contactRow{"an unknown protocol", "\x03\x00\x00\x13", invalidMalformed, "the request line does not begin with a method.\n"})
	for _, request := range []string{
		"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n", "GET http://example.com/ HTTP/1.1\r\nHost: example.com\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "OPTIONS * HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "get", "P", "PROPFIND / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 100_000) + "\r\n\r\n",
	} {
		row := plain[0]
		row.name, row.send, row.reason, row.says = fmt.Sprintf("%.20q", request), request, invalidPlainHTTP, "use https:// in the proxy URL.\n"
		secure = append(secure, row)
	}
	for setup, options := range map[string]tunnelSetup{
		"served by the proxy": {}, "another handler": {site: "vars a b"}, "access log": {site: "log"}, "metrics": {global: "metrics"}, "wrapper above TLS": {servers: `listener_wrappers {
	async_proxy
}`}, "HTTP/1 alone": {site: "log", protocols: "h1"},
	} {
		w := newTunnelWorld(t, options)
		for address, rows := range map[string][]contactRow{w.plain: plain, w.tls: secure} {
			for _, row := range rows {
				t.Run(fmt.Sprintf("%s/%s/%v", setup, row.name, address == w.tls), func(t *testing.T) {
					forgetInvalidLines()
					before := invalidCount(t, row.reason)
					n := len(w.logLines(invalidLogs[row.reason].message))
					c := dialRaw(t, address)
					sent := writeInPieces(c, row.send, 1<<20)
					got := c.readAll()
					<-sent
					if !strings.HasSuffix(got, row.says) || row.says == "" && got != "" {
						t.Errorf("the response is %q", got)
					}
					status := "HTTP/1.1 400 Bad Request\r\n"
					if row.reason == invalidPlainHTTP {
						status = "HTTP/1.1 400 This proxy speaks TLS on this port: use https:// in the proxy URL\r\n"
					}
					if strings.HasSuffix(row.says, ".\n") && (!strings.HasPrefix(got, status) || !strings.Contains(got, "\r\nProxy-Status: ")) {
						t.Errorf("the response is %q", got)
					}
					line := w.waitLog(invalidLogs[row.reason].message, n+1)[n]
					if line["client"] != "127.0.0.1" || line["address"] != address || line["reason"] != string(row.reason) || line["refused"] != 1.0 || line["level"] != invalidLogs[row.reason].level.String() {
						t.Errorf("the log has %v", line)
					}
					if got := invalidCount(t, row.reason); got != before+1 {
						t.Errorf("counted %v times", got-before)
					}
				})
			}
		}
		// Clients of the right protocol are served.
		w.client(t, "h1-tls").open(echoTarget(t))
		if options.protocols == "" {
			w.client(t, "h2").open(echoTarget(t))
		}
		w.client(t, "h1").open(echoTarget(t))
	}
}

// Real clients with the wrong scheme report it.
func TestFirstContactOfClients(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{})
	for proxy, want := range map[string]string{
		"https://" + w.plain:  "first record does not look like a TLS handshake",
		"http://" + w.tls:     "This proxy speaks TLS on this port: use https:// in the proxy URL",
		"socks5://" + w.plain: "no acceptable authentication methods",
	} {
		u, _ := url.Parse(proxy)
		client := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(u), TLSClientConfig: clientTLS("http/1.1")}}
		if _, err := client.Get("https://example.com/"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("with %s: %v, want %s", proxy, err, want)
		}
	}
}

// Wrappers in front may consume their own first bytes before HTTP or TLS begins.
func TestFirstContactBehindOtherWrappers(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{servers: `listener_wrappers {
	async_proxy
	proxy_protocol {
		allow 127.0.0.0/8
	}
	tls
}`})
	for _, protocol := range []string{"h1", "h1-tls"} {
		c := w.client(t, protocol)
		c.preface = "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x09\x7f\x00\x00\x01\x12\x67\x00\x50"
		c.open(echoTarget(t))
	}
	if line := w.waitLog("CONNECT tunnel", 1)[0]; line["client"] != "127.0.0.9" {
		t.Errorf("the client is %v", line["client"])
	}
}

// A request that net/http refuses before a handler gets it is answered with the proxy's
// name and the error, logged and counted, as the first request and as a later one, wherever
// the listener wrapper has the connection.
func TestRefusedBelowHandlers(t *testing.T) {
	w := newWorld(t, "via tester", nil)
	get := "GET " + w.origin.URL + "/ HTTP/1.1\r\n"
	for _, site := range []string{w.site("via tester"), byCaddy(w.site("via tester"))} {
		for _, row := range []struct {
			name, send string
			status     int
			reason     invalidReason
			says       string
		}{
			{"no Host", get + "\r\n", 400, invalidMalformed, "missing required Host header"},
			{"two Hosts", get + "Host: x\r\nHost: y\r\n\r\n", 400, invalidMalformed, "not a well-formed HTTP request"},
			{"a bad Host", get + "Host: a b\r\n\r\n", 400, invalidMalformed, "malformed Host header"},
			{"a bad name", get + "Host: x\r\nA B: 1\r\n\r\n", 400, invalidMalformed, "not a well-formed HTTP request"},
			{"a bad value", get + "Host: x\r\nA: \x01\r\n\r\n", 400, invalidMalformed, "not a well-formed HTTP request"},
			{"no request line", "nonsense of some length\r\n\r\n", 400, invalidMalformed, "not a well-formed HTTP request"},
			{"a coding", "POST " + w.origin.URL + "/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501, invalidUnknown, "transfer coding"},
			{"an expectation", "PUT " + w.origin.URL + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: foo\r\n\r\n", 417, invalidUnknown, "expectation"},
			{"a version", "GET " + w.origin.URL + "/ HTTP/3.0\r\nHost: x\r\n\r\n", 505, invalidUnknown, "version"},
			{"a large field", get + "Host: x\r\nX: " + strings.Repeat("x", 300<<10) + "\r\n\r\n", 431, invalidTooLarge, "too large"},
			{"a long URL", "GET " + w.origin.URL + "/" + strings.Repeat("x", 300<<10) + " HTTP/1.1\r\nHost: x\r\n\r\n", 414, invalidTooLarge, "too long"},
		} {
			for _, before := range []string{"", get + "Host: x\r\n\r\n"} {
				if before != "" && row.status == 414 && site != w.site("via tester") {
					row.status, row.says = 431, "too large" // only net/http knows where a later request begins
				}
				t.Run(fmt.Sprintf("%s/%v/%v", row.name, before != "", site == w.site("via tester")), func(t *testing.T) {
					forgetInvalidLines()
					w.load(site)
					counted, n := invalidCount(t, row.reason), len(w.logLines(invalidLogs[row.reason].message))
					c := w.dial()
					if before != "" {
						c.send(before)
						if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusOK {
							t.Fatal(res.Status)
						}
					}
					sent := writeInPieces(c, row.send, 1<<20)
					res, body := c.response(http.MethodGet)
					<-sent
					if res.StatusCode != row.status || ownStatus(t, res.Header)["error"] != "http_request_error" || !strings.Contains(body, row.says) {
						t.Errorf("%s %q %q, want %d and %q", res.Status, res.Header.Get("Proxy-Status"), body, row.status, row.says)
					}
					line := w.waitLog(invalidLogs[row.reason].message, n+1)[n]
					if line["client"] != "127.0.0.1" || line["reason"] != string(row.reason) || !strings.HasPrefix(fmt.Sprint(line["status"]), fmt.Sprint(row.status)) {
						t.Errorf("the log has %v", line)
					}
					if got := invalidCount(t, row.reason); got != counted+1 {
						t.Errorf("counted %v times", got-counted)
					}
				})
			}
		}
	}
}

// No response of a handler or an origin is mistaken for net/http's refusal.
func TestResponsesAreNoRefusals(t *testing.T) {
	origin := listen(t, func(c *net.TCPConn) {
		streamRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n400 Bad Request")
	})
	w := newWorld(t, "via off", nil)
	before := invalidCount(t, invalidMalformed)
	c := w.dial()
	c.send("POST http://" + origin + "/ HTTP/1.1\nHost: x\nContent-Length: 0\n\n")
	if res, body := c.response(http.MethodPost); body != "400 Bad Request" || res.Header.Get("Proxy-Status") != "" {
		t.Errorf("%v %q", res, body)
	}
	if got := invalidCount(t, invalidMalformed); got != before {
		t.Errorf("counted %v times", got-before)
	}
}

// Response content is passed on unchanged, even if it arrives on its own and looks like
// net/http's response to a malformed request. Replacing it would break the announced
// length, and the client would take the rest for the response to its next request.
func TestContentThatLooksLikeARefusal(t *testing.T) {
	const content = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n400 Bad Request"
	goOn := make(chan struct{})
	origin := listen(t, func(c *net.TCPConn) {
		for range 2 {
			streamRequest(c)
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", len(content))
			<-goOn
			_, _ = io.WriteString(c, content)
		}
	})
	for _, log := range []string{"", "\tlog\n", "\tvars way ordinary\n"} {
		w := newWorld(t, "", nil)
		w.load(strings.Replace(w.site(""), "\tasync_proxy", log+"\tasync_proxy", 1))
		c := w.dial()
		before := invalidCount(t, invalidMalformed)
		for range 2 {
			c.send("POST http://" + origin + "/ HTTP/1.1\nHost: x\nContent-Length: 0\n\n")
			if _, err := c.r.Peek(1); err != nil { // the head arrives separately
				t.Fatal(err)
			}
			goOn <- struct{}{}
			if res, body := c.response(http.MethodPost); res.StatusCode != http.StatusOK || body != content {
				t.Errorf("%s %q", res.Status, body)
			}
		}
		if got := invalidCount(t, invalidMalformed); got != before {
			t.Errorf("counted %v times", got-before)
		}
		// After these responses, a malformed request is still recognized.
		c.send("POST http://" + origin + "/ HTTP/1.1\nHost: x\nContent-Length: x\n\n")
		if res, body := c.response(http.MethodPost); res.StatusCode != http.StatusBadRequest || !strings.Contains(body, "well-formed") && !*byNetHTTP {
			t.Errorf("a malformed request: %s %q", res.Status, body)
		}
	}
}

// A client gets one log line of a kind a minute, with the number of refusals it stands for. Memory is
// bounded.
func TestLineLimit(t *testing.T) {
	var l lineLimit
	now := time.Now()
	line := invalidLine{client: keyOf("192.0.2.1"), reason: invalidTLS}
	expect := func(after time.Duration, want int64) { // 0: no line
		t.Helper()
		if n, ok := l.count(line, now.Add(after)); n != want || ok != (n > 0) {
			t.Errorf("after %v: %d, %v, want %d", after, n, ok, want)
		}
	}
	expect(0, 1)
	expect(0, 0)
	expect(invalidInterval-1, 0)
	expect(invalidInterval, 3)
	expect(invalidInterval, 0)
	expect(2*invalidInterval, 2)
	expect(4*invalidInterval, 1) // after a minute without refusals
	expect(4*invalidInterval, 0)
	line.reason = invalidSOCKS
	expect(0, 1)
	lines := 0
	for i := range 3 * maxInvalidLines {
		key := client.Address(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
		if _, ok := l.count(invalidLine{client: key}, now.Add(10*invalidInterval)); ok {
			lines++
		}
	}
	if len(l.lines) > maxInvalidLines || lines != maxInvalidLines {
		t.Errorf("%d kinds are tracked and %d lines were logged, want %d", len(l.lines), lines, maxInvalidLines)
	}
	line.reason = invalidSSH
	expect(12*invalidInterval, 1) // entries have expired
}

// A client that speaks HTTP/2 without TLS where the server has HTTP/1 alone gets that answer in HTTP/2.
// Where it has h2, Caddy serves such clients even without h2c.
func TestPriorHTTP2(t *testing.T) {
	for _, options := range []tunnelSetup{{protocols: "h1"}, {protocols: "h1", site: "vars a b"}} {
		w := newTunnelWorld(t, options)
		forgetInvalidLines()
		c := dialRaw(t, w.plain)
		framer := http2.NewFramer(c, c.r)
		c.send(http2.ClientPreface)
		if err := framer.WriteSettings(); err != nil {
			t.Fatal(err)
		}
		settings, err := framer.ReadFrame()
		if _, ok := settings.(*http2.SettingsFrame); !ok {
			t.Fatalf("%v, %v", settings, err)
		}
		frame, err := framer.ReadFrame()
		if goAway, ok := frame.(*http2.GoAwayFrame); !ok || goAway.ErrCode != http2.ErrCodeHTTP11Required || string(goAway.DebugData()) != useHTTP1 {
			t.Errorf("%v, %v", frame, err)
		}
		if rest := c.readAll(); rest != "" {
			t.Errorf("%q follows", rest)
		}
		if line := w.waitLog(invalidLogs[invalidHTTP2].message, 1)[0]; line["client"] != "127.0.0.1" || line["reason"] != "http2" || line["level"] != "warn" {
			t.Errorf("the log has %v", line)
		}
	}
}
