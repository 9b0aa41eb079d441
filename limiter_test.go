// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// testLimiter is a limiter module whose answers a test sets.
type testLimiter struct {
	Word string `json:"word,omitempty"`
}

// answers holds what every testLimiter answers, and what it was asked.
var answers struct {
	sync.Mutex
	wait      time.Duration
	err       error
	suspended bool
	asked     []Bucket
	trouble   string
}

func init() { caddy.RegisterModule(testLimiter{}) }

func (testLimiter) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.async_proxy.limiters.test", New: func() caddy.Module { return new(testLimiter) }}
}

func (l *testLimiter) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		l.Word = d.Val()
	}
	for d.NextBlock(0) {
		if d.Val() != "word" || !d.AllArgs(&l.Word) {
			return d.Errf("unrecognized option '%s'", d.Val())
		}
	}
	return nil
}

func (*testLimiter) Take(_ context.Context, b Bucket) (time.Duration, error) {
	answers.Lock()
	defer answers.Unlock()
	answers.asked = append(answers.asked, b)
	return answers.wait, answers.err
}

func (*testLimiter) Suspended() bool {
	answers.Lock()
	defer answers.Unlock()
	return answers.suspended
}

func (l *testLimiter) Refill(ctx context.Context, b Bucket) (bool, error) {
	_, err := l.Take(ctx, b)
	return err == nil, err
}

// answer sets what the testLimiters answer until the test ends.
func answer(t *testing.T, wait time.Duration, err error, suspended bool) {
	t.Helper()
	answers.Lock()
	defer answers.Unlock()
	answers.wait, answers.err, answers.suspended = wait, err, suspended
	t.Cleanup(func() {
		answers.Lock()
		defer answers.Unlock()
		answers.wait, answers.err, answers.suspended, answers.asked = 0, nil, false, nil
	})
}

// askedBuckets returns the buckets asked for since the last call.
func askedBuckets() []Bucket {
	answers.Lock()
	defer answers.Unlock()
	list := answers.asked
	answers.asked = nil
	return list
}

// sharedClient is a client of a handler with a shared limiter. Time passes only when a test
// says so.
type sharedClient struct {
	t   *testing.T
	y   *policy
	now time.Duration
}

func newSharedClient(t *testing.T, burst int64, refill float64) *sharedClient {
	return &sharedClient{t: t, y: &policy{proxy: &proxy{shared: new(testLimiter)}, limiter: newTable(limits(burst, refill))}}
}

// takes makes a request and checks how often the shared limiter is asked about it.
func (s *sharedClient) takes(questions int, want bucket.Decision) {
	s.t.Helper()
	askedBuckets()
	got := s.y.chargeBuckets(s.t.Context(), keyOf("192.0.2.1"), int64(s.now))
	got.LogCount, got.Event = 0, false // covered by other tests
	if n := len(askedBuckets()); got != want || n != questions {
		s.t.Errorf("after %v: take = %+v, want %+v; the shared limiter is asked %d times, want %d", s.now, got, want, n, questions)
	}
}

func TestLocalDenialSkipsSharedLimiter(t *testing.T) {
	s := newSharedClient(t, 2, 0.5)
	answer(t, 0, nil, false)
	s.takes(1, bucket.Decision{Allowed: true})
	s.takes(1, bucket.Decision{Allowed: true})
	s.takes(0, bucket.Decision{Wait: 2 * time.Second})
	s.now += 2 * time.Second
	s.takes(1, bucket.Decision{Allowed: true})
	s.takes(0, bucket.Decision{Wait: 2 * time.Second})
}

// A client that is out of tokens because of requests through other proxies is refused here
// without asking again until a token is due.
func TestSharedRefusalIsLearned(t *testing.T) {
	s := newSharedClient(t, 10, 0.5)
	answer(t, 1500*time.Millisecond, nil, false)
	s.takes(1, bucket.Decision{Wait: 1500 * time.Millisecond})
	s.takes(0, bucket.Decision{Wait: 1500 * time.Millisecond})
	s.now += 1500*time.Millisecond - 1
	s.takes(0, bucket.Decision{Wait: 1})
	s.now++
	answer(t, 0, nil, false)
	s.takes(1, bucket.Decision{Allowed: true})
	s.takes(0, bucket.Decision{Wait: 2 * time.Second}) // there was only one token
}

