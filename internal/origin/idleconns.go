// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"slices"
	"sync"
)

// idleConns are the idle connections of a pool with the same key. All methods are safe for
// concurrent use.
type idleConns struct {
	mu      sync.Mutex
	conns   []*pooledConn // the most recently used last
	removed bool          // from the pool, which takes no more of them
}

// newIdleConns returns an empty list, for xsync.Map.LoadOrCompute.
func newIdleConns() (list *idleConns, cancel bool) { return new(idleConns), false }

// take removes and returns the most recently used connection, or nil if there is none.
func (l *idleConns) take() *pooledConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.conns) == 0 {
		return nil
	}
	last := len(l.conns) - 1
	c := l.conns[last]
	l.conns[last] = nil
	l.conns = l.conns[:last]
	return c
}

// add adds a connection, unless the list has been removed from the pool.
func (l *idleConns) add(c *pooledConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.removed {
		l.conns = append(l.conns, c)
	}
	return !l.removed
}

// has reports whether there is a connection.
func (l *idleConns) has() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns) > 0
}

// extract removes and returns the connections that meet a condition. If none is left, it calls
// remove, which removes the list from the pool.
func (l *idleConns) extract(condition func(*pooledConn) bool, remove func()) (extracted []*pooledConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = slices.DeleteFunc(l.conns, func(c *pooledConn) bool {
		if !condition(c) {
			return false
		}
		extracted = append(extracted, c)
		return true
	})
	if len(l.conns) == 0 && !l.removed {
		l.removed = true
		remove()
	}
	return extracted
}
