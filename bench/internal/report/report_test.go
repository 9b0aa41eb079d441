// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package report

import (
	"flag"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the tables of the tests to testdata")

// round returns a round with a cost in microseconds.
func round(operations int64, microseconds int, foreign float64) Round {
	cpu := time.Duration(operations) * time.Duration(microseconds) * time.Microsecond
	return Round{
		Operations: operations, Elapsed: time.Second, CPU: cpu, Foreign: foreign,
		P50: time.Millisecond, P99: 2 * time.Millisecond, P999: 30 * time.Millisecond, RSS: 64 << 20, Anonymous: 16 << 20,
	}
}

// sample returns results of all kinds: quiet and disturbed, with errors, failed.
func sample() *Results {
	date := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	bulk := Round{Bytes: 2e9, Elapsed: time.Second, CPU: 300 * time.Millisecond, RSS: 64 << 20}
	wrong := round(100, 50, 0)
	wrong.Errors, wrong.FirstError = 3, "status 502 instead of 200"
	reopened := round(100, 200, 0)
	reopened.Reopened = 99
	tunnels := func(kilobytes int64, descriptors int) Round {
		return Round{Operations: 100, Elapsed: time.Second, CPU: 10 * time.Millisecond, RSS: kilobytes * 100 << 10, Anonymous: kilobytes * 50 << 10, Descriptors: descriptors * 100}
	}
	return &Results{
		Machine:  Machine{CPU: "A CPU", Cores: 2, Kernel: "Linux 6.1", Go: "go1.26.0", Date: date},
		Settings: Settings{Rounds: 3, Duration: time.Second, Tunnels: 100, Reference: "async_proxy", Foreign: 0.15},
		Peers: []Peer{
			{ID: "async_proxy", Name: "async_proxy", Version: "2.11.9"}, {ID: "squid", Name: "Squid", Version: "5.7-2", Note: "one worker"},
			{ID: "slow", Name: "slow", Version: "1"}, {ID: "buffered", Name: "async_proxy, buffered logs", Variant: true},
			{ID: "limited", Name: "async_proxy, limiting"}, {ID: "respond", Name: "Caddy `respond`"},
		},
		Missing: []string{"haproxy is not installed"},
		Scenarios: []Scenario{
			{ID: "get", Title: "GET", Details: "32 clients.", Unit: PerOperation, Own: "async_proxy", Brief: true, WithLogs: true},
			{ID: "down", Title: "bulk", Details: "4 tunnels.", Unit: PerGigabyte, Own: "async_proxy", Brief: true},
			{ID: "idle", Title: "idle tunnels", Details: "Idle.", Unit: PerTunnel, Own: "async_proxy", Brief: true},
			{ID: "429", Title: "429", Details: "32 clients.", Unit: PerOperation, Own: "limited", Reference: "respond"},
		},
		Rows: []*Row{
			{Scenario: "get", Peer: "async_proxy", Rounds: []Round{round(1000, 20, 0), round(1000, 22, 0), round(500, 40, 0.5), round(1000, 21, 0)}},
			{Scenario: "get", Peer: "squid", Rounds: []Round{round(500, 40, 0.5), round(500, 44, 0.4)}},
			{Scenario: "get", Peer: "slow", Rounds: []Round{reopened}},
			{Scenario: "get", Peer: "async_proxy", Logs: true, Rounds: []Round{round(1000, 30, 0)}},
			{Scenario: "get", Peer: "buffered", Logs: true, Rounds: []Round{round(1000, 24, 0.5)}},
			{Scenario: "get", Peer: "squid", Logs: true, Rounds: []Round{round(1000, 27, 0)}},
			{Scenario: "down", Peer: "async_proxy", Rounds: []Round{bulk}},
			{Scenario: "down", Peer: "squid", Failure: "squid: it ended\nwithout | a word"},
			{Scenario: "idle", Peer: "async_proxy", Rounds: []Round{tunnels(10, 2)}},
			{Scenario: "idle", Peer: "squid", Rounds: []Round{tunnels(8, 2)}},
			{Scenario: "429", Peer: "limited", Rounds: []Round{round(1000, 12, 0)}},
			{Scenario: "429", Peer: "respond", Rounds: []Round{round(1000, 24, 0)}},
			{Scenario: "429", Peer: "respond", Logs: true, Rounds: []Round{wrong}},
		},
	}
}

// TestTables compares all tables with testdata/tables.md.
func TestTables(t *testing.T) {
	results := sample()
	got := results.Markdown() + "\n---\n\n" + results.Short()
	const file = "testdata/tables.md"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the tables are\n%s", got)
	}
}

