// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
)

// allClients is the value of the option clients that opens the proxy.
const allClients = "all"

// provisionClients reads which clients may use the proxy.
func (h *Handler) provisionClients(server *caddyhttp.Server) (err error) {
	var ranges []string
	for _, r := range h.Clients {
		if r == allClients {
			ranges = append(ranges, "0.0.0.0/0", "::/0")
		} else {
			ranges = append(ranges, r)
		}
	}
	if len(h.Clients) == 0 {
		ranges = []string{"private_ranges"}
	}
	if h.clients, err = parsePrefixes("clients", ranges); err != nil {
		return err
	}
	h.guarded = sync.OnceValue(func() bool {
		return len(h.auth) > 0 || server != nil && restrictedBefore(server, h, matchesClients)
	})
	return nil
}

// admits reports whether a client may use the proxy. An address that is not
// valid is that of a client on a Unix socket, which has none.
//
// Without the option clients, everybody may if authentication or a matcher of
// addresses already restricts who gets here, and otherwise private addresses
// may. That depends on the routes around the handler, which are complete only
// after all handlers are provisioned, but always before the first request: it
// is decided then, so the proxy is never open in between.
func (h *Handler) admits(addr netip.Addr) bool {
	return !addr.IsValid() || h.clients.Contains(addr) || len(h.Clients) == 0 && h.guarded()
}

// isOpen reports whether anybody who can reach the proxy may use it.
func (h *Handler) isOpen() bool {
	return len(h.Clients) > 0 && !namesClients(h.Clients) && !h.guarded()
}

// effectiveClients returns the value of the option clients that is in effect.
func (h *Handler) effectiveClients() []string {
	switch {
	case len(h.Clients) > 0:
		return h.Clients
	case h.guarded():
		return []string{allClients}
	}
	return []string{"private_ranges"}
}

// namesClients reports whether ranges of addresses are limited to certain
// clients.
func namesClients(ranges []string) bool {
	return len(ranges) > 0 && !slices.ContainsFunc(ranges, func(r string) bool { return r == allClients || strings.HasSuffix(r, "/0") })
}

// restrictedBefore reports whether every way to a handler is for certain clients
// or users only, as far as the routes of its server tell: the matchers on the
// way restrict clients, or a handler before it asks everybody for credentials or
// turns away everybody but certain clients.
func restrictedBefore(server *caddyhttp.Server, h caddyhttp.MiddlewareHandler, restricts func(caddyhttp.MatcherSet) bool) bool {
	w := waysTo{handler: h, restricts: restricts}
	w.walk(server.Routes, maps.Clone(server.NamedRoutes), false)
	return w.found && !w.open
}

// waysTo finds the ways through routes to a handler.
type waysTo struct {
	handler   caddyhttp.MiddlewareHandler
	restricts func(caddyhttp.MatcherSet) bool // reports whether a set of matchers matches certain clients only

	found bool // there is a way
	open  bool // there is one that is not restricted
}

// walk follows routes. restricted says whether only certain clients or users get
// to the first of them; the result says the same of what follows the last one.
func (w *waysTo) walk(routes caddyhttp.RouteList, named map[string]*caddyhttp.Route, restricted bool) bool {
	groups := make(map[string]bool)
	for _, route := range routes {
		inside := restricted || everySet(route.MatcherSets, w.restricts)
		for _, handler := range route.Handlers {
			switch handler := handler.(type) {
			case *caddyhttp.Subroute:
				inside = w.walk(handler.Routes, named, inside)
			case *caddyhttp.Invoke:
				if invoked := named[handler.Name]; invoked != nil {
					others := maps.Clone(named)
					delete(others, handler.Name) // it may invoke itself
					inside = w.walk(caddyhttp.RouteList{*invoked}, others, inside)
				}
			case *caddyauth.Authentication, *caddyhttp.StaticError:
				inside = true
			case *caddyhttp.StaticResponse:
				inside = inside || endsRequest(handler)
			default:
				if handler == w.handler {
					w.found, w.open = true, w.open || !inside
				}
			}
		}
		// A route that not all requests take restricts those that skip it only if
		// it takes everybody but certain clients.
		skipped := len(route.MatcherSets) > 0 || groups[route.Group]
		if !skipped || everySet(route.MatcherSets, matchesAllBut(w.restricts)) && !groups[route.Group] {
			restricted = inside
		}
		if route.Group != "" {
			groups[route.Group] = true // of which a request takes one route only
		}
	}
	return restricted
}

// endsRequest reports whether a static response ends the request, as all do but
// 103 (Early Hints). A status in a placeholder may be that.
func endsRequest(s *caddyhttp.StaticResponse) bool {
	status, err := strconv.Atoi(string(s.StatusCode))
	return s.Abort || s.StatusCode == "" || err == nil && status != http.StatusEarlyHints
}

// everySet reports whether there are sets of matchers and the condition holds
// for each.
func everySet(sets caddyhttp.MatcherSets, condition func(caddyhttp.MatcherSet) bool) bool {
	return len(sets) > 0 && !slices.ContainsFunc(sets, func(set caddyhttp.MatcherSet) bool { return !condition(set) })
}

// matchesClients reports whether a set of matchers matches certain clients only.
func matchesClients(set caddyhttp.MatcherSet) bool {
	return slices.ContainsFunc(set, func(m any) bool {
		switch m := m.(type) {
		case *caddyhttp.MatchRemoteIP:
			return namesClients(m.Ranges)
		case *caddyhttp.MatchClientIP:
			return namesClients(m.Ranges)
		}
		return false
	})
}

// matchesAllBut returns a condition that holds for a set of matchers which matches
// whatever sets that restrict do not.
func matchesAllBut(restricts func(caddyhttp.MatcherSet) bool) func(caddyhttp.MatcherSet) bool {
	return func(set caddyhttp.MatcherSet) bool {
		if len(set) != 1 {
			return false
		}
		not, ok := set[0].(*caddyhttp.MatchNot)
		return ok && everySet(not.MatcherSets, restricts)
	}
}

// isBeyondLoopback reports whether other machines may be able to connect to a
// listener's address.
func isBeyondLoopback(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && !tcp.IP.IsLoopback()
}
