// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/quic-go/quic-go/http3"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
)

// gatherMetrics returns the values of all metrics (of histograms, the counts), keyed by name and
// labels as in the exposition format, without zones: it adds up their values.
func gatherMetrics(t testing.TB) map[string]float64 {
	t.Helper()
	zone, sums := regexp.MustCompile(`,?zone="[^"]*"`), make(map[string]float64)
	for name, value := range gatherZones(t) {
		sums[zone.ReplaceAllString(name, "")] += value
	}
	return sums
}

// gatherZones is gatherMetrics with zones.
func gatherZones(t testing.TB) map[string]float64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	if err := program.metrics.Register(registry, metricsState); err != nil {
		t.Fatal(err)
	}
	if err := program.metrics.Register(registry, metricsState); err != nil { // already registered by another handler
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[string]float64)
	for _, family := range families {
		for _, metric := range family.Metric {
			var labels []string
			for _, label := range metric.Label {
				labels = append(labels, fmt.Sprintf("%s=%q", label.GetName(), label.GetValue()))
			}
			name := strings.TrimPrefix(family.GetName(), "caddy_async_proxy_")
			if len(labels) > 0 {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			values[name] = metric.GetCounter().GetValue() + metric.GetGauge().GetValue() + float64(metric.GetHistogram().GetSampleCount())
		}
	}
	return values
}

