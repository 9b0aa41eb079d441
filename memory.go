// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"maps"
	"sync"
	"time"
)

// memory caches values by key for a limited time. Its size is bounded: when it is full and
// nothing has expired, it drops everything, which only costs its users time.
//
// All methods are safe for concurrent use.
type memory[K comparable, V any] struct {
	size int
	keep time.Duration

	mu     sync.Mutex
	values map[K]remembered[V]
}

type remembered[V any] struct {
	value V
	until time.Time
}

func newMemory[K comparable, V any](size int, keep time.Duration) *memory[K, V] {
	return &memory[K, V]{size: size, keep: keep, values: make(map[K]remembered[V])}
}

// get returns the value of a key, if there is one that has not expired.
func (m *memory[K, V]) get(key K) (value V, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.values[key]
	if !ok || time.Now().After(r.until) {
		return value, false
	}
	return r.value, true
}

// put stores a value.
func (m *memory[K, V]) put(key K, value V) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	if len(m.values) >= m.size {
		maps.DeleteFunc(m.values, func(_ K, r remembered[V]) bool { return now.After(r.until) })
	}
	if len(m.values) >= m.size {
		clear(m.values)
	}
	m.values[key] = remembered[V]{value, now.Add(m.keep)}
}
