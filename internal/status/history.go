// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
)

const (
	// historyStep is the precision of the history. Steps end at multiples of it on the clock.
	historyStep = 5 * time.Second

	// historySteps is how many steps the history keeps: an hour.
	historySteps = 720
)

// history remembers what was counted in each step of the last hour. It takes at most 160 KiB of
// memory, and none before the first event.
//
// A timer reads the counters at the end of each step. After a step in which nothing has changed
// and no tunnel is open, the history is asleep: no timer runs until the next event. Nothing is
// counted in the steps in between, so they need no reading.
//
// All methods are safe for concurrent use.
type history struct {
	read   func() sums
	asleep atomic.Bool // set before a reading that finds nothing new, so that no event is missed

	mu    sync.Mutex
	ring  *[historySteps]point // by the step's number; nil: there is no step yet
	first int64                // the first step of the ring that is valid
	last  int64                // the last one
	idle  int64                // the step up to which the history was asleep
	sums  sums                 // at the end of the last step that was read
	timer *time.Timer          // ends the current step; nil before the first event
}

// sums are the counters since the process started, and the current numbers of tunnels and clients.
type sums struct {
	requests           [len(historyRequests)]int64
	bytesUp, bytesDown int64
	evicted            int64
	dials, responses   [metrics.NumDurations]int64

	tunnels, clients int64 // now
}

// historyRequests are the results of requests, named as in Stats.
var historyRequests = [...]string{"forwarded", "tunnels", "passed_on", "rate_limited", "refused", "failed", "auth_required"}

// sumsOf returns what the history keeps of the counters.
func sumsOf(s Stats) sums {
	r := s.Requests
	sums := sums{
		requests: [...]int64{r.Forwarded, r.Tunnels, r.PassedOn, r.RateLimited, r.Refused, r.Failed, r.AuthRequired},
		bytesUp:  s.BytesUp, bytesDown: s.BytesDown, evicted: s.Clients.Evicted,
		tunnels: s.Tunnels.Open, clients: s.Clients.Tracked,
	}
	copy(sums.dials[:], s.DialSeconds.Counts)
	copy(sums.responses[:], s.FirstByteSeconds.Counts)
	return sums
}

// point is what a step has added to the sums. If the counters were not read at the end of a step,
// the next step that has a reading includes what it would have added.
type point struct {
	unread             bool
	requests           [len(historyRequests)]int64
	bytesUp, bytesDown int64
	evicted            int64
	dials, responses   [metrics.NumDurations]uint32

	tunnels, clients int64 // at the end of the step
}

// newHistory returns the history of a process that started at a time, with all counters at 0.
func newHistory(started time.Time, read func() sums) *history {
	h := &history{read: read, last: stepAt(started)}
	h.first, h.idle = h.last+1, h.last
	h.asleep.Store(true)
	return h
}

// stepAt returns the number of the last step that has ended at a time.
func stepAt(t time.Time) int64 { return t.UnixNano() / int64(historyStep) }

// stepEnd returns when a step ends.
func stepEnd(step int64) time.Time { return time.Unix(0, step*int64(historyStep)) }

// wake makes the history read the counters at the end of the current step.
func (h *history) wake() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.asleep.Load() {
		return // another event was first
	}
	h.idle = stepAt(time.Now())
	h.asleep.Store(false)
	h.schedule()
}

// schedule sets the timer for the end of the current step.
func (h *history) schedule() {
	now := time.Now()
	left := stepEnd(stepAt(now) + 1).Sub(now)
	if h.timer == nil {
		h.timer = time.AfterFunc(left, h.endStep)
	} else {
		h.timer.Reset(left)
	}
}

// endStep reads the counters, and falls asleep if nothing happens.
func (h *history) endStep() {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.read()
	quiet := now == h.sums && now.tunnels == 0
	h.record(stepAt(time.Now()), now)
	if quiet {
		// An event is counted first, and then checks whether to wake the history. If it has
		// checked too early, this reading includes it.
		h.asleep.Store(true)
		if h.read() == now {
			return
		}
		h.asleep.Store(false)
	}
	h.schedule()
}

// record sets the last step. If the clock has been set back, it forgets the steps before.
func (h *history) record(step int64, now sums) {
	h.fillIdle()
	switch {
	case step == h.last:
		return // the timer was early by the drift of the clock; the next reading includes this one
	case step < h.last:
		h.first, h.last, h.idle = step, step-1, step-1
	}
	h.fill(step-1, point{unread: true})
	p := point{bytesUp: now.bytesUp - h.sums.bytesUp, bytesDown: now.bytesDown - h.sums.bytesDown, evicted: now.evicted - h.sums.evicted, tunnels: now.tunnels, clients: now.clients}
	for i := range p.requests {
		p.requests[i] = now.requests[i] - h.sums.requests[i]
	}
	for i := range p.dials {
		p.dials[i], p.responses[i] = uint32(now.dials[i]-h.sums.dials[i]), uint32(now.responses[i]-h.sums.responses[i])
	}
	h.append(p)
	h.sums = now
}

// fillIdle adds the steps in which the history was asleep.
func (h *history) fillIdle() {
	h.fill(h.idle, point{tunnels: h.sums.tunnels, clients: h.sums.clients})
}

// fill adds steps up to and including one.
func (h *history) fill(to int64, p point) {
	if to-h.last > historySteps {
		h.last = to - historySteps
	}
	for h.last < to {
		h.append(p)
	}
}

// append adds a step after the last one.
func (h *history) append(p point) {
	if h.ring == nil {
		h.ring = new([historySteps]point)
	}
	h.last++
	h.ring[h.last%historySteps] = p
	h.first = max(h.first, h.last-historySteps+1)
}

// after returns the steps after one, up to now. If that one is not over yet, because the clock has been
// set back since, it returns all steps.
func (h *history) after(step int64, now time.Time) History {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.asleep.Load() {
		h.idle = stepAt(now)
	}
	h.fillIdle()
	if step > h.last {
		step = 0
	}
	from := max(step+1, h.first)
	list := newHistoryList(stepEnd(from-1), max(0, h.last-from+1))
	for ; from <= h.last; from++ {
		list.add(&h.ring[from%historySteps])
	}
	return list
}

// evictedSince returns how many clients have been forgotten early since the end of a step. evicted is
// their number since the process started.
func (h *history) evictedSince(step, evicted int64) int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := evicted - h.sums.evicted
	for from := max(step+1, h.first); from <= h.last; from++ {
		n += h.ring[from%historySteps].evicted
	}
	return n
}
