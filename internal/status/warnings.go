// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"cmp"
	"fmt"
	"slices"
	"time"
	"unicode"
	"unicode/utf8"
)

// Warning is something that is wrong now.
type Warning struct {
	Code string `json:"code"`           // never changes its meaning
	Site string `json:"site,omitempty"` // its addresses; "": the whole process
	Text string `json:"text"`           // a sentence that says what is wrong and what to do, and stays the same meanwhile
}

// forgottenSteps is the number of steps of the history, five minutes, for which operators are warned
// that clients have been forgotten early.
const forgottenSteps = 60

// warnings returns what is wrong now, in a stable order. s are the current counters.
func (v *View) warnings(s *Stats, now time.Time) []Warning {
	list := append([]Warning{}, v.in.Warnings()...)
	if t := s.Tunnels; t.Limit > 0 && 10*t.Open >= 9*t.Limit {
		list = append(list, Warning{Code: "tunnels_near_limit",
			Text: fmt.Sprintf("at least 90 %% of the %d tunnels that max_tunnels allows are open, and beyond that clients get status 503; raise max_tunnels, or set per_client", t.Limit)})
	}
	if v.history.evictedSince(stepAt(now)-forgottenSteps, s.Clients.Evicted) > 0 {
		list = append(list, Warning{Code: "clients_forgotten",
			Text: "in the last five minutes, clients have been forgotten early because there are too many, and start again with full buckets; raise max_clients"})
	}
	for i := range list {
		first, size := utf8.DecodeRuneInString(list[i].Text)
		list[i].Text = string(unicode.ToUpper(first)) + list[i].Text[size:] + "."
	}
	slices.SortFunc(list, func(a, b Warning) int {
		return cmp.Or(cmp.Compare(a.Code, b.Code), cmp.Compare(a.Site, b.Site), cmp.Compare(a.Text, b.Text))
	})
	return slices.Compact(list) // several proxies of a site may have the same
}
