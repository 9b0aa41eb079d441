// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
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
	stop   func() // ends the streams
	done   <-chan struct{}
}

// statusServers maps each status page of this process to its server. The proxy does not
// connect clients to these servers.
var statusServers sync.Map // *Status -> *caddyhttp.Server

// servesStatus reports whether a server has a status page.
func servesStatus(server *caddyhttp.Server) (found bool) {
	statusServers.Range(func(_, of any) bool {
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
	status := new(Status)
	return status, status.UnmarshalCaddyfile(h.Dispenser)
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
		name := d.Val()
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
		if last := d.Val(); d.NextBlock(d.Nesting()) || d.Val() != last { // an empty block only advances the Dispenser
			return d.Errf("%s: unexpected block; expected no value", name)
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
	s.done, s.stop = ended, sync.OnceFunc(func() { close(ended) })
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
	statusServers.Store(s, server)
	return events.(*caddyevents.App).On("started", eventHandler{func() { s.started(server) }})
}

// started warns if any web page can trigger the actions of this status page by DNS
// rebinding: the web page's name is made to resolve to this server's address, so that the
// operator's browser regards requests to the server as same-origin. Such requests carry
// another host and no credentials.
func (s *Status) started(server *caddyhttp.Server) {
	if !s.Actions {
		return
	}
	hosts, _ := hostsLeadingTo(server.Routes, s)
	asks := restrictedBefore(server, s, func(caddyhttp.MatcherSet) bool { return false })
	if len(hosts) == 0 && !asks {
		s.logger.Warn("any web page open in an operator's browser can trigger this status page's actions by DNS rebinding, "+
			"because its site has no host name in its address; give it one, such as localhost, or require basic_auth",
			zap.Strings("addresses", server.Listen))
	}
}

// Cleanup implements caddy.CleanerUpper. It may follow a Provision that failed.
func (s *Status) Cleanup() error {
	statusServers.Delete(s)
	if s.stop != nil {
		s.stop()
	}
	return nil
}

// statusHeader restricts the page: it may load only its own files and cannot be framed.
var statusHeader = map[string]string{
	"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
	"X-Content-Type-Options":       "nosniff",
	"Referrer-Policy":              "no-referrer",
	"Cross-Origin-Opener-Policy":   "same-origin",
	"Cross-Origin-Resource-Policy": "same-origin",
	"Cache-Control":                "no-store",
}

// ServeHTTP implements caddyhttp.MiddlewareHandler. It responds to every request and never
// calls the next handler.
func (s *Status) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	for field, value := range statusHeader {
		w.Header().Set(field, value)
	}
	if cameThroughProxy(r) {
		statusError(w, http.StatusForbidden, "The status page is not available through the proxy.")
		return nil
	}
	name := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		s.get(w, r, name)
	case http.MethodPost:
		s.act(w, r, name)
	default:
		w.Header().Set("Allow", "GET, HEAD, POST")
		statusError(w, http.StatusMethodNotAllowed, "Expected GET, HEAD or POST.")
	}
	return nil
}

// cameThroughProxy reports whether a proxy of this process forwarded or tunnelled r to this
// page. If an async_proxy runs before the page, it has already refused such requests, and
// the proxy's name in Via is its own.
func cameThroughProxy(r *http.Request) (found bool) {
	if passedProxyHandler(r) {
		return false
	}
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	withProcess(func(p *process) {
		p.handlers.Range(func(h *Handler, _ struct{}) bool {
			found = h.via.seen(r.Header) || h.isLoop(r, peer)
			return !found
		})
	})
	return found
}

func (s *Status) get(w http.ResponseWriter, r *http.Request, name string) {
	switch name {
	case "events":
		s.stream(w, r)
	case "snapshot.json":
		snap := takeSnapshot(time.Now())
		s.data(w, r, &snap, nil)
	case "clients.json":
		list, err := queryClients(r.URL.Query(), time.Now())
		s.data(w, r, list, err)
	case "tunnels.json":
		list, err := queryTunnels(r.URL.Query(), time.Now())
		s.data(w, r, list, err)
	default:
		s.page(w, r, name)
	}
}

// data responds with data as JSON. Searching is not allowed when clients are masked, because
// it would reveal their addresses.
func (s *Status) data(w http.ResponseWriter, r *http.Request, data interface{ mask() }, err error) {
	switch {
	case err != nil:
		statusError(w, http.StatusBadRequest, err.Error())
	case s.MaskClients && r.URL.Query().Get("q") != "":
		statusError(w, http.StatusForbidden, "Searching by q is not allowed while mask_clients is on.")
	default:
		if s.MaskClients {
			data.mask()
		}
		statusJSON(w, http.StatusOK, data)
	}
}

// page serves the page and its files. Their links are relative, so the path of the page
// must end in a slash; other paths are redirected.
func (s *Status) page(w http.ResponseWriter, r *http.Request, name string) {
	if file, ok := statusFiles()[name]; ok && name != "" {
		file.serve(w, r)
		return
	}
	path := r.URL.Path
	if original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok {
		path = original.URL.Path // handle_path may have stripped a prefix from r's
	}
	last := path[strings.LastIndexByte(path, '/')+1:]
	switch {
	case strings.Contains(name, "."):
		statusError(w, http.StatusNotFound, "The status page has no such file.")
	case last != "":
		w.Header().Set("Location", (&url.URL{Path: last + "/"}).String())
		w.WriteHeader(http.StatusPermanentRedirect)
	default:
		statusFiles()[""].serve(w, r)
	}
}

func statusJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // fails only if the client has disconnected
}

func statusError(w http.ResponseWriter, status int, text string) {
	statusJSON(w, status, map[string]string{"error": text})
}

// Interface guards
var (
	_ caddy.Provisioner           = (*Status)(nil)
	_ caddy.CleanerUpper          = (*Status)(nil)
	_ caddyhttp.MiddlewareHandler = (*Status)(nil)
	_ caddyfile.Unmarshaler       = (*Status)(nil)
)
