// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"net/netip"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
)

// closeInStages closes the connection after the proxy's own response to r has been written,
// if it is HTTP/1 and the client may still be sending.
func (p *proxy) closeInStages(w http.ResponseWriter, r *http.Request, client netip.Addr) {
	if r.ProtoMajor != 1 || !stillSending(r) {
		return
	}
	if fast := downstream.WriterOf(w); fast != nil {
		fast.CloseInStages(client)
		return
	}
	// net/http would close the connection without reading what is left. Hijack it in the
	// middle of the response, which is possible when that has a Content-Length.
	if w.Header().Get("Content-Length") == "" || http.NewResponseController(w).Flush() != nil {
		return
	}
	if conn, _, err := hijack(w); err == nil {
		go p.process.lingering.Close(conn, client)
	}
}

// stillSending reports whether the client of r may still be sending bytes that the proxy
// will not read.
func stillSending(r *http.Request) bool {
	return r.Method == http.MethodConnect || r.ContentLength != 0 && !expectsContinue(r)
}

// expectsContinue reports whether the client waits for 100 (Continue) before it sends
// content.
func expectsContinue(r *http.Request) bool {
	return httpguts.HeaderValuesContainsToken(r.Header["Expect"], "100-continue")
}

// beforeErrorRoutes prepares the connection of r for the error routes, which will answer it.
// Once they have, the handler has returned and can no longer read from the connection or hijack
// it. Content is read before they answer. What a client sends after a CONNECT has no end that
// could be awaited, so its connection is closed in stages afterwards, by the writer that giveReason
// has put in place of net/http's. On the fast path, every such connection is.
func (p *proxy) beforeErrorRoutes(w http.ResponseWriter, r *http.Request) {
	fast := downstream.WriterOf(w)
	switch {
	case r.ProtoMajor != 1:
	case fast != nil:
		if stillSending(r) {
			fast.CloseInStages(identifyClient(r).addr)
		}
	case r.Method == http.MethodConnect: // without write_idle
	case r.ContentLength != 0 && !expectsContinue(r):
		p.process.lingering.Drop(identifyClient(r).addr, r.Body, http.NewResponseController(w).SetReadDeadline)
	}
}

// hasErrorRoutes reports whether the site has error routes (handle_errors).
func hasErrorRoutes(r *http.Request) bool {
	server, _ := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	return server != nil && server.Errors != nil && len(server.Errors.Routes) > 0
}

// hasUnreadInput reports whether an HTTP/1 connection must close after a response to r because
// the client may have sent data that nothing reads: the request's content, or bytes after
// a CONNECT for a tunnel that was not opened. They would be parsed as another request, or
// read before the response is sent. An HTTP/1.0 connection closes in any case (RFC 9112
// §9.3).
func hasUnreadInput(r *http.Request) bool {
	return r.ProtoMajor == 1 && (r.ContentLength != 0 || r.Method == http.MethodConnect || r.ProtoMinor == 0)
}
