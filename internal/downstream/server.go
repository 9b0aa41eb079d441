// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package downstream serves client connections below net/http, and hands those that it does not
// serve to net/http. It offers Listen, which calls a Server's functions for requests to the proxy,
// refuses malformed ones, and replaces net/http's own refusals. It knows nothing of Caddy, of the
// purpose of a request, or of tunnels: a handler that hijacks a connection may leave it to a function
// that runs after the handler.
//
// A connection goes through these states:
//
//	           request              response
//	pristine ───────────► busy ◄─────────────────► idle
//	   │                  │  │      request         │
//	   │                  │  └──► taken over        │
//	   │                  ▼                         │
//	   └─────────► closed, handed off ◄─────────────┘
//
// When the listener closes, each state has its own way out:
//
//   - pristine: the client has sent no whole request yet, but may be about to, after the handshake
//     if it speaks TLS. The connection is handed off to the listener that follows at the address,
//     or to net/http if there is none.
//   - busy: the handler has a request. The connection stays until the response has been sent.
//   - idle: the client may send another request. The connection is handed off to the listener that
//     follows, or closed if there is none.
//
// If the program exits, pristine and idle connections are closed. The other states are final:
//
//   - handed off: another Listener or net/http has the connection, with every byte that the client
//     has sent since its last request. net/http also gets it with the first request that is not
//     served here. It is taken back when a request for the proxy follows.
//   - closed: by the client, a timeout, an error, or a response after which the connection cannot
//     be used. If the client may still be sending, it is closed in stages.
//   - taken over: the handler has hijacked the connection (Writer.Hijack, Writer.Takeover).
package downstream

import (
	"context"
	"net"
	"net/http"
	"time"
)

// Server says how to serve the connections of a listener. All of its functions must be set.
type Server struct {
	// Handle serves a request. It responds to w, or hijacks the connection.
	Handle func(w http.ResponseWriter, r *http.Request)

	// BaseContext is where the contexts of all requests come from.
	BaseContext context.Context
	// Prepares reports whether the context that Prepare returns has a value for key.
	Prepares func(key any) bool
	// Prepare returns a context with values that only few requests need. It is called when the
	// context of the request r is first asked for such a value, with the writer of the response
	// and with what the handler has attached to the request.
	Prepare func(r *http.Request, w http.ResponseWriter, attached any) context.Context
	// FreeAttached is called with what the handler has attached to a request that nothing uses
	// any longer.
	FreeAttached func(attached any)

	// ReadHeaderTimeout limits how long a request head may take, IdleTimeout how long a client
	// may take to begin one, ReadIdleTimeout each read of content, and WriteIdleTimeout each
	// write. 0: no limit.
	ReadHeaderTimeout, IdleTimeout, ReadIdleTimeout, WriteIdleTimeout time.Duration

	// MaxWriteChunk limits how much content one write may send. 0: no limit.
	MaxWriteChunk int

	// MaxHeaderBytes limits the length of a request head. A longer one is refused.
	MaxHeaderBytes int

	// Below identifies what lies between a connection's socket and HTTP: TLS and the PROXY
	// protocol with their settings, or nothing. A connection moves only to a listener whose
	// server has the same Below.
	Below string

	// HTTP1Only says that net/http does not serve HTTP/2 without TLS. A client that begins with
	// it is refused.
	HTTP1Only bool

	Listeners *Listeners // of the program
	Lingering *Lingering // of the program

	// Successor returns which of the listeners that accept at an address, the earliest first, takes
	// over the connections of the others; nil if there are none. It must not retain the slice.
	Successor func(accepting []*Listener) *Listener
	// ConfigDone is closed when the config that the server is part of has ended.
	ConfigDone <-chan struct{}
	// Exiting reports whether the program exits, so that no other config follows.
	Exiting func() bool

	// OnInvalid is called when a client has sent something other than a valid request. It returns
	// the response, or nil for none.
	OnInvalid func(conn net.Conn, what Invalid) (response []byte)
	// OnHandshakeError is called when a client's TLS handshake has failed.
	OnHandshakeError func(conn net.Conn, err error)
	// OnEnd is called when a connection will have no further requests, neither here nor in net/http.
	OnEnd func(conn net.Conn)
	// OnPanic is called when Handle has panicked.
	OnPanic func(remote string, value any, stack []byte)
	// OnAcceptError is called when a connection could not be accepted.
	OnAcceptError func(error)
}
