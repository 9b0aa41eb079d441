// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net"
	"net/http"
	"sync"
)

// Flow-control windows of clients' HTTP/2 connections. By default, one stream can use up the
// window of the whole connection: if the target of one tunnel reads nothing, no other stream
// can send a byte. With these values it takes 64 such streams. The stream window, which is
// net/http's default, limits what one upload may have in flight, and so its speed over long
// distances.
const (
	clientConnWindow   = 64 << 20
	clientStreamWindow = 1 << 20
)

// withWindows returns a function for http.Server.ConnContext. Its first call sets the
// server's windows.
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

// setWindows sets the windows of a server that has not served a connection yet. Caddy has no
// option for them. If it gets one, the operator's values are kept.
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
