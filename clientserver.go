// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net"
	"net/http"
	"time"
)

// clientServer says how to serve the connections of a listener. All functions must be set but
// Wrap.
type clientServer struct {
	// Handle serves a request. It responds to w, or hijacks the connection.
	Handle func(w http.ResponseWriter, r *http.Request)

	// BaseContext is where the contexts of all requests come from.
	BaseContext context.Context
	// Prepares reports whether the context that Prepare returns has a value for key.
	Prepares func(key any) bool
	// Prepare returns a context with what few requests need. It is called when the context of
	// the request r is first asked for such a value, with the writer of the response and with
	// what the handler has attached to the request.
	Prepare func(r *http.Request, w http.ResponseWriter, attached any) context.Context
	// Wrap returns the writer that the handler gets for the requests of a connection, and their
	// context. CONNECT gets the responseWriter itself. nil: all requests do.
	Wrap func(ctx context.Context, w *responseWriter) (context.Context, http.ResponseWriter)

	// ReadHeaderTimeout limits how long a request head may take, IdleTimeout how long a client
	// may take to begin one, and WriteIdleTimeout each write. 0: no limit.
	ReadHeaderTimeout, IdleTimeout, WriteIdleTimeout time.Duration

	Listeners *clientListeners // of the program
	Lingering *lingering       // of the program

	// ConfigDone is closed when the config that the server is part of has ended.
	ConfigDone <-chan struct{}
	// Exiting reports whether the program exits, so that no other config follows.
	Exiting func() bool

	// OnInvalid is told what a client has sent that is not a request. It returns what to respond;
	// nil: nothing.
	OnInvalid func(conn net.Conn, what invalidInput) (response []byte)
	// OnEnd is told that a connection has no further requests here or in net/http.
	OnEnd func(conn net.Conn)
	// OnPanic is told of a panic of Handle.
	OnPanic func(remote string, value any, stack []byte)
	// OnAcceptError is told that a connection could not be accepted.
	OnAcceptError func(error)
}
