// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
)

func init() { caddy.RegisterModule(ListenerWrapper{}) }

// ListenerWrapper lets a server's async_proxy serve client connections itself, below Go's
// and Caddy's HTTP servers, with about 40 % less CPU. It hands everything else to those:
// HTTP/2, requests for the server itself, and all connections of a server where something else
// takes part in connections or requests, such as a handler before the proxy, or a listener wrapper
// other than tls and proxy_protocol. It writes the entries of Caddy's access log, observes Caddy's
// metrics and calls the error routes as Caddy's server does.
//
// If no other wrapper takes part, it also refuses and logs clients that do not speak the
// port's protocol, with TLS or without. It does the same for requests that Go's HTTP server refuses
// before any handler sees them, but inside TLS only on connections that it has served itself.
//
// It serves clients only if it comes after proxy_protocol and tls, where those are listed.
//
// The Caddyfile adapter adds it wherever it helps, unless the server has global options.
type ListenerWrapper struct {
	ctx         caddy.Context
	server      *caddyhttp.Server
	onlyWrapper bool // there is no other wrapper but tls, and proxy_protocol before this one

	// What lies between a connection and this wrapper, as text to compare with that of other configs.
	proxyProtocol string // the settings of the wrapper proxy_protocol; "": there is none
	tlsSettings   string // the server's settings for TLS
}

// CaddyModule returns the Caddy module information.
func (ListenerWrapper) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "caddy.listeners.async_proxy",
		New: func() caddy.Module { return new(ListenerWrapper) },
	}
}

// Provision implements caddy.Provisioner.
func (w *ListenerWrapper) Provision(ctx caddy.Context) error {
	w.ctx = ctx
	w.server, _ = ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if w.server == nil {
		return errors.New("async_proxy is a listener wrapper for HTTP servers")
	}
	addUnclaimed(w.server)
	w.onlyWrapper, w.proxyProtocol = checkWrappers(w.server.ListenerWrappersRaw)
	w.tlsSettings = tlsSettings(w.server)
	return nil
}

// checkWrappers reports whether the fast path can serve clients behind the listener wrappers of a
// server, and returns the settings of proxy_protocol. That one must come before async_proxy, so that
// its listener is the inner one, from whose connections the fast path takes the clients' addresses.
func checkWrappers(wrappers []json.RawMessage) (ok bool, proxyProtocol string) {
	isFirst := true // async_proxy has not been listed yet
	for _, raw := range wrappers {
		var each struct{ Wrapper string }
		if json.Unmarshal(raw, &each) != nil {
			return false, ""
		}
		switch each.Wrapper {
		case "async_proxy":
			isFirst = false
		case "proxy_protocol":
			proxyProtocol += string(raw)
			if !isFirst {
				return false, ""
			}
		case "tls":
		default:
			return false, ""
		}
	}
	return true, proxyProtocol
}

// tlsSettings returns a text that identifies what a server demands of TLS connections. A connection
// that one config has accepted may move to a server of the next config only if both texts are equal.
// With client certificates, no two servers have the same text, because the certificates are verified
// in the handshake only. It must be called before the server's connection policies are provisioned.
func tlsSettings(server *caddyhttp.Server) string {
	text, err := json.Marshal(server.TLSConnPolicies)
	verifies := func(p *caddytls.ConnectionPolicy) bool { return p.ClientAuthentication != nil }
	if err != nil || slices.ContainsFunc(server.TLSConnPolicies, verifies) {
		return fmt.Sprintf("%p", server)
	}
	return string(text)
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler. There are no options.
func (w *ListenerWrapper) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the wrapper's name
	if d.NextArg() {
		return d.ArgErr()
	}
	if d.NextBlock(0) {
		return d.Errf("the listener wrapper async_proxy has no options")
	}
	return nil
}

// WrapListener implements caddy.ListenerWrapper. Caddy calls it when all handlers are
// provisioned, and before it accepts connections.
func (w *ListenerWrapper) WrapListener(ln net.Listener) net.Listener {
	app, err := w.ctx.AppIfConfigured("http")
	if err != nil {
		return ln
	}
	if !w.onlyWrapper {
		return ln
	}
	// The Caddyfile adapter adds one wrapper for each site of the server. ln may be the listener
	// that an earlier one returned.
	overTLS := usesTLS(app.(*caddyhttp.App), w.server, ln)
	p, _ := fastPathHandler(app.(*caddyhttp.App), w.server)
	first := p
	if first == nil {
		first = firstProxy(routesOf(w.server))
	}
	if first == nil {
		return ln
	}
	s := newFastPath(w.ctx, app.(*caddyhttp.App), first, w.server)
	s.Below = w.proxyProtocol
	if overTLS {
		s.Below += w.tlsSettings
		ln = downstream.Watch(ln, s, true)
	}
	switch {
	case p != nil && (!overTLS || downstream.IsTLS(ln)):
		p.fastPath = true
		return downstream.Listen(ln, s)
	case overTLS:
		return ln
	}
	return downstream.Watch(ln, s, false)
}

