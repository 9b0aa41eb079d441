// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package metrics

import "github.com/prometheus/client_golang/prometheus"

// Policy holds the counters of the policies with one name, in all zones. All methods are safe for
// concurrent use.
type Policy struct {
	set      *Set
	name     string
	requests [numOutcomes]prometheus.Counter
	users    int // callers of Set.Policy that have not called Release yet; under set.mu
}

// Policy returns the counters of a policy. While any caller has not released them yet, all callers
// get the same ones, so that they continue after a reload. The caller must call Release once for each
// call.
func (s *Set) Policy(name string) *Policy {
	s.mu.Lock()
	defer s.mu.Unlock()
	y := s.policies[name]
	if y == nil {
		y = &Policy{set: s, name: name}
		for o := range numOutcomes {
			y.requests[o] = s.policyRequests.WithLabelValues(name, outcomeNames[o])
		}
		s.policies[name] = y
	}
	y.users++
	return y
}

// Release removes the counters if no other caller uses them, so that only policies of configs in use
// have counters. Requests that are counted later are lost.
func (y *Policy) Release() {
	y.set.mu.Lock()
	defer y.set.mu.Unlock()
	if y.users--; y.users == 0 {
		delete(y.set.policies, y.name)
		y.set.policyRequests.DeletePartialMatch(prometheus.Labels{policyLabel: y.name})
	}
}

// Request counts a completed request.
func (y *Policy) Request(outcome Outcome) { y.requests[outcome].Inc() }
