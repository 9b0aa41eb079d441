// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package report turns measurements into tables.
package report

import (
	"slices"
	"time"
)

// Results is everything that a run has found.
type Results struct {
	Machine   Machine
	Settings  Settings
	Peers     []Peer
	Missing   []string // peers that are not installed or could not be started
	Scenarios []Scenario
	Rows      []*Row
}

// Machine is where the run took place.
type Machine struct {
	CPU    string
	Cores  int
	Kernel string
	Go     string
	Date   time.Time
}

// Settings are how the run was made.
type Settings struct {
	Rounds    int
	Duration  time.Duration // of a measurement
	Tunnels   int           // that are open in the scenario of idle tunnels
	Reference string        // the ID of the peer that ratios refer to
	Foreign   float64       // the share of the machine beyond which a measurement is disturbed
}

// Peer is a proxy that was measured.
type Peer struct {
	ID, Name, Version, Note string
	Variant                 bool // another configuration of async_proxy, which summaries leave out
}

// Unit says what the figures of a scenario are for.
type Unit string

// The units.
const (
	PerOperation Unit = "operation"
	PerGigabyte  Unit = "GB"
	PerTunnel    Unit = "tunnel"
)

// Scenario is one kind of work.
type Scenario struct {
	ID      string
	Title   string // of its table
	Details string // what clients do
	Unit    Unit

	Own       string // the ID of async_proxy in this scenario
	Reference string // the ID of the peer that ratios refer to; if empty, that of the settings
	Brief     bool   // README has it
	WithLogs  bool   // README has it with logs, too
}

// Row is what was measured of one peer in one scenario, with or without logs.
type Row struct {
	Scenario string
	Peer     string
	Logs     bool
	Rounds   []Round
	Failure  string `json:",omitempty"` // why there are no rounds
}

// Round is one measurement. For idle tunnels, memory and descriptors are those that the
// tunnels added.
type Round struct {
	Operations  int64
	Bytes       int64
	Errors      int64
	FirstError  string `json:",omitempty"`
	Reopened    int64  // connections that the peer ended after an answer
	Elapsed     time.Duration
	CPU         time.Duration // of all processes of the peer
	P50         time.Duration
	P99         time.Duration
	P999        time.Duration
	RSS         int64
	Anonymous   int64
	Descriptors int
	Foreign     float64 // the share of the machine that other processes used
}

// Summary are the medians of a row.
type Summary struct {
	Cost        float64 // CPU time per unit: microseconds, or seconds per GB
	CostSpread  float64 // (largest - smallest) / median
	Rate        float64 // units per second
	RateSpread  float64
	P50         time.Duration
	P99         time.Duration
	P999        time.Duration
	RSS         float64 // bytes, or bytes per tunnel
	Anonymous   float64
	Descriptors float64
	Errors      int64
	FirstError  string
	Reopened    bool // most operations took a new connection, although clients keep theirs
	Used        int  // rounds that the medians are of
	Disturbed   bool // too few rounds were quiet, so that all are used
	Valid       bool // there is something to show
}

// Summarize returns the medians of the rounds in which other processes left the machine
// alone. If fewer than two rounds were so, it uses all.
func (r *Row) Summarize(unit Unit, foreign float64) Summary {
	var s Summary
	rounds := slices.Clone(r.Rounds)
	for _, round := range r.Rounds {
		s.Errors += round.Errors
		if s.FirstError == "" {
			s.FirstError = round.FirstError
		}
	}
	rounds = slices.DeleteFunc(rounds, func(round Round) bool { return round.units(unit) == 0 })
	quiet := slices.DeleteFunc(slices.Clone(rounds), func(round Round) bool { return round.Foreign > foreign })
	if len(quiet) >= min(2, len(rounds)) {
		rounds = quiet
	} else {
		s.Disturbed = true
	}
	if s.Used = len(rounds); s.Used == 0 {
		return s
	}
	s.Valid = true
	s.Cost, s.CostSpread = spread(rounds, func(r Round) float64 { return r.cost(unit) })
	s.Rate, s.RateSpread = spread(rounds, func(r Round) float64 { return r.units(unit) / r.Elapsed.Seconds() })
	s.P50 = duration(rounds, func(r Round) time.Duration { return r.P50 })
	s.P99 = duration(rounds, func(r Round) time.Duration { return r.P99 })
	s.P999 = duration(rounds, func(r Round) time.Duration { return r.P999 })
	s.RSS, _ = spread(rounds, func(r Round) float64 { return r.each(float64(r.RSS), unit) })
	s.Anonymous, _ = spread(rounds, func(r Round) float64 { return r.each(float64(r.Anonymous), unit) })
	s.Descriptors, _ = spread(rounds, func(r Round) float64 { return r.each(float64(r.Descriptors), unit) })
	reopened, _ := spread(rounds, func(r Round) float64 { return float64(r.Reopened) / float64(max(r.Operations, 1)) })
	s.Reopened = reopened > 0.5
	return s
}

// units returns how much work was done.
func (r *Round) units(unit Unit) float64 {
	if unit == PerGigabyte {
		return float64(r.Bytes) / 1e9
	}
	return float64(r.Operations)
}

// cost returns the CPU time per unit.
func (r *Round) cost(unit Unit) float64 {
	if unit == PerGigabyte {
		return r.CPU.Seconds() / r.units(unit)
	}
	return r.CPU.Seconds() * 1e6 / r.units(unit)
}

// each returns a figure per tunnel, if it is about tunnels.
func (r *Round) each(figure float64, unit Unit) float64 {
	if unit == PerTunnel {
		return figure / r.units(unit)
	}
	return figure
}

// spread returns the median of a figure, and how far its values are apart.
func spread(rounds []Round, figure func(Round) float64) (median, share float64) {
	values := make([]float64, len(rounds))
	for i, round := range rounds {
		values[i] = figure(round)
	}
	slices.Sort(values)
	median = (values[len(values)/2] + values[(len(values)-1)/2]) / 2
	if median != 0 {
		share = (values[len(values)-1] - values[0]) / median
	}
	return median, share
}

func duration(rounds []Round, figure func(Round) time.Duration) time.Duration {
	median, _ := spread(rounds, func(r Round) float64 { return float64(figure(r)) })
	return time.Duration(median)
}

// row returns the row of a peer in a scenario, or nil.
func (r *Results) row(scenario, peer string, logs bool) *Row {
	for _, row := range r.Rows {
		if row.Scenario == scenario && row.Peer == peer && row.Logs == logs {
			return row
		}
	}
	return nil
}

// summary returns the medians of a peer in a scenario. They are not Valid if there are none.
func (r *Results) summary(scenario Scenario, peer string, logs bool) Summary {
	if row := r.row(scenario.ID, peer, logs); row != nil {
		return row.Summarize(scenario.Unit, r.Settings.Foreign)
	}
	return Summary{}
}

// Failed returns what did not work: rows without results, or with errors.
func (r *Results) Failed() []string {
	var failed []string
	for _, scenario := range r.Scenarios {
		for _, row := range r.Rows {
			if row.Scenario != scenario.ID {
				continue
			}
			name := scenario.ID + ", " + row.Peer
			if row.Logs {
				name += " with logs"
			}
			s := row.Summarize(scenario.Unit, r.Settings.Foreign)
			switch {
			case row.Failure != "":
				failed = append(failed, name+": "+row.Failure)
			case s.Errors > 0:
				failed = append(failed, name+": "+s.FirstError)
			case !s.Valid:
				failed = append(failed, name+": no results")
			}
		}
	}
	return failed
}
