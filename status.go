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
	// Beside metrics, which is as much of an answer as this is.
	httpcaddyfile.RegisterDirectiveOrder("async_proxy_status", httpcaddyfile.After, "metrics")
}

// Status serves a page that shows what all async_proxy handlers of this process
// are doing: their clients, tunnels and refusals, live. The page is at every
// path that ends in a slash; what it needs lies beside it.
//
// It shows the addresses of clients and where they go. Restrict who can see it:
// by the site's address, `remote_ip` or `basic_auth`. Give its site a host name,
// such as localhost, so that no other name leads there. The proxy takes no client
// to a server that has such a page. Caddy's admin endpoint has the same data for
// programs.
type Status struct {
	// Whether the page may close tunnels, and give clients a full bucket or
	// block them. Only requests from the page itself, or from no browser, are
	// taken; that is only so if the site has a host name or asks for
	// credentials. Default: false.
	Actions bool `json:"actions,omitempty"`

	// Whether of a client only its network is shown, the first 24 bits of an
	// IPv4 address and 48 of an IPv6 one, and of a tunnel not its user. Excludes
	// actions. Default: false.
	MaskClients bool `json:"mask_clients,omitempty"`

	logger *zap.Logger
	stop   func() // ends the streams
	ended  <-chan struct{}
}

// statusServers has the server of each status page of this process. The proxy
// takes no client to such a server.
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
// Both are off by default, and exclude each other.
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
		if last := d.Val(); d.NextBlock(d.Nesting()) || d.Val() != last { // an empty block only moves on
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
	s.ended, s.stop = ended, sync.OnceFunc(func() { close(ended) })
	// A server that stops waits for its requests: a stream must end by itself.
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

// started warns about a page whose actions pages of others can have done: in the
// browser of somebody who looks at one, whose name comes to stand for this
// server's address (DNS rebinding), requests to here are from the same origin.
// They have another host, and no credentials.
func (s *Status) started(server *caddyhttp.Server) {
	if !s.Actions {
		return
	}
	hosts, _ := hostsBefore(server.Routes, s)
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

// statusHeader is what the page may do: load what lies beside it, and nothing
// else; and be in nobody's frame.
var statusHeader = map[string]string{
	"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
	"X-Content-Type-Options":       "nosniff",
	"Referrer-Policy":              "no-referrer",
	"Cross-Origin-Opener-Policy":   "same-origin",
	"Cross-Origin-Resource-Policy": "same-origin",
	"Cache-Control":                "no-store",
}

// ServeHTTP implements caddyhttp.MiddlewareHandler. It answers every request.
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

// cameThroughProxy reports whether a proxy of this process forwarded or tunnelled
// r to here. An async_proxy before the page has already refused such a request,
// and has put its own name into Via.
func cameThroughProxy(r *http.Request) (found bool) {
	if hasVisited(r) {
		return false
	}
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	eachRegistry(func(reg *registry) {
		reg.handlers.Range(func(h *Handler, _ struct{}) bool {
			found = h.via.seen(r.Header) || h.loops(r, peer)
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

// data answers with what there is to see. Where clients are masked they cannot
// be searched for either, as that would tell who is there.
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

// page serves the page and its parts. Its links are relative, so that a path
// which is to be that of the page must end in a slash.
func (s *Status) page(w http.ResponseWriter, r *http.Request, name string) {
	if file, ok := statusFiles()[name]; ok && name != "" {
		file.serve(w, r)
		return
	}
	path := r.URL.Path
	if original, ok := r.Context().Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok {
		path = original.URL.Path // of which handle_path may have taken a part away
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
	_ = json.NewEncoder(w).Encode(v) // fails if the client has left
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
