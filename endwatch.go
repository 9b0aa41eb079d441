// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import "time"

// endWatch follows what one end of a tunnel takes. Bytes that were written count
// when the kernel has them, so that an end that takes nothing and one that takes
// little look the same for as long as the kernel's buffer is full. What the other
// side has acknowledged tells them apart.
type endWatch struct {
	taken   int64  // bytes that were written to it, at the last look
	since   int64  // when it last took something, or had nothing to take, since epoch
	pending bool   // there was something for it that it had not taken, at the last look
	checked int64  // when its socket was last looked at, since epoch; 0: not since taken has changed
	acked   uint64 // by the other side of the socket, then
}

// look reports whether the end has taken something since the last look. The socket of
// an end that has nothing to take is looked at only once in an interval, since most
// tunnels are idle.
func (e *endWatch) look(now int64, f *flow, p peer, interval time.Duration) (took bool) {
	taken, waiting := f.Load(), f.waiting.Load()
	if took = taken != e.taken; took || e.since == 0 {
		*e = endWatch{taken: taken, since: now, pending: waiting, acked: e.acked}
		return took
	}
	if waiting && !e.pending {
		e.pending, e.since = true, now
	}
	if !e.pending && e.checked != 0 && now-e.checked < int64(interval) {
		return false
	}
	acked, queued := p.sendState(e.acked)
	took = e.checked != 0 && acked != e.acked
	e.checked, e.acked, e.pending = now, acked, waiting || queued
	if took || !e.pending {
		e.since = now
	}
	return took
}

// stalledFor returns for how long the end has taken nothing of what there is for it.
func (e *endWatch) stalledFor(now int64) time.Duration {
	if !e.pending {
		return 0
	}
	return time.Duration(now - e.since)
}

// isAtRest reports whether the end has taken all that there was for it, and nothing
// since the last look.
func (e *endWatch) isAtRest(f *flow, p peer) bool {
	if f.waiting.Load() || f.Load() != e.taken {
		return false
	}
	_, queued := p.sendState(e.acked)
	return !queued
}
