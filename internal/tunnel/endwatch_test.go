// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"sync/atomic"
	"testing"
	"time"
)

// watchedPeer reports what a test says about a socket.
type watchedPeer struct {
	End
	acked  uint64
	queued bool
	looks  atomic.Int32
}

func (p *watchedPeer) SendState(uint64) (uint64, bool) {
	p.looks.Add(1)
	return p.acked, p.queued
}

// An end has stalled if it has acknowledged none of its pending data for a while.
func TestEndWatch(t *testing.T) {
	const second, interval = int64(time.Second), 15 * time.Second
	for _, row := range []struct {
		name  string
		tick  func(i int, f *flow, p *watchedPeer) // runs each second
		most  time.Duration                        // bounds for how long it has stalled after a minute
		least time.Duration
		looks int32 // upper bound for the reads of its socket's state
	}{
		{"nothing to read", func(int, *flow, *watchedPeer) {}, 0, 0, 5},
		{"bytes that are acknowledged at once", func(_ int, f *flow, _ *watchedPeer) { f.Add(1) }, 0, 0, 0},
		{"a blocked write", func(_ int, f *flow, _ *watchedPeer) { f.writing.Store(true) }, 60 * time.Second, 58 * time.Second, 60},
		{"a write blocked by a slow reader", func(i int, f *flow, p *watchedPeer) {
			f.writing.Store(true)
			p.acked = uint64(i / 5)
		}, 5 * time.Second, 0, 60},
		{"a queue that is never read", func(_ int, f *flow, p *watchedPeer) {
			f.Store(5)
			p.queued = true
		}, 60 * time.Second, 58 * time.Second, 60},
		{"a queue that is read slowly", func(i int, f *flow, p *watchedPeer) {
			f.Store(5)
			p.acked, p.queued = uint64(i/5), true
		}, 5 * time.Second, 0, 60},
		{"a write that blocks late", func(i int, f *flow, _ *watchedPeer) { f.writing.Store(i > 50) }, 10 * time.Second, 8 * time.Second, 15},
	} {
		t.Run(row.name, func(t *testing.T) {
			var e endWatch
			var f flow
			p := new(watchedPeer)
			now := second
			for i := range 60 {
				row.tick(i, &f, p)
				e.update(now, &f, p, interval)
				now += second
			}
			if stalled := e.stalledFor(now); stalled < row.least || stalled > row.most {
				t.Errorf("stalled for %v, want from %v to %v", stalled, row.least, row.most)
			}
			if n := p.looks.Load(); n > row.looks {
				t.Errorf("the socket was looked at %d times, want at most %d", n, row.looks)
			}
		})
	}
}
