// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// newTLSWorld starts a proxy whose clients connect over TLS, with the options of its server.
func newTLSWorld(t *testing.T, f form, servers, options string, handler http.Handler) *world {
	t.Helper()
	w := newWorld(t, "", handler)
	loadCaddyfile(t, withServers(w.globals()+f.site(t, w.site(options)), f.servers(true)+servers))
	return w
}

// The certificate of a client is verified, and is known to whatever asks for it, as by Caddy's
// server. A server that compares the requested host with the name in the handshake does it for
// all requests.
func TestTLSClientCertificates(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root.pem")
	certificate, _ := conntest.CertificateFiles(t)
	text, err := os.ReadFile(certificate)
	if err == nil {
		err = os.WriteFile(root, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	f := form{overTLS: true, directives: "client_auth {\nmode require_and_verify\ntrust_pool file " + root + "\n}"}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Header["X-Serial"]) })
	for strict, want := range map[string]string{"insecure_off": "200 [1]", "on": "421 "} {
		w := newTLSWorld(t, f, "strict_sni_host "+strict, "header_up X-Serial {http.request.tls.client.serial}", handler)
		config := clientTLS("http/1.1")
		config.Certificates = []tls.Certificate{tlsCertificate}
		c := dialRaw(t, w.proxy)
		c.startTLS(config)
		c.get(w.origin.URL+"/", "")
		res, body := c.response(http.MethodGet)
		if got := fmt.Sprintf("%d %s", res.StatusCode, body); got != want {
			t.Errorf("strict_sni_host %s: %s, want %s", strict, got, want)
		}
		expectFastPath(t, "strict_sni_host "+strict, oneIf(strict == "insecure_off"))
		warned := slices.ContainsFunc(warningsNow(t), func(w status.Warning) bool { return w.Code == "strict_sni_host" })
		if warned != (strict == "on") {
			t.Errorf("strict_sni_host %s: warned: %v", strict, warned)
		}
		stranger := dialRaw(t, w.proxy)
		over := tls.Client(stranger.TCPConn, clientTLS("http/1.1"))
		_, _ = io.WriteString(over, "GET "+w.origin.URL+"/ HTTP/1.1\r\nHost: x\r\n\r\n")
		if got, err := io.ReadAll(over); err == nil || len(got) > 0 {
			t.Errorf("strict_sni_host %s: without a certificate: %q, %v", strict, got, err)
		}
		eventually(t, "the failed handshake in the log", func() bool { return len(w.handshakeErrors(": tls: client didn't provide a certificate")) > 0 })
	}
}

// handshakeErrors returns the messages of failed handshakes that end so.
func (w *world) handshakeErrors(end string) (messages []string) {
	data, err := os.ReadFile(w.logs)
	if err != nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, `"logger":"http.stdlib","msg":"http: TLS handshake error from 127.0.0.1:`) &&
			strings.Contains(line, `"level":"debug"`) && strings.Contains(line, end) {
			messages = append(messages, line)
		}
	}
	return messages
}

// Clients that fail in the handshake, are slow in it or vanish leave nothing behind. Caddy's log
// says what went wrong, as it does when Caddy's server serves them.
func TestTLSHandshakeEnds(t *testing.T) {
	w := newTLSWorld(t, forms[1], "timeouts {\nread_header 500ms\n}\n", "", nil)
	once := func() {
		c := w.dialFastPathOver(forms[1])
		_ = c.Close()
		eventually(t, "the connection to end", func() bool { return fastPathConns() == 0 })
	}
	once()
	files, goroutines := descriptors(t, "self"), runtime.NumGoroutine()
	hello := func(c *rawConn, n int) { // sends the first bytes of a handshake
		near, far := socketPair(t)
		go func() { _ = tls.Client(near, clientTLS("http/1.1")).Handshake() }()
		message := make([]byte, n)
		if _, err := io.ReadFull(far, message); err != nil {
			t.Error(err)
		}
		_ = near.Close()
		_ = far.Close()
		_, _ = c.Write(message)
	}
	for name, row := range map[string]struct {
		send func(c *rawConn)
		log  string
		end  string // what the client receives
	}{
		"silence":               {func(*rawConn) {}, "i/o timeout", ""},
		"a part":                {func(c *rawConn) { hello(c, 50) }, "i/o timeout", ""},
		"a part, and the end":   {func(c *rawConn) { hello(c, 50); _ = c.CloseWrite() }, "unexpected EOF", ""},
		"a part, and a reset":   {func(c *rawConn) { hello(c, 50); _ = c.SetLinger(0); _ = c.TCPConn.Close() }, "connection reset by peer", ""},
		"the end":               {func(c *rawConn) { _ = c.CloseWrite() }, "EOF", ""},
		"no version":            {func(c *rawConn) { _, _ = c.Write([]byte("\x16\x03\x01\x00\x05hello")) }, " exceeds maximum of 65536 bytes", "\x15"},
		"HTTP without TLS":      {func(c *rawConn) { c.send("GET / HTTP/1.1\n\n"); _ = c.CloseWrite() }, "EOF", "HTTP/1.1 400 This proxy speaks TLS on this port"},
		"SOCKS":                 {func(c *rawConn) { c.send("\x05\x01\x00"); _ = c.CloseWrite() }, "EOF", "\x05\xff"},
		"no protocol in common": {func(c *rawConn) { _ = tls.Client(c.TCPConn, clientTLS("spdy")).Handshake() }, `\"spdy\"])`, ""},
	} {
		before := len(w.handshakeErrors(row.log))
		c := dialRaw(t, w.proxy)
		row.send(c)
		got, _ := io.ReadAll(c.TCPConn)
		if !strings.HasPrefix(string(got), row.end) || row.end == "" && len(got) > 0 {
			t.Errorf("%s: the client got %q", name, got)
		}
		_ = c.Close()
		eventually(t, name+": the line in the log", func() bool { return len(w.handshakeErrors(row.log)) > before })
		eventually(t, name+": the connection to end", func() bool { return fastPathConns() == 0 })
	}
	once()
	eventually(t, "all connections to be gone", func() bool {
		return descriptors(t, "self") <= files && runtime.NumGoroutine() <= goroutines
	})
}

