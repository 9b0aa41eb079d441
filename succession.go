// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"iter"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// A reload replaces one config by another, while client connections, tunnels and clients stay.
// This file decides which part of the new config takes over from which part of the old one:
// successorListener for connections, site.supersedes for tunnels, and successorTable for the clients
// on the status page. Tokens need no rule: a site with the same limits acquires the same table.

// successorListener returns the listener that takes over the connections of the others at its
// address, or nil if there is none. accepting are all that accept there, the earliest first.
//
// A connection leads to an address, and each of its requests may go to any site there. During
// a reload, an address has two listeners. The later one stays, or the earlier one if the new
// config fails; it is then the last again.
func successorListener(accepting []*downstream.Listener) *downstream.Listener {
	if len(accepting) == 0 {
		return nil
	}
	return accepting[len(accepting)-1]
}

// site holds what a tunnel needs to know about the proxy that opened it. A tunnel may outlive
// many configs, so a site must not refer to its Handler, which would keep the whole config in
// memory.
type site struct {
	// A site is the same one in the next config if it has the same zone and a common address.
	zone       *metrics.Zone   // one for each name
	addresses  []string        // that its server listens on
	configDone <-chan struct{} // identifies its config, and is closed when that ends

	closeDelay *caddy.Duration          // stream_close_delay
	tables     map[string]*bucket.Table // of its policies, by name
	logger     *zap.Logger
	process    *process
}

// provisionSite sets site. server is nil outside of the http app.
func (p *proxy) provisionSite(server *caddyhttp.Server) {
	p.site = &site{
		zone: p.zone, configDone: p.configDone, closeDelay: p.config.StreamCloseDelay,
		logger: p.logger, process: p.process,
	}
	if server != nil {
		p.site.addresses = server.Listen
	}
}

// openedBy returns the site that opened a tunnel.
func openedBy(t *tunnel.Tunnel) *site { return t.Owner.Observer.(*site) }

// tableOf returns the table that counts the client of a tunnel.
func tableOf(t *tunnel.Tunnel) *bucket.Table { return openedBy(t).tables[t.Owner.Policy] }

// supersedes reports whether s replaces another site: one of another config, with the same
// zone and a common listen address. s is then responsible for its tunnels.
//
// A tunnel is open because the rules of one site allow it, so only that site may judge it again.
// The sites of a server share its addresses, and servers may share a zone, so both must be the
// same. One common address is enough, because a site may gain and lose others.
func (s *site) supersedes(other *site) bool {
	return s.zone == other.zone && s.configDone != other.configDone &&
		slices.ContainsFunc(s.addresses, func(address string) bool { return slices.Contains(other.addresses, address) })
}

// successorTable returns the table of clients that replaced t: the only one in use with the
// same zone and prefix lengths. It returns t if t is in use itself or there is no such table.
//
// The zone and the prefix lengths determine a client's key. Other limits may change without making
// it another client. The listen addresses do not matter, because several sites may share a zone.
func successorTable(t *bucket.Table, inUse iter.Seq[*bucket.Table]) *bucket.Table {
	var candidates []*bucket.Table
	for candidate := range inUse {
		if candidate == t {
			return t
		}
		a, b := candidate.Limits, t.Limits
		if a.Zone == b.Zone && a.Policy == b.Policy && a.IPv4Prefix == b.IPv4Prefix && a.IPv6Prefix == b.IPv6Prefix {
			candidates = append(candidates, candidate)
		}
	}
	if len(candidates) != 1 {
		return t
	}
	return candidates[0]
}

// closeTunnelsAfterDelay closes the tunnels of a replaced site after its
// stream_close_delay, if that is set.
func (s *site) closeTunnelsAfterDelay() {
	if s.closeDelay == nil || caddy.Exiting() {
		return
	}
	time.AfterFunc(time.Duration(*s.closeDelay), func() {
		s.process.tunnels.CloseIf(tunnel.ReasonReload, func(t *tunnel.Tunnel) bool { return openedBy(t) == s })
	})
}

// reconcile applies a reload to a tunnel that was still being dialled when its site was
// replaced: it gets the same checks and delays as the site's other tunnels.
func (p *process) reconcile(t *tunnel.Tunnel) {
	current, opener := p.config.Load(), openedBy(t)
	if current == any(opener.configDone) {
		return
	}
	for each := range p.proxies.All() {
		if each.config.RecheckTunnels && current == any(each.configDone) && each.running.Load() && each.site.supersedes(opener) && each.forbids(t) {
			t.Close(tunnel.ReasonForbidden)
		}
	}
	select {
	case <-opener.configDone:
		opener.closeTunnelsAfterDelay()
	default: // the end of the config will call it
	}
}
