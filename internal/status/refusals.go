// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"cmp"
	"math"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// maxGroups is how many groups of refusals with the same cause are kept. There are some forty
// causes and error types, so the groups take at most a few megabytes, whatever clients send.
const maxGroups = 200

// RefusalKey is what the refusals of a group have in common.
type RefusalKey struct {
	Cause   string     // as in logs and metrics; "": the request failed, and Reason says how
	Reason  string     // the error type of RFC 9209
	Client  netip.Addr // invalid: a client without an address
	User    string
	Policy  string
	Method  string // only if it is the reason
	Target  string
	Rule    string     // that denies the target; "": none does
	Address netip.Addr // of the target, if that is what is denied
}

// name returns what the key's refusals are counted under: the cause, or if there is none, the
// error type.
func (k *RefusalKey) name() string { return cmp.Or(k.Cause, k.Reason) }

// RefusalDetails describes a refusal. The details of a group's first refusal describe the group.
type RefusalDetails struct {
	Status int
	Detail string // the sentence for the client
	Hint   string // how the operator could allow it; "": there is no way
	Allow  string // the line of a Caddyfile that would allow it; "": there is none
}

// refusals counts refusals in groups. Counting one of a known group takes no lock and no
// memory. For each cause, maxGroups groups are kept. A new group then replaces the one whose last
// refusal is the oldest. Its methods are safe for concurrent use.
type refusals struct {
	groups *xsync.Map[RefusalKey, *refusalGroup]

	mu     sync.Mutex
	causes map[string]*refusalCause // under mu
}

// refusalGroup is a group of refusals.
type refusalGroup struct {
	key         RefusalKey
	details     RefusalDetails
	first       int64
	count, last atomic.Int64 // count is below zero once the group is dropped
}

// refusalCause holds the groups of a cause.
type refusalCause struct {
	groups           []*refusalGroup
	dropped, missing int64 // groups that were dropped, and the refusals in them
}

func newRefusals() *refusals {
	return &refusals{groups: xsync.NewMap[RefusalKey, *refusalGroup](), causes: make(map[string]*refusalCause)}
}

// dropped is the count of a group that was dropped. No number of refusals makes it positive.
const dropped = math.MinInt64

// add counts a refusal at a time. It returns false if the group was dropped meanwhile.
func (g *refusalGroup) add(at int64) bool {
	if g.count.Add(1) < 0 {
		return false
	}
	for {
		last := g.last.Load()
		if at <= last || g.last.CompareAndSwap(last, at) {
			return true
		}
	}
}

// add counts a refusal. details is called if it is the first of its group.
func (r *refusals) add(k RefusalKey, at int64, details func() RefusalDetails) {
	k.User, k.Method, k.Target, k.Rule = printable.Text(k.User), printable.Text(k.Method), printable.Text(k.Target), printable.Text(k.Rule)
	if g, ok := r.groups.Load(k); ok && g.add(at) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if g, ok := r.groups.Load(k); ok && g.add(at) {
		return
	}
	// The texts may be parts of a request that is much larger.
	k.User, k.Method, k.Target, k.Rule = strings.Clone(k.User), strings.Clone(k.Method), strings.Clone(k.Target), strings.Clone(k.Rule)
	g := &refusalGroup{key: k, details: details(), first: at}
	d := &g.details
	d.Detail, d.Hint = strings.Clone(printable.Text(d.Detail)), strings.Clone(printable.Text(d.Hint))
	if d.Allow != printable.Long(d.Allow) {
		d.Allow = "" // a part of it would allow something else
	}
	g.count.Store(1)
	g.last.Store(at)
	c := r.causes[k.name()]
	if c == nil {
		c = new(refusalCause)
		r.causes[k.name()] = c
	}
	if gone := c.put(g); gone != nil {
		r.groups.Delete(gone.key)
	}
	r.groups.Store(k, g)
}

// put adds a group. If there are too many, it drops one and returns that.
func (c *refusalCause) put(g *refusalGroup) (gone *refusalGroup) {
	if len(c.groups) < maxGroups {
		c.groups = append(c.groups, g)
		return nil
	}
	oldest, at := 0, int64(math.MaxInt64)
	for i, g := range c.groups {
		if last := g.last.Load(); last < at {
			oldest, at = i, last
		}
	}
	gone, c.groups[oldest] = c.groups[oldest], g
	c.dropped++
	c.missing += gone.count.Swap(dropped)
	return gone
}

// Refused counts a refusal of a request that began at a time. details is called only if it is
// the first of its group.
func (v *View) Refused(k RefusalKey, at time.Time, details func() RefusalDetails) {
	v.refusals.add(k, monotime.Of(at), details)
}
