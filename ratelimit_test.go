// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// limits returns these limits, and defaults otherwise.
func limits(burst int64, refill float64) bucket.Limits {
	h := Handler{Options: Options{Burst: burst, Refill: refill}}
	h.setDefaults()
	return h.limits(&h.Options)
}

func newTable(limits bucket.Limits) *bucket.Table {
	return bucket.New(limits, eventInterval, program.metrics.Evictions())
}

func TestCeilSeconds(t *testing.T) {
	for d, want := range map[time.Duration]int64{
		0:                       1,
		1:                       1,
		time.Second - 1:         1,
		time.Second:             1,
		time.Second + 1:         2,
		1999 * time.Millisecond: 2,
		100_000 * time.Second:   100_000,
		100_000*time.Second - 1: 100_000,
		4e9 * time.Second:       4e9,
		4e9*time.Second - 999:   4e9,
	} {
		if got := ceilSeconds(d); got != want {
			t.Errorf("ceilSeconds(%v) = %d, want %d", d, got, want)
		}
	}
}

func TestRateLimitFields(t *testing.T) {
	limits := limits(10, 0.3) // full after 33.33 s
	limits.Zone = "office"
	if got, want := rateLimitPolicy(limits), `"office";q=10;w=34`; got != want {
		t.Errorf("rateLimitPolicy() = %s, want %s", got, want)
	}
	for wait, want := range map[time.Duration]string{
		1:                       `"office";r=0;t=1`,
		1500 * time.Millisecond: `"office";r=0;t=2`,
		3333333333:              `"office";r=0;t=4`,
	} {
		if got := rateLimitState(limits.Zone, ceilSeconds(wait)); got != want {
			t.Errorf("rateLimitState(%v) = %s, want %s", wait, got, want)
		}
	}
}

// TestEvictionsAreCounted checks that the metric counts clients that are forgotten early.
func TestEvictionsAreCounted(t *testing.T) {
	limits := limits(1, 1)
	limits.MaxClients = 2
	table, before := newTable(limits), gatherMetrics(t)["rate_limit_evictions_total"]
	for i := range 100 {
		table.Take(client.Address(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})), 1)
	}
	got := gatherMetrics(t)["rate_limit_evictions_total"] - before
	if want := 100 - table.Len(); got != float64(want) {
		t.Errorf("%v evictions are counted, want %d", got, want)
	}
}

// keyOf returns the key of an address.
func keyOf(addr string) client.Key { return client.Address(netip.MustParseAddr(addr)) }

// runTogether runs do in n goroutines that start at the same time.
func runTogether(n int, do func(i int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			do(i)
		})
	}
	close(start)
	wg.Wait()
}

// The following tests cover the limiter in a running Caddy. Where buckets must not refill
// during a test, refill is at most one token per 100 s.

// get makes a request to the origin through the proxy at address, on its own connection,
// and returns the status. fields alternates names and values.
func (w *world) get(address string, fields ...string) int {
	w.t.Helper()
	conn := dialRaw(w.t, address)
	defer conn.Close()
	request := fmt.Sprintf("GET %s/ HTTP/1.1\nHost: origin\nConnection: close\n", w.origin.URL)
	for i := 0; i < len(fields); i += 2 {
		request += fields[i] + ": " + fields[i+1] + "\n"
	}
	conn.send(request + "\n")
	res, _ := conn.response(http.MethodGet)
	return res.StatusCode
}

// gets makes requests one after the other and checks their statuses.
func (w *world) gets(address string, want ...int) {
	w.t.Helper()
	for i, want := range want {
		if got := w.get(address); got != want {
			w.t.Fatalf("request %d through %s: status %d, want %d", i+1, address, got, want)
		}
	}
}

// siteAt returns the Caddyfile of another proxy.
func siteAt(address, options string) string {
	return fmt.Sprintf(`http://%s {
	async_proxy {
		%s
	}
}
`, strings.TrimPrefix(address, "127.0.0.1"), options)
}

