// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// httpSeries returns the values of the series caddy_http_… and, of histograms, the number of
// observations.
func httpSeries(t *testing.T) map[string]float64 {
	t.Helper()
	ctx := caddy.ActiveContext()
	families, err := ctx.GetMetricsRegistry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[string]float64)
	for _, family := range families {
		if !strings.HasPrefix(family.GetName(), "caddy_http_") {
			continue
		}
		for _, m := range family.Metric {
			name := family.GetName()
			for _, label := range m.Label {
				name += fmt.Sprintf(" %s=%s", label.GetName(), label.GetValue())
			}
			switch {
			case m.Counter != nil:
				values[name] = m.Counter.GetValue()
			case m.Gauge != nil:
				values[name] = m.Gauge.GetValue()
			case m.Histogram != nil:
				values[name+" count"] = float64(m.Histogram.GetSampleCount())
				if strings.Contains(name, "_size_bytes") {
					values[name+" sum"] = m.Histogram.GetSampleSum()
				}
			}
		}
	}
	return values
}

// The fast path observes requests in the series of Caddy's HTTP server, with the same values.
func TestServerMetricsOnTheFastPath(t *testing.T) {
	for name, row := range map[string]struct{ metrics, site string }{
		"plain":         {metrics: "metrics"},
		"per host":      {metrics: "metrics {\nper_host\n}"},
		"all hosts":     {metrics: "metrics {\nper_host\nobserve_catchall_hosts\n}"},
		"error routes":  {metrics: "metrics", site: "handle_errors {\nrespond \"sorry {http.error.status_code}\"\n}\n"},
		"an access log": {metrics: "metrics", site: "log {\noutput discard\n}\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "", loggedOrigin())
			closed := freeAddress(t)
			var values [2]map[string]float64
			for way, servers := range []string{withWrapper, withoutWrapper} {
				site := w.site("allow 127.0.0.0/8\ndeny denied.example\nvia tester")
				site = strings.Replace(site, "{\n", "{\n"+row.site, 1)
				loadCaddyfile(t, strings.Replace(withServers(w.globals()+site, servers), "{\n", "{\n"+row.metrics+"\n", 1))
				if way == 0 && !*byNetHTTP {
					w.dialFastPath()
				} else {
					w.dial().gets(w.origin.URL + "/")
				}
				for _, head := range loggedRequests {
					sendLogged(t, forms[0], w.proxy, strings.NewReplacer("ORIGIN", strings.TrimPrefix(w.origin.URL, "http://"), "CLOSED", closed).Replace(head))
				}
				time.Sleep(100 * time.Millisecond)
				values[way] = httpSeries(t)
			}
			fast, ordinary := values[0], values[1]
			if len(ordinary) == 0 {
				t.Error("there are no series")
			}
			for _, series := range slices.Sorted(maps.Keys(ordinary)) {
				if value, ok := fast[series]; !ok || value != ordinary[series] {
					t.Errorf("%s: %v on the fast path, %v by Caddy's server", series, value, ordinary[series])
				}
			}
			for series, value := range fast {
				if _, ok := ordinary[series]; !ok {
					t.Errorf("%s: %v on the fast path only", series, value)
				}
			}
		})
	}
}
