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
// net/http because net/http cannot write that response. header is that of net/http's response.
// EndHijacked must be called when the response is complete. s needs only MaxWriteChunk,
// WriteIdleTimeout and Lingering.
func (s *Server) NewWriter(conn net.Conn, r *http.Request, header http.Header) *Writer {
	c := &clientConn{Conn: conn, server: s, tls: r.TLS}
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(r.Context()))
	c.w.client = c
	c.w.reset(r)
	h1.FreeHeader(c.w.header)
	c.w.header, c.w.freesHeader, c.w.closes = header, false, true
	return &c.w
}

// EndHijacked ends the response of a Writer that NewWriter has returned, and closes the connection.
// If the connection must close in stages, another goroutine does that.
func (w *Writer) EndHijacked() {
	c := w.client
	_ = w.finish() // fails only if the client has disconnected
	c.cancel()
	if w.lingers {
		go c.server.Lingering.Close(c.Conn, w.sender)
		return
	}
	_ = c.Close()
}