// TestMetricsCount runs a script of requests twice, with a reload in between, and checks
// every metric exactly.
func TestMetricsCount(t *testing.T) {
	refusalResolver(t)
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/broken" {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "half")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
	}))
	origin := w.origin.Listener.Addr().String()
	echo := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	closed := freeAddress(t)
	for round := range 2 {
		w.load(strings.Replace(w.site(fmt.Sprintf("burst 13\nrefill 0.00001\nzone metrics-%d\nmax_tunnels 7\ndeny denied.test\nexempt 192.0.2.0/24", round)), "{\n", "{\nrespond hello\n", 1))
		before := gatherMetrics(t)
		ask := func(method, target, lines string, want int) {
			t.Helper()
			conn := w.dial()
			conn.send(method + " " + target + " HTTP/1.1\nHost: x\n" + lines + "\n")
			if res, err := http.ReadResponse(conn.r, &http.Request{Method: method}); err != nil || res.StatusCode != want {
				t.Errorf("%s %s: %v, %v, want %d", method, target, res, err, want)
			}
		}
		ask("GET", "http://"+origin+"/broken", "", 200)
		for range 3 {
			ask("GET", "http://"+origin+"/", "", 200)
		}
		ask("GET", "http://denied.test/", "", 403)
		ask("GET", "http://nowhere.invalid/", "", 502)
		ask("GET", "/", "", 200) // served by another handler
		ask("CONNECT", "bad", "", 400)
		ask("CONNECT", closed, "", 502)
		ask("CONNECT", "10.0.0.1:80", policyRemote, 403)
		conn := w.dial()
		conn.connect(echo)
		conn.send("12345678\n")
		if _, err := io.ReadFull(conn.r, make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
		var during map[string]float64
		up := before[`tunnel_bytes_total{direction="up"}`] + 10
		eventually(t, "the bytes sent to be counted", func() bool {
			during = gatherMetrics(t)
			return during[`tunnel_bytes_total{direction="up"}`] >= up
		})
		for name, want := range map[string]float64{"tunnels": 1, "tunnels_limit": 7, `tunnel_bytes_total{direction="up"}`: up} {
			if during[name] != want {
				t.Errorf("while a tunnel is open: %s = %v, want %v", name, during[name], want)
			}
		}
		if during["rate_limit_clients"] < 1 || during["idle_connections"] < 1 {
			t.Errorf("%v clients, %v idle connections, want some", during["rate_limit_clients"], during["idle_connections"])
		}
		conn.Close()
		w.waitLog("CONNECT tunnel closed", round+1)
		for range 3 {
			ask("GET", "http://"+origin+"/", "", 200)
		}
		for range 2 {
			ask("GET", "http://"+origin+"/", "", 429)
		}
		ask("CONNECT", echo, "", 429)

		eventually(t, "the last tunnel to be counted", func() bool { return gatherMetrics(t)["tunnels"] == 0 })
		const dialled = `dial_duration_seconds{outcome="ok"}`
		want := map[string]float64{
			`requests_total{kind="forward",outcome="ok"}`:                        6,
			`requests_total{kind="forward",outcome="failed"}`:                    2,
			`requests_total{kind="forward",outcome="refused"}`:                   1,
			`requests_total{kind="forward",outcome="rate_limited"}`:              2,
			`requests_total{kind="other",outcome="ok"}`:                          1,
			`requests_total{kind="tunnel",outcome="ok"}`:                         1,
			`requests_total{kind="tunnel",outcome="refused"}`:                    2,
			`requests_total{kind="tunnel",outcome="failed"}`:                     1,
			`requests_total{kind="tunnel",outcome="rate_limited"}`:               1,
			`policy_requests_total{outcome="ok",policy="default"}`:               7,
			`policy_requests_total{outcome="failed",policy="default"}`:           3,
			`policy_requests_total{outcome="refused",policy="default"}`:          3,
			`policy_requests_total{outcome="rate_limited",policy="default"}`:     3,
			`refusals_total{cause="",reason="http_request_error"}`:               1,
			`refusals_total{cause="rule",reason="http_request_denied"}`:          1,
			`refusals_total{cause="rate_limited",reason="http_request_denied"}`:  3,
			`refusals_total{cause="",reason="dns_error"}`:                        1,
			`refusals_total{cause="",reason="connection_refused"}`:               1,
			`refusals_total{cause="default",reason="destination_ip_prohibited"}`: 1,
			`tunnel_bytes_total{direction="up"}`:                                 10,
			`tunnel_bytes_total{direction="down"}`:                               10,
			`tunnel_duration_seconds`:                                            1,
			`response_duration_seconds`:                                          7, // response heads received
			`forwarded_bytes_total{direction="down"}`:                            4,
			`dial_duration_seconds{outcome="dns"}`:                               1,
			`dial_duration_seconds{outcome="refused"}`:                           1,
			`dial_duration_seconds{outcome="denied"}`:                            2,
		}
		var got map[string]float64
		counted := func() bool {
			got = make(map[string]float64)
			for name, value := range gatherMetrics(t) {
				if added := value - before[name]; added != 0 && !slices.Contains([]string{"tunnels", "tunnels_limit", "idle_connections", "rate_limit_clients"}, name) {
					got[name] = added
				}
			}
			want[dialled] = got[dialled] // depends on how many connections were idle
			return maps.Equal(got, want)
		}
		// A client may have its response before it is counted.
		for deadline := time.Now().Add(patience); !counted() && time.Now().Before(deadline); {
			time.Sleep(5 * time.Millisecond)
		}
		if !maps.Equal(got, want) {
			for _, name := range slices.Sorted(maps.Keys(got)) {
				if got[name] != want[name] {
					t.Errorf("round %d: %s grew by %v, want %v", round, name, got[name], want[name])
				}
			}
			for name := range want {
				if _, ok := got[name]; !ok {
					t.Errorf("round %d: %s did not grow, want %v", round, name, want[name])
				}
			}
		}
	}
}