func TestOneHundredAtOnce(t *testing.T) {
	const burst, requests = 10, 100
	var reached atomic.Int64
	w := newWorld(t, "burst 10\nrefill 0.01", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { reached.Add(1) }))
	var ok, limited atomic.Int64
	client := w.client()
	runTogether(requests, func(int) {
		res, err := client.Get(w.origin.URL)
		if err != nil {
			t.Error(err)
			return
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Error(err)
		}
		switch res.StatusCode {
		case http.StatusOK:
			ok.Add(1)
		case http.StatusTooManyRequests:
			limited.Add(1)
			retry, err := strconv.Atoi(res.Header.Get("Retry-After"))
			// An earlier request may have read the clock later.
			if err != nil || retry < 1 || retry > 101 {
				t.Errorf("Retry-After: %q, want seconds from 1 to 101", res.Header.Get("Retry-After"))
			}
			for name, want := range map[string]string{
				"Ratelimit-Policy": `"default";q=10;w=1000`,
				"Ratelimit":        fmt.Sprintf(`"default";r=0;t=%d`, retry),
				"Content-Type":     "text/plain; charset=utf-8",
			} {
				if got := res.Header.Get(name); got != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			if got, want := ownStatus(t, res.Header), fmt.Sprintf("Too many requests from your address; try again in %d s", retry); got["error"] != "http_request_denied" || got["details"] != want {
				t.Errorf("Proxy-Status: %q, want the details %q", got, want)
			}
			if want := fmt.Sprintf("Too many requests from your address; try again in %d s.\n", retry); string(body) != want {
				t.Errorf("body = %q, want %q", body, want)
			}
		default:
			t.Errorf("status %d", res.StatusCode)
		}
	})
	if ok.Load() != burst || limited.Load() != requests-burst || reached.Load() != burst {
		t.Errorf("%d allowed, %d limited, %d at the origin; want %d, %d, %d",
			ok.Load(), limited.Load(), reached.Load(), burst, requests-burst, burst)
	}

	lines := w.waitLog("rate limited", 1)
	for name, want := range map[string]any{
		"level": "warn", "logger": "http.handlers.async_proxy", "ip": "127.0.0.1",
		"method": "GET", "host": strings.TrimPrefix(w.origin.URL, "http://"), "refused": 1.0,
	} {
		if got := lines[0][name]; got != want {
			t.Errorf("log line: %s = %v, want %v", name, got, want)
		}
	}
}

// TestRateLimitedLine checks that the line of a limited request begins with the same fields as the
// line of any other request, in the same order, by both ways of serving.
func TestRateLimitedLine(t *testing.T) {
	for way, change := range map[string]func(string) string{"fast": func(site string) string { return site }, "ordinary": byCaddy} {
		t.Run(way, func(t *testing.T) {
			w := newWorld(t, "", nil)
			w.load(change(w.site("burst 1\nrefill 0.00001\nzone line-" + way)))
			w.gets(w.proxy, 200)
			target := w.origin.Listener.Addr().String()
			policyRequest(t, w.proxy, http.MethodConnect, target, "")
			line := w.waitLog("rate limited", 1)[0]
			latency, ok := line["latency"].(float64)
			if line["method"] != "CONNECT" || line["host"] != target || line["path"] != "" || line["status"] != 429.0 || !ok || latency < 0 {
				t.Errorf("line %v", line)
			}
			log, err := os.ReadFile(w.logs)
			if err != nil {
				t.Fatal(err)
			}
			for _, message := range []string{"request", "rate limited"} {
				begins := regexp.MustCompile(`"msg":"` + message + `","method":"[A-Z]+","host":"[^"]*","path":"[^"]*","status":\d+,"latency":`)
				if !begins.Match(log) {
					t.Errorf("the line %q does not begin as it should", message)
				}
			}
		})
	}
}

func TestConnectIsOneRequest(t *testing.T) {
	w := newWorld(t, "burst 2\nrefill 0.01", nil)
	tunnel := w.dial()
	tunnel.connect(w.origin.Listener.Addr().String())
	for range 10 {
		tunnel.send("GET / HTTP/1.1\nHost: origin\n\n")
		if res, _ := tunnel.response(http.MethodGet); res.StatusCode != http.StatusOK {
			t.Fatalf("in the tunnel: status %d, want 200", res.StatusCode)
		}
	}
	w.gets(w.proxy, 200, 429)
	refused := w.dial()
	refused.send("CONNECT " + w.origin.Listener.Addr().String() + " HTTP/1.1\nHost: origin\n\nnot a request")
	if res, _ := refused.response(http.MethodConnect); res.StatusCode != http.StatusTooManyRequests || !res.Close {
		t.Errorf("CONNECT: status %d, close %v; want 429 and the connection closed", res.StatusCode, res.Close)
	}
	refused.expectEnd()
}

