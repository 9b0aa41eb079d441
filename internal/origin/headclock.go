// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// headClock measures how long an origin keeps the proxy waiting for the head of a response. It
// runs only while it is the origin's turn: while the origin has the whole request, or is not
// reading the rest of it. Its methods are safe for concurrent use.
type headClock struct {
	turnBegan    atomic.Int64 // when the origin's turn began, since epoch; 0: it is the client's
	lastProgress atomic.Int64 // when the origin last reported progress, since epoch; 0: never
}

// reset prepares the clock for another request. start is when the origin got the request, or
// zero if it is the client's turn to send the rest of it.
func (c *headClock) reset(start time.Time) {
	turn := int64(0)
	if !start.IsZero() {
		turn = monotime.Of(start)
	}
	c.turnBegan.Store(turn)
	c.lastProgress.Store(0)
}

// setTurn starts the clock if it is the origin's turn, and stops it if it is the client's.
func (c *headClock) setTurn(origin bool) {
	if origin {
		c.turnBegan.Store(monotime.Of(time.Now()))
	} else {
		c.turnBegan.Store(0)
	}
}

// recordProgress records that the origin has reported progress.
func (c *headClock) recordProgress() { c.lastProgress.Store(monotime.Of(time.Now())) }

// maxTimeouts bounds the total wait for a response whose origin keeps reporting progress, as a
// multiple of the timeout.
const maxTimeouts = 10

// left returns how much of a timeout the origin has left to respond.
func (c *headClock) left(timeout time.Duration) time.Duration {
	turn, progress := c.turnBegan.Load(), c.lastProgress.Load()
	if turn == 0 {
		return timeout
	}
	now, last := monotime.Of(time.Now()), turn
	if progress != 0 {
		last = max(turn, progress)
	}
	inAll := maxTimeouts * min(timeout, math.MaxInt64/maxTimeouts)
	return min(timeout-time.Duration(now-last), inAll-time.Duration(now-turn))
}
