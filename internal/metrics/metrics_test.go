// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// TestRead checks that each event appears in the reading, and nowhere else.
func TestRead(t *testing.T) {
	limited := Refusal{"denied", "limit"}
	s := New(Labels{Refusals: []Refusal{limited}, RateLimited: limited, Dials: []string{"ok", "failed"}})
	s.Request(Forward, Failed)
	s.Refused(Refusal{"denied", ""})
	s.Refused(Refusal{"denied", "rule"})
	s.RateLimited()
	s.Dial("ok", 3*time.Millisecond)
	s.Dial("ok", time.Hour)
	s.Dial("failed", 0)
	s.ResponseHead(time.Millisecond)
	s.TunnelBytes(1, 2)
	s.ForwardedBytes(3, 4)
	s.Evictions().Add(5)
	r := s.Read()
	for k, outcomes := range r.Requests {
		for o, n := range outcomes {
			if (n == 1) != (Kind(k) == Forward && Outcome(o) == Failed) {
				t.Errorf("%d requests of kind %d with outcome %d", n, k, o)
			}
		}
	}
	if want := map[string]int64{"denied": 3}; !maps.Equal(r.Refusals, want) {
		t.Errorf("refusals %v, want %v", r.Refusals, want)
	}
	if want := map[string]int64{"limit": 1, "rule": 1}; !maps.Equal(r.Causes, want) {
		t.Errorf("causes %v, want %v", r.Causes, want)
	}
	if r.DialsOK != 2 || r.DialsFailed != 1 || r.Evictions != 5 {
		t.Errorf("dials %d and %d, evictions %d", r.DialsOK, r.DialsFailed, r.Evictions)
	}
	if got := [...]int64{r.TunnelBytesUp, r.TunnelBytesDown, r.ForwardedBytesUp, r.ForwardedBytesDown}; got != [...]int64{1, 2, 3, 4} {
		t.Errorf("bytes %v", got)
	}
	if want := []int64{0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}; !slices.Equal(r.DialSeconds.Counts, want) || len(r.DialSeconds.Buckets) != len(want)-1 {
		t.Errorf("dial seconds %+v", r.DialSeconds)
	}
	if r.ResponseSeconds.Counts[0] != 1 {
		t.Errorf("response seconds %+v", r.ResponseSeconds)
	}
}

// TestRegister checks that a registry has the metrics once, even if several handlers
// register them, and asks for the state at each scrape.
func TestRegister(t *testing.T) {
	s, registry, scrapes := New(Labels{}), prometheus.NewPedanticRegistry(), 0
	for range 2 {
		if err := s.Register(registry, func() State { scrapes++; return State{Tunnels: scrapes} }); err != nil {
			t.Fatal(err)
		}
	}
	for want := 1.0; want < 3; want++ {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(families, func(f *dto.MetricFamily) bool { return f.GetName() == "caddy_async_proxy_tunnels" })
		if got := families[i].Metric[0].GetGauge().GetValue(); got != want {
			t.Errorf("%v tunnels, want %v", got, want)
		}
	}
}
