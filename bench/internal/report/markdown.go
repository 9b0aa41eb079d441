// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package report

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Markdown returns the results as a text with a table for each scenario.
func (r *Results) Markdown() string {
	var text strings.Builder
	r.writeMachine(&text)
	for _, scenario := range r.Scenarios {
		fmt.Fprintf(&text, "\n### %s\n\n%s\n\n", scenario.Title, scenario.Details)
		r.writeTable(&text, scenario)
	}
	r.writeBehind(&text)
	return text.String()
}

// writeMachine writes where and how the figures were found.
func (r *Results) writeMachine(text *strings.Builder) {
	m := r.Machine
	fmt.Fprintf(text, "| | |\n|---|---|\n| machine | %s, %d cores |\n| kernel | %s |\n| Go | %s |\n| date | %s |\n",
		m.CPU, m.Cores, m.Kernel, m.Go, m.Date.UTC().Format("2006-01-02 15:04 UTC"))
	fmt.Fprintf(text, "| rounds | %d of %d ms for each peer and scenario, interleaved |\n", r.Settings.Rounds, r.Settings.Duration.Milliseconds())
	for _, peer := range r.Peers {
		note := ""
		if peer.Note != "" {
			note = "; " + peer.Note
		}
		fmt.Fprintf(text, "| %s | %s%s |\n", peer.Name, peer.Version, note)
	}
	for _, missing := range r.Missing {
		fmt.Fprintf(text, "| missing | %s |\n", missing)
	}
	disturbed, all := r.disturbed()
	fmt.Fprintf(text, "\nDisturbed measurements, in which other processes used more than %.0f %% of the machine: %d of %d.\n",
		r.Settings.Foreign*100, disturbed, all)
	if disturbed > 0 && disturbed*5 >= all {
		text.WriteString("**The machine was busy. Repeat the run when it is quiet.**\n")
	}
}

// disturbed returns how many measurements were disturbed, of how many.
func (r *Results) disturbed() (disturbed, all int) {
	for _, row := range r.Rows {
		for _, round := range row.Rounds {
			all++
			if round.Foreign > r.Settings.Foreign {
				disturbed++
			}
		}
	}
	return disturbed, all
}

// heads are the heads of the tables by unit. The first two columns are the peer, and
// whether it logs.
var heads = map[Unit]string{
	PerOperation: "CPU µs | ratio | spread | per second | ratio | spread | p50 ms | p99 ms | p99.9 ms | RSS MiB | anon. MiB | errors",
	PerGigabyte:  "CPU s/GB | ratio | spread | GB/s | ratio | spread | RSS MiB | anon. MiB | errors",
	PerTunnel:    "RSS KiB | ratio | anon. KiB | descriptors | CPU µs to open | errors",
}

func (r *Results) writeTable(text *strings.Builder, scenario Scenario) {
	head := heads[scenario.Unit]
	columns := strings.Count(head, "|") + 1
	fmt.Fprintf(text, "| peer | logs | %s |\n|---|---|%s\n", head, strings.Repeat("--:|", columns))
	for _, logs := range []bool{false, true} {
		reference := r.reference(scenario, logs)
		for _, peer := range r.Peers {
			row := r.row(scenario.ID, peer.ID, logs)
			if row == nil {
				continue
			}
			s := row.Summarize(scenario.Unit, r.Settings.Foreign)
			name := peer.Name
			if s.Disturbed {
				name += " ~"
			}
			if s.Reopened {
				name += " †"
			}
			fmt.Fprintf(text, "| %s | %s | %s |\n", name, onOff(logs), strings.Join(cells(scenario.Unit, s, reference, row.Failure), " | "))
		}
	}
}

