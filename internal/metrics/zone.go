// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package metrics

import "github.com/prometheus/client_golang/prometheus"

// Zone holds the counters of one zone of sites. All methods are safe for concurrent use.
type Zone struct {
	requests    [numKinds][numOutcomes]prometheus.Counter
	refusals    *prometheus.CounterVec // by reason and cause
	rateLimited prometheus.Counter     // the element of refusals for rate limiting

	tunnelUp, tunnelDown       prometheus.Counter
	forwardedUp, forwardedDown prometheus.Counter
}

// Zone returns the counters of a zone. It is the same Zone each time, so that counters
// continue after a reload and zones can be compared. Names must come from the config,
// because a Zone is kept as long as its set.
func (s *Set) Zone(name string) *Zone {
	s.mu.Lock()
	defer s.mu.Unlock()
	z := s.zones[name]
	if z == nil {
		z = s.newZone(name)
		s.zones[name] = z
	}
	return z
}

// newZone creates a zone's counters with all labels that are known in advance.
func (s *Set) newZone(name string) *Zone {
	z := &Zone{
		refusals:      s.refusals.MustCurryWith(prometheus.Labels{zoneLabel: name}),
		tunnelUp:      s.tunnelBytes.WithLabelValues(name, "up"),
		tunnelDown:    s.tunnelBytes.WithLabelValues(name, "down"),
		forwardedUp:   s.forwardedBytes.WithLabelValues(name, "up"),
		forwardedDown: s.forwardedBytes.WithLabelValues(name, "down"),
	}
	for k := range numKinds {
		for o := range numOutcomes {
			z.requests[k][o] = s.requests.WithLabelValues(name, kindNames[k], outcomeNames[o])
		}
	}
	for _, r := range s.labels.Refusals {
		z.refusals.WithLabelValues(r.ErrorType, r.Cause)
	}
	z.rateLimited = z.refusals.WithLabelValues(s.labels.RateLimited.ErrorType, s.labels.RateLimited.Cause)
	return z
}

// Request counts a completed request.
func (z *Zone) Request(kind Kind, outcome Outcome) { z.requests[kind][outcome].Inc() }

// Refused counts a response that the proxy generated itself.
func (z *Zone) Refused(r Refusal) { z.refusals.WithLabelValues(r.ErrorType, r.Cause).Inc() }

// RateLimited counts a refusal of a client that has no token. Its counter is looked up in advance,
// because such refusals are frequent in a flood.
func (z *Zone) RateLimited() { z.rateLimited.Inc() }

// TunnelBytes counts bytes through tunnels.
func (z *Zone) TunnelBytes(up, down int64) {
	z.tunnelUp.Add(float64(up))
	z.tunnelDown.Add(float64(down))
}

// ForwardedBytes counts content bytes of requests and responses.
func (z *Zone) ForwardedBytes(up, down int64) {
	z.forwardedUp.Add(float64(up))
	z.forwardedDown.Add(float64(down))
}
