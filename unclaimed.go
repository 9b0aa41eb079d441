// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

func init() { caddy.RegisterModule(Unclaimed{}) }

// Unclaimed guards its server as every async_proxy does: it refuses proxy requests that no handler
// has responded to, such as those of a client that no async_proxy matches. Caddy itself would respond
// with an empty 200, which tells the client of a CONNECT that a tunnel is open.
//
// It may be anywhere in the server's routes, and passes all requests to the next handler. Only a
// server whose every async_proxy is in a named route or an error route needs it, because Caddy provisions
// those too late. The listener wrapper async_proxy adds it.
type Unclaimed struct{}

// CaddyModule returns the Caddy module information.
func (Unclaimed) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.async_proxy_unclaimed",
		New: func() caddy.Module { return new(Unclaimed) },
	}
}

// Provision implements caddy.Provisioner.
func (Unclaimed) Provision(ctx caddy.Context) error { return guardRoutes(ctx) }

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (Unclaimed) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	return next.ServeHTTP(w, r)
}

// addUnclaimed adds an Unclaimed to the routes of a server, before they are provisioned.
func addUnclaimed(server *caddyhttp.Server) {
	raw := caddyconfig.JSONModuleObject(Unclaimed{}, "handler", "async_proxy_unclaimed", nil)
	if n := len(server.Routes); n > 0 && slices.ContainsFunc(server.Routes[n-1].HandlersRaw, func(handler json.RawMessage) bool { return string(handler) == string(raw) }) {
		return // the wrapper of another site has added it
	}
	server.Routes = append(server.Routes, caddyhttp.Route{HandlersRaw: []json.RawMessage{raw}})
}

// routeGuard is the handler around all routes of a server. It sees whether any of their handlers has
// responded. A handler at the end of the routes would not see requests that a terminal route, such as
// the one of a Caddyfile's site, has matched.
type routeGuard struct {
	routes caddyhttp.RouteList
	chain  func() caddyhttp.Handler // of the routes
	logger *zap.Logger
	logged atomic.Int64 // time of the last log line, since epoch; at most one line per second
}

// guardRoutes puts a routeGuard around the routes of the server that ctx is for. It must be called
// while Caddy provisions them, which goes on with those inside the guard, and before Caddy compiles
// the list that is then the server's. For the first async_proxy of a server it is too late if that is in
// a named route or in an error route, which Caddy provisions later. That is an error.
func guardRoutes(ctx caddy.Context) error {
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok || guardOf(server) != nil {
		return nil
	}
	// Caddy drops the raw handlers of a route once it has provisioned them.
	if !slices.ContainsFunc(server.Routes, func(route caddyhttp.Route) bool { return route.HandlersRaw != nil }) {
		return errUnguarded
	}
	g := &routeGuard{routes: server.Routes, logger: ctx.Logger()}
	g.chain = sync.OnceValue(func() caddyhttp.Handler { // at the first request, when all of them are provisioned
		return g.routes.Compile(caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { return nil }))
	})
	around := caddyhttp.Route{Handlers: []caddyhttp.MiddlewareHandler{g}}
	if err := around.ProvisionHandlers(ctx, nil); err != nil { // without metrics: the routes have their own
		return err
	}
	server.Routes = caddyhttp.RouteList{around}
	return nil
}

var errUnguarded = errors.New("the server's only async_proxy is in a named route or an error route, so Caddy would answer a CONNECT request " +
	"that does not reach it with 200, as if a tunnel were open: add the listener wrapper async_proxy to the server " +
	"(global options: servers { listener_wrappers { async_proxy } })")

// guardOf returns the guard around the routes of a server, or nil.
func guardOf(server *caddyhttp.Server) *routeGuard {
	if len(server.Routes) != 1 || len(server.Routes[0].Handlers) != 1 {
		return nil
	}
	g, _ := server.Routes[0].Handlers[0].(*routeGuard)
	return g
}

// routesOf returns the routes of a server as the config lists them.
func routesOf(server *caddyhttp.Server) caddyhttp.RouteList {
	if g := guardOf(server); g != nil {
		return g.routes
	}
	return server.Routes
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (g *routeGuard) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	if r.Method != http.MethodConnect && r.URL.Host == "" && !isForOtherHost(r) {
		return g.chain().ServeHTTP(w, r)
	}
	recorder := &statusRecorder{ResponseWriterWrapper: caddyhttp.ResponseWriterWrapper{ResponseWriter: w}}
	err := g.chain().ServeHTTP(recorder, r)
	if err == nil && recorder.status == 0 && !passedProxyHandler(r) {
		g.refuse(w, r)
	}
	return err
}

// refuse responds to a proxy request that no handler has responded to.
func (g *routeGuard) refuse(w http.ResponseWriter, r *http.Request) {
	now := monotime.Of(time.Now())
	if last := g.logged.Load(); (last == 0 || now-last >= int64(time.Second)) && g.logged.CompareAndSwap(last, now) {
		g.logger.Warn("no async_proxy of this server handles this request: none matches it, or its site has a host name in its address",
			zap.String("client", printable.Text(r.RemoteAddr)), zap.String("method", printable.Text(r.Method)), zap.String("host", printable.Text(hostport.WithoutUser(r.Host))))
	}
	header := w.Header()
	header["Content-Type"] = []string{"text/plain; charset=utf-8"}
	if r.ProtoMajor == 1 {
		header["Connection"] = []string{"close"} // the bytes that follow may be meant for a tunnel
	}
	w.WriteHeader(http.StatusMisdirectedRequest)
	_, _ = io.WriteString(w, "No proxy here handles this request.\n")
}

// passedProxyHandler reports whether an async_proxy has served r. That async_proxy sees to a response
// itself, also where it passes r to the next handler.
func passedProxyHandler(r *http.Request) bool {
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return false
	}
	_, visited := repl.Get("http.async_proxy.method")
	return visited
}

// isForOtherHost reports whether an HTTP/2 or HTTP/3 request, where proxy requests look like all
// others, is for another host than the server name of its TLS connection. It returns false
// if the client sent no server name.
func isForOtherHost(r *http.Request) bool {
	if r.ProtoMajor == 1 || r.TLS == nil || r.TLS.ServerName == "" {
		return false
	}
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	return !strings.EqualFold(strings.TrimSuffix(host, "."), r.TLS.ServerName)
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Unclaimed)(nil)
	_ caddyhttp.MiddlewareHandler = (*routeGuard)(nil)
	_ caddyhttp.MiddlewareHandler = (*Unclaimed)(nil)
)
