// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import "time"

// endWatch tracks whether one end of a tunnel takes the bytes that are sent to it. Written bytes
// count as taken as soon as the kernel has them. While the kernel's buffer is full, that does not
// distinguish an end that reads slowly from one that does not read at all. The acknowledgements
// of the other side do.
type endWatch struct {
	written       int64  // bytes written to the end, as of the last update
	since         int64  // when the end last took bytes or none were waiting, since epoch
	pending       bool   // bytes were waiting for the end, as of the last update
	socketChecked int64  // when the socket was last checked, since epoch; 0: not since written changed
	acked         uint64 // bytes acknowledged by the other side, when the socket was last checked
}

// update reports whether the end has taken bytes since the last update. If no bytes are waiting,
// it checks the socket only once per interval, because most tunnels are idle.
func (e *endWatch) update(now int64, f *flow, p End, interval time.Duration) (took bool) {
	taken, waiting := f.Load(), f.writing.Load()
	if took = taken != e.written; took || e.since == 0 {
		*e = endWatch{written: taken, since: now, pending: waiting, acked: e.acked}
		return took
	}
	if waiting && !e.pending {
		e.pending, e.since = true, now
	}
	if !e.pending && e.socketChecked != 0 && now-e.socketChecked < int64(interval) {
		return false
	}
	acked, queued := p.SendState(e.acked)
	took = e.socketChecked != 0 && acked != e.acked
	e.socketChecked, e.acked, e.pending = now, acked, waiting || queued
	if took || !e.pending {
		e.since = now
	}
	return took
}

// stalledFor returns how long the end has taken nothing although bytes wait for it.
func (e *endWatch) stalledFor(now int64) time.Duration {
	if !e.pending {
		return 0
	}
	return time.Duration(now - e.since)
}

// isAtRest reports whether no bytes wait for the end, and none were written since the last
// update.
func (e *endWatch) isAtRest(f *flow, p End) bool {
	if f.writing.Load() || f.Load() != e.written {
		return false
	}
	_, queued := p.SendState(e.acked)
	return !queued
}