// reference returns what ratios in a scenario refer to.
func (r *Results) reference(scenario Scenario, logs bool) Summary {
	if scenario.Reference != "" {
		return r.summary(scenario, scenario.Reference, logs)
	}
	return r.summary(scenario, r.Settings.Reference, logs)
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// cells returns the cells of a row after the first two.
func cells(unit Unit, s, reference Summary, failure string) []string {
	errors := "0"
	if s.Errors > 0 {
		errors = fmt.Sprintf("**%d** (%s)", s.Errors, cell(s.FirstError))
	}
	if failure != "" {
		errors = "**failed** (" + cell(failure) + ")"
	}
	if !s.Valid {
		s = Summary{Cost: math.NaN(), Rate: math.NaN(), RSS: math.NaN(), Anonymous: math.NaN(), Descriptors: math.NaN()}
	}
	cost := []string{number(s.Cost), ratio(s.Cost, reference.Cost), percent(s.CostSpread)}
	rate := []string{number(s.Rate), ratio(s.Rate, reference.Rate), percent(s.RateSpread)}
	memory := []string{number(s.RSS / (1 << 20)), number(s.Anonymous / (1 << 20)), errors}
	switch unit {
	case PerTunnel:
		return []string{
			number(s.RSS / 1024), ratio(s.RSS, reference.RSS), number(s.Anonymous / 1024),
			number(s.Descriptors), number(s.Cost), errors,
		}
	case PerGigabyte:
		return append(append(cost, rate...), memory...)
	}
	return append(append(append(cost, rate...), milliseconds(s.P50), milliseconds(s.P99), milliseconds(s.P999)), memory...)
}

// cell returns a text that fits into a cell of a table.
func cell(text string) string {
	text = strings.NewReplacer("\n", " ", "|", "/").Replace(text)
	if len(text) > 60 {
		text = strings.ToValidUTF8(text[:60], "") + "..."
	}
	return text
}

// number returns a figure with three significant digits, or as an integer if it has more.
func number(x float64) string {
	switch {
	case math.IsNaN(x) || math.IsInf(x, 0):
		return "–"
	case math.Abs(x) >= 99.95:
		return fmt.Sprintf("%.0f", x)
	case math.Abs(x) >= 9.995:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

func ratio(x, reference float64) string {
	if reference == 0 || math.IsNaN(x) {
		return "–"
	}
	return fmt.Sprintf("%.2f", x/reference)
}

func percent(share float64) string { return fmt.Sprintf("%.0f %%", share*100) }

func milliseconds(d time.Duration) string { return number(d.Seconds() * 1e3) }

// noise is by how much costs must differ to be called different.
const noise = 0.05

// writeBehind lists where other peers need less than async_proxy.
func (r *Results) writeBehind(text *strings.Builder) {
	compared := slices.ContainsFunc(r.Scenarios, func(s Scenario) bool {
		return r.row(s.ID, s.Own, false) != nil || r.row(s.ID, s.Own, true) != nil
	})
	if !compared {
		return
	}
	fmt.Fprintf(text, "\n### Where async_proxy is not first\n\n"+
		"These need at least %.0f %% less CPU time than async_proxy, or less memory for idle tunnels:\n\n", noise*100)
	before := text.Len()
	for _, scenario := range r.Scenarios {
		for _, logs := range []bool{false, true} {
			if better := r.better(scenario, logs); len(better) > 0 {
				suffix := ""
				if logs {
					suffix = ", with logs"
				}
				fmt.Fprintf(text, "- %s%s: %s\n", scenario.Title, suffix, strings.Join(better, ", "))
			}
		}
	}
	if text.Len() == before {
		text.WriteString("None in this run.\n")
	}
}

// better lists the peers that need less than async_proxy, with the ratio to it.
func (r *Results) better(scenario Scenario, logs bool) []string {
	figure := func(s Summary) float64 {
		if scenario.Unit == PerTunnel {
			return s.RSS
		}
		return s.Cost
	}
	own := r.summary(scenario, scenario.Own, logs)
	var better []string
	for _, peer := range r.Peers {
		s := r.summary(scenario, peer.ID, logs)
		if !peer.Variant && s.Valid && s.Errors == 0 && own.Valid && figure(s) > 0 && figure(s) < figure(own)*(1-noise) {
			better = append(better, fmt.Sprintf("%s (%s)", peer.Name, ratio(figure(s), figure(own))))
		}
	}
	return better
}
