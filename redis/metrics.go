// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are shared by the whole process. They are created once and registered with each
// config's registry, so that counts survive reloads.
var metrics = struct {
	duration  prometheus.Histogram
	errors    *prometheus.CounterVec
	fallbacks *prometheus.CounterVec
}{
	duration: prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "caddy_async_proxy_limiter_duration_seconds",
		Help:    "Time that requests waited for the shared limiter, including failures.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, 1},
	}),
	errors: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_async_proxy_limiter_errors_total",
		Help: "Failed queries to the shared limiter, by kind: timeout, connection or answer.",
	}, []string{"kind"}),
	fallbacks: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "caddy_async_proxy_limiter_fallbacks_total",
		Help: "Requests that the shared limiter did not count, by the on_error policy that applied.",
	}, []string{"on_error"}),
}

// registerMetrics registers the metrics with registry. Another limiter of the same config
// may already have done so.
func registerMetrics(registry *prometheus.Registry) error {
	for _, c := range []prometheus.Collector{metrics.duration, metrics.errors, metrics.fallbacks} {
		if err := registry.Register(c); err != nil && !errors.As(err, &prometheus.AlreadyRegisteredError{}) {
			return err
		}
	}
	return nil
}
