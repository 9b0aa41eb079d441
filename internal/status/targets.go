// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"cmp"
	"fmt"
	"net/url"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// maxTargets is how many targets are counted by requests, and how many by bytes. A target with more
// than a thousandth of all requests or bytes is certainly among them.
const maxTargets = 1024

// TargetSorts are the orders of targets, for messages.
const TargetSorts = "requests or bytes"

// SortsTargets reports whether targets can be sorted by key, one of TargetSorts.
func SortsTargets(key string) bool { return key == "requests" || key == "bytes" }

// targets counts requests and bytes by target.
type targets struct{ requests, bytes *heavyHitters }

func newTargets() targets {
	return targets{newHeavyHitters(maxTargets), newHeavyHitters(maxTargets)}
}

// TargetList is one page of the targets with the most requests or bytes; Total counts all that are
// listed.
type TargetList struct {
	Targets []Target `json:"targets"`
	Total   int      `json:"total"`
}

// Target describes a target. Its counts begin when it is listed: a target that was not always listed
// may have had more before. It may be listed by requests, by bytes, or by both.
type Target struct {
	Target         string `json:"target"`
	Requests       *int64 `json:"requests,omitempty"`
	RequestsBefore int64  `json:"requests_before,omitempty"` // at most
	Bytes          *int64 `json:"bytes,omitempty"`
	BytesBefore    int64  `json:"bytes_before,omitempty"` // at most
}

// Served counts a request for which there was a tunnel to a target, or a response from it. The target
// is a host and a port.
func (v *View) Served(target string) { v.targets.requests.add(targetName(target), 1) }

// Transferred counts bytes between clients and a target.
func (v *View) Transferred(target string, n int64) {
	if n > 0 {
		v.targets.bytes.add(targetName(target), n)
	}
}

func targetName(target string) string { return printable.Text(strings.ToLower(target)) }

// targetQuery selects targets.
type targetQuery struct {
	limit, offset int
	match         string // part of the target, in lower case
	byBytes       bool
	ascending     bool
}

// Targets returns what a query of the API finds among the targets.
func (v *View) Targets(values url.Values) (TargetList, error) {
	q := targetQuery{match: strings.ToLower(values.Get("q"))}
	var err error
	if q.limit, q.offset, q.ascending, err = queryPage(values); err != nil {
		return TargetList{}, err
	}
	sort := cmp.Or(values.Get("sort"), "requests")
	if !SortsTargets(sort) {
		return TargetList{}, fmt.Errorf("sort %q: expected %s", sort, TargetSorts)
	}
	q.byBytes = sort == "bytes"
	v.in.Counters() // counts the bytes of open tunnels
	return v.targets.list(q), nil
}

// list returns the targets that q selects: of those that are listed by requests, or by bytes if q
// sorts by bytes.
func (t *targets) list(q targetQuery) TargetList {
	by := t.requests
	if q.byBytes {
		by = t.bytes
	}
	list := TargetList{Targets: []Target{}}
	found := topN[string]{n: q.offset + q.limit, ascending: q.ascending}
	by.each(func(name string) {
		if !containsFold(name, q.match) {
			return
		}
		if sum, _, ok := by.counted(name); ok {
			list.Total++
			found.add(float64(sum), name)
		}
	})
	for _, entry := range found.sorted(q.offset) {
		list.Targets = append(list.Targets, t.info(entry.value))
	}
	return list
}

func (t *targets) info(name string) Target {
	info := Target{Target: name}
	if n, before, ok := t.requests.counted(name); ok {
		info.Requests, info.RequestsBefore = &n, before
	}
	if n, before, ok := t.bytes.counted(name); ok {
		info.Bytes, info.BytesBefore = &n, before
	}
	return info
}

// top returns the first n targets by requests, and those of the first n by bytes that are not among
// them.
func (t *targets) top(n int) TargetList {
	list := t.list(targetQuery{limit: n})
	listed := make(map[string]bool)
	for _, target := range list.Targets {
		listed[target.Target] = true
	}
	for _, target := range t.list(targetQuery{limit: n, byBytes: true}).Targets {
		if !listed[target.Target] {
			list.Targets = append(list.Targets, target)
		}
	}
	return list
}

// mask does nothing: targets do not identify clients.
func (l TargetList) mask() {}
