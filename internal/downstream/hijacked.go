// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"context"
	"net"
	"net/http"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// NewWriter returns a Writer for the response to r, on a connection that a handler has hijacked from
// net/http because net/http cannot write that response. header is that of net/http's response. The
// Writer ends the response and closes the connection when the context of r ends, which net/http
// sees to as soon as the handler has returned. Of s it needs only MaxWriteChunk, WriteIdleTimeout and
// Lingering.
func (s *Server) NewWriter(conn net.Conn, r *http.Request, header http.Header) *Writer {
	c := &clientConn{Conn: conn, server: s, tls: r.TLS}
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(r.Context()))
	c.w.client = c
	c.w.reset(r)
	h1.FreeHeader(c.w.header)
	c.w.header, c.w.freesHeader, c.w.closes = header, false, true
	context.AfterFunc(r.Context(), c.finishHijacked)
	return &c.w
}

// finishHijacked ends the response and the connection of a Writer that NewWriter has returned.
func (c *clientConn) finishHijacked() {
	_ = c.w.finish() // fails only if the client has disconnected
	c.cancel()
	if c.w.lingers {
		c.server.Lingering.Close(c.Conn, c.w.sender)
		return
	}
	_ = c.Close()
}
