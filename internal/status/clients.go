// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"cmp"
	"strings"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// clientQuery selects clients.
type clientQuery struct {
	limit, offset int
	limited       bool   // only clients without a token or that are blocked
	match         string // substring of the name, in lower case; "" for all
	policy        policyQuery
	key           func(*clientRow, int64) float64
	ascending     bool
}

// policyQuery selects the rows of one policy. The zero policyQuery selects those of all policies.
type policyQuery struct {
	only bool   // only those of the policy with this name
	name string // "": the directive's own options
}

// policyQuery returns the selection that a parameter of a request stands for.
func (v *View) policyQuery(parameter string) policyQuery {
	q := policyQuery{only: parameter != "", name: parameter}
	if parameter == v.in.DirectivePolicy {
		q.name = ""
	}
	return q
}

func (q policyQuery) includes(policy string) bool { return !q.only || q.name == policy }

// containsFold reports whether a name contains part, ignoring case. part must be lower case.
func containsFold(name, part string) bool {
	return part == "" || strings.Contains(strings.ToLower(name), part)
}

// clientRow is the state of a client.
type clientRow struct {
	*bucket.Entry
	table   *bucket.Table
	client  client.Key
	tunnels int
	started int64 // when its last tunnel started, if no limiter tracks it; else 0
	up      int64 // bytes of open tunnels
	down    int64
	blocked int64 // since epoch; 0: not
	listed  bool  // a limiter tracks it, so it is already listed
}

func (c *clientRow) tokens(now int64) float64 { return c.table.Tokens(c.Entry, now) }

func (c *clientRow) lastSeen() int64 { return max(c.LastSeen(), c.started) }

// bytes returns the client's bytes, those of open tunnels included.
func (c *clientRow) bytes() (up, down int64) {
	up, down = c.Bytes()
	return up + c.up, down + c.down
}

var sortsOfClients = map[string]func(c *clientRow, now int64) float64{
	"last_seen":  func(c *clientRow, _ int64) float64 { return float64(c.lastSeen()) },
	"requests":   func(c *clientRow, _ int64) float64 { return float64(c.Requests()) },
	"rejections": func(c *clientRow, _ int64) float64 { return float64(c.Rejections()) },
	"bytes": func(c *clientRow, _ int64) float64 {
		up, down := c.bytes()
		return float64(up + down)
	},
	"tunnels": func(c *clientRow, _ int64) float64 { return float64(c.tunnels) },
	"tokens":  func(c *clientRow, now int64) float64 { return c.tokens(now) },
}

// findClients returns the clients that q selects. It searches the clients that a limiter
// tracks, and also untracked ones that are blocked or have open tunnels.
func (v *View) findClients(q clientQuery, now time.Time) ClientList {
	at := monotime.Of(now)
	tunnels, blocks := v.tunnelsByClient(), v.blocksByClient(at)
	found := topN[clientRow]{n: q.offset + q.limit, ascending: q.ascending}
	total := 0
	add := func(c clientRow) {
		if !q.policy.includes(c.table.Limits.Policy) || q.limited && c.blocked == 0 && c.tokens(at) >= 1 || q.match != "" && !containsFold(c.table.Name(c.client), q.match) {
			return
		}
		total++
		found.add(q.key(&c, at), c)
	}
	for t := range v.in.Tables {
		t.Each(func(key client.Key, e *bucket.Entry) {
			c := clientRow{client: key}
			if open := tunnels[clientKey{t, key}]; open != nil {
				open.listed = true
				c = *open
			}
			if block := blocks[key]; block != nil {
				block.listed = true
				c.blocked = block.blocked
			}
			c.Entry, c.table, c.started = e, t, 0
			add(c)
		})
	}
	for key, c := range tunnels {
		if block := blocks[key.client]; block != nil && !c.listed {
			block.listed = true
			c.blocked = block.blocked
		}
		if !c.listed {
			add(*c)
		}
	}
	for _, c := range blocks {
		if c.listed {
			continue
		}
		if c.table = v.tableOf(c.client); c.table != nil {
			add(*c)
		}
	}
	list := ClientList{Clients: []Client{}, Total: total}
	for _, k := range found.sorted(q.offset) {
		list.Clients = append(list.Clients, k.value.info(now))
	}
	return list
}

// clientKey identifies a client of one limiter.
type clientKey struct {
	table  *bucket.Table
	client client.Key
}

// tunnelsByClient returns the clients with open tunnels. Each entry is complete enough to be
// listed even if its limiter does not track the client.
func (v *View) tunnelsByClient() map[clientKey]*clientRow {
	clients, current := make(map[clientKey]*clientRow), make(map[*bucket.Table]*bucket.Table)
	for t := range v.in.Tunnels {
		opened := v.in.TableOf(t)
		table := current[opened]
		if table == nil {
			table = v.in.Successor(opened, v.in.Tables)
			current[opened] = table
		}
		c := clients[clientKey{table, t.LimitKey}]
		if c == nil {
			c = &clientRow{Entry: new(bucket.Entry), table: table, client: t.LimitKey}
			clients[clientKey{table, t.LimitKey}] = c
		}
		c.tunnels++
		c.up += t.BytesUp()
		c.down += t.BytesDown()
		c.started = max(c.started, monotime.Of(t.Start))
	}
	return clients
}

// blocksByClient returns the blocked clients. Blocks apply in all zones.
func (v *View) blocksByClient(at int64) map[client.Key]*clientRow {
	clients := make(map[client.Key]*clientRow)
	for key, until := range v.in.Blocks {
		if until > at {
			clients[key] = &clientRow{Entry: new(bucket.Entry), client: key, blocked: until}
		}
	}
	return clients
}

// tableOf returns the table of a limiter for which key is the key of a client, or nil. Among
// several it prefers the shortest prefix, so that key is shown as the largest network.
func (v *View) tableOf(key client.Key) *bucket.Table {
	var best *bucket.Table
	order := func(a, b *bucket.Table) int {
		return cmp.Or(cmp.Compare(a.Bits(key), b.Bits(key)), cmp.Compare(a.Limits.Zone, b.Limits.Zone), cmp.Compare(a.Limits.Policy, b.Limits.Policy),
			cmp.Compare(a.Limits.Burst, b.Limits.Burst), cmp.Compare(a.Limits.Refill, b.Limits.Refill))
	}
	for t := range v.in.Tables {
		if t.KeyOf(key) == key && (best == nil || order(t, best) < 0) {
			best = t
		}
	}
	return best
}

func (c *clientRow) info(now time.Time) Client {
	at := monotime.Of(now)
	info := Client{
		Client: printable.Text(c.table.Name(c.client)), Zone: c.table.Limits.Zone, Policy: c.table.Limits.Policy,
		Tokens: c.tokens(at), Burst: c.table.Limits.Burst, Refill: c.table.Limits.Refill,
		Requests: c.Requests(), Rejections: c.Rejections(),
		Tunnels: int64(c.tunnels),
	}
	info.BytesUp, info.BytesDown = c.bytes()
	if seen := c.lastSeen(); seen > 0 {
		info.LastSeen = now.Add(time.Duration(seen - at))
	}
	if c.blocked > 0 {
		until := now.Add(time.Duration(c.blocked - at))
		info.BlockedUntil = &until
	}
	return info
}
