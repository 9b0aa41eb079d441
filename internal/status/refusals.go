// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"sync/atomic"
)

// refusalRing holds the latest refusals. Its methods are safe for concurrent use and
// lock-free.
type refusalRing struct {
	entries [100]atomic.Pointer[Refusal]
	n       atomic.Uint64
}

func (r *refusalRing) add(info *Refusal) {
	r.entries[(r.n.Add(1)-1)%uint64(len(r.entries))].Store(info)
}

// list returns the refusals, latest first.
func (r *refusalRing) list() []Refusal {
	list := make([]Refusal, 0, len(r.entries))
	n := r.n.Load()
	for i := range min(n, uint64(len(r.entries))) {
		if info := r.entries[(n-1-i)%uint64(len(r.entries))].Load(); info != nil {
			list = append(list, *info)
		}
	}
	return list
}