// A denial costs no token, whether the shared limiter or an error caused it.
func TestSharedRefusalCostsNothing(t *testing.T) {
	s := newSharedClient(t, 3, 0.5)
	answer(t, 1, nil, false) // so short that the local bucket is full again
	for range 100 {
		s.takes(1, bucket.Decision{Wait: 1})
		s.now++
	}
	answer(t, 0, errors.New("out of order"), false)
	for range 100 {
		s.takes(1, bucket.Decision{Err: answers.err})
	}
	answer(t, 0, nil, false)
	s.takes(1, bucket.Decision{Allowed: true})
}

func TestSuspendedLimiter(t *testing.T) {
	s := newSharedClient(t, 1, 0.5)
	answer(t, time.Second, nil, false)
	s.takes(1, bucket.Decision{Wait: time.Second})
	answer(t, time.Second, nil, true)
	for range 10 {
		s.takes(0, bucket.Decision{Allowed: true})
	}
	answer(t, 0, nil, false)
	s.takes(0, bucket.Decision{Wait: time.Second})
}

func TestBucketsOfTheSharedLimiter(t *testing.T) {
	lim := limits(7, 3)
	lim.Zone, lim.IPv4Prefix, lim.IPv6Prefix = "office", 24, 56
	l := newTable(lim)
	for addr, want := range map[string]string{
		"192.0.2.1":        "192.0.2.0/24",
		"::ffff:192.0.2.9": "192.0.2.0/24",
		"2001:db8:0:1ff::": "2001:db8:0:100::/56",
	} {
		got := sharedBucket(l, l.Key(netip.MustParseAddr(addr)))
		if want := (Bucket{"office", "", netip.MustParsePrefix(want), "", 7, 333333333}); got != want {
			t.Errorf("the bucket of %s is %+v, want %+v", addr, got, want)
		}
	}
	if got, want := sharedBucket(l, client.User("alice")), (Bucket{"office", "", netip.Prefix{}, "alice", 7, 333333333}); got != want {
		t.Errorf("alice's bucket is %v, want %v", got, want)
	}
	if got, want := sharedBucket(l, l.Key(netip.Addr{})), (Bucket{"office", "", netip.Prefix{}, "", 7, 333333333}); got != want {
		t.Errorf("the bucket of a client without an address is %+v, want %+v", got, want)
	}
}

// An operator's refill also refills the shared bucket.
func TestRefillingTheSharedLimiter(t *testing.T) {
	w := newWorld(t, "limiter test\nburst 10\nrefill 0.5\nipv4_prefix 24", nil)
	answer(t, 0, nil, false)
	if !currentProcess().refillClient(keyOf("192.0.2.7"), "", "") || !currentProcess().refillClient(client.User("alice"), "", "") {
		t.Error("the clients are unknown")
	}
	want := []Bucket{
		{"default", "", netip.MustParsePrefix("192.0.2.0/24"), "", 10, 2 * time.Second},
		{"default", "", netip.Prefix{}, "alice", 10, 2 * time.Second},
	}
	if got := askedBuckets(); !slices.Equal(got, want) {
		t.Errorf("refilled %+v, want %+v", got, want)
	}
	answer(t, 0, errors.New("out of order"), false)
	if currentProcess().refillClient(keyOf("192.0.2.7"), "", "") {
		t.Error("the client is known")
	}
	if line := w.waitLog("failed to refill a shared bucket", 1)[0]; line["client"] != "192.0.2.0/24" || line["error"] != "out of order" {
		t.Errorf("log line: %v", line)
	}
}

