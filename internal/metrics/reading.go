// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Reading holds the values of a set's counters since the process started, summed over all zones.
type Reading struct {
	Requests    [numKinds][numOutcomes]int64
	Refusals    map[string]int64 // by error type
	Causes      map[string]int64 // refusals by cause, if they have one
	Evictions   int64
	DialsOK     int64
	DialsFailed int64

	TunnelBytesUp, TunnelBytesDown       int64
	ForwardedBytesUp, ForwardedBytesDown int64

	DialSeconds     Histogram // of dials that succeeded
	ResponseSeconds Histogram
}

// Histogram counts durations per bucket, not cumulatively: above the previous bound of
// Buckets and up to this one. The last count is that of all longer durations.
type Histogram struct {
	Buckets []float64
	Counts  []int64
}

// Read returns the current values of the counters.
func (s *Set) Read() Reading {
	r := Reading{
		Refusals: map[string]int64{}, Causes: map[string]int64{}, Evictions: s.evicted.Load(),
		ResponseSeconds: histogram(read(s.responses)),
	}
	s.mu.Lock()
	for _, z := range s.zones {
		z.addTo(&r)
	}
	s.mu.Unlock()
	for _, m := range elements(s.refusals) {
		labels := map[string]string{}
		for _, label := range m.Label {
			labels[label.GetName()] = label.GetValue()
		}
		n := int64(m.GetCounter().GetValue())
		r.Refusals[labels["reason"]] += n
		if labels["cause"] != "" {
			r.Causes[labels["cause"]] += n
		}
	}
	for _, m := range elements(s.dials) {
		if m.Label[0].GetValue() == "ok" {
			r.DialsOK += int64(m.GetHistogram().GetSampleCount())
			r.DialSeconds = histogram(m)
		} else {
			r.DialsFailed += int64(m.GetHistogram().GetSampleCount())
		}
	}
	return r
}

// addTo adds the zone's counters to r, except for refusals.
func (z *Zone) addTo(r *Reading) {
	for k := range numKinds {
		for o := range numOutcomes {
			r.Requests[k][o] += count(z.requests[k][o])
		}
	}
	r.TunnelBytesUp += count(z.tunnelUp)
	r.TunnelBytesDown += count(z.tunnelDown)
	r.ForwardedBytesUp += count(z.forwardedUp)
	r.ForwardedBytesDown += count(z.forwardedDown)
}

func read(m prometheus.Metric) *dto.Metric {
	var d dto.Metric
	_ = m.Write(&d) // fails only for invalid metrics
	return &d
}

func count(c prometheus.Counter) int64 { return int64(read(c).GetCounter().GetValue()) }

func elements(c prometheus.Collector) []*dto.Metric {
	ch := make(chan prometheus.Metric)
	go func() { c.Collect(ch); close(ch) }()
	var list []*dto.Metric
	for m := range ch {
		list = append(list, read(m))
	}
	return list
}

func histogram(m *dto.Metric) Histogram {
	h := Histogram{Buckets: []float64{}, Counts: []int64{}}
	var below uint64
	for _, b := range m.GetHistogram().GetBucket() {
		h.Buckets = append(h.Buckets, b.GetUpperBound())
		h.Counts = append(h.Counts, int64(b.GetCumulativeCount()-below))
		below = b.GetCumulativeCount()
	}
	h.Counts = append(h.Counts, int64(m.GetHistogram().GetSampleCount()-below))
	return h
}