// TestOtherHandlersTakeNoToken checks that health checks, the PAC script and the site's other
// handlers cost no token and work for a client without one.
func TestOtherHandlersTakeNoToken(t *testing.T) {
	for name, serve := range map[string]func(string) string{
		"fast":     func(site string) string { return site },
		"ordinary": byCaddy,
		"shared": func(site string) string {
			return strings.Replace(site, "async_proxy {", "async_proxy {\nlimiter test", 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, "", nil)
			site := strings.TrimSuffix(strings.TrimSpace(w.site("burst 2\nrefill 0.00001\nzone otherHandlers-"+name+"\nserve_pac")), "}")
			w.load(serve(site) + "respond /healthz \"well\"\n}\n")
			otherHandlers := func() {
				t.Helper()
				conn := w.dial()
				for range 5 {
					for path, want := range map[string]string{"/healthz": "well", "/proxy.pac": "function FindProxyForURL("} {
						conn.send("GET " + path + " HTTP/1.1\nHost: 192.0.2.1:8080\n\n")
						if res, body := conn.response(http.MethodGet); res.StatusCode != http.StatusOK || !strings.Contains(body, want) {
							t.Errorf("%s: %s %q", path, res.Status, body)
						}
					}
				}
			}
			otherHandlers()
			w.gets(w.proxy, 200, 200, 429)
			askedBuckets()
			otherHandlers()
			if n := len(askedBuckets()); n != 0 {
				t.Errorf("the shared limiter was asked %d times", n)
			}
			w.gets(w.proxy, 429)
		})
	}
}

func TestReloadKeepsBuckets(t *testing.T) {
	const options = "burst 3\nrefill 0.00001"
	w := newWorld(t, options, nil)
	w.gets(w.proxy, 200, 200, 200, 429)

	other := freeAddress(t)
	w.load("# the same limits\n" + w.site(options) + siteAt(other, "zone other"))
	w.gets(w.proxy, 429)
	w.load(w.site(options))
	w.gets(w.proxy, 429)

	w.load(w.site("burst 2\nrefill 0.00001"))
	w.gets(w.proxy, 200, 200, 429)
	w.load(w.site("burst 2\nrefill 0.00002"))
	w.gets(w.proxy, 200, 200, 429)
	w.load(w.site("burst 2\nrefill 0.00002\ndial_timeout 3s")) // limits unchanged
	w.gets(w.proxy, 429)
}

func TestSitesShareBucketsByZoneAndLimits(t *testing.T) {
	const options = "burst 2\nrefill 0.00001"
	w := newWorld(t, options, nil)
	same, zone, limit := freeAddress(t), freeAddress(t), freeAddress(t)
	w.load(w.site(options) + siteAt(same, options) + siteAt(zone, options+"\nzone other") + siteAt(limit, "burst 1\nrefill 0.00001"))
	w.gets(w.proxy, 200)
	w.gets(same, 200, 429)
	w.gets(w.proxy, 429)
	w.gets(zone, 200, 200, 429)
	w.gets(limit, 200, 429)
}

func TestExemptClientsAreNeverLimited(t *testing.T) {
	const options = "burst 1\nrefill 0.00001\n"
	w := newWorld(t, options+"exempt 10.0.0.0/8 127.0.0.1", nil)
	w.gets(w.proxy, 200, 200, 200, 200, 200)
	w.load(w.site(options + "exempt 10.0.0.0/8"))
	w.gets(w.proxy, 200, 429)
	for _, mine := range []string{"private_ranges", "::ffff:127.0.0.0/104"} {
		w.load(w.site(options + "exempt " + mine))
		w.gets(w.proxy, 200, 200, 200)
	}
}

func TestForwardedForUntrustedIgnored(t *testing.T) {
	w := newWorld(t, "burst 1\nrefill 0.00001\nallow 127.0.0.1", nil)
	for i, want := range []int{200, 429, 429} {
		if got := w.get(w.proxy, "X-Forwarded-For", fmt.Sprintf("203.0.113.%d", i)); got != want {
			t.Errorf("request %d: status %d, want %d", i+1, got, want)
		}
	}
}

