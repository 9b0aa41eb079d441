// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

func init() {
	caddy.RegisterModule(adminAPI{})
}

// adminAPI serves /async_proxy/ on Caddy's admin endpoint. docs/admin-api.md describes it.
type adminAPI struct{}

// CaddyModule returns the Caddy module information.
func (adminAPI) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "admin.api.async_proxy",
		New: func() caddy.Module { return new(adminAPI) },
	}
}

// Routes implements caddy.AdminRouter.
func (a adminAPI) Routes() []caddy.AdminRoute {
	return []caddy.AdminRoute{{Pattern: "/async_proxy/", Handler: caddy.AdminHandlerFunc(a.serve)}}
}

func (a adminAPI) serve(w http.ResponseWriter, r *http.Request) error {
	now := time.Now()
	// A slash within a name is escaped as %2F.
	collection, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.EscapedPath(), "/async_proxy/"), "/")
	name, verb, _ := strings.Cut(rest, "/")
	// The slash of a network is not escaped.
	if bits, more, _ := strings.Cut(verb, "/"); collection == "clients" && isNumber(bits) {
		name, verb = name+"/"+bits, more
	}
	name, err := url.PathUnescape(name)
	if err != nil {
		return apiError(http.StatusBadRequest, "%w", err)
	}
	switch {
	case collection == "stats" && rest == "":
		return a.get(w, r, func() (any, error) { return takeStats(now), nil })
	case collection == "clients" && rest == "":
		return a.get(w, r, func() (any, error) { return queryClients(r.URL.Query(), now) })
	case collection == "tunnels" && rest == "":
		return a.get(w, r, func() (any, error) { return queryTunnels(r.URL.Query(), now) })
	case collection == "tunnels" && verb == "":
		id, err := strconv.ParseUint(name, 10, 64)
		if err != nil {
			return apiError(http.StatusBadRequest, "%q is not a tunnel id; expected a number", name)
		}
		return a.do(w, r, http.MethodDelete, func() bool { return closeTunnel(id) })
	case collection == "clients" && (verb == "" || verb == "block"):
		key, err := clientToActOn(name)
		if err != nil {
			return apiError(http.StatusBadRequest, "%w", err)
		}
		if verb == "" {
			return a.do(w, r, http.MethodDelete, func() bool { return refillClient(key, r.URL.Query().Get("zone")) })
		}
		d, err := caddy.ParseDuration(r.URL.Query().Get("for"))
		if r.Method == http.MethodPut && (err != nil || d <= 0) {
			return apiError(http.StatusBadRequest, "for=%s: expected a positive duration such as 10m", r.URL.Query().Get("for"))
		}
		return a.do(w, r, http.MethodPut, func() bool { return blockClient(key, d) })
	}
	return apiError(http.StatusNotFound, "no endpoint %s; see docs/admin-api.md of async_proxy", r.URL.Path)
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 8)
	return err == nil
}

func (adminAPI) get(w http.ResponseWriter, r *http.Request, answer func() (any, error)) error {
	if r.Method != http.MethodGet {
		return apiError(http.StatusMethodNotAllowed, "%s: expected GET", r.Method)
	}
	v, err := answer()
	if err != nil {
		return caddy.APIError{HTTPStatus: http.StatusBadRequest, Err: err}
	}
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(v)
}

func (adminAPI) do(w http.ResponseWriter, r *http.Request, method string, action func() bool) error {
	if r.Method != method {
		return apiError(http.StatusMethodNotAllowed, "%s: expected %s", r.Method, method)
	}
	if !action() {
		return caddy.APIError{HTTPStatus: http.StatusNotFound, Err: errors.New("not found")}
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func apiError(status int, format string, args ...any) error {
	return caddy.APIError{HTTPStatus: status, Err: fmt.Errorf(format, args...)}
}

// clientToActOn parses a client that an operator entered. It rejects networks of a size for
// which no site's limiter has buckets.
func clientToActOn(s string) (client.Key, error) {
	if network, err := netip.ParsePrefix(s); err == nil && !isClient(network) {
		return client.Key{}, fmt.Errorf("%q is not a client: no site has clients of %d bits; ipv4_prefix and ipv6_prefix set that", s, network.Bits())
	}
	return client.Parse(s)
}

// isClient reports whether some site's limiter has one bucket per network of this size.
func isClient(network netip.Prefix) (found bool) {
	limiters.Range(func(_, t any) bool {
		limits := t.(*bucket.Table).Limits
		bits := limits.IPv6Prefix
		if network.Addr().Is4() {
			bits = limits.IPv4Prefix
		}
		found = found || bits == network.Bits()
		return true
	})
	return found
}

// Interface guard
var _ caddy.AdminRouter = adminAPI{}
