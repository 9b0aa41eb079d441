// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math/bits"
	"time"
)

// Each power of two is divided into 64 steps, so that a latency is off by at most 1/64.
const (
	stepBits = 6
	steps    = 1 << stepBits
	maxBits  = 40 // 2^40 ns are 18 minutes; what takes longer counts as that
)

// Histogram counts latencies. The zero value is empty. It takes the same memory however
// many there are. It is not safe for concurrent use: each client has its own, and they are
// added up at the end.
type Histogram struct {
	counts [(maxBits - stepBits + 1) * steps]uint64
	total  uint64
}

// Add counts one latency.
func (h *Histogram) Add(latency time.Duration) {
	h.counts[step(uint64(max(latency, 0)))]++
	h.total++
}

// AddAll counts all latencies of another histogram.
func (h *Histogram) AddAll(other *Histogram) {
	for i, n := range other.counts {
		h.counts[i] += n
	}
	h.total += other.total
}

// Total returns the number of latencies.
func (h *Histogram) Total() uint64 { return h.total }

// Quantile returns the latency that the share q of all latencies does not exceed. It is 0
// for an empty histogram.
func (h *Histogram) Quantile(q float64) time.Duration {
	rank := max(uint64(q*float64(h.total)+0.5), 1)
	var seen uint64
	for i, n := range h.counts {
		if seen += n; seen >= rank {
			return middle(i)
		}
	}
	return 0
}

// step returns the index of the step that ns belongs to.
func step(ns uint64) int {
	if ns < steps {
		return int(ns)
	}
	ns = min(ns, 1<<maxBits-1)
	shift := bits.Len64(ns) - stepBits - 1
	return shift*steps + int(ns>>shift)
}

// middle returns the latency in the middle of a step.
func middle(i int) time.Duration {
	if i < 2*steps {
		return time.Duration(i)
	}
	shift := i/steps - 1
	low := (i%steps + steps) << shift
	return time.Duration(low + 1<<shift/2)
}
