// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"math"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/puzpuzpuz/xsync/v4"
)

// heavyHitters finds the names with the largest sums, in bounded memory, by the algorithm
// Space-Saving (Metwally, Agrawal, El Abbadi: Efficient Computation of Frequent and Top-k
// Elements in Data Streams, 2005). It lists size names. A new name replaces the one with the
// smallest sum and inherits that sum, because it may have been listed before. Each name with more
// than 1/size of the total is therefore listed, and it is known how much of a sum is inherited.
//
// Counting a listed name takes no lock and no memory. All methods are safe for concurrent use.
type heavyHitters struct {
	size  int
	found *xsync.Map[string, *hitter]

	mu    sync.Mutex
	order []*hitter // a heap by floor, once it has size names; under mu
}

// hitter is a listed name.
type hitter struct {
	name      string
	sum       atomic.Int64 // with what is inherited; below zero once the name is no longer listed
	inherited int64
	floor     int64 // the sum when its place in the heap was last decided; under mu
}

func newHeavyHitters(size int) *heavyHitters {
	return &heavyHitters{size: size, found: xsync.NewMap[string, *hitter]()}
}

// add adds n, which must not be negative, to the sum of a name.
func (h *heavyHitters) add(name string, n int64) {
	if e, ok := h.found.Load(name); ok && e.sum.Add(n) >= 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if e, ok := h.found.Load(name); ok {
		e.sum.Add(n)
		return
	}
	e := &hitter{name: strings.Clone(name)} // it may be a part of a much larger request
	full := len(h.order) == h.size
	if full {
		least := h.least()
		e.inherited = least.sum.Swap(math.MinInt64)
		h.found.Delete(least.name)
		h.order[0] = e
	} else {
		h.order = append(h.order, e)
	}
	e.floor = e.inherited + n
	e.sum.Store(e.floor)
	h.found.Store(e.name, e)
	if full {
		h.sink(0)
	} else if len(h.order) == h.size {
		for i := h.size/2 - 1; i >= 0; i-- {
			h.sink(i)
		}
	}
}

// sink moves an element of the heap down to its place.
func (h *heavyHitters) sink(i int) {
	for child := 2*i + 1; child < len(h.order); child = 2*i + 1 {
		if child+1 < len(h.order) && h.order[child+1].floor < h.order[child].floor {
			child++
		}
		if h.order[i].floor <= h.order[child].floor {
			return
		}
		h.order[i], h.order[child] = h.order[child], h.order[i]
		i = child
	}
}

// least returns the listed name with the smallest sum, and makes it the first of the heap. Sums only
// grow, so the sum with the smallest floor is the smallest if it still equals its floor.
func (h *heavyHitters) least() *hitter {
	for {
		e := h.order[0]
		now := e.sum.Load()
		if now == e.floor {
			return e
		}
		e.floor = now
		h.sink(0)
	}
}

// counted returns how much has been added to the sum of a name since it was listed, and an upper
// bound of what had been added before. found is false if the name is not listed.
func (h *heavyHitters) counted(name string) (sum, before int64, found bool) {
	e, found := h.found.Load(name)
	if !found {
		return 0, 0, false
	}
	total := e.sum.Load()
	if total < 0 { // it has just been replaced
		return 0, 0, false
	}
	return total - e.inherited, e.inherited, true
}

// each calls f with the listed names.
func (h *heavyHitters) each(f func(name string)) {
	h.found.Range(func(name string, _ *hitter) bool { f(name); return true })
}