// A handshake that a reload interrupts is completed, and the new config serves the client,
// whichever protocol it has chosen.
func TestTLSHandshakeDuringReload(t *testing.T) {
	w := newTLSWorld(t, forms[1], "", "", nil)
	clients := map[string]*rawConn{"http/1.1": dialRaw(t, w.proxy), "h2": dialRaw(t, w.proxy)}
	eventually(t, "the connections to be accepted", func() bool { return fastPathConns() == len(clients) })
	old := program.listeners.All()[0]
	loaded := make(chan struct{})
	go func() {
		defer close(loaded)
		loadCaddyfile(t, withServers(w.globals()+forms[1].site(t, w.site("via second")), forms[1].servers(true)))
	}()
	eventually(t, "the old listener to close", func() bool {
		all := program.listeners.All()
		return len(all) == 1 && all[0] != old
	})
	for alpn, c := range clients {
		c.startTLS(clientTLS(alpn))
		if got := c.over.ConnectionState().NegotiatedProtocol; got != alpn {
			t.Errorf("negotiated %q", got)
		}
	}
	c := clients["http/1.1"]
	c.get("http://127.0.0.1:1/", "")
	if res, _ := c.response(http.MethodGet); !strings.HasPrefix(res.Header.Get("Proxy-Status"), "second;") {
		t.Errorf("HTTP/1.1: %s, %v", res.Status, res.Header)
	}
	expectFastPath(t, "after the handshakes", 1)
	if _, err := io.WriteString(clients["h2"], "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
		t.Error(err)
	}
	frame := make([]byte, 9)
	if _, err := io.ReadFull(clients["h2"].r, frame); err != nil || frame[3] != 4 {
		t.Errorf("HTTP/2: %q, %v, want SETTINGS", frame, err)
	}
	for _, c := range clients {
		_ = c.TCPConn.Close()
	}
	<-loaded
}

// A tunnel over TLS is taken over from the fast path. Each side may end what it sends and still
// receive.
func TestTLSTunnelOnTheFastPath(t *testing.T) {
	w := newTLSWorld(t, forms[1], "", "", nil)
	target := listen(t, answerAtEnd)
	c := forms[1].dial(t, w.proxy)
	c.connect(target)
	if stacks := goroutineStacks(); strings.Count(stacks, ".(*clientConn).run(") != 1 {
		t.Error("the tunnel is not run by the fast path")
	}
	c.send("hello")
	_ = c.CloseWrite()
	if got := c.readAll(); got != "got hello" {
		t.Errorf("received %q", got)
	}
	waitNoTunnels(t)
}

// A connection that Caddy's server has by then gets its tunnel, too, wherever net/http's reads end,
// and its requests are known to have come over TLS.
func TestTLSTunnelBehindOtherRequests(t *testing.T) {
	for _, protocols := range []string{"h1 h2", "h1"} {
		w := newTLSWorld(t, forms[1], "protocols "+protocols+"\n", "serve_pac", nil)
		target := listen(t, answerAtEnd)
		c := w.dialFastPathOver(forms[1])
		c.send("GET /proxy.pac HTTP/1.1\nHost: proxy.example\n\n")
		if _, body := c.response(http.MethodGet); !strings.Contains(body, "HTTPS proxy.example") {
			t.Errorf("protocols %s: the PAC script is %.200q", protocols, body)
		}
		expectFastPath(t, "protocols "+protocols, 0)
		c.send("GET /proxy.pac HTTP/1.1\nHost: proxy.example\n\nCONN")
		c.response(http.MethodGet)
		c.send("ECT " + target + " HTTP/1.1\nHost: x\n\nhel")
		c.readUntil("\r\n\r\n")
		c.send("lo")
		_ = c.CloseWrite()
		if got := c.readAll(); got != "got hello" {
			t.Errorf("protocols %s: received %q", protocols, got)
		}
		waitNoTunnels(t)
	}
}

// HTTP/2 without having negotiated it is no request.
func TestTLSUnnegotiatedHTTP2(t *testing.T) {
	w := newTLSWorld(t, forms[1], "", "", nil)
	c := forms[1].dial(t, w.proxy)
	c.send("PRI * HTTP/2.0\n\nSM\n\n")
	if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusBadRequest {
		t.Errorf("got %s", res.Status)
	}
}

// answerAtEnd reads to the end of what the client sends, and then responds.
func answerAtEnd(c *net.TCPConn) {
	got, _ := io.ReadAll(c)
	fmt.Fprintf(c, "got %s", got)
}

// goroutineStacks returns the stacks of all goroutines.
func goroutineStacks() string {
	stacks := make([]byte, 4<<20)
	return string(stacks[:runtime.Stack(stacks, true)])
}
