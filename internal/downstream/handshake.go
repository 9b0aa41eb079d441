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

// open completes the TLS handshake of a connection, and then has its requests served: here if the
// client is to speak HTTP/1.1, and otherwise by net/http. The requests get a goroutine of their
// own, because the stack of this one has grown for the handshake.
func (c *clientConn) open() {
	opened := false
	defer func() {
		if v := recover(); v != nil {
			c.server.OnPanic(c.remote, v, debug.Stack())
		}
		if !opened {
			c.server.OnEnd(c.Conn)
			_ = c.Close()
			c.leave()
		}
	}()
	conn := c.Conn.(*tls.Conn)
	c.remote = conn.RemoteAddr().String()
	if err := c.shakeHands(conn); err != nil {
		c.server.OnHandshakeError(conn, err)
		return
	}
	if !c.state.CompareAndSwap(connOpening, connIdle) {
		return // shutdown has closed it
	}
	opened = true
	if speaksHTTP1(conn) {
		go c.run()
		return
	}
	if heir := c.listener.heir(); heir != nil {
		heir.serveConn(conn, c.isNew)
	} else {
		c.listener.handToNetHTTP(conn)
	}
	c.leave()
}

// shakeHands completes the handshake, unless it has been completed before the connection moved
// here. It may take as long as net/http would let it take.
func (c *clientConn) shakeHands(conn *tls.Conn) error {
	limit := c.server.ReadHeaderTimeout
	c.limitRead(limit, limit)
	if limit > 0 {
		c.setWriteDeadline(time.Now().Add(limit), 0)
	}
	err := conn.HandshakeContext(context.WithValue(c.server.BaseContext, http.LocalAddrContextKey, conn.LocalAddr()))
	c.readDeadline.Clear(conn)
	c.clearWriteDeadline()
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