// TestMetricsOfZones checks that each request counts for the zone of its site only. A tunnel
// counts for the zone that opened it even after that has gone from the config, and a zone that
// comes back continues to count.
func TestMetricsOfZones(t *testing.T) {
	const answer = "hello"
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, answer) }))
	other := freeAddress(t)
	echo := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	// Zones keep their counts when the test is repeated.
	suffix := strings.ReplaceAll(w.proxy, ":", "-")
	first, second := w.site("zone first-"+suffix), siteAt(other, "zone second-"+suffix)
	w.load(first + second)
	check := func(when string, want map[string]float64) {
		t.Helper()
		var got map[string]float64
		for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
			got = make(map[string]float64)
			for name, value := range gatherZones(t) {
				if strings.Contains(name, suffix) && value != 0 {
					got[strings.ReplaceAll(name, "-"+suffix, "")] = value
				}
			}
			if maps.Equal(got, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %v, want %v", when, got, want)
			}
		}
	}
	want := map[string]float64{}
	check("at the start", want)

	conn := w.dial()
	conn.connect(echo)
	want[`requests_total{kind="tunnel",outcome="ok",zone="first"}`] = 1
	w.gets(w.proxy, 200)
	want[`requests_total{kind="forward",outcome="ok",zone="first"}`] = 1
	want[`forwarded_bytes_total{direction="down",zone="first"}`] = float64(len(answer))
	refused := w.dial()
	refused.send("GET http://127.0.0.1:0/ HTTP/1.1\nHost: x\n\n")
	refused.response("GET")
	want[`requests_total{kind="forward",outcome="refused",zone="first"}`] = 1
	want[`refusals_total{cause="",reason="http_request_error",zone="first"}`] = 1
	check("one zone has requests", want)

	w.load(second)
	conn.send("12345678\n")
	if _, err := io.ReadFull(conn.r, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	want[`tunnel_bytes_total{direction="up",zone="first"}`] = 10
	want[`tunnel_bytes_total{direction="down",zone="first"}`] = 10
	check("a tunnel outlives its zone", want)

	w.load(first + second)
	w.gets(w.proxy, 200)
	w.gets(other, 200, 200, 200)
	want[`requests_total{kind="forward",outcome="ok",zone="first"}`]++
	want[`forwarded_bytes_total{direction="down",zone="first"}`] += float64(len(answer))
	want[`requests_total{kind="forward",outcome="ok",zone="second"}`] = 3
	want[`forwarded_bytes_total{direction="down",zone="second"}`] = float64(3 * len(answer))
	check("both zones have requests", want)
}

// TestMetricsLint checks that the metrics follow the conventions and match docs/observability.md.
func TestMetricsLint(t *testing.T) {
	program.metrics.Zone("default") // the metrics of zones and policies exist only if there is one
	defer program.metrics.Policy(directivePolicy).Release()
	registry := prometheus.NewPedanticRegistry()
	if err := program.metrics.Register(registry, metricsState); err != nil {
		t.Fatal(err)
	}
	problems, err := testutil.GatherAndLint(registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range problems {
		t.Errorf("%s: %s", problem.Metric, problem.Text)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile("docs/observability.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, family := range families {
		names = append(names, family.GetName())
	}
	var documented []string
	for _, match := range regexp.MustCompile("(?m)^\\| `(caddy_async_proxy_[a-z_]+)").FindAllStringSubmatch(string(page), -1) {
		documented = append(documented, match[1])
	}
	slices.Sort(documented)
	if !slices.Equal(names, documented) {
		t.Errorf("the metrics are %v, docs/observability.md has %v", names, documented)
	}
}

// TestMetricsExposition compares the metrics of an unused proxy with
// testdata/metrics.txt, except for gauges of the process's current state.
func TestMetricsExposition(t *testing.T) {
	registry, set := prometheus.NewPedanticRegistry(), metrics.New(metricLabels())
	set.Zone("default")
	set.Policy(directivePolicy)
	if err := set.Register(registry, metricsState); err != nil {
		t.Fatal(err)
	}
	answer := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	moment := regexp.MustCompile(`(?m)^(caddy_async_proxy_(?:rate_limit_clients|tunnels|tunnels_limit|idle_connections)) .*$`)
	got := moment.ReplaceAllString(answer.Body.String(), "$1 N")
	const golden = "testdata/metrics.txt"
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the exposition differs from %s:\n%s", golden, got)
	}
}

// since returns how much each metric has grown, except for gauges of the current state and
// for durations.
func since(t testing.TB, before map[string]float64) map[string]float64 {
	t.Helper()
	grown := make(map[string]float64)
	for name, value := range gatherMetrics(t) {
		if (strings.HasPrefix(name, "requests_total") || strings.HasPrefix(name, "refusals_total") || strings.HasPrefix(name, "forwarded_bytes")) && value != before[name] {
			grown[name] = value - before[name]
		}
	}
	return grown
}

// A client's disconnect never counts as a failure, whenever it happens.
func TestMetricsOfDisconnect(t *testing.T) {
	const some = 1 << 20
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/never" {
			<-r.Context().Done()
			return
		}
		if strings.HasPrefix(r.URL.Path, "/length") { // otherwise chunked
			w.Header().Set("Content-Length", fmt.Sprint(1<<40))
		}
		for part := make([]byte, some); ; {
			if _, err := w.Write(part); err != nil {
				return
			}
			if strings.HasSuffix(r.URL.Path, "/some") {
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
				return
			}
		}
	}))
	for _, path := range []string{"/never", "/length", "/length/some", "/chunks", "/chunks/some"} {
		t.Run(path, func(t *testing.T) {
			w.forgetLogs()
			before := gatherMetrics(t)
			conn := w.dial()
			conn.send(fmt.Sprintf("GET %s%s HTTP/1.1\nHost: x\n\n", w.origin.URL, path))
			if path != "/never" {
				res, err := http.ReadResponse(conn.r, nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.CopyN(io.Discard, res.Body, some); err != nil {
					t.Fatal(err)
				}
				eventually(t, "bytes to be counted during the transfer", func() bool { return since(t, before)[`forwarded_bytes_total{direction="down"}`] >= some })
			}
			conn.Close()
			if line := w.waitLog("request", 1)[0]; line["level"] != "info" || line["status"] != 499.0 || line["reason"] != "connection_terminated" {
				t.Errorf("line %v", line)
			}
			grown := since(t, before)
			delete(grown, `forwarded_bytes_total{direction="down"}`)
			if want := map[string]float64{`requests_total{kind="forward",outcome="canceled"}`: 1}; !maps.Equal(grown, want) {
				t.Errorf("growth %v, want %v", grown, want)
			}
		})
	}
}

