// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net"
	"net/http"
	"sync"
)

// The flow-control windows of clients' HTTP/2 connections. By default a single
// stream may use up the window of its whole connection: if the target of one tunnel
// takes nothing, no other stream can send a byte. With these, that takes 64 such
// streams. A stream's window is what one upload may have on its way, so it also
// bounds the speed over long distances; it is net/http's default.
const (
	clientConnWindow   = 64 << 20
	clientStreamWindow = 1 << 20
)

// withWindows returns a function for a server to call before it serves a connection.
// The first call sets the server's windows.
func withWindows() func(context.Context, net.Conn) context.Context {
	var once sync.Once
	return func(ctx context.Context, _ net.Conn) context.Context {
		once.Do(func() {
			if server, ok := ctx.Value(http.ServerContextKey).(*http.Server); ok {
				setWindows(server)
			}
		})
		return ctx
	}
}

// setWindows sets the windows of a server that has served no connection yet. Caddy
// has no option for them; if it gets one, the operator's values are kept.
func setWindows(server *http.Server) {
	var config http.HTTP2Config
	if server.HTTP2 != nil {
		config = *server.HTTP2
	}
	if config.MaxReceiveBufferPerConnection == 0 && config.MaxReceiveBufferPerStream == 0 {
		config.MaxReceiveBufferPerConnection, config.MaxReceiveBufferPerStream = clientConnWindow, clientStreamWindow
		server.HTTP2 = &config
	}
}
