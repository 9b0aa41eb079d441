// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// TestHistogram compares quantiles with those of all latencies in a sorted list.
func TestHistogram(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var h, half Histogram
	var all []time.Duration
	for i := range 100_001 {
		latency := time.Duration(1) << random.IntN(36)
		latency += time.Duration(random.Int64N(int64(latency)))
		all = append(all, latency)
		if i%2 == 0 {
			h.Add(latency)
		} else {
			half.Add(latency)
		}
	}
	h.AddAll(&half)
	slices.Sort(all)
	if h.Total() != uint64(len(all)) {
		t.Errorf("%d latencies", h.Total())
	}
	for _, q := range []float64{0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.999, 1} {
		want := all[max(int(q*float64(len(all))+0.5), 1)-1]
		if got := h.Quantile(q); got < want-want/steps || got > want+want/steps {
			t.Errorf("quantile %v is %v instead of %v", q, got, want)
		}
	}
}

// TestHistogramLimits counts nothing, and what is too short or too long to be told apart.
func TestHistogramLimits(t *testing.T) {
	var h Histogram
	if got := h.Quantile(0.5); got != 0 {
		t.Errorf("the median of nothing is %v", got)
	}
	h.Add(-time.Second)
	if got := h.Quantile(1); got != 0 {
		t.Errorf("the longest latency is %v", got)
	}
	h.Add(24 * time.Hour)
	if got := h.Quantile(1); got < 18*time.Minute || got > 19*time.Minute {
		t.Errorf("the longest latency is %v", got)
	}
}