// A client that resets its connection amid an upload has left. It has not sent a bad request.
func TestMetricsOfResetUploads(t *testing.T) {
	origin := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
	w := newWorld(t, "", nil)
	for _, site := range []string{w.site(""), inRoute(w.site(""))} {
		w.load(site)
		for _, upload := range []string{"Content-Length: 10\n\nhello", "Content-Length: 1000000\n\nhello", "Transfer-Encoding: chunked\n\n5\nhel", "Transfer-Encoding: chunked\n\n100000\nhello"} {
			w.forgetLogs()
			before := gatherMetrics(t)
			conn := w.dial()
			conn.send("POST http://" + origin + "/ HTTP/1.1\nHost: x\n" + upload)
			time.Sleep(50 * time.Millisecond) // so that, mostly, the content is being read
			_ = conn.SetLinger(0)
			_ = conn.Close()
			if line := w.waitLog("request", 1)[0]; line["level"] != "info" || line["status"] != 499.0 || line["reason"] != "connection_terminated" {
				t.Errorf("%q: line %v", upload, line)
			}
			grown := since(t, before)
			delete(grown, `forwarded_bytes_total{direction="up"}`)
			if want := map[string]float64{`requests_total{kind="forward",outcome="canceled"}`: 1}; !maps.Equal(grown, want) {
				t.Errorf("%q: growth %v, want %v", upload, grown, want)
			}
		}
	}
}

// So has a client that cancels an upload over HTTP/2 or HTTP/3, or whose connection ends.
func TestMetricsOfCanceledUploads(t *testing.T) {
	origin := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
	w, secure := framesWorld(t)
	h2 := &http.Transport{Protocols: new(http.Protocols)}
	h2.Protocols.SetUnencryptedHTTP2(true)
	h3 := &http3.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}}
	defer h3.Close()
	leave := map[string]func(cancel context.CancelFunc, conn net.Conn){
		"cancels":               func(cancel context.CancelFunc, _ net.Conn) { cancel() },
		"closes its connection": func(_ context.CancelFunc, conn net.Conn) { _ = conn.Close() },
	}
	for how, leave := range leave {
		for _, protocol := range []string{"h2", "h3"} {
			before := gatherMetrics(t)
			var conn net.Conn
			var transport http.RoundTripper
			address := "https://" + secure
			if protocol == "h2" {
				h2 := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (_ net.Conn, err error) {
					conn, err = net.Dial("tcp", w.proxy)
					return conn, err
				}}
				h2.Protocols.SetUnencryptedHTTP2(true)
				defer h2.CloseIdleConnections()
				transport, address = h2, "http://"+w.proxy
			} else {
				h3 := &http3.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}}
				defer h3.Close()
				transport, conn = h3, closerConn{close: h3.Close}
			}
			ctx, cancel := context.WithCancel(t.Context())
			content, writer := io.Pipe()
			r, _ := http.NewRequestWithContext(ctx, http.MethodPost, address+"/", content)
			r.Host, r.ContentLength = origin, 1_000_000
			go func() {
				_, _ = io.WriteString(writer, strings.Repeat("x", 1000))
				time.Sleep(50 * time.Millisecond) // so that, mostly, the content is being read
				leave(cancel, conn)
			}()
			if res, err := transport.RoundTrip(r); err == nil {
				t.Errorf("%s %s: %s", protocol, how, res.Status)
			}
			cancel()
			_ = writer.Close()
			eventually(t, "the request to end", func() bool {
				grown := since(t, before)
				return grown[`requests_total{kind="forward",outcome="canceled"}`]+grown[`requests_total{kind="forward",outcome="refused"}`] > 0
			})
			grown := since(t, before)
			delete(grown, `forwarded_bytes_total{direction="up"}`)
			if want := map[string]float64{`requests_total{kind="forward",outcome="canceled"}`: 1}; !maps.Equal(grown, want) {
				t.Errorf("%s %s: growth %v, want %v", protocol, how, grown, want)
			}
		}
	}
}

