// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestTopN checks that sorted returns the same elements as a full sort.
func TestTopN(t *testing.T) {
	for range 500 {
		f := topN[int]{n: 1 + rand.IntN(20), ascending: rand.IntN(2) == 0}
		var keys []float64
		for i := range rand.IntN(200) {
			key := float64(rand.IntN(50))
			keys = append(keys, key)
			f.add(key, i)
		}
		want := make([]int, len(keys))
		for i := range want {
			want[i] = i
		}
		slices.SortStableFunc(want, func(a, b int) int {
			if !f.ascending {
				a, b = b, a
			}
			switch {
			case keys[a] < keys[b]:
				return -1
			case keys[a] > keys[b]:
				return 1
			}
			return 0
		})
		offset := rand.IntN(f.n)
		want = want[min(offset, len(want)):min(f.n, len(want))]
		var got []int
		for _, k := range f.sorted(offset) {
			got = append(got, k.value)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("of %v the first %d after %d, ascending %v, are %v, want %v", keys, f.n, offset, f.ascending, got, want)
		}
	}
}
