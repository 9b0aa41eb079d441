// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// RefusalList is one page of the groups of refusals; Total counts them all. Causes has every
// cause with a refusal since the process started, by name, and then the error types of failures.
type RefusalList struct {
	Refusals []Refusal      `json:"refusals"`
	Total    int            `json:"total"`
	Causes   []RefusalCause `json:"causes"`
}

// Refusal is a group of refusals: responses that the proxy generated itself, and that have the
// cause, the client, the target, the rule and the policy in common.
type Refusal struct {
	Cause   string    `json:"cause,omitempty"`
	Reason  string    `json:"reason"`
	Client  string    `json:"client"`
	User    string    `json:"user,omitempty"`
	Policy  string    `json:"policy,omitempty"`
	Method  string    `json:"method,omitempty"`
	Target  string    `json:"target"`
	Address string    `json:"address,omitempty"`
	Rule    string    `json:"rule,omitempty"`
	Status  int       `json:"status"`
	Detail  string    `json:"detail"`
	Hint    string    `json:"hint,omitempty"`
	Allow   string    `json:"allow,omitempty"`
	Count   int64     `json:"count"`
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
}

// RefusalCause counts the refusals of a cause, or of an error type if they have no cause.
type RefusalCause struct {
	Cause   string `json:"cause,omitempty"`
	Reason  string `json:"reason,omitempty"` // only without a cause
	Count   int64  `json:"count"`            // of refusals, with those of groups that were dropped
	Groups  int    `json:"groups"`           // that are kept
	Dropped int64  `json:"dropped"`          // groups that were dropped to keep memory bounded
}

// refusalQuery selects groups of refusals.
type refusalQuery struct {
	limit, offset  int
	cause          string // or error type; "": all
	match          string // part of the cause, error type, client, user, target or rule, in lower case
	client, target string // parts of the client or user, and of the target, in lower case
	policy         policyQuery
	key            func(*refusalGroup) int64
	ascending      bool
}

var sortsOfRefusals = map[string]func(g *refusalGroup) int64{
	"last":  func(g *refusalGroup) int64 { return g.last.Load() },
	"first": func(g *refusalGroup) int64 { return g.first },
	"count": func(g *refusalGroup) int64 { return g.count.Load() },
}

func (q *refusalQuery) includes(k *RefusalKey) bool {
	return (q.cause == "" || q.cause == k.name()) && q.policy.includes(k.Policy) && containsFold(k.Target, q.target) &&
		k.isClient(q.client) && (k.isClient(q.match) || containsFold(k.Target, q.match) || containsFold(k.name(), q.match) || containsFold(k.Reason, q.match) || containsFold(k.Rule, q.match))
}

// isClient reports whether part, in lower case, is a part of the client's address, or of the user
// as the list of clients shows it.
func (k *RefusalKey) isClient(part string) bool {
	return containsFold(client.Name(k.Client), part) || k.User != "" && containsFold("user "+k.User, part)
}

// list returns the groups that q selects. Meanwhile it blocks only refusals that are the first of
// their group.
func (r *refusals) list(q refusalQuery) RefusalList {
	list := RefusalList{Refusals: []Refusal{}, Causes: []RefusalCause{}}
	found := topN[*refusalGroup]{n: q.offset + q.limit, ascending: q.ascending}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.causes {
		k := &c.groups[0].key
		sum := RefusalCause{Cause: k.Cause, Count: c.missing, Groups: len(c.groups), Dropped: c.dropped}
		if k.Cause == "" {
			sum.Reason = k.Reason
		}
		for _, g := range c.groups {
			sum.Count += g.count.Load()
			if q.includes(&g.key) {
				list.Total++
				found.add(float64(q.key(g)), g)
			}
		}
		list.Causes = append(list.Causes, sum)
	}
	slices.SortFunc(list.Causes, func(a, b RefusalCause) int {
		return cmp.Or(strings.Compare(a.Reason, b.Reason), strings.Compare(a.Cause, b.Cause))
	})
	for _, entry := range found.sorted(q.offset) {
		list.Refusals = append(list.Refusals, entry.value.info())
	}
	return list
}

func (g *refusalGroup) info() Refusal {
	k, d := &g.key, &g.details
	info := Refusal{
		Cause: k.Cause, Reason: k.Reason, Client: client.Name(k.Client), User: k.User, Policy: k.Policy, Method: k.Method, Target: k.Target, Rule: k.Rule,
		Status: d.Status, Detail: d.Detail, Hint: d.Hint, Allow: d.Allow,
		Count: g.count.Load(), First: monotime.Time(g.first), Last: monotime.Time(g.last.Load()),
	}
	if k.Address.IsValid() {
		info.Address = k.Address.String()
	}
	return info
}

// mask shows networks in place of clients, and no users. It also removes the lines that would allow a
// client, because they name the client.
func (l RefusalList) mask() {
	for i := range l.Refusals {
		r := &l.Refusals[i]
		masked := maskClient(r.Client)
		if strings.Contains(r.Allow, r.Client) {
			r.Allow = ""
		}
		r.Detail, r.Hint = strings.ReplaceAll(r.Detail, r.Client, masked), strings.ReplaceAll(r.Hint, r.Client, masked)
		r.Client, r.User = masked, ""
	}
}
