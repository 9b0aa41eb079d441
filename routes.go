// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
)

// This file answers questions about the routes of a server that the config alone can answer: whether
// and for which requests they lead to a handler, and what comes before it.

// hostsLeadingTo returns the host names that the routes to h are restricted to, if they are,
// and whether the routes lead to h at all.
func hostsLeadingTo(routes caddyhttp.RouteList, h caddyhttp.MiddlewareHandler) (hosts []string, found bool) {
	for _, route := range routes {
		for _, handler := range route.Handlers {
			if sub, ok := handler.(*caddyhttp.Subroute); ok {
				hosts, found = hostsLeadingTo(sub.Routes, h)
			} else {
				found = handler == h
			}
			if found {
				return append(matchedHosts(route), hosts...), true
			}
		}
	}
	return nil, false
}

// matchedHosts returns the hosts that a route is restricted to; none if it matches others.
func matchedHosts(route caddyhttp.Route) []string {
	var hosts []string
	for _, set := range route.MatcherSets {
		i := slices.IndexFunc(set, func(m any) bool { _, ok := m.(*caddyhttp.MatchHost); return ok })
		if i < 0 {
			return nil
		}
		hosts = append(hosts, *set[i].(*caddyhttp.MatchHost)...)
	}
	return hosts
}

// pathLeadingTo returns a path at which routes lead to h, and whether they do.
func pathLeadingTo(routes caddyhttp.RouteList, h caddyhttp.MiddlewareHandler) (path string, found bool) {
	for _, route := range routes {
		for _, handler := range route.Handlers {
			if sub, ok := handler.(*caddyhttp.Subroute); ok {
				path, found = pathLeadingTo(sub.Routes, h)
			} else {
				path, found = "/", handler == h
			}
			if found && path == "/" {
				path = matchedPath(route)
			}
			if found {
				return path, true
			}
		}
	}
	return "", false
}

// matchedPath returns a path that a route matches and that ends in a slash, as far as its path
// matchers tell.
func matchedPath(route caddyhttp.Route) string {
	for _, set := range route.MatcherSets {
		for _, m := range set {
			if paths, ok := m.(*caddyhttp.MatchPath); ok && len(*paths) > 0 {
				return strings.TrimRight(strings.TrimSuffix((*paths)[0], "*"), "/") + "/"
			}
		}
	}
	return "/"
}

// firstHandler returns the handler that gets every request before any other handler.
func firstHandler(routes caddyhttp.RouteList) caddyhttp.MiddlewareHandler {
	if len(routes) == 0 || len(routes[0].MatcherSets) > 0 || len(routes[0].Handlers) == 0 {
		return nil
	}
	first := routes[0].Handlers[0]
	if sub, ok := first.(*caddyhttp.Subroute); ok {
		if sub.Errors != nil {
			return nil
		}
		return firstHandler(sub.Routes)
	}
	return first
}

