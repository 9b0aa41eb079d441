// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
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

// Unclaimed refuses proxy requests that no other handler has responded to, such as those
// of a client that no async_proxy of the site matches. Caddy itself would respond with an
// empty 200, which tells the client of a CONNECT that a tunnel is open.
//
// The listener wrapper async_proxy adds this handler after all others of its server.
// Without the wrapper, add it there in the config.
type Unclaimed struct {
	logger *zap.Logger
	logged *atomic.Int64 // time of the last log line, since epoch; at most one line per second
}

// CaddyModule returns the Caddy module information.
func (Unclaimed) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.async_proxy_unclaimed",
		New: func() caddy.Module { return new(Unclaimed) },
	}
}

// Provision implements caddy.Provisioner.
func (u *Unclaimed) Provision(ctx caddy.Context) error {
	u.logger, u.logged = ctx.Logger(), new(atomic.Int64)
	return nil
}

// ServeHTTP implements caddyhttp.MiddlewareHandler.
func (u *Unclaimed) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	if (r.Method != http.MethodConnect || isExtendedConnect(r)) && r.URL.Host == "" && (!isForOtherHost(r) || passedProxyHandler(r)) {
		return next.ServeHTTP(w, r)
	}
	now := monotime.Of(time.Now())
	if last := u.logged.Load(); (last == 0 || now-last >= int64(time.Second)) && u.logged.CompareAndSwap(last, now) {
		u.logger.Warn("no async_proxy of this server handles this request: none matches it, or its site has a host name in its address",
			zap.String("client", printable.Text(r.RemoteAddr)), zap.String("method", printable.Text(r.Method)), zap.String("host", printable.Text(hostport.WithoutUser(r.Host))))
	}
	header := w.Header()
	header["Content-Type"] = []string{"text/plain; charset=utf-8"}
	if r.ProtoMajor == 1 {
		header["Connection"] = []string{"close"} // the bytes that follow may be meant for a tunnel
	}
	w.WriteHeader(http.StatusMisdirectedRequest)
	_, _ = io.WriteString(w, "No proxy here handles this request.\n")
	return nil
}

// passedProxyHandler reports whether an async_proxy has passed r to the next handler. That
// async_proxy responds to r itself if no handler does.
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

// addUnclaimed adds the handler after all others of a server: at the end of its routes and
// of each terminal route.
func addUnclaimed(server *caddyhttp.Server) {
	raw := caddyconfig.JSONModuleObject(Unclaimed{}, "handler", "async_proxy_unclaimed", nil)
	isUnclaimed := func(handler json.RawMessage) bool { return string(handler) == string(raw) }
	n := len(server.Routes)
	if n == 0 || slices.ContainsFunc(server.Routes[n-1].HandlersRaw, isUnclaimed) {
		return // the wrapper of another site has added it
	}
	for i := range server.Routes {
		if route := &server.Routes[i]; route.Terminal {
			route.HandlersRaw = append(route.HandlersRaw, raw)
		}
	}
	server.Routes = append(server.Routes, caddyhttp.Route{HandlersRaw: []json.RawMessage{raw}})
}

// siteOf returns the routes of the site that a handler is in.
func siteOf(server *caddyhttp.Server, h caddyhttp.MiddlewareHandler) caddyhttp.RouteList {
	for _, route := range server.Routes {
		for _, handler := range route.Handlers {
			if sub, ok := handler.(*caddyhttp.Subroute); ok && route.Terminal {
				if _, found := hostsLeadingTo(sub.Routes, h); found {
					return sub.Routes
				}
			}
		}
	}
	return server.Routes
}

// mayFallThrough reports whether a request may pass all routes without a response, as far
// as can be told from the config.
func mayFallThrough(routes caddyhttp.RouteList) bool {
	return !slices.ContainsFunc(routes, func(route caddyhttp.Route) bool {
		return len(route.MatcherSets) == 0 && slices.ContainsFunc(route.Handlers, func(handler caddyhttp.MiddlewareHandler) bool {
			switch handler := handler.(type) {
			case *Unclaimed:
				return false
			case *caddyhttp.Subroute:
				return !mayFallThrough(handler.Routes)
			case *caddyhttp.StaticResponse:
				return endsRequest(handler)
			}
			module, ok := handler.(caddy.Module)
			return !ok || !slices.Contains(passingHandlers, module.CaddyModule().ID.Name())
		})
	})
}

// passingHandlers lists Caddy's handlers that leave the response to the next handler.
var passingHandlers = []string{
	"authentication", "encode", "headers", "intercept", "log_append", "map", "push", "request_body", "rewrite", "templates", "tracing", "vars",
}

// firstProxy returns the first async_proxy in routes.
func firstProxy(routes caddyhttp.RouteList) *proxy {
	for _, route := range routes {
		for _, handler := range route.Handlers {
			switch handler := handler.(type) {
			case *Handler:
				return handler.proxy
			case *caddyhttp.Subroute:
				if p := firstProxy(handler.Routes); p != nil {
					return p
				}
			}
		}
	}
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Unclaimed)(nil)
	_ caddyhttp.MiddlewareHandler = (*Unclaimed)(nil)
)
