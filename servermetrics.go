// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/puzpuzpuz/xsync/v4"
)

// serverMetrics observes requests in the series of Caddy's HTTP server (caddy_http_…), for
// requests that do not pass through it.
type serverMetrics struct {
	server, handler string              // labels
	perHost         bool                // there is a label host
	hosts           map[string]struct{} // the hosts with series of their own; nil: all

	inFlight                          *prometheus.GaugeVec
	count, failed                     *prometheus.CounterVec
	duration, ttfb, request, response *prometheus.HistogramVec

	register func(*http.Request) // makes Caddy register its metrics, once
	found    bool                // they are registered as expected; set by register

	byHost  *xsync.Map[string, *hostSeries]
	series  *xsync.Map[seriesKey, *requestSeries]
	headers *xsync.Map[seriesKey, *headerSeries]

	observations sync.Pool
}

// hostSeries holds the series that do not depend on the response.
type hostSeries struct {
	host     string
	inFlight prometheus.Gauge
	count    prometheus.Counter
}

// seriesKey identifies the series of a kind of requests.
type seriesKey struct {
	status       int
	method, host string
}

// headerSeries holds the series of the headers of responses with one seriesKey.
type headerSeries struct {
	key  seriesKey
	ttfb prometheus.Observer
}

// requestSeries holds the series of requests with one seriesKey.
type requestSeries struct {
	key                         seriesKey
	duration, request, response prometheus.Observer
}

// newServerMetrics returns the metrics of a server whose first route gets every request. It
// must be called once the routes are provisioned.
func newServerMetrics(ctx caddy.Context, app *caddyhttp.App, server *caddyhttp.Server) *serverMetrics {
	route := routesOf(server)[0]
	m := &serverMetrics{
		server: server.Name(), handler: caddy.GetModuleName(route.Handlers[0]),
		perHost: app.Metrics.PerHost,
		byHost:  xsync.NewMap[string, *hostSeries](),
		series:  xsync.NewMap[seriesKey, *requestSeries](),
		headers: xsync.NewMap[seriesKey, *headerSeries](),
	}
	m.observations.New = func() any {
		o := &observation{metrics: m}
		o.onHeader = o.wroteHeader
		return o
	}
	if m.perHost && !app.Metrics.ObserveCatchallHosts {
		m.hosts = allowedHosts(app.Metrics)
	}
	route.Group, route.Handlers, route.HandlersRaw = "", nil, nil
	var once sync.Once
	m.register = func(r *http.Request) {
		once.Do(func() {
			// Caddy registers its metrics at the first request. This one reaches no handler.
			if err := route.ProvisionHandlers(ctx, app.Metrics); err == nil {
				passThrough(route, r)
			}
			if m.found = m.find(ctx.GetMetricsRegistry()); !m.found {
				ctx.Logger().Error("Caddy's metrics are not as expected; clients that are served on the fast path are missing in caddy_http_*")
			}
		})
	}
	return m
}

// passThrough passes a request through a route without handlers. Nothing observes it, because
// it panics at the end.
func passThrough(route caddyhttp.Route, r *http.Request) {
	defer func() { _ = recover() }()
	end := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error { panic(http.ErrAbortHandler) })
	_ = route.Compile(end).ServeHTTP(headerOnly{make(http.Header)}, r)
}

// allowedHosts returns the hosts that have series of their own. Caddy does not export them. It
// returns no host if they cannot be read.
func allowedHosts(metrics *caddyhttp.Metrics) map[string]struct{} {
	hosts := make(map[string]struct{})
	if allowed := reflect.ValueOf(metrics).Elem().FieldByName("allowedHosts"); allowed.IsValid() && allowed.Kind() == reflect.Map {
		for _, host := range allowed.MapKeys() {
			hosts[host.String()] = struct{}{}
		}
	}
	return hosts
}

// find finds the collectors that Caddy has registered, and reports whether all of them are
// there.
func (m *serverMetrics) find(registry *prometheus.Registry) bool {
	of, ofResponse := []string{"server", "handler"}, []string{"server", "handler", "code", "method"}
	if m.perHost {
		of, ofResponse = append(of, "host"), append(ofResponse, "host")
	}
	histogram := func(name, help string, buckets []float64) *prometheus.HistogramVec {
		return registered(registry, prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "caddy", Subsystem: "http", Name: name, Help: help, Buckets: buckets,
		}, ofResponse))
	}
	counter := func(name, help string) *prometheus.CounterVec {
		return registered(registry, prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "caddy", Subsystem: "http", Name: name, Help: help,
		}, of))
	}
	sizes := prometheus.ExponentialBuckets(256, 4, 8)
	m.inFlight = registered(registry, prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: "caddy", Subsystem: "http", Name: "requests_in_flight", Help: "Number of requests currently handled by this server.",
	}, of))
	m.failed = counter("request_errors_total", "Number of requests resulting in middleware errors.")
	m.count = counter("requests_total", "Counter of HTTP(S) requests made.")
	m.duration = histogram("request_duration_seconds", "Histogram of round-trip request durations.", prometheus.DefBuckets)
	m.request = histogram("request_size_bytes", "Total size of the request. Includes body", sizes)
	m.response = histogram("response_size_bytes", "Size of the returned response.", sizes)
	m.ttfb = histogram("response_duration_seconds", "Histogram of times to first byte in response bodies.", prometheus.DefBuckets)
	return m.inFlight != nil && m.failed != nil && m.count != nil && m.duration != nil && m.request != nil && m.response != nil && m.ttfb != nil
}