// closerConn is a connection that can only be closed.
type closerConn struct {
	net.Conn
	close func() error
}

func (c closerConn) Close() error { return c.close() }

// Request content is counted as it is read, whatever its framing.
func TestMetricsOfUploads(t *testing.T) {
	const size = 100_000
	w := newWorld(t, "zone uploads", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	for i, body := range []io.Reader{strings.NewReader(strings.Repeat("x", size)), io.MultiReader(strings.NewReader(strings.Repeat("x", size)))} {
		before := gatherMetrics(t)
		res, err := w.client().Post(w.origin.URL, "text/plain", body)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		w.waitLog("request", i+1)
		if got := since(t, before)[`forwarded_bytes_total{direction="up"}`]; got != size {
			t.Errorf("upload %d: %v bytes were counted, want %d", i, got, size)
		}
		list, err := program.status.Clients(nil, time.Now())
		if err != nil || len(list.Clients) != 1 || list.Clients[0].BytesUp != int64(i+1)*size {
			t.Errorf("upload %d: %v, %+v", i, err, list)
		}
	}
}

// A tunnel is counted when it opens, over every protocol.
func TestMetricsOfOpenTunnels(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{})
	for _, protocol := range tunnelProtocols {
		before := gatherMetrics(t)
		conn := w.client(t, protocol).open(echoTarget(t))
		hear(t, conn, say(t, conn, "hello"))
		// Over HTTP/1 the client may have its response before the handler has returned.
		want := map[string]float64{`requests_total{kind="tunnel",outcome="ok"}`: 1}
		eventually(t, protocol+" to count", func() bool { return maps.Equal(since(t, before), want) })
		conn.Close()
		eventually(t, "the tunnel to end", func() bool { return gatherMetrics(t)["tunnels"] == 0 })
		if grown := since(t, before); !maps.Equal(grown, want) {
			t.Errorf("%s: after its end: growth %v, want %v", protocol, grown, want)
		}
	}
}

// A dial that takes too long is a timeout, whichever limit applies. A dial that the client
// or the proxy gives up is canceled.
func TestDialOutcomes(t *testing.T) {
	late, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	left, leave := context.WithCancelCause(t.Context())
	leave(errors.New("the client left"))
	refused := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	for _, tc := range []struct {
		ctx  context.Context
		err  error
		want string
	}{
		{t.Context(), nil, "ok"},
		{t.Context(), refused, "refused"},
		{late, os.ErrDeadlineExceeded, "timeout"},
		{late, context.DeadlineExceeded, "timeout"},
		{late, &access.DeniedError{}, "denied"},
		{late, refused, "refused"},
		{left, context.Canceled, "canceled"},
		{left, os.ErrDeadlineExceeded, "canceled"},
		{t.Context(), &egress.ResolveError{Err: &net.DNSError{IsTimeout: true}}, "timeout"},
		{t.Context(), &egress.ResolveError{Err: &net.DNSError{IsNotFound: true}}, "dns"},
		{t.Context(), errors.New("else"), "failed"},
	} {
		if got := dialOutcome(tc.ctx, tc.err); got != tc.want {
			t.Errorf("%v, %v: %s, want %s", tc.ctx.Err(), tc.err, got, tc.want)
		}
	}
}
