// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The metrics are the process's. They are made once and registered with each
// config's registry, so that they count on across reloads and for all handlers
// together. No label has values that clients choose.

// kind is what a request is to the proxy.
type kind int

const (
	kindTunnel  kind = iota // CONNECT
	kindForward             // a plain request to an origin
	kindOther               // for this server itself
	kinds
)

// outcome is what came of a request.
type outcome int

const (
	outcomeOK           outcome = iota // a tunnel, or a response of the origin or the next handler
	outcomeLimited                     // no token left
	outcomeRefused                     // another 4xx of the proxy's own, or 508
	outcomeFailed                      // another 5xx of its own, or a response that broke off
	outcomeCanceled                    // the client left before it had an answer, or all of it
	outcomeAuthRequired                // a challenge (407) for a request without credentials
	outcomes
)

var (
	kindNames    = [kinds]string{"tunnel", "forward", "other"}
	outcomeNames = [outcomes]string{"ok", "rate_limited", "refused", "failed", "canceled", "auth_required"}
)

// dialOutcomes are those of connecting to a target or a parent.
var dialOutcomes = []string{"ok", "refused", "timeout", "dns", "denied", "canceled", "failed"}

var durationBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

var metrics = newProcessMetrics()

type processMetrics struct {
	requests  [kinds][outcomes]prometheus.Counter
	refusals  *prometheus.CounterVec // by reason and cause
	limited   prometheus.Counter     // of refusals, those by the limiter
	reported  *prometheus.CounterVec // by what
	invalid   *prometheus.CounterVec // by reason
	evictions prometheus.Counter

	authFailures prometheus.Counter
	durations    prometheus.Histogram // of tunnels
	up, down     prometheus.Counter   // bytes of tunnels, as far as they are counted
	responses    prometheus.Histogram

	forwardedUp, forwardedDown prometheus.Counter // bytes of the content of messages

	dials      *prometheus.HistogramVec
	collectors []prometheus.Collector
}

func newProcessMetrics() *processMetrics {
	const prefix = "caddy_async_proxy_"
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + name, Help: help}, labels)
	}
	m := &processMetrics{
		refusals: counters("refusals_total", "Responses of the proxy's own, by the error type of RFC 9209 and by cause.", "reason", "cause"),
		reported: counters("reported_total", "What would have been refused, had it not been only to be reported.", "what"),
		invalid:  counters("invalid_requests_total", "Connections and requests that were refused before a handler saw them, by reason.", "reason"),
		evictions: prometheus.NewCounter(prometheus.CounterOpts{
			Name: prefix + "rate_limit_evictions_total",
			Help: "Clients whose tokens were forgotten early because max_clients were tracked.",
		}),
		authFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: prefix + "auth_failures_total",
			Help: "Logins with wrong credentials.",
		}),
		durations: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: prefix + "tunnel_duration_seconds", Help: "How long tunnels were open that have ended.",
			Buckets: []float64{.1, 1, 10, 60, 600, 3600, 6 * 3600, 24 * 3600},
		}),
		responses: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: prefix + "response_duration_seconds", Help: "How long it took from a forwarded request until the head of its response was there.",
			Buckets: durationBuckets,
		}),
		dials: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: prefix + "dial_duration_seconds", Help: "How long it took to connect to a target, resolving included, or to find out that it is not possible.",
			Buckets: durationBuckets,
		}, []string{"outcome"}),
	}
	for c, row := range causes {
		m.refusals.WithLabelValues(row.kind, string(c))
	}
	m.limited = m.refusals.WithLabelValues(deniedRequest, string(causeRateLimited))
	requests := counters("requests_total", "Requests by what they are to the proxy and what came of them.", "kind", "outcome")
	for k := range kinds {
		for o := range outcomes {
			m.requests[k][o] = requests.WithLabelValues(kindNames[k], outcomeNames[o])
		}
	}
	for _, what := range []string{"rules", "limits"} {
		m.reported.WithLabelValues(what)
	}
	for reason := range invalids {
		m.invalid.WithLabelValues(string(reason))
	}
	for _, outcome := range dialOutcomes {
		m.dials.WithLabelValues(outcome)
	}
	bytes := counters("tunnel_bytes_total", "Bytes through tunnels, open ones included: up from clients, down to them.", "direction")
	m.up, m.down = bytes.WithLabelValues("up"), bytes.WithLabelValues("down")
	forwarded := counters("forwarded_bytes_total", "Bytes of the content of forwarded requests (up) and responses (down).", "direction")
	m.forwardedUp, m.forwardedDown = forwarded.WithLabelValues("up"), forwarded.WithLabelValues("down")
	m.collectors = []prometheus.Collector{
		requests, m.refusals, m.reported, m.invalid, m.evictions, m.authFailures, m.durations, m.dials, m.responses, forwarded, stateCollector{bytes},
	}
	return m
}

// registerMetrics makes the metrics part of registry. Another handler of the
// same config may have done so before.
func registerMetrics(registry *prometheus.Registry) error {
	for _, c := range metrics.collectors {
		if err := registry.Register(c); err != nil && !errors.As(err, &prometheus.AlreadyRegisteredError{}) {
			return err
		}
	}
	return nil
}

