// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import "time"

// endWatch tracks how much one end of a tunnel takes. Written bytes count as soon as the
// kernel has them. While the kernel's buffer is full, that does not tell an end that reads
// slowly from one that does not read at all. The other side's acknowledgements do.
type endWatch struct {
	written       int64  // bytes written to it, as of the last look
	since         int64  // when it last took bytes or none were waiting, since epoch
	pending       bool   // bytes were waiting for it, as of the last look
	socketChecked int64  // when its socket was last checked, since epoch; 0: not since taken changed
	acked         uint64 // bytes acknowledged by the other side, as of then
}

// update reports whether the end has taken bytes since the last look. Without bytes waiting,
// it checks the socket only once per interval, since most tunnels are idle.
func (e *endWatch) update(now int64, f *Flow, p End, interval time.Duration) (took bool) {
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
// look.
func (e *endWatch) isAtRest(f *Flow, p End) bool {
	if f.writing.Load() || f.Load() != e.written {
		return false
	}
	_, queued := p.SendState(e.acked)
	return !queued
}