// newFastPath returns what serves the clients of a server below net/http, for the proxy that
// gets their requests first.
func newFastPath(ctx caddy.Context, app *caddyhttp.App, p *proxy, server *caddyhttp.Server) *downstream.Server {
	s := &downstream.Server{
		Handle:      newFastServer(ctx, app, server, p).serve,
		BaseContext: context.WithValue(context.Background(), caddyhttp.ServerCtxKey, server),
		Prepares:    func(key any) bool { _, ok := key.(caddy.CtxKey); return ok },
		Prepare: func(r *http.Request, w http.ResponseWriter, attached any) context.Context {
			return caddyContext(r, w, server, attached.(*transaction))
		},
		FreeAttached: freeTransaction,

		ReadHeaderTimeout: time.Duration(server.ReadHeaderTimeout),
		IdleTimeout:       time.Duration(server.IdleTimeout),
		ReadIdleTimeout:   time.Duration(server.ReadIdleTimeout),
		WriteIdleTimeout:  time.Duration(server.WriteIdleTimeout),

		MaxHeaderBytes: cmp.Or(server.MaxHeaderBytes, http.DefaultMaxHeaderBytes),

		HTTP1Only: speaksHTTP1Only(server),

		Listeners:  &program.listeners,
		Successor:  successorListener,
		Lingering:  &p.process.lingering,
		ConfigDone: p.configDone,
		Exiting:    caddy.Exiting,

		OnInvalid:        p.answerInvalid,
		OnHandshakeError: logHandshakeError(ctx, app),
		OnEnd:            func(conn net.Conn) { origin.ReleaseClient(socketOf(conn)) },
		OnPanic: func(remote string, value any, stack []byte) {
			p.logger.Error("panic serving a client", zap.String("client", remote), zap.Any("panic", value), zap.ByteString("stack", stack))
		},
		OnAcceptError: func(err error) { p.logger.Error("a connection could not be accepted", zap.Error(err)) },
	}
	if server.WriteIdleTimeout > 0 {
		s.MaxWriteChunk = cmp.Or(max(server.MaxWriteChunk, 0), caddyhttp.DefaultMaxWriteChunk)
	}
	return s
}

// logHandshakeError returns a function that logs failed TLS handshakes as Caddy's server does.
func logHandshakeError(ctx caddy.Context, app *caddyhttp.App) func(conn net.Conn, err error) {
	logger := ctx.Logger(app).Named("stdlib")
	return func(conn net.Conn, err error) {
		if c := logger.Check(zapcore.DebugLevel, ""); c != nil {
			c.Message = fmt.Sprintf("http: TLS handshake error from %s: %v", conn.RemoteAddr(), err)
			c.Write()
		}
	}
}

// noNext is the next handler on the fast path, where all requests are for the proxy. If a request were
// not, passOn would refuse it, because noNext does not respond.
var noNext = caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil })

// caddyContext returns the context of a request with what Caddy's server prepares for each one,
// such as variables and placeholders, and with the proxy's own placeholders.
func caddyContext(r *http.Request, w http.ResponseWriter, server *caddyhttp.Server, v *transaction) context.Context {
	repl := caddy.NewReplacer()
	repl.Map(v.placeholder)
	ctx := caddyhttp.PrepareRequest(r, repl, w, server).Context()
	caddyhttp.SetVar(ctx, "start_time", v.start) // Caddy measures durations from it
	return ctx
}

// namesClient reports whether a request has a field that may name another client than the
// one that is connected. If it has, Caddy determines the client.
func namesClient(r *http.Request) bool {
	if len(r.Header["X-Forwarded-For"]) > 0 {
		return true
	}
	server := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	return slices.ContainsFunc(server.ClientIPHeaders, func(name string) bool { return len(r.Header.Values(name)) > 0 })
}

// comparesSNI reports whether Caddy refuses requests for other hosts than that of the TLS handshake.
func comparesSNI(server *caddyhttp.Server) bool {
	return len(server.TLSConnPolicies) > 0 && server.StrictSNIHost != nil && *server.StrictSNIHost
}

// fastPathHandler returns the proxy if the fast path can serve the server's proxy requests, which
// is when no other part of Caddy takes part in them. Otherwise why names that part.
func fastPathHandler(app *caddyhttp.App, server *caddyhttp.Server) (p *proxy, why string) {
	lacksHTTP1 := func(protocols []string) bool { return protocols != nil && !slices.Contains(protocols, "h1") }
	switch {
	case server.ReadTimeout > 0 || server.WriteTimeout > 0:
		return nil, "the server has the timeout read_body or write"
	case server.ReadMinRate != 0 || server.WriteMinRate != 0:
		return nil, "the server has a minimum rate for reads or writes"
	case len(server.ExpectedUnderscoreHeaders) > 0 || len(server.ExpectedDotHeaders) > 0:
		return nil, "the server has the option expected_underscore_headers or expected_dot_headers"
	case lacksHTTP1(server.Protocols) || slices.ContainsFunc(server.ListenProtocols, lacksHTTP1):
		return nil, "the server's protocols do not include h1, or not at each address"
	case comparesSNI(server):
		return nil, "the server has the option strict_sni_host"
	}
	if h, ok := firstHandler(routesOf(server)).(*Handler); ok {
		return h.proxy, ""
	}
	return nil, "another handler or a matcher comes before async_proxy"
}

// Interface guards
var (
	_ caddy.Provisioner     = (*ListenerWrapper)(nil)
	_ caddyfile.Unmarshaler = (*ListenerWrapper)(nil)
	_ caddy.ListenerWrapper = (*ListenerWrapper)(nil)
)
