// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// Bytes that an origin sends between two exchanges are no response to the next request.
func TestUnsolicitedOriginBytes(t *testing.T) {
	var conns atomic.Int64
	sendExtra, extraSent := make(chan struct{}), make(chan struct{})
	origin := listen(t, func(c *net.TCPConn) {
		conns.Add(1)
		streamRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		if conns.Load() == 1 {
			<-sendExtra
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
			close(extraSent)
		}
		_, _ = io.Copy(io.Discard, c)
	})
	w := newWorld(t, "", nil)
	for i := range 2 {
		c := w.dial()
		c.send("GET http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n\n")
		if _, body := c.response(http.MethodGet); body != "ok" {
			t.Errorf("response %d is %q", i, body)
		}
		if i == 0 {
			w.waitLog("request", 1) // the connection is idle by now
			close(sendExtra)
			<-extraSent
		}
	}
	if n := conns.Load(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}

// A connection that has not sent all of a request is not reused.
func TestUnfinishedRequestIsLastOnOrigin(t *testing.T) {
	var conns atomic.Int64
	origin := listen(t, func(c *net.TCPConn) {
		conns.Add(1)
		r := streamRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		_, _ = io.Copy(io.Discard, r)
	})
	w := newWorld(t, "", nil)
	for range 2 {
		c := w.dial()
		c.send("POST http://" + origin + "/ HTTP/1.1\nHost: x\nContent-Length: 10\n\nhello")
		if res, body := c.response(http.MethodPost); body != "ok" {
			t.Errorf("%s %q", res.Status, body)
		}
	}
	if n := conns.Load(); n != 2 {
		t.Errorf("%d connections, want 2", n)
	}
}

// A reused connection to this machine is checked again: the address may have become that of
// a listener that is closed to clients.
func TestLocalConnectionsAreRechecked(t *testing.T) {
	shared, opened, _ := conntest.HTTP2Server(t, func(http.ResponseWriter, *http.Request) {})
	alone := listen(t, func(c *net.TCPConn) {
		secure := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{tlsCertificate}, NextProtos: []string{"http/1.1"}})
		for r := bufio.NewReader(secure); ; {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			_, _ = io.WriteString(secure, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	w := newWorld(t, "", nil)
	p := provisioned(t)[0].directive.dialer.Access
	before := p.IsSelf
	for _, url := range []string{w.origin.URL, "https://" + shared, "https://" + alone} {
		ask := func(want int) {
			t.Helper()
			c := w.dial()
			c.send("GET " + url + "/ HTTP/1.1\nHost: " + strings.Split(url, "/")[2] + "\n\n")
			if res, body := c.response(http.MethodGet); res.StatusCode != want {
				t.Errorf("%s: %s %q, want %d", url, res.Status, body, want)
			}
		}
		ask(http.StatusOK)
		p.IsSelf = func(to netip.AddrPort, _ bool) bool { return strings.HasSuffix(url, to.String()) }
		ask(http.StatusForbidden)
		p.IsSelf = before
		ask(http.StatusOK)
	}
	if n := opened.Load(); n != 1 {
		t.Errorf("%d connections, a denial must not close one that others use", n)
	}
}
