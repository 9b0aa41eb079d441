// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"encoding/json"
	"strconv"
	"time"
)

// History is what was counted in the steps of the last hour, or in some of them. All lists have an
// element for each step.
type History struct {
	Start       time.Time         `json:"start"` // of the first step
	StepSeconds int               `json:"step_seconds"`
	Requests    map[string]Counts `json:"requests"` // by result
	BytesUp     Counts            `json:"bytes_up"`
	BytesDown   Counts            `json:"bytes_down"`
	Tunnels     Counts            `json:"tunnels"` // open at the end of the step
	Clients     Counts            `json:"clients"` // tracked at the end of the step
	Evicted     Counts            `json:"evicted"`
	Dials       Durations         `json:"dial_seconds"`
	FirstBytes  Durations         `json:"first_byte_seconds"`
}

// Counts has a number for each step. In JSON, Unread is null.
type Counts []int64

// Unread stands for a step at whose end the counters were not read, because the machine was
// suspended or overloaded. What was counted in it is in the next step.
const Unread = -1

// Durations has a histogram for each step, nil if that would be empty.
type Durations [][]uint32

// MarshalJSON implements json.Marshaler.
func (c Counts) MarshalJSON() ([]byte, error) {
	text := []byte{'['}
	for i, n := range c {
		if i > 0 {
			text = append(text, ',')
		}
		if n == Unread {
			text = append(text, "null"...)
		} else {
			text = strconv.AppendInt(text, n, 10)
		}
	}
	return append(text, ']'), nil
}

// UnmarshalJSON implements json.Unmarshaler.
func (c *Counts) UnmarshalJSON(text []byte) error {
	var list []*int64
	if err := json.Unmarshal(text, &list); err != nil {
		return err
	}
	*c = make(Counts, len(list))
	for i, n := range list {
		(*c)[i] = Unread
		if n != nil {
			(*c)[i] = *n
		}
	}
	return nil
}

// newHistoryList returns a list without steps and with room for n.
func newHistoryList(start time.Time, n int64) History {
	list := History{
		Start: start.UTC(), StepSeconds: int(historyStep / time.Second), Requests: make(map[string]Counts),
		Dials: make(Durations, 0, n), FirstBytes: make(Durations, 0, n),
	}
	for _, name := range historyRequests {
		list.Requests[name] = make(Counts, 0, n)
	}
	for _, counts := range []*Counts{&list.BytesUp, &list.BytesDown, &list.Tunnels, &list.Clients, &list.Evicted} {
		*counts = make(Counts, 0, n)
	}
	return list
}

// lastStep returns the number of the last step, or if there is none, of the one before the first.
func (l *History) lastStep() int64 { return stepAt(l.Start) + int64(len(l.Tunnels)) }

// add adds a step.
func (l *History) add(p *point) {
	add := func(counts *Counts, n int64) {
		if p.unread {
			n = Unread
		}
		*counts = append(*counts, n)
	}
	for i, name := range historyRequests {
		counts := l.Requests[name]
		add(&counts, p.requests[i])
		l.Requests[name] = counts
	}
	add(&l.BytesUp, p.bytesUp)
	add(&l.BytesDown, p.bytesDown)
	add(&l.Tunnels, p.tunnels)
	add(&l.Clients, p.clients)
	add(&l.Evicted, p.evicted)
	l.Dials = append(l.Dials, unlessEmpty(p.dials[:]))
	l.FirstBytes = append(l.FirstBytes, unlessEmpty(p.responses[:]))
}

// unlessEmpty returns a copy of the counts of a histogram, or nil if all are 0.
func unlessEmpty(counts []uint32) []uint32 {
	for _, n := range counts {
		if n > 0 {
			return append([]uint32(nil), counts...)
		}
	}
	return nil
}
