// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package status shows operators what the proxies of a process are doing, and lets them act.
// It offers View, which takes snapshots and answers queries, and serves them as a live page
// and as an API. It never knows how a proxy handles requests, or which server serves the
// page.
package status

import (
	"context"
	"iter"
	"sync"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// Inputs are the sources of what a view shows, and its actions. All functions must be safe for
// concurrent use.
type Inputs struct {
	Versions func() Versions
	Started  time.Time        // when the process started
	Loaded   func() time.Time // when the last config with a proxy started to run
	Sites    func() []Site    // that are running
	Listen   func() []Listener
	Counters func() metrics.Reading
	Warnings func() []Warning // in any order; their texts begin in lower case and have no full stop

	Tables      iter.Seq[*bucket.Table]            // of the limiters in use
	Blocks      iter.Seq2[client.Key, int64]       // blocked clients, and until when, on package monotime's clock
	Tunnels     iter.Seq[*tunnel.Tunnel]           // that are open
	OpenTunnels func() (n, limit int)              // a limit of 0 is none
	TableOf     func(*tunnel.Tunnel) *bucket.Table // of the limiter that admitted the tunnel

	// Successor returns the table in use that has the clients of t since a reload: t itself, or
	// the one that replaced it.
	Successor func(t *bucket.Table, inUse iter.Seq[*bucket.Table]) *bucket.Table

	// DirectivePolicy stands for the policy without a name in parameters of requests.
	DirectivePolicy string

	// The actions report whether they changed anything. Refill fills the buckets of a client in a
	// policy of a zone. If zone or policy is "", it does so in all of them, and if both are "", it
	// also ends a block. Block blocks a client for d; 0 ends the block.
	CloseTunnel   func(id uint64) bool
	Refill        func(key client.Key, zone, policy string) bool
	Block         func(key client.Key, d time.Duration) bool
	ParseDuration func(string) (time.Duration, error)

	// Explain says how the running proxies would treat a request, in the order of their addresses.
	Explain func(context.Context, Question) ([]Explanation, error)
}

// View shows operators the state of a process. All methods are safe for concurrent use.
type View struct {
	in       Inputs
	refusals *refusals
	targets  targets
	feed     *feed
	history  *history

	// query is held while a query searches all clients or tunnels, so that concurrent queries
	// need no more memory than one.
	query sync.Mutex
}

// New returns the view of a process.
func New(in Inputs) *View {
	v := &View{in: in, refusals: newRefusals(), targets: newTargets()}
	v.feed = newFeed(v.Snapshot)
	v.history = newHistory(in.Started, func() sums { return sumsOf(v.counted()) })
	return v
}

// Active must be called after anything has been counted that the history shows. It costs next to
// nothing, except for the first call after a pause.
func (v *View) Active() {
	if v.history.asleep.Load() {
		v.history.wake()
	}
}

// History returns the last hour.
func (v *View) History(now time.Time) History { return v.history.after(0, now) }
