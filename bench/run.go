// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/load"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/peer"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/proc"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/report"
)

// entrant is a peer with or without logs.
type entrant struct {
	*peer.Peer
	log bool
}

// runner runs scenarios.
type runner struct {
	options
	dir      string // for what peers write
	entrants []entrant
	started  time.Time
	left     time.Duration // of the patience: how long to go on waiting for a quiet machine
}

// run runs a scenario with all peers that can do it, and returns a row for each.
func (r *runner) run(ctx context.Context, s scenario) []*report.Row {
	var entrants []entrant
	var rows []*report.Row
	for _, e := range r.entrants {
		if e.Abilities&s.needs != 0 {
			entrants = append(entrants, e)
			rows = append(rows, &report.Row{Scenario: s.ID, Peer: e.ID, Logs: e.log})
		}
	}
	r.say("%s", s.Title)
	if s.ID == idle {
		r.runIdle(ctx, entrants, rows)
	} else {
		r.runLoad(ctx, s, entrants, rows)
	}
	return rows
}

// say tells the user where the run is.
func (r *runner) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%5.0f s  %s\n", time.Since(r.started).Seconds(), fmt.Sprintf(format, args...))
}

// runLoad starts all peers and measures each in turn, several times.
func (r *runner) runLoad(ctx context.Context, s scenario, entrants []entrant, rows []*report.Row) {
	running := make([]*peer.Running, len(entrants))
	var starting sync.WaitGroup
	for i, e := range entrants {
		starting.Go(func() {
			var err error
			if running[i], err = e.Start(ctx, r.dir, e.log); err != nil {
				rows[i].Failure = err.Error()
			}
		})
	}
	starting.Wait()
	defer stopAll(running)
	for range r.rounds {
		for i, p := range running {
			if p != nil && ctx.Err() == nil {
				rows[i].Rounds = append(rows[i].Rounds, r.measureQuietly(ctx, s, p))
			}
		}
	}
}

// stopAll ends peers, all at the same time.
func stopAll(running []*peer.Running) {
	var stopping sync.WaitGroup
	for _, p := range running {
		if p != nil {
			stopping.Go(p.Stop)
		}
	}
	stopping.Wait()
}

// repeats limits how often one measurement is repeated.
const repeats = 2

// measureQuietly measures once, or again when the machine was busy with something else and
// there is patience left.
func (r *runner) measureQuietly(ctx context.Context, s scenario, p *peer.Running) report.Round {
	best := r.measure(ctx, s, p)
	for i := 0; i < repeats && best.Foreign > r.foreign && r.left > 0 && ctx.Err() == nil; i++ {
		began := time.Now()
		r.awaitQuiet(ctx)
		again := r.measure(ctx, s, p)
		errors, first := best.Errors+again.Errors, cmp.Or(best.FirstError, again.FirstError)
		if again.Foreign < best.Foreign {
			best = again
		}
		best.Errors, best.FirstError = errors, first
		r.left -= time.Since(began)
	}
	return best
}

// awaitQuiet waits until the machine has been nearly idle for a moment, but not longer than
// the patience allows.
func (r *runner) awaitQuiet(ctx context.Context) {
	for end := time.Now().Add(min(r.left, 3*time.Second)); time.Now().Before(end) && ctx.Err() == nil; {
		sample := newMeter(nil)
		time.Sleep(200 * time.Millisecond)
		if sample.stop().foreign < r.foreign {
			return
		}
	}
}

