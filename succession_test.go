// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"slices"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
)

func TestSuccessorListener(t *testing.T) {
	t.Parallel()
	first, second := new(downstream.Listener), new(downstream.Listener)
	for _, tc := range []struct {
		accepting []*downstream.Listener
		want      *downstream.Listener
	}{
		{nil, nil},
		{[]*downstream.Listener{first}, first},
		{[]*downstream.Listener{first, second}, second},
	} {
		if got := successorListener(tc.accepting); got != tc.want {
			t.Errorf("of %p: %p, want %p", tc.accepting, got, tc.want)
		}
	}
}

func TestSiteSupersedes(t *testing.T) {
	t.Parallel()
	before, after := make(chan struct{}), make(chan struct{})
	office, guests := new(metrics.Zone), new(metrics.Zone)
	old := &site{zone: office, addresses: []string{":3128", ":8080"}, configDone: before}
	for name, tc := range map[string]struct {
		next site
		want bool
	}{
		"the same site":     {site{zone: office, addresses: []string{":3128", ":8080"}, configDone: after}, true},
		"one address stays": {site{zone: office, addresses: []string{":8080", ":9090"}, configDone: after}, true},
		"other addresses":   {site{zone: office, addresses: []string{":9090"}, configDone: after}, false},
		"another zone":      {site{zone: guests, addresses: []string{":3128", ":8080"}, configDone: after}, false},
		"the same config":   {site{zone: office, addresses: []string{":3128", ":8080"}, configDone: before}, false},
		"not in the app":    {site{zone: office, configDone: after}, false},
	} {
		if got := tc.next.supersedes(old); got != tc.want {
			t.Errorf("%s: %t, want %t", name, got, tc.want)
		}
	}
}

func TestSuccessorTable(t *testing.T) {
	t.Parallel()
	table := func(zone string, burst int64, bits int) *bucket.Table {
		return bucket.New(bucket.Limits{Zone: zone, Burst: burst, Refill: 1, IPv4Prefix: bits, IPv6Prefix: 64, MaxClients: 10}, eventInterval, program.metrics.Evictions())
	}
	old, larger, smaller := table("office", 10, 32), table("office", 20, 32), table("office", 5, 32)
	network, guests := table("office", 20, 24), table("guests", 10, 32)
	for name, tc := range map[string]struct {
		inUse []*bucket.Table
		want  *bucket.Table
	}{
		"none":                     {nil, old},
		"other limits":             {[]*bucket.Table{guests, larger, network}, larger},
		"still in use":             {[]*bucket.Table{larger, old}, old},
		"two that may be it":       {[]*bucket.Table{larger, smaller}, old},
		"other prefixes and zones": {[]*bucket.Table{network, guests}, old},
	} {
		if got := successorTable(old, slices.Values(tc.inUse)); got != tc.want {
			t.Errorf("%s: %+v, want %+v", name, got.Limits, tc.want.Limits)
		}
	}
}