// TestSummarize checks medians, spreads, and which rounds they are of.
func TestSummarize(t *testing.T) {
	tests := []struct {
		name           string
		rounds         []Round
		cost, spread   float64
		used           int
		disturbed, any bool
	}{
		{"odd", []Round{round(10, 30, 0), round(10, 10, 0), round(10, 20, 0)}, 20, 1, 3, false, true},
		{"even", []Round{round(10, 30, 0), round(10, 10, 0)}, 20, 1, 2, false, true},
		{"one", []Round{round(10, 30, 0)}, 30, 0, 1, false, true},
		{"one disturbed", []Round{round(10, 30, 0), round(10, 90, 0.2), round(10, 30, 0)}, 30, 0, 2, false, true},
		{"too many disturbed", []Round{round(10, 30, 0.2), round(10, 60, 0.2), round(10, 40, 0)}, 40, 0.75, 3, true, true},
		{"nothing done", []Round{round(0, 0, 0), round(10, 30, 0)}, 30, 0, 1, false, true},
		{"nothing at all", []Round{round(0, 0, 0)}, 0, 0, 0, false, false},
		{"no rounds", nil, 0, 0, 0, false, false},
	}
	for _, test := range tests {
		row := Row{Rounds: test.rounds}
		s := row.Summarize(PerOperation, 0.15)
		if s.Cost != test.cost || s.CostSpread != test.spread || s.Used != test.used || s.Disturbed != test.disturbed || s.Valid != test.any {
			t.Errorf("%s: %+v", test.name, s)
		}
	}
}

// TestFailed checks that no row without results, or with errors, goes unnoticed.
func TestFailed(t *testing.T) {
	results := sample()
	results.Rows = append(results.Rows, &Row{Scenario: "idle", Peer: "slow", Logs: true, Rounds: []Round{{}}})
	want := []string{
		"down, squid: squid: it ended\nwithout | a word",
		"idle, slow with logs: no results",
		"429, respond with logs: status 502 instead of 200",
	}
	if got := results.Failed(); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// TestBusy checks that the text says when the machine was busy.
func TestBusy(t *testing.T) {
	results := sample()
	const says = "**The machine was busy."
	if text := results.Markdown(); !strings.Contains(text, "machine: 4 of 16.") || !strings.Contains(text, says) {
		t.Error(text)
	}
	results.Rows[1].Rounds = nil
	if text := results.Markdown(); strings.Contains(text, says) {
		t.Error("two of fourteen measurements are not much")
	}
}

// TestWithoutOwn checks that a run without async_proxy says nothing about its rank.
func TestWithoutOwn(t *testing.T) {
	results := sample()
	results.Rows = results.Rows[1:3]
	if text := results.Markdown(); strings.Contains(text, "not first") {
		t.Error(text)
	}
}

// TestInsert replaces the results in a document.
func TestInsert(t *testing.T) {
	document := "before\n" + BeginMark + "\nold\n" + EndMark + "\nafter\n"
	want := "before\n" + BeginMark + "\n\nnew\n\n" + EndMark + "\nafter\n"
	for range 2 {
		got, err := Insert(document, "new\n")
		if err != nil || got != want {
			t.Errorf("%q, %v", got, err)
		}
		document = got
	}
	for _, document := range []string{"", BeginMark, EndMark, EndMark + BeginMark} {
		if text, err := Insert(document, "new"); err == nil {
			t.Errorf("%q became %q", document, text)
		}
	}
}
