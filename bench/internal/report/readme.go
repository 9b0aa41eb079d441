// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package report

import (
	"errors"
	"fmt"
	"strings"
)

// Short returns the table of README: CPU time as a ratio to the reference, whose own is in
// microseconds, or seconds per GB. A sentence about refusals follows, and one that says what
// the figures are comes first.
func (r *Results) Short() string {
	var text strings.Builder
	columns := r.columns()
	fmt.Fprintf(&text, "CPU time of all processes of a proxy for the same work, as a multiple of what %s needs\n"+
		"(%d cores, loopback, %s; without logs unless a row says otherwise):\n\n",
		r.name(r.Settings.Reference), r.Machine.Cores, r.Machine.Date.UTC().Format("2006-01-02"))
	text.WriteString("| work |")
	for _, peer := range columns {
		fmt.Fprintf(&text, " %s |", peer.title())
	}
	text.WriteString("\n|---|" + strings.Repeat("--:|", len(columns)) + "\n")
	for _, scenario := range r.Scenarios {
		switch {
		case !scenario.Brief:
		case scenario.Unit == PerTunnel:
			r.writeIdle(&text, scenario, columns)
		default:
			r.writeShort(&text, scenario, columns, false)
			if scenario.WithLogs {
				r.writeShort(&text, scenario, columns, true)
			}
		}
	}
	for _, scenario := range r.Scenarios {
		own, reference := r.summary(scenario, scenario.Own, false), r.reference(scenario, false)
		if scenario.Own != proxy && own.Valid && reference.Valid && own.Errors+reference.Errors == 0 {
			fmt.Fprintf(&text, "\nA 429 costs %s times as much as the same answer of Caddy's `respond`.\n", ratio(own.Cost, reference.Cost))
		}
	}
	return text.String()
}

// name returns the name of a peer.
func (r *Results) name(id string) string {
	for _, peer := range r.Peers {
		if peer.ID == id {
			return peer.Name
		}
	}
	return id
}

// proxy is the ID of async_proxy where it is compared with proxies.
const proxy = "async_proxy"

// title returns the head of a column.
func (p Peer) title() string {
	if p.ID == proxy || strings.HasSuffix(p.Name, "`") {
		return p.Name // the version is that of Caddy, or of this repository
	}
	version, _, _ := strings.Cut(p.Version, "-")
	return strings.TrimSpace(p.Name + " " + version)
}

// columns returns the peers of the scenarios that compare proxies.
func (r *Results) columns() []Peer {
	compared := make(map[string]bool)
	for _, scenario := range r.Scenarios {
		for _, row := range r.Rows {
			if row.Scenario == scenario.ID && scenario.Own == proxy {
				compared[row.Peer] = true
			}
		}
	}
	var columns []Peer
	for _, peer := range r.Peers {
		if compared[peer.ID] && !peer.Variant {
			columns = append(columns, peer)
		}
	}
	return columns
}

func (r *Results) writeShort(text *strings.Builder, scenario Scenario, columns []Peer, logs bool) {
	reference := r.reference(scenario, logs)
	if !reference.Valid {
		return
	}
	title := scenario.Title
	if logs {
		title = "the same with logs"
	}
	fmt.Fprintf(text, "| %s |", title)
	for _, peer := range columns {
		s := r.summary(scenario, peer.ID, logs)
		figure := ratio(s.Cost, reference.Cost)
		switch {
		case !s.Valid:
			figure = ""
		case s.Errors > 0:
			figure += " (errors)"
		case peer.ID == r.Settings.Reference && scenario.Unit == PerGigabyte:
			figure = "1 (" + number(s.Cost) + " s/GB)"
		case peer.ID == r.Settings.Reference:
			figure = "1 (" + number(s.Cost) + " µs)"
		}
		fmt.Fprintf(text, " %s |", figure)
	}
	text.WriteString("\n")
}

func (r *Results) writeIdle(text *strings.Builder, scenario Scenario, columns []Peer) {
	text.WriteString("| an idle tunnel: descriptors, memory |")
	for _, peer := range columns {
		figure := ""
		if s := r.summary(scenario, peer.ID, false); s.Valid {
			figure = fmt.Sprintf("%.0f, %s KiB", s.Descriptors, number(s.RSS/1024))
		}
		fmt.Fprintf(text, " %s |", figure)
	}
	text.WriteString("\n")
}

// The marks in a document, between which the results stand.
const (
	BeginMark = "<!-- results of the benchmark, written by `go run . -docs ../docs/benchmarks.md` -->"
	EndMark   = "<!-- end of the results of the benchmark -->"
)

// Insert returns a document with the results between its marks.
func Insert(document, results string) (string, error) {
	before, rest, begins := strings.Cut(document, BeginMark)
	_, after, ends := strings.Cut(rest, EndMark)
	if !begins || !ends {
		return "", errors.New("the document lacks the marks of the results")
	}
	return before + BeginMark + "\n\n" + strings.TrimSpace(results) + "\n\n" + EndMark + after, nil
}
