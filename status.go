// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

func init() {
	caddy.RegisterModule(Status{})
	httpcaddyfile.RegisterHandlerDirective("async_proxy_status", parseStatus)
	// Next to metrics, which responds to requests in the same way.
	httpcaddyfile.RegisterDirectiveOrder("async_proxy_status", httpcaddyfile.After, "metrics")
}

// Status serves a live page with the clients, tunnels and refusals of all async_proxy
// handlers of this process. The page is served at every path that ends in a slash, and
// its files next to it.
//
// It shows the addresses of clients and their destinations. Restrict access to it by the
// site's address, `remote_ip` or `basic_auth`. Give its site a host name, such as
// localhost, so that no other name leads to it. The proxy does not connect clients to a
// server with such a page. Caddy's admin endpoint provides the same data for programs.
type Status struct {
	// Whether the page may close tunnels and refill or block clients. Only requests
	// from the page itself or from programs other than browsers are accepted. To enforce
	// that, the site needs a host name or must require credentials. Default: false.
	Actions bool `json:"actions,omitempty"`

	// Whether to show only the network of each client (the first 24 bits of an IPv4
	// address, 48 of an IPv6 address) and no user names. Cannot be combined with actions.
	// Default: false.
	MaskClients bool `json:"mask_clients,omitempty"`

	logger *zap.Logger
	page   *status.Page
	stop   func() // ends the page's streams
}

// servesStatus reports whether a server has a status page.
func servesStatus(server *caddyhttp.Server) (found bool) {
	program.statusServers.Range(func(_, of any) bool {
		found = of == server
		return !found
	})
	return found
}

// CaddyModule returns the Caddy module information.
func (Status) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.async_proxy_status",
		New: func() caddy.Module { return new(Status) },
	}
}

func parseStatus(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	s := new(Status)
	return s, s.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens. Syntax:
//
//	async_proxy_status [<matcher>] {
//		actions
//		mask_clients
//	}
//
// Both are off by default, and they cannot be combined.
func (s *Status) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	if d.NextArg() {
		return d.Errf("unexpected argument '%s'; expected a block of options, or nothing", d.Val())
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name, at := d.Val(), *d
		var on *bool
		switch name {
		case "actions":
			on = &s.Actions
		case "mask_clients":
			on = &s.MaskClients
		default:
			return d.Errf("unrecognized option '%s'; expected actions or mask_clients", name)
		}
		switch {
		case d.NextArg():
			return d.Errf("%s: unexpected value '%s'; expected no value", name, d.Val())
		case *on:
			return d.Errf("%s: the option is set twice; expected it once", name)
		}
		*on = true
		if err := noBlock(d, at, name, "no value"); err != nil {
			return err
		}
	}
	if s.Actions && s.MaskClients {
		return d.Err("mask_clients: cannot be combined with actions, which need the clients' addresses")
	}
	return nil
}

// Provision implements caddy.Provisioner.
func (s *Status) Provision(ctx caddy.Context) error {
	if s.Actions && s.MaskClients {
		return errors.New("mask_clients: cannot be combined with actions, which need the clients' addresses")
	}
	s.logger = ctx.Logger()
	ended := make(chan struct{})
	s.stop = sync.OnceFunc(func() { close(ended) })
	s.page = &status.Page{
		View: program.status, Actions: s.Actions, MaskClients: s.MaskClients, Done: ended,
		OriginalPath: originalPath, CameThroughProxy: cameThroughProxy, Acted: s.logAction,
	}
	// A server that shuts down waits for its requests, so streams must end by themselves.
	server, ok := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if !ok {
		return nil // provisioned outside of the http app
	}
	server.RegisterOnShutdown(s.stop)
	events, err := ctx.App("events")
	if err != nil {
		return err
	}
	program.statusServers.Store(s, server)
	return events.(*caddyevents.App).On("started", eventHandler{func() { s.started(server) }})
}

// started warns if any web page can trigger the actions of this status page by DNS rebinding: an
// attacker makes the web page's name resolve to this server's address, and the operator's browser then
// regards requests to the server as same-origin. Such requests have another host and no credentials.
//
// It also warns if other machines can reach the page and nothing restricts which of them may.
func (s *Status) started(server *caddyhttp.Server) {
	if slices.ContainsFunc(server.Listeners(), func(ln net.Listener) bool { return isBeyondLoopback(ln.Addr()) }) && !restrictedBefore(server, s, matchesClients) {
		s.logger.Warn("other machines can reach this status page, which shows clients and their destinations; "+
			"bind it to 127.0.0.1, or restrict it with basic_auth or a remote_ip matcher", zap.Strings("addresses", server.Listen))
	}
	byBrowser := func(ln net.Listener) bool { return ln.Addr().Network() != "unix" }
	if !s.Actions || !slices.ContainsFunc(server.Listeners(), byBrowser) {
		return
	}
	hosts, _ := hostsLeadingTo(routesOf(server), s)
	asks := restrictedBefore(server, s, func(caddyhttp.MatcherSet) bool { return false })
	if len(hosts) == 0 && !asks {
		s.logger.Warn("any web page open in an operator's browser can trigger this status page's actions by DNS rebinding, "+
			"because its site has no host name in its address; give it one, such as localhost, or require basic_auth",
			zap.Strings("addresses", server.Listen))
	}
}

// Cleanup implements caddy.CleanerUpper. It may follow a Provision that failed.
func (s *Status) Cleanup() error {
	program.statusServers.Delete(s)
	if s.stop != nil {
		s.stop()
	}
	return nil
}

// ServeHTTP implements caddyhttp.MiddlewareHandler. It responds to every request and never
// calls the next handler.
func (s *Status) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	s.page.ServeHTTP(w, r)
	return nil
}

// logAction logs an action of an operator.
func (s *Status) logAction(r *http.Request, action string, done bool) {
	if c := s.logger.Check(zap.InfoLevel, "operator's action"); c != nil {
		by, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
		c.Write(
			zap.String("action", action),
			textField("tunnel", r.FormValue("tunnel")),
			textField("client", r.FormValue("client")),
			textField("zone", r.FormValue("zone")),
			textField("policy", r.FormValue("policy")),
			textField("for", r.FormValue("for")),
			zap.Bool("done", done),
			zap.String("by", by),
		)
	}
}

// cameThroughProxy reports whether a proxy of this process forwarded or tunnelled r to this
// page. If an async_proxy runs before the page, it has already refused such requests, and
// the proxy's name in Via is its own.
func cameThroughProxy(r *http.Request) bool {
	if passedProxyHandler(r) {
		return false
	}
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	p := currentProcess()
	if p == nil {
		return false
	}
	for each := range p.proxies.All() {
		if each.via.seen(r.Header) || each.isLoop(r, peer) {
			return true
		}
	}
	return false
}

// originalPath returns the path that the client sent. handle_path may have stripped a prefix
// from r's.
func originalPath(r *http.Request) string {
	if original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok {
		return original.URL.Path
	}
	return r.URL.Path
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Status)(nil)
	_ caddy.CleanerUpper          = (*Status)(nil)
	_ caddyhttp.MiddlewareHandler = (*Status)(nil)
	_ caddyfile.Unmarshaler       = (*Status)(nil)
)
