// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// pageActions maps the path of a POST request to its action. An action returns false if its
// tunnel or client no longer exists.
var pageActions = map[string]func(v *View, r *http.Request) (done bool, err error){
	"close":  (*View).closeAction,
	"refill": (*View).refillAction,
	"block":  (*View).blockAction,
}

// maxBlock is the longest block that the page can set. Longer ones belong in the config.
const maxBlock = 30 * 24 * time.Hour

func (v *View) closeAction(r *http.Request) (bool, error) {
	id, err := strconv.ParseUint(r.FormValue("tunnel"), 10, 64)
	if err != nil {
		return false, errors.New("tunnel: expected the number of an open tunnel")
	}
	return v.in.CloseTunnel(id), nil
}

func (v *View) refillAction(r *http.Request) (bool, error) {
	key, err := v.clientToActOn(r.FormValue("client"))
	if err != nil {
		return false, err
	}
	return v.in.Refill(key, r.FormValue("zone"), r.FormValue("policy")), nil
}

func (v *View) blockAction(r *http.Request) (bool, error) {
	key, err := v.clientToActOn(r.FormValue("client"))
	if err != nil {
		return false, err
	}
	d, err := v.in.ParseDuration(r.FormValue("for"))
	if err != nil || d < 0 || d > maxBlock {
		return false, errors.New("for: expected a duration up to 30d such as 10m, or 0s to end a block")
	}
	return v.in.Block(key, d), nil
}

// clientToActOn parses a client that an operator entered. It rejects networks of a size for
// which no site's limiter has buckets.
func (v *View) clientToActOn(s string) (client.Key, error) {
	if network, err := netip.ParsePrefix(s); err == nil && !v.isClient(network) {
		return client.Key{}, fmt.Errorf("%q is not a client: no site has clients of %d bits; ipv4_prefix and ipv6_prefix set that", s, network.Bits())
	}
	return client.Parse(s)
}

// isClient reports whether some site's limiter has one bucket per network of this size.
func (v *View) isClient(network netip.Prefix) bool {
	for t := range v.in.Tables {
		bits := t.Limits.IPv6Prefix
		if network.Addr().Is4() {
			bits = t.Limits.IPv4Prefix
		}
		if bits == network.Bits() {
			return true
		}
	}
	return false
}

// crossOrigin rejects requests that a browser sends on behalf of another origin.
var crossOrigin = http.NewCrossOriginProtection()

// act performs an action of an operator.
func (p *Page) act(w http.ResponseWriter, r *http.Request, name string) {
	action, ok := pageActions[name]
	switch {
	case !ok:
		writeError(w, http.StatusNotFound, "There is no such action; expected close, refill or block.")
		return
	case !p.Actions:
		writeError(w, http.StatusForbidden, "Actions are off; enable them with the option actions of async_proxy_status.")
		return
	case crossOrigin.Check(r) != nil:
		writeError(w, http.StatusForbidden, "Actions may only come from the status page itself; this request comes from another origin.")
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, 4<<10)
	done, err := action(p.View, r)
	if err != nil {
		writeError(w, http.StatusBadRequest, err.Error())
		return
	}
	p.Acted(r, name, done)
	if !done {
		writeError(w, http.StatusNotFound, "It no longer exists.")
		return
	}
	writeJSON(w, http.StatusOK, map[string]bool{"done": true})
}
