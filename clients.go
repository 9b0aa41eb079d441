// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
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

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// allClients is the value of the option clients that opens the proxy.
const allClients = "all"

// provisionClients parses the option clients.
func (p *proxy) provisionClients(server *caddyhttp.Server) (err error) {
	var ranges []string
	for _, r := range p.config.Clients {
		if r == allClients {
			ranges = append(ranges, "0.0.0.0/0", "::/0")
		} else {
			ranges = append(ranges, r)
		}
	}
	if len(p.config.Clients) == 0 {
		ranges = []string{"private_ranges"}
	}
	if p.clients, err = parsePrefixes("clients", ranges); err != nil {
		return err
	}
	p.restrictedElsewhere = sync.OnceValue(func() bool {
		return server != nil && restrictedBefore(server, p.config, matchesClients)
	})
	p.clientsLine = sync.OnceValues(p.makeClientsLine)
	return nil
}

// admits reports whether a client may use the proxy. A client on a Unix socket has no
// valid address; it is always admitted.
//
// Without the option clients, every client is admitted if authentication or an address
// matcher already restricts access; otherwise only private addresses are. That depends on
// the routes around the handler, which are complete only once all handlers are provisioned.
// It is therefore decided at the first request, so the proxy is never open in between.
func (p *proxy) admits(addr netip.Addr) bool {
	return p.admitsWithoutLogin(addr) || len(p.config.Clients) == 0 && len(p.auth) > 0
}

// admitsWithoutLogin is admits for a client that need not log in.
func (p *proxy) admitsWithoutLogin(addr netip.Addr) bool {
	return !addr.IsValid() || p.clients.Contains(addr) || len(p.config.Clients) == 0 && p.restrictedElsewhere()
}

// deniedClient returns why a client may not use the proxy, if it is not admitted.
func (p *proxy) deniedClient(addr netip.Addr) *access.DeniedError {
	reason, line := p.clientsLine()
	e := &access.DeniedError{Rule: "clients", Reason: reason, Hint: fmt.Sprintf("add %s to clients", addr)}
	if line != "" {
		e.Allow = func() string { return line + " " + addr.String() }
	}
	return e
}

// makeClientsLine returns why clients are not admitted, and the option clients as a line of a
// Caddyfile. If that would be long, the reason has the beginning of it, and there is no line:
// the list may have thousands of ranges, and each stranger would cost as much.
func (p *proxy) makeClientsLine() (reason, line string) {
	line = "clients " + strings.Join(p.effectiveClients(), " ")
	reason = "the client's address is not in " + printable.Text(line)
	if len(line) > printable.MaxText {
		line = ""
	}
	return reason, line
}

// servesWithoutLogin reports whether the policy needs no credentials of a client at addr that meets
// its conditions. Anybody may meet conditions that name neither clients nor users, and
// authentication no longer keeps strangers out: such a policy is for the clients that could use the
// proxy if it had no authentication.
func (y *policy) servesWithoutLogin(addr netip.Addr) bool {
	return y.anonymous && (y.namesClients || y.proxy.admitsWithoutLogin(addr))
}

// isOpen reports whether every client that can reach the proxy may use it.
func (p *proxy) isOpen() bool {
	if namesClients(p.config.Clients) || p.restrictedElsewhere() {
		return false
	}
	open := len(p.config.Clients) > 0 // to all
	if len(p.auth) == 0 {
		return open
	}
	return slices.ContainsFunc(p.policies, func(y *policy) bool {
		return y.anonymous && (y.isOpen || open && !y.namesClients)
	})
}

// effectiveClients returns the value of the option clients that is in effect.
func (p *proxy) effectiveClients() []string {
	switch {
	case len(p.config.Clients) > 0:
		return p.config.Clients
	case len(p.auth) > 0 || p.restrictedElsewhere():
		return []string{allClients}
	}
	return []string{"private_ranges"}
}

// namesClients reports whether ranges restrict access, which ranges that include all
// addresses do not.
func namesClients(ranges []string) bool {
	return len(ranges) > 0 && !slices.ContainsFunc(ranges, func(r string) bool { return r == allClients || strings.HasSuffix(r, "/0") })
}

// restrictedBefore reports whether every path to a handler through the routes of its
// server is restricted to certain clients or users: a matcher on the path restricts the
// clients, or an earlier handler requires credentials or rejects all other clients.
func restrictedBefore(server *caddyhttp.Server, h caddyhttp.MiddlewareHandler, restricts func(caddyhttp.MatcherSet) bool) bool {
	w := pathsTo{handler: h, restricts: restricts}
	w.walk(routesOf(server), maps.Clone(server.NamedRoutes), false)
	return w.found && !w.unrestricted
}

// pathsTo finds the paths through routes to a handler.
type pathsTo struct {
	handler   caddyhttp.MiddlewareHandler
	restricts func(caddyhttp.MatcherSet) bool // reports whether a matcher set matches certain clients only

	found        bool // a path exists
	unrestricted bool // an unrestricted path exists
}

// walk follows routes. restricted says whether only certain clients or users reach the
// first route; the result says the same of whatever follows the last one.
func (w *pathsTo) walk(routes caddyhttp.RouteList, named map[string]*caddyhttp.Route, restricted bool) bool {
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

// endsRequest reports whether a static response ends the request. All do except 103 (Early
// Hints), which a status in a placeholder may turn out to be.
func endsRequest(s *caddyhttp.StaticResponse) bool {
	status, err := strconv.Atoi(string(s.StatusCode))
	return s.Abort || s.StatusCode == "" || err == nil && status != http.StatusEarlyHints
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

// isBeyondLoopback reports whether a listener's address is a TCP address that other
// machines may be able to reach.
func isBeyondLoopback(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && !tcp.IP.IsLoopback()
}
