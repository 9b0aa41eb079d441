// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// What report_only may suppress, for the metric.
const (
	reportedRules  = "rules"
	reportedLimits = "limits"
)

// dialOutcomes lists the outcomes of connecting to a target or a parent.
var dialOutcomes = []string{"ok", "refused", "timeout", "dns", "denied", "canceled", "failed"}

// metricLabels returns the values of labels that exist before anything has been counted.
func metricLabels() metrics.Labels {
	labels := metrics.Labels{
		RateLimited: metrics.Refusal{ErrorType: deniedRequest, Cause: string(causeRateLimited)},
		Reported:    []string{reportedRules, reportedLimits},
		Dials:       dialOutcomes,
	}
	for c, row := range causes {
		if row.label == c { // each label once
			labels.Refusals = append(labels.Refusals, metrics.Refusal{ErrorType: row.errorType, Cause: string(c)})
		}
	}
	for reason := range invalidLogs {
		labels.Invalid = append(labels.Invalid, string(reason))
	}
	return labels
}

// count counts a completed request, unless it has been counted already. err is the result of serve.
// If err is a response that the proxy must generate itself, count returns it.
func (p *proxy) count(v *transaction, err error) *refusal {
	o, f := outcomeOf(err)
	switch {
	case v.counted:
		return f
	case v.rateLimited:
		o = metrics.RateLimited
		p.zone.RateLimited()
	case f != nil && o != metrics.Canceled:
		p.zone.Refused(metrics.Refusal{ErrorType: f.errorType, Cause: string(f.cause)})
	}
	v.counted = true
	p.zone.Request(v.kind, o)
	if v.kind != metrics.Other {
		v.policy.counters.Request(o)
	}
	program.status.Active()
	return f
}

// outcomeOf returns the outcome of a request that has passed the limiter, and the response
// that the proxy must generate itself, if any.
func outcomeOf(err error) (metrics.Outcome, *refusal) {
	if err == nil {
		return metrics.OK, nil // the fast path
	}
	var f *refusal
	switch {
	case errors.As(err, &f) && f.status == statusClientClosedRequest:
		return metrics.Canceled, f
	case f != nil && f.cause == causeAuthRequired:
		return metrics.AuthRequired, f
	case f != nil && (f.status < 500 || f.status == http.StatusLoopDetected):
		return metrics.Refused, f
	case f != nil, errors.As(err, new(cutOffError)):
		return metrics.Failed, f
	}
	return metrics.OK, nil
}

// countDial counts an attempt to connect that began at start.
func countDial(ctx context.Context, start time.Time, err error) {
	program.metrics.Dial(dialOutcome(ctx, err), time.Since(start))
}

// countForwarded counts content bytes of a request to a target or of its response.
func (p *proxy) countForwarded(target string, from clientIdentity, up, down int64) {
	if up+down == 0 {
		return
	}
	p.zone.ForwardedBytes(up, down)
	from.policy.limiter.AddBytes(from.limitKey, up, down)
	program.status.Transferred(target, up+down)
	program.status.Active()
}

// countTunnelBytes counts the bytes of open tunnels.
func (p *process) countTunnelBytes() {
	for t := range p.tunnels.All() {
		countTunnelBytes(t)
	}
}

// countTunnelBytes counts the bytes that the tunnel has transferred since the last call.
func countTunnelBytes(t *tunnel.Tunnel) {
	up, down := t.Growth()
	openedBy(t).zone.TunnelBytes(up, down)
	program.status.Transferred(t.Target, up+down)
}

// metricsState returns what the gauges show. It counts the bytes of open tunnels first.
func metricsState() (state metrics.State) {
	p := currentProcess()
	if p == nil {
		return state
	}
	for t := range p.eachTable {
		state.Clients += t.Len()
	}
	state.Tunnels, state.TunnelLimit = p.tunnels.Reserved(), p.tunnelLimit()
	p.countTunnelBytes()
	for each := range p.proxies.All() {
		state.IdleConnections += each.idleConnections()
	}
	return state
}