// measure measures a peer once.
func (r *runner) measure(ctx context.Context, s scenario, p *peer.Running) report.Round {
	var m *meter
	var found reading
	l := s.load
	l.Warm, l.Duration = r.warm, r.duration
	l.Received = p.Origin.Received
	l.Begin = func() { m = newMeter(p) }
	l.End = func() { found = m.stop() }
	result, err := load.Run(ctx, p.Target, l)
	if err != nil {
		return report.Round{Errors: 1, FirstError: err.Error()}
	}
	return report.Round{
		Operations: result.Operations, Bytes: result.Bytes, Reopened: result.Reopened,
		Errors: result.Errors, FirstError: result.FirstError,
		Elapsed: result.Elapsed, CPU: found.cpu, Foreign: found.foreign,
		P50: result.Latency.Quantile(0.5), P99: result.Latency.Quantile(0.99), P999: result.Latency.Quantile(0.999),
		RSS: found.usage.RSS, Anonymous: found.usage.Anonymous, Descriptors: found.usage.Descriptors,
	}
}

// runIdle starts each peer anew for each measurement, so that no memory is left from the one
// before.
func (r *runner) runIdle(ctx context.Context, entrants []entrant, rows []*report.Row) {
	for range min(r.rounds, 3) {
		for i, e := range entrants {
			if ctx.Err() != nil {
				return
			}
			p, err := e.Start(ctx, r.dir, e.log)
			if err != nil {
				rows[i].Failure = err.Error()
				continue
			}
			rows[i].Rounds = append(rows[i].Rounds, r.measureIdle(p))
			p.Stop()
		}
	}
}

// settling is how long a peer may take to free what it needed only to open tunnels.
const settling = 500 * time.Millisecond

// measureIdle opens tunnels and returns what they need.
func (r *runner) measureIdle(p *peer.Running) report.Round {
	first, err := load.OpenTunnels(p.Target, 5)
	if err != nil {
		return report.Round{Errors: 1, FirstError: err.Error()}
	}
	first.Close()
	time.Sleep(settling)
	m := newMeter(p)
	before := p.Usage()
	began := time.Now()
	tunnels, err := load.OpenTunnels(p.Target, r.tunnels)
	if err != nil {
		return report.Round{Errors: 1, FirstError: err.Error()}
	}
	defer tunnels.Close()
	round := report.Round{Operations: int64(tunnels.Len()), Elapsed: time.Since(began)}
	time.Sleep(settling)
	found := m.stop()
	round.CPU, round.Foreign = found.cpu, found.foreign
	round.RSS = found.usage.RSS - before.RSS
	round.Anonymous = found.usage.Anonymous - before.Anonymous
	round.Descriptors = found.usage.Descriptors - before.Descriptors
	return round
}

// meter measures CPU time.
type meter struct {
	peer            *peer.Running // or nil
	began           time.Time
	busy, own, used time.Duration
}

// reading is what a meter has measured.
type reading struct {
	cpu     time.Duration // of the peer
	usage   proc.Usage    // of the peer, at the end
	foreign float64       // the share of the machine that other processes used
}

func newMeter(p *peer.Running) *meter {
	m := &meter{peer: p, began: time.Now(), busy: proc.Busy(), own: proc.Own()}
	if p != nil {
		m.used = p.Usage().CPU
	}
	return m
}

func (m *meter) stop() reading {
	var found reading
	if m.peer != nil {
		found.usage = m.peer.Usage()
		found.cpu = found.usage.CPU - m.used
	}
	others := proc.Busy() - m.busy - (proc.Own() - m.own) - found.cpu
	all := time.Since(m.began) * time.Duration(runtime.NumCPU())
	found.foreign = max(0, others.Seconds()/all.Seconds())
	return found
}

// find builds and finds peers, and returns those that are there as entrants, and what is
// missing.
func find(peers []*peer.Peer, bin string, logs []bool) (entrants []entrant, missing []string) {
	for _, log := range logs {
		for _, p := range peers {
			if p.Buffered && !log {
				if !slices.Contains(logs, true) {
					missing = append(missing, p.ID+" runs with logs only")
				}
				continue
			}
			if p.Path == "" {
				if err := p.Find(bin); err != nil {
					if !slices.Contains(missing, err.Error()) {
						missing = append(missing, err.Error())
					}
					continue
				}
			}
			entrants = append(entrants, entrant{p, log})
		}
	}
	return entrants, missing
}
