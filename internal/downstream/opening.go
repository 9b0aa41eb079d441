// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"context"
	"crypto/tls"
	"net/http"
	"runtime/debug"
	"time"
)

// open makes a connection ready for requests. If the client then speaks HTTP/1, run serves them, on
// a goroutine of its own, because the handshake has grown the stack of this one. Otherwise net/http
// serves them.
func (c *clientConn) open() {
	if next := c.opened(); next != nil && c.state.CompareAndSwap(connOpening, connIdle) {
		next()
		return
	}
	c.server.OnEnd(c.Conn)
	_ = c.Close()
	c.leave()
}

// opened reads the header of the PROXY protocol, or completes the TLS handshake. It returns the
// function that takes the connection from there, or nil if the connection must end.
func (c *clientConn) opened() (next func()) {
	defer func() {
		if v := recover(); v != nil {
			c.server.OnPanic(c.remote, v, debug.Stack())
			next = nil
		}
	}()
	c.remote = c.RemoteAddr().String() // below TLS, this reads the header
	switch conn := c.Conn.(type) {
	case proxyProtocolConn:
		read, err := unwrapProxyProtocol(conn)
		if err != nil {
			return nil // net/http closes silently, too
		}
		return func() {
			c.listener.conns.remove(c)
			c.listener.serveConn(read, c.isNew)
			c.markUsed() // the listener waits for new connections until then
		}
	case *tls.Conn:
		if err := c.handshake(conn); err != nil {
			c.server.OnHandshakeError(conn, err)
			return nil
		}
		if speaksHTTP1(conn) {
			return func() { go c.run() }
		}
	}
	return func() {
		if heir := c.listener.heir(); heir != nil {
			heir.serveConn(c.Conn, c.isNew)
		} else {
			c.listener.handToNetHTTP(c.Conn)
		}
		c.leave()
	}
}

// handshake completes the TLS handshake, unless that was done before the connection moved here. The
// time limit is that of net/http.
func (c *clientConn) handshake(conn *tls.Conn) error {
	limit := c.server.ReadHeaderTimeout
	c.limitRead(limit, limit)
	if limit > 0 {
		c.w.setDeadline(time.Now().Add(limit), 0)
	}
	err := conn.HandshakeContext(context.WithValue(c.server.BaseContext, http.LocalAddrContextKey, conn.LocalAddr()))
	c.readDeadline.Clear(conn)
	c.w.clearDeadline()
	return err
}

// speaksHTTP1 reports whether the client speaks HTTP/1 as far as the handshake has told.
func speaksHTTP1(conn *tls.Conn) bool {
	switch conn.ConnectionState().NegotiatedProtocol {
	case "", "http/1.1", "http/1.0":
		return true
	}
	return false
}