// count counts a request that has its answer, once. It returns the answer that
// the proxy has to give itself, if err, which is what serve says, is one.
func (v *visit) count(err error) *refusal {
	o, f := outcomeOf(err)
	switch {
	case v.counted:
		return f
	case v.limited:
		o = outcomeLimited
		metrics.limited.Inc()
	case f != nil && o != outcomeCanceled:
		metrics.refusals.WithLabelValues(f.kind, string(causeOf(f))).Inc()
	}
	v.counted = true
	metrics.requests[v.kind][o].Inc()
	return f
}

// outcomeOf tells what came of a request that has passed the limiter, and the
// answer of the proxy's own, if it is that.
func outcomeOf(err error) (outcome, *refusal) {
	if err == nil {
		return outcomeOK, nil // at no cost
	}
	var f *refusal
	switch {
	case errors.As(err, &f) && f.status == statusClientClosedRequest:
		return outcomeCanceled, f
	case f != nil && causeOf(f) == causeAuthRequired:
		return outcomeAuthRequired, f
	case f != nil && (f.status < 500 || f.status == http.StatusLoopDetected):
		return outcomeRefused, f
	case f != nil, errors.As(err, new(brokenOff)):
		return outcomeFailed, f
	}
	return outcomeOK, nil
}

// countDial counts an attempt to connect that began at start.
func countDial(ctx context.Context, start time.Time, err error) {
	metrics.dials.WithLabelValues(dialOutcome(ctx, err)).Observe(time.Since(start).Seconds())
}

// dialOutcome tells what came of an attempt to connect.
func dialOutcome(ctx context.Context, err error) string {
	if err == nil {
		return "ok" // at no cost
	}
	var (
		denied  *deniedError
		dns     *net.DNSError
		timeout net.Error
	)
	switch {
	case ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded): // that is the time limit's
		return "canceled"
	case errors.As(err, &denied):
		return "denied"
	case noDescriptors(err):
		return "failed"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	case errors.As(err, &dns):
		return "dns"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	}
	return "failed"
}

// count counts a tunnel that has ended.
func (t *tunnel) count() {
	metrics.durations.Observe(time.Since(t.start).Seconds())
	t.countBytes()
	t.owner.limiter.countBytes(t.bucket, t.up.Load(), t.down.Load())
}

// countForwarded counts a part of the content of a request or its response.
func (h *Handler) countForwarded(client netip.Addr, up, down int64) {
	if up+down == 0 {
		return
	}
	metrics.forwardedUp.Add(float64(up))
	metrics.forwardedDown.Add(float64(down))
	h.limiter.countBytes(client, up, down)
}

// countBytes notes bytes for a client, if it is known.
func (l *limiter) countBytes(client netip.Addr, up, down int64) {
	g := l.gens.Load()
	b, ok := g.cur.Load(client)
	if !ok {
		b, ok = g.old.Load(client)
	}
	if ok && up+down > 0 {
		b.bytesUp.Add(up)
		b.bytesDown.Add(down)
	}
}

// countBytes counts what has gone through the tunnel since it was last called.
func (t *tunnel) countBytes() {
	countNew(metrics.up, &t.up.Int64, &t.countedUp)
	countNew(metrics.down, &t.down.Int64, &t.countedDown)
}

// countNew adds to c by how much n has grown. Concurrent callers add it once.
func countNew(c prometheus.Counter, n, counted *atomic.Int64) {
	was, now := counted.Load(), n.Load()
	if now > was && counted.CompareAndSwap(was, now) {
		c.Add(float64(now - was))
	}
}

// stateCollector tells what is there now, when it is asked.
type stateCollector struct{ bytes *prometheus.CounterVec }

var (
	descClients = prometheus.NewDesc("caddy_async_proxy_rate_limit_clients", "Clients that the limiter tracks now.", nil, nil)
	descTunnels = prometheus.NewDesc("caddy_async_proxy_tunnels", "Tunnels that are open now, or being opened.", nil, nil)
	descLimit   = prometheus.NewDesc("caddy_async_proxy_tunnels_limit", "The least max_tunnels of the sites; 0 if none has one.", nil, nil)
	descIdle    = prometheus.NewDesc("caddy_async_proxy_idle_connections", "Connections to origins and parents that wait for another request.", nil, nil)
)

func (s stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descClients, descTunnels, descLimit, descIdle} {
		ch <- d
	}
	s.bytes.Describe(ch)
}

func (s stateCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, n int) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n))
	}
	clients := 0
	limiters.Range(func(_, value any) bool {
		clients += value.(*limiter).clients()
		return true
	})
	gauge(descClients, clients)
	var tunnels, limit, idle int
	eachRegistry(func(r *registry) {
		tunnels, limit = int(r.admitted.Load()), r.limit()
		r.countBytes()
		r.handlers.Range(func(h *Handler, _ struct{}) bool {
			idle += h.idleConnections()
			return true
		})
	})
	gauge(descTunnels, tunnels)
	gauge(descLimit, limit)
	gauge(descIdle, idle)
	s.bytes.Collect(ch)
}
