// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
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

// An idle connection is reused as long as nothing has arrived on it, over TCP and TLS.
func TestOriginConnQuiet(t *testing.T) {
	config := &tls.Config{Certificates: []tls.Certificate{tlsCertificate}}
	for _, name := range []string{"TCP", "TLS"} {
		t.Run(name, func(t *testing.T) {
			pair := func() (near, far net.Conn) {
				near, far = socketPair(t)
				if name == "TLS" {
					secure := tls.Client(near, &tls.Config{InsecureSkipVerify: true})
					near, far = secure, tls.Server(far, config)
					go func() { _, _ = io.WriteString(far, "x") }()
					if _, err := near.Read(make([]byte, 1)); err != nil { // the handshake, and the messages after it
						t.Fatal(err)
					}
				}
				return near, far
			}
			near, far := pair()
			c := &originConn{Conn: near}
			for range 2 {
				if !c.quiet() {
					t.Fatal("a connection without unread data is not quiet")
				}
			}
			go func() { _, _ = io.WriteString(far, "answer") }()
			if n, err := near.Read(make([]byte, 6)); n == 0 || err != nil {
				t.Fatalf("%d bytes, %v: the check has broken the connection", n, err)
			}
			if n, err := far.Write([]byte("more")); n != 4 || err != nil {
				t.Fatal(err)
			}
			if c.quiet() {
				t.Error("a connection with unread data is quiet")
			}

			near, far = pair()
			c = &originConn{Conn: near}
			far.Close()
			if c.quiet() {
				t.Error("a closed connection is quiet")
			}

			// Two messages in one TLS record, or in two records that were read together.
			near, far = pair()
			c = &originConn{Conn: near}
			if n, err := far.Write([]byte("onetwo")); n != 6 || err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(near, make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
			if c.quiet() {
				t.Error("a connection with decrypted unread data is quiet")
			}
		})
	}
}

// Idle connections are limited in number and age, and unread bytes of a response close its
// connection.
func TestOriginsAreBounded(t *testing.T) {
	o := newOriginPool(nil)
	idle := func() (*originConn, net.Conn) {
		near, far := net.Pipe()
		t.Cleanup(func() { near.Close(); far.Close() })
		return &originConn{Conn: near, authority: "origin.example:80", fresh: true}, far
	}
	closed := func(c *originConn) bool {
		tcpconn.Interrupt(c.SetReadDeadline)
		_, err := c.Read(make([]byte, 1))
		return errors.Is(err, io.ErrClosedPipe)
	}
	var conns []*originConn
	for range maxIdleOrigins + 1 {
		c, _ := idle()
		o.keep(c)
		conns = append(conns, c)
	}
	if n := o.count.Load(); n != maxIdleOrigins || closed(conns[0]) || !closed(conns[maxIdleOrigins]) {
		t.Errorf("%d idle connections, want %d, and the last one closed", n, maxIdleOrigins)
	}
	for _, c := range conns[:10] {
		c.idleSince = c.idleSince.Add(-maxIdleTime)
	}
	if c, err := o.get(t.Context(), "origin.example:80", false); err != nil || c != conns[maxIdleOrigins-1] {
		t.Errorf("got %p, %v; want the one used last", c, err)
	}
	o.closeIdle(func(c *originConn) bool { return time.Since(c.idleSince) >= maxIdleTime })
	if n := o.count.Load(); n != maxIdleOrigins-11 || !closed(conns[0]) || closed(conns[10]) {
		t.Errorf("%d idle connections after ten had expired", n)
	}
	o.close()
	late, _ := idle()
	late.r = bufio.NewReader(late)
	o.put(late)
	if n := o.count.Load(); n != 0 || !closed(conns[10]) || !closed(late) {
		t.Errorf("%d idle connections after close", n)
	}

	o = newOriginPool(nil)
	talking, far := idle()
	talking.r = bufio.NewReader(talking)
	go func() { _, _ = io.WriteString(far, "more than was asked for") }()
	if _, err := talking.r.ReadByte(); err != nil {
		t.Fatal(err)
	}
	if o.put(talking); o.count.Load() != 0 || !closed(talking) {
		t.Error("a connection with unread data is kept")
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
	shared, opened, _ := http2TestOrigin(t, func(http.ResponseWriter, *http.Request) {})
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
	p := provisioned(t)[0].dialer.Policy
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
