// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"maps"
	"sync"
	"time"
)

// ttlCache caches values by key for a limited time. Its size is bounded: when it is full and
// nothing has expired, it drops everything, which only costs its users time.
//
// All methods are safe for concurrent use.
type ttlCache[K comparable, V any] struct {
	size int
	keep time.Duration

	mu     sync.Mutex
	values map[K]ttlEntry[V]
}

type ttlEntry[V any] struct {
	value V
	until time.Time
}

func newTTLCache[K comparable, V any](size int, keep time.Duration) *ttlCache[K, V] {
	return &ttlCache[K, V]{size: size, keep: keep, values: make(map[K]ttlEntry[V])}
}

// get returns the value of a key, if there is one that has not expired.
func (m *ttlCache[K, V]) get(key K) (value V, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.values[key]
	if !ok || time.Now().After(r.until) {
		return value, false
	}
	return r.value, true
}

// put stores a value.
func (m *ttlCache[K, V]) put(key K, value V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	if len(m.values) >= m.size {
		maps.DeleteFunc(m.values, func(_ K, r ttlEntry[V]) bool { return now.After(r.until) })
	}
	if len(m.values) >= m.size {
		clear(m.values)
	}
	m.values[key] = ttlEntry[V]{value, now.Add(m.keep)}
}
