// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"encoding/json"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
)

// counters is a process with counters and a history. In a bubble of synctest, the clock starts at
// the beginning of a step. A test that counts at the end of one races with the timer.
type counters struct {
	*history
	mu       sync.Mutex
	now      sums
	readings int
	reading  func(n int) // is called after each reading, with its number
}

func newCounters() *counters {
	c := new(counters)
	c.history = newHistory(time.Now(), func() sums {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.readings++
		now := c.now
		if c.reading != nil {
			c.reading(c.readings)
		}
		return now
	})
	return c
}

// count changes the counters, and then does what View.Active does.
func (c *counters) count(change func(*sums)) {
	c.mu.Lock()
	change(&c.now)
	c.mu.Unlock()
	if c.asleep.Load() {
		c.wake()
	}
}

func (c *counters) forward(n int64) { c.count(func(s *sums) { s.requests[0] += n }) }

// list returns the history, after the timer if it is due now.
func (c *counters) list() History {
	synctest.Wait()
	return c.after(0, time.Now())
}

func checkCounts(t *testing.T, what string, got Counts, want ...int64) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

func TestHistorySteps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		started := time.Now()
		c := newCounters()
		time.Sleep(12 * time.Second)
		c.forward(3)
		time.Sleep(2 * time.Second)
		c.count(func(s *sums) {
			s.requests[3], s.bytesUp, s.bytesDown, s.evicted, s.tunnels, s.clients = 1, 20, 30, 4, 5, 6
			s.dials[2], s.responses[13] = 7, 8
		})
		time.Sleep(7 * time.Second)
		c.forward(4)
		c.count(func(s *sums) { s.bytesDown, s.tunnels = 31, 0 })
		time.Sleep(6 * time.Second)
		list := c.list()
		if !list.Start.Equal(started) || list.StepSeconds != 5 {
			t.Errorf("start %v, steps of %d s; want %v, 5", list.Start, list.StepSeconds, started)
		}
		checkCounts(t, "forwarded", list.Requests["forwarded"], 0, 0, 3, 0, 4)
		checkCounts(t, "rate limited", list.Requests["rate_limited"], 0, 0, 1, 0, 0)
		checkCounts(t, "failed", list.Requests["failed"], 0, 0, 0, 0, 0)
		checkCounts(t, "up", list.BytesUp, 0, 0, 20, 0, 0)
		checkCounts(t, "down", list.BytesDown, 0, 0, 30, 0, 1)
		checkCounts(t, "evicted", list.Evicted, 0, 0, 4, 0, 0)
		checkCounts(t, "tunnels", list.Tunnels, 0, 0, 5, 5, 0)
		checkCounts(t, "clients", list.Clients, 0, 0, 6, 6, 6)
		if len(list.Dials) != 5 || list.Dials[1] != nil || list.Dials[3] != nil || !slices.Equal(list.Dials[2], []uint32{2: 7, 13: 0}) || !slices.Equal(list.FirstBytes[2], []uint32{13: 8}) {
			t.Errorf("durations %v, %v", list.Dials, list.FirstBytes)
		}
		// The steps that a viewer does not have yet.
		later := c.after(stepAt(started)+3, time.Now())
		if !later.Start.Equal(started.Add(15 * time.Second)) {
			t.Errorf("the later steps start at %v", later.Start)
		}
		checkCounts(t, "later", later.Requests["forwarded"], 0, 4)
		if none := c.after(stepAt(started)+5, time.Now()); len(none.Tunnels) != 0 || len(none.Requests["forwarded"]) != 0 {
			t.Errorf("got %v, want no steps", none)
		}
		if n := c.evictedSince(stepAt(started)+2, 5); n != 5 {
			t.Errorf("%d clients were forgotten, want 5", n)
		}
		if n := c.evictedSince(stepAt(started)+3, 5); n != 1 {
			t.Errorf("%d clients were forgotten later, want 1", n)
		}
		time.Sleep(time.Hour) // the bubble must end without a timer
		if list := c.list(); slices.Min(list.Clients) != 6 || slices.Max(list.Tunnels) != 0 || slices.Max(list.BytesDown) != 0 {
			t.Errorf("asleep: %+v", list)
		}
	})
}

