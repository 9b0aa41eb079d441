// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"
	"text/tabwriter"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// checkRefusalSort returns an error if neither refusals nor targets can be sorted by key.
func checkRefusalSort(key string) error {
	if !status.SortsRefusals(key) && !status.SortsTargets(key) {
		return fmt.Errorf("--sort %q: expected %s for refusals, or %s for targets", key, status.RefusalSorts, status.TargetSorts)
	}
	return nil
}

// refusalPaths returns what to ask the admin API for, and where the answers go. The targets are not
// those of a client, so that a query for a client leaves them out.
func (q statusQuery) refusalPaths(s *statusReport) map[string]any {
	s.Refusals = new(status.RefusalList)
	values := url.Values{"limit": {strconv.Itoa(q.limit)}, "client": {q.client}}
	if status.SortsRefusals(q.sort) {
		values.Set("sort", q.sort)
	}
	paths := map[string]any{"stats": &s.Stats, "refusals?" + values.Encode(): s.Refusals}
	if q.client == "" {
		s.Targets = new(status.TargetList)
		values := url.Values{"limit": {strconv.Itoa(q.limit)}}
		if status.SortsTargets(q.sort) {
			values.Set("sort", q.sort)
		}
		paths["targets?"+values.Encode()] = s.Targets
	}
	return paths
}

// printRefusals prints the refusals, and the targets if there are any.
func (s *statusReport) printRefusals(w io.Writer) {
	list, now := s.Refusals.Refusals, s.Stats.Time
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	policy := columnIf(slices.ContainsFunc(list, func(r status.Refusal) bool { return r.Policy != "" }))
	fmt.Fprintf(table, "COUNT\tCAUSE\tCLIENT%s\tTARGET\tRULE\tFIRST\tLAST\tTO ALLOW IT\n", policy("POLICY"))
	for _, r := range list {
		client, target := r.Client, r.Target
		if r.User != "" {
			client = r.User + "@" + client
		}
		if r.Method != "" {
			target = r.Method + " " + target
		}
		howTo := cmp.Or(r.Allow, r.Hint)
		if r.Hint != "" && len(r.Allow) > printable.MaxText {
			howTo = r.Hint // a line that is cut off would allow something else
		}
		fmt.Fprintf(table, "%d\t%s\t%s%s\t%s\t%s\t%s ago\t%s ago\t%s\n", r.Count, printable.Text(cmp.Or(r.Cause, r.Reason)), printable.Text(client), policy(printable.Text(r.Policy)),
			printable.Text(target), printable.Text(r.Rule), formatAge(now.Sub(r.First)), formatAge(now.Sub(r.Last)), printable.Text(howTo))
	}
	_ = table.Flush()
	var dropped int64
	for _, c := range s.Refusals.Causes {
		dropped += c.Dropped
	}
	if more := s.Refusals.Total - len(list); more > 0 || dropped > 0 {
		fmt.Fprintf(w, "and %d more groups of refusals, and %d that were dropped\n", more, dropped)
	}
	if s.Targets != nil {
		fmt.Fprintf(w, "\n")
		s.printTargets(w)
	}
}

// printTargets prints the list of targets.
func (s *statusReport) printTargets(w io.Writer) {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(table, "TARGET\tREQUESTS\tTRAFFIC\n")
	for _, t := range s.Targets.Targets {
		requests, bytes := "", ""
		if t.Requests != nil {
			requests = fmt.Sprint(*t.Requests)
		}
		if t.Bytes != nil {
			bytes = formatSize(*t.Bytes)
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", printable.Text(t.Target), requests, bytes)
	}
	_ = table.Flush()
	printMore(w, s.Targets.Total-len(s.Targets.Targets), "targets")
}

// fitRefusals truncates the refusals and the targets to what fits in room lines.
func (s *statusReport) fitRefusals(room int) {
	refusals, targets := len(s.Refusals.Refusals), 0
	if s.Targets != nil {
		targets = len(s.Targets.Targets)
		s.Targets.Targets = s.Targets.Targets[:min(targets, max(room/2, room-refusals))]
	}
	s.Refusals.Refusals = s.Refusals.Refusals[:min(refusals, max(room-room/2, room-targets))]
}
