// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// tunnelQuery selects tunnels.
type tunnelQuery struct {
	limit, offset int
	match         string // substring of the client, user or target, in lower case
	client        string // substring of the client or user, in lower case
	policy        policyQuery
	key           func(*tunnel.Tunnel, int64) float64
	ascending     bool
}

var sortsOfTunnels = map[string]func(t *tunnel.Tunnel, now int64) float64{
	"started": func(t *tunnel.Tunnel, _ int64) float64 { return float64(t.ID) },
	"idle":    func(t *tunnel.Tunnel, now int64) float64 { return float64(now - t.LastActivity()) },
	"bytes":   func(t *tunnel.Tunnel, _ int64) float64 { return float64(t.BytesUp() + t.BytesDown()) },
}

// isClientOf reports whether part, in lower case, is a part of the name of t's client: of its
// address, of its user, or of the owner of its bucket.
func isClientOf(t *tunnel.Tunnel, part string) bool {
	return containsFold(client.Name(t.Client), part) || containsFold(t.User, part) || containsFold(t.LimitKey.String(), part)
}

// findTunnels returns the open tunnels that q selects.
func (v *View) findTunnels(q tunnelQuery, now time.Time) TunnelList {
	at := monotime.Of(now)
	found := topN[*tunnel.Tunnel]{n: q.offset + q.limit, ascending: q.ascending}
	list := TunnelList{Tunnels: []Tunnel{}}
	for t := range v.in.Tunnels {
		if q.policy.includes(t.Owner.Policy) && (isClientOf(t, q.match) || containsFold(t.Target, q.match)) && isClientOf(t, q.client) {
			list.Total++
			found.add(q.key(t, at), t)
		}
	}
	for _, k := range found.sorted(q.offset) {
		t := k.value
		list.Tunnels = append(list.Tunnels, Tunnel{
			ID: t.ID, Client: client.Name(t.Client), User: printable.Text(t.User), Policy: t.Owner.Policy, Target: printable.Text(t.Target), Address: t.Address.String(), Proto: printable.Text(t.Proto),
			Started: t.Start, IdleSeconds: time.Duration(max(0, at-t.LastActivity())).Seconds(), BytesUp: t.BytesUp(), BytesDown: t.BytesDown(),
		})
	}
	return list
}