func TestForwardedForTrustedIsClient(t *testing.T) {
	const options = "clients all\nburst 1\nrefill 0.00001\nallow 127.0.0.1"
	w := newWorld(t, options, nil)
	loadCaddyfile(t, `{
	admin off
	persist_config off
	default_bind 127.0.0.1
	servers {
		trusted_proxies static 127.0.0.1/32
	}
}
`+w.site(options))
	for _, tc := range []struct {
		forwardedFor string
		want         int
	}{
		{"203.0.113.1", 200},
		{"203.0.113.1", 429},
		{"203.0.113.2", 200},
		{"203.0.113.1", 429},
		{"2001:db8::1", 200},
		{"2001:db8::2", 429}, // same /64
		{"2001:db8:0:1::1", 200},
	} {
		if got := w.get(w.proxy, "X-Forwarded-For", tc.forwardedFor); got != tc.want {
			t.Errorf("a request for %s: status %d, want %d", tc.forwardedFor, got, tc.want)
		}
	}
	w.gets(w.proxy, 200, 429) // the trusted proxy's own bucket
}

func TestErrorRoutesAnswerForTheLimiter(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(fmt.Sprintf(`http://%s {
	async_proxy burst 1 refill 0.01
	handle_errors {
		header X-From error-route
		respond "slow down: {err.status_code}" {err.status_code}
	}
}
`,
		strings.TrimPrefix(w.proxy, "127.0.0.1")))
	w.gets(w.proxy, 200)
	conn := w.dial()
	conn.send("GET " + w.origin.URL + "/ HTTP/1.1\nHost: origin\n\n")
	res, body := conn.response(http.MethodGet)
	if res.StatusCode != http.StatusTooManyRequests || body != "slow down: 429" {
		t.Errorf("status %d, body %q; want those of the error route", res.StatusCode, body)
	}
	for name, want := range map[string]string{
		"X-From": "error-route", "Retry-After": "9.|100", "Ratelimit": `"default";r=0;t=(9.|100)`, "Ratelimit-Policy": `"default";q=1;w=100`,
	} {
		if got := res.Header.Get(name); !regexp.MustCompile("^(" + want + ")$").MatchString(got) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// expectEnd checks that the connection ends, orderly or with a reset, without another
// byte.
func (c *rawConn) expectEnd() {
	c.t.Helper()
	rest, err := io.ReadAll(c.r)
	if len(rest) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		c.t.Errorf("after the response: %q and %v, want the end", rest, err)
	}
}

// The body of a denied request contains another request, which must not be parsed as one:
// the connection closes. The response does not wait for the body, which may never arrive.
func TestDeniedRequestBodyIsNotParsed(t *testing.T) {
	const smuggled = "GET http://smuggled.example/ HTTP/1.1\r\nHost: smuggled.example\r\n\r\n"
	chunked := func(body string) string { return fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body) }
	big := strings.Repeat(smuggled, 1<<20/len(smuggled))
	for _, tc := range []struct{ name, fields, body string }{
		{"small", fmt.Sprintf("Content-Length: %d\n", len(smuggled)), smuggled},
		{"small, chunked", "Transfer-Encoding: chunked\n", chunked(smuggled)},
		{"large", fmt.Sprintf("Content-Length: %d\n", len(big)), big},
		{"large, chunked", "Transfer-Encoding: chunked\n", chunked(big)},
		{"with Expect: 100-continue", fmt.Sprintf("Content-Length: %d\nExpect: 100-continue\n", len(smuggled)), smuggled},
	} {
		for _, sent := range []string{"before the answer", "after the answer"} {
			t.Run(tc.name+", "+sent, func(t *testing.T) {
				w := newWorld(t, "burst 1\nrefill 0.00001", nil)
				w.gets(w.proxy, 200)
				conn := w.dial()
				conn.send("POST " + w.origin.URL + "/ HTTP/1.1\nHost: origin\n" + tc.fields + "\n")
				written := make(chan struct{})
				write := func() {
					_, _ = io.WriteString(conn, tc.body+smuggled) // fails if the proxy closes first
					_ = conn.CloseWrite()
					close(written)
				}
				if sent == "before the answer" {
					go write()
				}
				res, body := conn.response(http.MethodPost)
				if res.StatusCode != http.StatusTooManyRequests || !res.Close {
					t.Errorf("status %d (%s), close: %t; want 429 and Connection: close", res.StatusCode, body, res.Close)
				}
				if sent == "after the answer" {
					go write()
				}
				conn.expectEnd()
				<-written
				if lines := w.waitLog("rate limited", 1); len(lines) != 1 || lines[0]["method"] != "POST" {
					t.Errorf("log lines %v", lines)
				}
			})
		}
	}
}