func TestAnswersOfTheSharedLimiter(t *testing.T) {
	w := newWorld(t, "limiter test\nburst 10\nrefill 0.5\nzone a", nil)
	answer(t, 0, nil, false)
	w.gets(w.proxy, 200)
	if got := askedBuckets(); len(got) != 1 || got[0] != (Bucket{"a", "", netip.MustParsePrefix("127.0.0.1/32"), "", 10, 2 * time.Second}) {
		t.Errorf("asked for %+v", got)
	}

	answer(t, 3100*time.Millisecond, nil, false)
	conn := w.dial()
	conn.send(fmt.Sprintf("GET %s/ HTTP/1.1\nHost: x\n\n", w.origin.URL))
	res, _ := conn.response(http.MethodGet)
	if res.StatusCode != http.StatusTooManyRequests || res.Header.Get("Retry-After") != "4" || res.Header.Get("RateLimit") != `"a";r=0;t=4` {
		t.Errorf("status %d, fields %v", res.StatusCode, res.Header)
	}
	if line := w.waitLog("rate limited", 1)[0]; line["retry_after"] != 3.1 {
		t.Errorf("log line: %v", line)
	}
	w.gets(w.proxy, 429)
	if got := askedBuckets(); len(got) != 1 {
		t.Errorf("asked for %+v, want one question", got)
	}

	w.load(w.site("limiter test\nburst 10\nrefill 0.5\nexempt 127.0.0.1"))
	w.gets(w.proxy, 200)
	if got := askedBuckets(); len(got) != 0 {
		t.Errorf("asked for %+v though the client is exempt", got)
	}

	w.load(w.site("limiter test\nburst 10\nrefill 0.5\nzone b"))
	answer(t, 0, errors.New("the engine is cold"), false)
	conn = w.dial()
	conn.send(fmt.Sprintf("GET %s/ HTTP/1.1\nHost: x\n\n", w.origin.URL))
	res, body := conn.response(http.MethodGet)
	if res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("Retry-After") != "1" ||
		!strings.Contains(res.Header.Get("Proxy-Status"), "error=proxy_internal_error") || strings.Contains(body, "engine") {
		t.Errorf("status %d, fields %v: %s", res.StatusCode, res.Header, body)
	}
	lines := w.waitLog("request", 3)
	if line := lines[len(lines)-1]; line["level"] != "warn" || line["status"] != 503.0 || line["error"] != "the engine is cold" {
		t.Errorf("log line: %v", line)
	}
}

func TestCaddyfileLimiter(t *testing.T) {
	for directive, want := range map[string]any{
		"limiter test":       map[string]any{"module": "test"},
		"limiter test hello": map[string]any{"module": "test", "word": "hello"},
		`limiter test {
	word hello
}`: map[string]any{"module": "test", "word": "hello"},
		`limiter test a {
	word b
}
via a`: map[string]any{"module": "test", "word": "b"},
	} {
		got := handlers(t, `:8080 {
	async_proxy {
		burst 5
		`+directive+`
		refill 3
	}
}`)
		if len(got) != 1 || fmt.Sprint(got[0]["limiter"]) != fmt.Sprint(want) || got[0]["refill"] != 3.0 {
			t.Errorf("%s\ngives %v\nwant limiter %v", directive, got, want)
		}
	}
	const expected = "expected a limiter that this Caddy is built with; for redis, build it with --with github.com/asyncproxy/caddy-async-proxy/redis"
	for directive, want := range map[string]string{
		"limiter":                    "limiter: missing value; " + expected + ", at Caddyfile:3",
		"limiter nonsense":           "limiter: this build has no module http.async_proxy.limiters.nonsense; " + expected + ", at Caddyfile:3",
		"limiter test\nlimiter test": "limiter: the option is already set at Caddyfile:3; expected it once, at Caddyfile:4",
		`limiter test {
	nonsense a
}`: "unrecognized option 'nonsense', at Caddyfile:4",
	} {
		_, _, err := adapt(`:8080 {
	async_proxy {
		`+directive+`
	}
}
`, "Caddyfile")
		if want := "parsing caddyfile tokens for 'async_proxy': " + want; err == nil || err.Error() != want {
			t.Errorf("%s\ngives %v\nwant  %v", directive, err, want)
		}
	}
	if err := validate(t, `{"handler": "async_proxy", "limiter": {"module": "nonsense"}}`); err == nil || !strings.Contains(err.Error(), "unknown module: http.async_proxy.limiters.nonsense") {
		t.Errorf("an unknown module: %v", err)
	}
	if err := validate(t, `{"handler": "async_proxy", "limiter": {"module": "test"}}`); err != nil {
		t.Error(err)
	}
}
