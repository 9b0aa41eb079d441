// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Command bench compares async_proxy with other proxies on this machine. It builds what it
// can, uses what is installed, and names what is missing. docs/benchmarks.md says how it
// measures and what its figures mean.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/peer"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/proc"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/report"
)

// options are the flags.
type options struct {
	scenarios, peers, logs   string
	rounds, tunnels          int
	duration, warm, patience time.Duration
	foreign                  float64
	reference                string
	markdown, json, docs     string
	quick                    bool
}

func main() {
	proc.Guard()
	var o options
	o.parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	err := bench(ctx, &o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (o *options) parse() {
	flag.StringVar(&o.scenarios, "scenarios", "", "comma-separated `names` of scenarios (default all: "+names(scenarios())+")")
	flag.StringVar(&o.peers, "peers", "", "comma-separated `names` of peers (default all: "+ids(peer.List())+")")
	flag.StringVar(&o.logs, "logs", "both", "whether peers log: off, on or both")
	flag.IntVar(&o.rounds, "rounds", 5, "measurements of each peer in each scenario")
	flag.DurationVar(&o.duration, "duration", 700*time.Millisecond, "how long a measurement takes")
	flag.DurationVar(&o.warm, "warm", 150*time.Millisecond, "how long peers work before a measurement")
	flag.DurationVar(&o.patience, "patience", time.Minute, "how long the run may be prolonged, in all, because the machine is busy")
	flag.Float64Var(&o.foreign, "foreign", 0.15, "a measurement is disturbed if other processes use more than this `share` of the machine")
	flag.IntVar(&o.tunnels, "tunnels", 2000, "idle tunnels")
	flag.StringVar(&o.reference, "ref", "async_proxy", "the `peer` that ratios refer to")
	flag.StringVar(&o.markdown, "md", "", "write the tables to this `file` instead of standard output")
	flag.StringVar(&o.json, "json", "", "write all rounds to this `file`")
	flag.StringVar(&o.docs, "docs", "", "write the tables between the marks in this `file`")
	flag.BoolVar(&o.quick, "quick", false, "run each scenario once, briefly; the figures mean little")
	flag.Parse()
	if o.quick {
		o.rounds, o.duration, o.warm, o.patience, o.tunnels = 1, 100*time.Millisecond, 50*time.Millisecond, 0, 100
	}
}

// names returns the names of scenarios.
func names(all []scenario) string {
	var names []string
	for _, s := range all {
		names = append(names, s.ID)
	}
	return strings.Join(names, ",")
}

// ids returns the names of peers.
func ids(all []*peer.Peer) string {
	var names []string
	for _, p := range all {
		names = append(names, p.ID)
	}
	return strings.Join(names, ",")
}

// selected returns the elements whose names a flag lists, or all if the list is empty.
func selected[T any](flag string, all []T, list string, name func(T) string) ([]T, error) {
	if list == "" {
		return all, nil
	}
	var found []T
	for want := range strings.SplitSeq(list, ",") {
		i := slices.IndexFunc(all, func(one T) bool { return name(one) == want })
		if i < 0 {
			var known []string
			for _, one := range all {
				known = append(known, name(one))
			}
			return nil, fmt.Errorf("-%s %q: use %s", flag, want, strings.Join(known, ", "))
		}
		found = append(found, all[i])
	}
	return found, nil
}

// logModes returns which kinds of logging a run has.
func logModes(flag string) ([]bool, error) {
	modes := map[string][]bool{"off": {false}, "on": {true}, "both": {false, true}}
	if modes[flag] == nil {
		return nil, fmt.Errorf("-logs %q: use off, on or both", flag)
	}
	return modes[flag], nil
}

// bench runs the benchmark and writes the results.
func bench(ctx context.Context, o *options) error {
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if o.rounds < 1 {
		return fmt.Errorf("-rounds %d: use 1 or more", o.rounds)
	}
	chosen, err := selected("scenarios", scenarios(), o.scenarios, func(s scenario) string { return s.ID })
	if err != nil {
		return err
	}
	id := func(p *peer.Peer) string { return p.ID }
	peers, err := selected("peers", peer.List(), o.peers, id)
	if err != nil {
		return err
	}
	if _, err := selected("ref", peer.List(), o.reference, id); err != nil {
		return err
	}
	logs, err := logModes(o.logs)
	if err != nil {
		return err
	}
	if _, err := os.Stat("peers/goproxy/main.go"); err != nil {
		return errors.New("run it in the directory bench of the repository")
	}
	dir, err := os.MkdirTemp("", "async_proxy-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // peers that become another user write below it
		return err
	}
	if o.tunnels, err = raiseLimit(o.tunnels); err != nil {
		return err
	}
	debug.SetGCPercent(400) // the load maker shares the processors with the peers
	results := measureAll(ctx, o, dir, chosen, peers, logs)
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	return write(o, results)
}

func measureAll(ctx context.Context, o *options, dir string, chosen []scenario, peers []*peer.Peer, logs []bool) *report.Results {
	r := runner{options: *o, dir: dir, started: time.Now()}
	r.say("building peers")
	results := &report.Results{Machine: thisMachine(), Settings: report.Settings{
		Rounds: o.rounds, Duration: o.duration, Tunnels: o.tunnels, Reference: o.reference, Foreign: o.foreign,
	}}
	r.entrants, results.Missing = find(peers, dir, logs)
	for _, p := range peers {
		if p.Path != "" {
			results.Peers = append(results.Peers, report.Peer{ID: p.ID, Name: p.Name, Version: p.Version, Note: p.Note, Variant: p.Buffered})
		}
	}
	for _, missing := range results.Missing {
		r.say("missing: %s", missing)
	}
	for _, s := range chosen {
		r.left += o.patience / time.Duration(len(chosen))
		if ctx.Err() == nil {
			results.Scenarios = append(results.Scenarios, s.Scenario)
			results.Rows = append(results.Rows, r.run(ctx, s)...)
		}
	}
	r.say("done")
	return results
}

// write writes the results where the flags say. The error is for rows with errors, too.
func write(o *options, results *report.Results) error {
	tables := results.Markdown()
	if o.markdown != "" {
		if err := os.WriteFile(o.markdown, []byte(tables), 0o644); err != nil {
			return err
		}
	} else {
		fmt.Println(tables)
	}
	fmt.Printf("For README:\n\n%s", results.Short())
	if o.json != "" {
		text, err := json.MarshalIndent(results, "", "\t")
		if err != nil {
			return err
		}
		if err := os.WriteFile(o.json, append(text, '\n'), 0o644); err != nil {
			return err
		}
	}
	if o.docs != "" {
		if err := insert(o.docs, tables); err != nil {
			return err
		}
	}
	if failed := results.Failed(); len(failed) > 0 {
		return fmt.Errorf("these runs had errors:\n%s", strings.Join(failed, "\n"))
	}
	return nil
}

// insert writes the tables into a document.
func insert(file, tables string) error {
	document, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	text, err := report.Insert(string(document), tables)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return os.WriteFile(file, []byte(text), 0o644)
}
