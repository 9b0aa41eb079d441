// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"cmp"
	"slices"
)

// topN finds the n values with the largest keys or, if ascending, the smallest. Among equal
// keys, earlier values win.
type topN[T any] struct {
	n         int
	ascending bool
	added     int
	list      []topEntry[T] // up to 2n candidates; after a compaction, the first n are the best so far, in order
}

type topEntry[T any] struct {
	key   float64
	seq   int
	value T
}

func (f *topN[T]) compare(a, b topEntry[T]) int {
	order := cmp.Compare(a.key, b.key)
	if !f.ascending {
		order = -order
	}
	return cmp.Or(order, cmp.Compare(a.seq, b.seq))
}

// add sorts once per n relevant values. It discards irrelevant ones after one comparison.
func (f *topN[T]) add(key float64, value T) {
	f.added++
	k := topEntry[T]{key, f.added, value}
	if f.added > 2*f.n && f.compare(k, f.list[f.n-1]) > 0 {
		return
	}
	f.list = append(f.list, k)
	if len(f.list) == 2*f.n {
		f.list = f.sorted(0)
	}
}

// sorted returns the best n values in order, without the first offset.
func (f *topN[T]) sorted(offset int) []topEntry[T] {
	slices.SortFunc(f.list, f.compare)
	return f.list[min(offset, len(f.list)):min(f.n, len(f.list))]
}