// TestHistoryIsAnHour checks that the history forgets what is older than an hour, while it is
// awake and while it is asleep.
func TestHistoryIsAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCounters()
		time.Sleep(time.Second) // into a step
		for i := range int64(historySteps + 100) {
			c.forward(i + 1)
			time.Sleep(historyStep)
			if i == 9 {
				checkCounts(t, "the first steps", c.list().Requests["forwarded"], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
			}
		}
		list := c.list()
		got := list.Requests["forwarded"]
		if len(got) != historySteps || got[0] != 101 || got[historySteps-1] != 820 || !list.Start.Equal(time.Now().Add(-time.Second-time.Hour)) {
			t.Errorf("%d steps since %v, from %d to %d", len(got), list.Start, got[0], got[len(got)-1])
		}
		time.Sleep(time.Hour - 2*historyStep)
		got = c.list().Requests["forwarded"]
		checkCounts(t, "the end", got[:3], 819, 820, 0)
		if len(got) != historySteps || slices.Max(got[2:]) != 0 {
			t.Errorf("%d steps: %v", len(got), got)
		}
		time.Sleep(100 * time.Hour)
		c.forward(1)
		time.Sleep(historyStep)
		got = c.list().Requests["forwarded"]
		if len(got) != historySteps || got[historySteps-1] != 1 || slices.Max(got[:historySteps-1]) != 0 {
			t.Errorf("%d steps: %v", len(got), got)
		}
	})
}

// TestHistorySleeps checks that nothing reads the counters of an idle process, and that nothing is
// missed when it falls asleep.
func TestHistorySleeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCounters()
		expect := func(what string, readings int) {
			t.Helper()
			synctest.Wait()
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.readings != readings {
				t.Errorf("%s: %d readings, want %d", what, c.readings, readings)
			}
		}
		time.Sleep(24 * time.Hour)
		expect("at first", 0)
		if c.ring != nil {
			t.Error("a process without a request has memory for its history")
		}
		c.forward(1)
		time.Sleep(24 * time.Hour)
		expect("after one request", 3) // one finds it, and two find nothing more
		if list := c.list(); len(list.Tunnels) != historySteps {
			t.Errorf("%d steps", len(list.Tunnels))
		}
		expect("after a viewer", 3)

		// A request counts while the history falls asleep.
		c.forward(1)
		c.mu.Lock()
		c.reading = func(n int) {
			if n == 5 {
				c.now.requests[0]++ // and then looks whether to wake it, which is not yet necessary
			}
		}
		c.mu.Unlock()
		time.Sleep(14 * time.Second)
		expect("around the request", 6)
		if c.asleep.Load() {
			t.Error("the history is asleep although a request has counted")
		}
		time.Sleep(time.Hour - 10*time.Second)
		list := c.list().Requests["forwarded"]
		expect("after the request", 9)
		checkCounts(t, "the requests", list[:4], 1, 0, 1, 0)

		// An open tunnel may transfer bytes at any time, and no request tells.
		c.count(func(s *sums) { s.tunnels = 1 })
		time.Sleep(time.Minute)
		expect("with a tunnel", 9+12)
		c.count(func(s *sums) { s.tunnels = 0 })
		time.Sleep(time.Hour)
		expect("without a tunnel", 9+12+3)
	})
}

