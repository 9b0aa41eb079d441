// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// An idle connection is reused as long as nothing has arrived on it, over TCP and TLS.
func TestOriginConnQuiet(t *testing.T) {
	config := &tls.Config{Certificates: []tls.Certificate{conntest.Certificate}}
	for _, name := range []string{"TCP", "TLS"} {
		t.Run(name, func(t *testing.T) {
			pair := func() (near, far net.Conn) {
				near, far = conntest.Pair(t)
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
			c := &pooledConn{Conn: near}
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
			c = &pooledConn{Conn: near}
			far.Close()
			if c.quiet() {
				t.Error("a closed connection is quiet")
			}

			// Two messages in one TLS record, or in two records that were read together.
			near, far = pair()
			c = &pooledConn{Conn: near}
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
	o := newPool(nil)
	idle := func() (*pooledConn, net.Conn) {
		near, far := net.Pipe()
		t.Cleanup(func() { near.Close(); far.Close() })
		return &pooledConn{Conn: near, authority: "origin.example:80", fresh: true}, far
	}
	closed := func(c *pooledConn) bool {
		tcpconn.Interrupt(c.SetReadDeadline)
		_, err := c.Read(make([]byte, 1))
		return errors.Is(err, io.ErrClosedPipe)
	}
	var conns []*pooledConn
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
	o.closeIdle(func(c *pooledConn) bool { return time.Since(c.idleSince) >= maxIdleTime })
	if n := o.count.Load(); n != maxIdleOrigins-11 || !closed(conns[0]) || closed(conns[10]) {
		t.Errorf("%d idle connections after ten had expired", n)
	}
	for o.takeIdle("origin.example:80") != nil {
	}
	if o.has("origin.example:80") {
		t.Error("the pool has an idle connection after all were taken")
	}
	if o.sweepIdle(); len(o.idle) > 0 {
		t.Errorf("the pool keeps %d keys without connections", len(o.idle))
	}
	o.keep(conns[10])
	o.close()
	late, _ := idle()
	late.r = bufio.NewReader(late)
	o.put(late)
	if n := o.count.Load(); n != 0 || !closed(conns[10]) || !closed(late) {
		t.Errorf("%d idle connections after close", n)
	}

	o = newPool(nil)
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