// siteOf returns the routes of the site that a handler is in.
func siteOf(server *caddyhttp.Server, h caddyhttp.MiddlewareHandler) caddyhttp.RouteList {
	routes := routesOf(server)
	for _, route := range routes {
		for _, handler := range route.Handlers {
			if sub, ok := handler.(*caddyhttp.Subroute); ok && route.Terminal {
				if _, found := hostsLeadingTo(sub.Routes, h); found {
					return sub.Routes
				}
			}
		}
	}
	return routes
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

// shadowing returns the async_proxy before h that gets every request of the routes, so that h gets none; nil:
// there is none.
func shadowing(routes caddyhttp.RouteList, h *Handler) (first *Handler) {
	for _, route := range routes {
		for _, handler := range route.Handlers {
			var found *Handler
			switch handler := handler.(type) {
			case *Handler:
				if found = handler; handler == h {
					return nil
				}
			case *caddyhttp.Subroute:
				if _, leads := hostsLeadingTo(handler.Routes, h); leads {
					return shadowing(handler.Routes, h)
				}
				found = shadowing(handler.Routes, h)
			}
			if found != nil && len(route.MatcherSets) == 0 {
				return found
			}
		}
	}
	return nil
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

// restrictedBefore reports whether every path to a handler through the routes of its
// server is restricted to certain clients or users: a matcher on the path restricts the
// clients, or an earlier handler requires credentials or rejects all other clients.
func restrictedBefore(server *caddyhttp.Server, h caddyhttp.MiddlewareHandler, restricts func(caddyhttp.MatcherSet) bool) bool {
	w := pathSearch{handler: h, restricts: restricts}
	w.walk(routesOf(server), maps.Clone(server.NamedRoutes), false)
	return w.found && !w.unrestricted
}

// pathSearch finds the paths through routes to a handler.
type pathSearch struct {
	handler   caddyhttp.MiddlewareHandler
	restricts func(caddyhttp.MatcherSet) bool // reports whether a matcher set matches certain clients only

	found        bool // a path exists
	unrestricted bool // an unrestricted path exists
}

// walk follows routes. restricted says whether only certain clients or users reach the first
// route. The result says whether only certain ones reach what follows the last route.
func (w *pathSearch) walk(routes caddyhttp.RouteList, named map[string]*caddyhttp.Route, restricted bool) bool {
	groups := make(map[string]bool)
	for _, route := range routes {
		inside := restricted || allSets(route.MatcherSets, w.restricts)
		for _, handler := range route.Handlers {
			switch handler := handler.(type) {
			case *caddyhttp.Subroute:
				inside = w.walk(handler.Routes, named, inside)
			case *caddyhttp.Invoke:
				if invoked := named[handler.Name]; invoked != nil {
					others := maps.Clone(named)
					delete(others, handler.Name) // a named route may invoke itself
					inside = w.walk(caddyhttp.RouteList{*invoked}, others, inside)
				}
			case *caddyauth.Authentication, *caddyhttp.StaticError:
				inside = true
			case *caddyhttp.StaticResponse:
				inside = inside || endsRequest(handler)
			default:
				if handler == w.handler {
					w.found, w.unrestricted = true, w.unrestricted || !inside
				}
			}
		}
		// A route that some requests skip restricts these only if its matcher
		// matches all but certain clients.
		skipped := len(route.MatcherSets) > 0 || groups[route.Group]
		if !skipped || allSets(route.MatcherSets, matchesAllBut(w.restricts)) && !groups[route.Group] {
			restricted = inside
		}
		if route.Group != "" {
			groups[route.Group] = true // a request takes only one route of a group
		}
	}
	return restricted
}

// allSets reports whether there are matcher sets and condition holds for each of them.
func allSets(sets caddyhttp.MatcherSets, condition func(caddyhttp.MatcherSet) bool) bool {
	return len(sets) > 0 && !slices.ContainsFunc(sets, func(set caddyhttp.MatcherSet) bool { return !condition(set) })
}

// matchesClients reports whether a matcher set matches certain clients only.
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

// matchesAllBut returns a condition that holds for a matcher set that is exactly the
// negation of sets for which restricts holds.
func matchesAllBut(restricts func(caddyhttp.MatcherSet) bool) func(caddyhttp.MatcherSet) bool {
	return func(set caddyhttp.MatcherSet) bool {
		if len(set) != 1 {
			return false
		}
		not, ok := set[0].(*caddyhttp.MatchNot)
		return ok && allSets(not.MatcherSets, restricts)
	}
}

// endsRequest reports whether a static response certainly ends the request. 103 (Early Hints) does
// not, and a status in a placeholder may turn out to be 103.
func endsRequest(s *caddyhttp.StaticResponse) bool {
	status, err := strconv.Atoi(string(s.StatusCode))
	return s.Abort || s.StatusCode == "" || err == nil && status != http.StatusEarlyHints
}