// TestHistoryGaps checks that steps are marked in which the process did not run, and that the
// clock may be set back.
func TestHistoryGaps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCounters()
		c.forward(1)
		time.Sleep(7 * time.Second)
		c.timer.Stop() // as if the machine were suspended
		c.forward(2)
		time.Sleep(15 * time.Second)
		c.wake() // by an event that was not the first
		c.forward(4)
		c.endStep()
		list := c.list()
		checkCounts(t, "forwarded", list.Requests["forwarded"], 1, Unread, Unread, 6)
		checkCounts(t, "tunnels", list.Tunnels, 0, Unread, Unread, 0)
		text, err := json.Marshal(list.Requests["forwarded"])
		if err != nil || string(text) != "[1,null,null,6]" {
			t.Errorf("%s, %v", text, err)
		}
		var again Counts
		if err := json.Unmarshal(text, &again); err != nil || !slices.Equal(again, list.Requests["forwarded"]) {
			t.Errorf("read again: %v, %v", again, err)
		}
		c.forward(8)
		c.timer.Stop()
		time.Sleep(2 * time.Hour)
		c.endStep()
		list = c.list()
		if got := list.Requests["forwarded"]; len(got) != historySteps || got[0] != Unread || got[historySteps-1] != 8 {
			t.Errorf("after two hours: %d steps, %v", len(got), got)
		}

		c.timer.Stop()
		c.record(c.last+1_000_000_000_000, c.sums) // is not slow
		c.mu.Lock()
		c.now.requests[0] += 16
		now := c.now
		c.mu.Unlock()
		c.record(c.last-100, now)
		checkCounts(t, "after the clock was set back", c.after(0, time.Now()).Requests["forwarded"], 16)
		now.requests[0]++
		c.record(c.last, now) // slightly early
		now.requests[0]++
		c.record(c.last+1, now)
		checkCounts(t, "one step later", c.after(0, time.Now()).Requests["forwarded"], 16, 2)
	})
}

// TestHistoryWhenTheClockIsSetBack checks that the history goes on if the clock is set back to before
// the time at which it was asleep last.
func TestHistoryWhenTheClockIsSetBack(t *testing.T) {
	c := newHistory(time.Unix(1e9, 0), func() sums { return sums{} })
	awake := stepAt(time.Unix(1e9, 0)) + 1000
	c.idle = awake // an event has woken it
	c.asleep.Store(false)
	var now sums
	for i := range int64(4) {
		now.requests[0]++
		c.record(awake-500+i, now)
	}
	checkCounts(t, "forwarded", c.after(0, time.Unix(0, 0)).Requests["forwarded"], 1, 1, 1, 1)
	checkCounts(t, "a viewer from before", c.after(awake, time.Unix(0, 0)).Requests["forwarded"], 1, 1, 1, 1)
}

// TestHistoryIsSafe checks concurrent events and viewers with the race detector, and that every
// event is in the history.
func TestHistoryIsSafe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCounters()
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for j := range 100 {
					c.forward(1)
					time.Sleep(time.Duration(i*7+j%3*11+1) * 100 * time.Millisecond)
					if j%10 == i {
						c.after(0, time.Now())
					}
				}
			})
		}
		wg.Wait()
		time.Sleep(11 * time.Second)
		var total int64
		for _, n := range c.list().Requests["forwarded"] {
			total += n
		}
		if total != 800 {
			t.Errorf("the history has %d requests, want 800", total)
		}
	})
}

// TestHistoryMemory checks the bound that the comment of history promises.
func TestHistoryMemory(t *testing.T) {
	if n := unsafe.Sizeof([historySteps]point{}); n > 160<<10 {
		t.Errorf("an hour takes %d bytes", n)
	}
	c := newCounters()
	c.after(0, time.Now())
	step := c.last
	if n := testing.AllocsPerRun(2000, func() {
		step++
		c.record(step, sums{})
	}); n != 0 {
		t.Errorf("a step allocates %v times", n)
	}
}

// BenchmarkActive measures what each event costs.
func BenchmarkActive(b *testing.B) {
	v := New(Inputs{Started: time.Now()})
	v.history.asleep.Store(false)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			v.Active()
		}
	})
}