// registered returns the collector that is registered with the description of c, or the zero
// value if there is none.
func registered[T prometheus.Collector](registry *prometheus.Registry, c T) (existing T) {
	err := registry.Register(c)
	if err == nil {
		registry.Unregister(c)
		return existing
	}
	if already, ok := err.(prometheus.AlreadyRegisteredError); ok {
		existing, _ = already.ExistingCollector.(T)
	}
	return existing
}

// observation is the observation of one request. When it is reused, it still has the series of an
// earlier request, which are usually those of this one, too.
type observation struct {
	metrics  *serverMetrics
	onHeader func(status int) // wroteHeader

	start    time.Time
	key      seriesKey // its status is that of the header that was written last; 0: none yet
	host     *hostSeries
	header   *headerSeries
	response *requestSeries
}

// begin begins to observe a request that arrived at start. end must be called for it. It returns
// nil if Caddy's metrics are not as expected.
func (m *serverMetrics) begin(r *http.Request, start time.Time) *observation {
	if m.register(r); !m.found {
		return nil
	}
	o := m.observations.Get().(*observation)
	o.start, o.key = start, seriesKey{method: methodLabel(r.Method)}
	if m.perHost {
		o.key.host = strings.ToLower(r.Host)
		if _, allowed := m.hosts[o.key.host]; m.hosts != nil && !allowed {
			o.key.host = "_other"
		}
	}
	if o.host == nil || o.host.host != o.key.host {
		o.host = m.ofHost(o.key.host)
	}
	o.host.inFlight.Inc()
	return o
}

// end ends the observation, also of a request whose handler panics.
func (o *observation) end() {
	o.host.inFlight.Dec()
	o.metrics.observations.Put(o)
}

// wroteHeader observes the header of an interim or the final response.
func (o *observation) wroteHeader(status int) {
	o.key.status = status
	if o.header == nil || o.header.key != o.key {
		o.header = o.metrics.ofHeader(o.key)
	}
	o.header.ttfb.Observe(time.Since(o.start).Seconds())
}

// served observes a request that the handler has served. size is the size of the response's
// content, and err is the handler's error.
func (o *observation) served(r *http.Request, size int64, duration time.Duration, err error) {
	o.host.count.Inc()
	key := o.key
	if err != nil {
		o.metrics.failed.With(o.metrics.hostLabels(key.host)).Inc()
		code := caddyStatus(err)
		if code == 0 {
			return
		}
		if key.status == 0 {
			key.status = code
		}
	}
	if o.response == nil || o.response.key != key {
		o.response = o.metrics.ofRequest(key)
	}
	o.response.duration.Observe(duration.Seconds())
	o.response.request.Observe(float64(approximateSize(r)))
	o.response.response.Observe(float64(size))
}

// ofHost returns the series for a host.
func (m *serverMetrics) ofHost(host string) *hostSeries {
	s, ok := m.byHost.Load(host)
	if !ok {
		labels := m.hostLabels(host)
		s, _ = m.byHost.LoadOrStore(host, &hostSeries{host, m.inFlight.With(labels), m.count.With(labels)})
	}
	return s
}

// ofHeader returns the series of the headers of a kind of requests.
func (m *serverMetrics) ofHeader(key seriesKey) *headerSeries {
	s, ok := m.headers.Load(key)
	if !ok {
		s, _ = m.headers.LoadOrStore(key, &headerSeries{key, m.ttfb.With(m.labels(key))})
	}
	return s
}

// ofRequest returns the series of a kind of requests.
func (m *serverMetrics) ofRequest(key seriesKey) *requestSeries {
	s, ok := m.series.Load(key)
	if !ok {
		labels := m.labels(key)
		s, _ = m.series.LoadOrStore(key, &requestSeries{key, m.duration.With(labels), m.request.With(labels), m.response.With(labels)})
	}
	return s
}

func (m *serverMetrics) hostLabels(host string) prometheus.Labels {
	labels := prometheus.Labels{"server": m.server, "handler": m.handler}
	if m.perHost {
		labels["host"] = host
	}
	return labels
}

func (m *serverMetrics) labels(key seriesKey) prometheus.Labels {
	labels := m.hostLabels(key.host)
	labels["method"], labels["code"] = key.method, "200" // also without a response, for which Go writes 200
	if key.status != 0 {
		labels["code"] = strconv.Itoa(key.status)
	}
	return labels
}

// usualMethods are the methods that have labels of their own.
var usualMethods = []string{"GET", "CONNECT", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"}

// methodLabel returns the label for a method: one of the usual methods, or OTHER.
func methodLabel(method string) string {
	i := slices.Index(usualMethods, strings.ToUpper(method))
	if i < 0 || method != usualMethods[i] && method != strings.ToLower(method) {
		return "OTHER"
	}
	return usualMethods[i]
}

// approximateSize returns the size of a request as Caddy's server determines it.
func approximateSize(r *http.Request) int64 {
	n := len(r.Method) + len(r.Proto) + len(r.Host)
	if r.URL != nil {
		n += len(r.URL.String())
	}
	for name, values := range r.Header {
		n += len(name)
		for _, value := range values {
			n += len(value)
		}
	}
	if r.ContentLength > 0 {
		return int64(n) + r.ContentLength
	}
	return int64(n)
}
