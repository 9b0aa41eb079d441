// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net"
	"net/http"

	"github.com/quic-go/quic-go/http3"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// socketKey is the context key under which requests find what identifies their client
// connection.
type socketKey struct{}

func withSocket(ctx context.Context, conn net.Conn) context.Context {
	if ctx.Value(socketKey{}) != nil { // set by another handler of the server
		return ctx
	}
	return context.WithValue(ctx, socketKey{}, socketOf(conn))
}

// socketOf returns the TCP socket below all wrappers of a connection, or conn itself if
// there is none.
func socketOf(conn net.Conn) any {
	if tcp := tcpconn.Of(conn); tcp != nil {
		return tcp
	}
	return conn
}

// clientConnection returns what identifies the client connection of a request, or nil if
// it is not known.
func clientConnection(w http.ResponseWriter, r *http.Request) any {
	if fast := downstream.WriterOf(w); fast != nil {
		return socketOf(fast.Conn())
	}
	if r.ProtoMajor == 3 {
		return r.Context().Value(http3.RemoteAddrContextKey) // a pointer, unique to the connection
	}
	return r.Context().Value(socketKey{})
}

// connState is the ConnState hook of Caddy's HTTP server.
func connState(conn net.Conn, state http.ConnState) {
	if (state == http.StateClosed || state == http.StateHijacked) && !downstream.WasTakenBack(conn) {
		origin.ReleaseClient(socketOf(conn))
	}
}
