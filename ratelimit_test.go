// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/time/rate"
)

// limits returns the key of a limiter with these limits and defaults otherwise.
func limits(burst int64, refill float64) limiterKey {
	h := Handler{Burst: burst, Refill: refill}
	h.setDefaults()
	return h.limiterKey()
}

// someone is a client of a limiter. Time passes only when a test says so.
type someone struct {
	t   *testing.T
	l   *limiter
	key client.Key
	now time.Duration
}

func newSomeone(t *testing.T, burst int64, refill float64) *someone {
	return &someone{t: t, l: newLimiter(limits(burst, refill)), key: keyOf("127.0.0.1")}
}

// allowed makes n requests at once, all of which must be allowed.
func (s *someone) allowed(n int) {
	s.t.Helper()
	for i := range n {
		if got, want := s.l.take(s.key, int64(s.now)), (decision{ok: true}); got != want {
			s.t.Fatalf("after %v, request %d of %d: take = %+v, want %+v", s.now, i+1, n, got, want)
		}
	}
}

// denied makes one request, which must be denied with the given wait.
func (s *someone) denied(wait time.Duration) {
	s.t.Helper()
	if got := s.l.take(s.key, int64(s.now)); got.ok || got.wait != wait {
		s.t.Fatalf("after %v: take = %+v, want it denied with wait %v", s.now, got, wait)
	}
}

// advance advances the time.
func (s *someone) advance(d time.Duration) { s.now += d }

// setTokens sets the number of tokens in the bucket, for bursts too large to use up.
func (s *someone) setTokens(tokens int64) {
	s.l.bucket(s.key, int64(s.now)).fullAt.Store(int64(s.now) + s.l.fill - tokens*s.l.interval)
}

func TestBurstAtOnceThenOneEachInterval(t *testing.T) {
	s := newSomeone(t, 10, 0.5)
	s.allowed(10)
	s.denied(2 * time.Second)
	for range 5 {
		s.advance(2 * time.Second)
		s.allowed(1)
		s.denied(2 * time.Second)
	}
}

func TestRefillIsContinuous(t *testing.T) {
	s := newSomeone(t, 10, 0.5)
	s.allowed(10)
	s.advance(3 * time.Second) // one and a half tokens
	s.allowed(1)
	s.denied(1 * time.Second)
	s.advance(700 * time.Millisecond)
	s.denied(300 * time.Millisecond)
	s.advance(400 * time.Millisecond) // a twentieth more than one token
	s.allowed(1)
	s.denied(1900 * time.Millisecond)
}

func TestBucketIsFullAgainAfterBurstOverRefill(t *testing.T) {
	s := newSomeone(t, 10, 0.5)
	s.allowed(10)
	s.advance(20*time.Second - 1)
	s.allowed(9)
	s.denied(1)

	s = newSomeone(t, 10, 0.5)
	s.allowed(10)
	s.advance(20 * time.Second)
	s.allowed(10)
	s.denied(2 * time.Second)
}

func TestBucketNeverHoldsMoreThanBurst(t *testing.T) {
	s := newSomeone(t, 10, 0.5)
	s.allowed(1)
	s.advance(24 * time.Hour)
	s.allowed(10)
	s.denied(2 * time.Second)
}

func TestWaitIsExactToTheNanosecond(t *testing.T) {
	s := newSomeone(t, 2, 3) // one token every 333333333 ns
	s.allowed(2)
	s.denied(333333333)
	s.advance(333333332)
	s.denied(1)
	s.advance(1)
	s.allowed(1)
	s.denied(333333333)
}

func TestDeniedRequestCostsNothing(t *testing.T) {
	s := newSomeone(t, 10, 0.5)
	s.allowed(10)
	for range 1000 {
		s.advance(time.Millisecond)
		s.denied(2*time.Second - s.now)
	}
	s.advance(time.Second)
	s.allowed(1)
}

func TestLimitsAtTheirBounds(t *testing.T) {
	const day = 24 * time.Hour
	for _, tc := range []struct {
		burst    int64
		refill   float64
		interval time.Duration
		fill     time.Duration
	}{
		{1, 0.5, 2 * time.Second, 2 * time.Second},
		{1, maxRefill, time.Microsecond, time.Microsecond},
		{1, minRefill, 100_000 * time.Second, 100_000 * time.Second},
		{1, 1.0 / 86400, day, day},
		{10, 1.0 / 86400, day, 10 * day},
		{3, 0.3, 3333333333, 3 * 3333333333},
		{1000, 700_000, 1429, 1000 * 1429},
		{maxBurst, maxRefill, time.Microsecond, 1000 * time.Second},
		{maxBurst, 0.25, 4 * time.Second, maxFill * time.Second}, // the longest possible
		{40_000, minRefill, 100_000 * time.Second, maxFill * time.Second},
	} {
		t.Run(fmt.Sprintf("burst %d refill %v", tc.burst, tc.refill), func(t *testing.T) {
			s := newSomeone(t, tc.burst, tc.refill)
			if err := s.l.key.validate(); err != nil {
				t.Fatalf("validate() = %v, want no error", err)
			}
			if interval, fill := time.Duration(s.l.interval), time.Duration(s.l.fill); interval != tc.interval || fill != tc.fill {
				t.Fatalf("one token every %v and full after %v, want %v and %v", interval, fill, tc.interval, tc.fill)
			}
			// Nothing overflows, even in a process that has run for a century.
			for _, started := range []time.Duration{0, 100 * 365 * day} {
				s.now = started
				s.setTokens(1)
				s.allowed(1)
				s.denied(tc.interval)
				s.advance(tc.interval - 1)
				s.denied(1)
				s.advance(1)
				s.allowed(1)
				s.setTokens(tc.burst)
				s.allowed(1)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	const good = "" // no error
	for _, tc := range []struct {
		name   string
		change func(*limiterKey)
		want   string
	}{
		{"defaults", func(k *limiterKey) {}, good},
		{"least burst", func(k *limiterKey) { k.burst = 1 }, good},
		{"greatest burst", func(k *limiterKey) { k.burst = 1e9 }, good},
		{"no burst", func(k *limiterKey) { k.burst = 0 }, "burst 0: expected a number of tokens from 1 to 1000000000"},
		{"negative burst", func(k *limiterKey) { k.burst = -1 }, "burst -1: expected a number of tokens from 1 to 1000000000"},
		{"burst too great", func(k *limiterKey) { k.burst = 1e9 + 1 }, "burst 1000000001: expected a number of tokens from 1 to 1000000000"},

		{"least refill", func(k *limiterKey) { k.refill = 0.00001 }, good},
		{"greatest refill", func(k *limiterKey) { k.refill = 1e6 }, good},
		{"no refill", func(k *limiterKey) { k.refill = 0 }, "refill 0: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"negative refill", func(k *limiterKey) { k.refill = -0.5 }, "refill -0.5: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"refill too small", func(k *limiterKey) { k.refill = 0.0000099 }, "refill 9.9e-06: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"refill too great", func(k *limiterKey) { k.refill = 1e6 + 1 }, "refill 1.000001e+06: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"refill NaN", func(k *limiterKey) { k.refill = math.NaN() }, "refill NaN: expected tokens per second from 0.00001 (about one a day) to 1000000"},
		{"refill infinite", func(k *limiterKey) { k.refill = math.Inf(1) }, "refill +Inf: expected tokens per second from 0.00001 (about one a day) to 1000000"},

		{"longest fill", func(k *limiterKey) { k.burst, k.refill = 1e9, 0.25 }, good},
		{"fill too long", func(k *limiterKey) { k.burst, k.refill = 1e9, 0.24 },
			"burst 1000000000 with refill 0.24: an empty bucket would take more than 4000000000 seconds to fill; expected a smaller burst or a larger refill"},

		{"ipv4_prefix 1", func(k *limiterKey) { k.v4 = 1 }, good},
		{"ipv4_prefix 0", func(k *limiterKey) { k.v4 = 0 }, "ipv4_prefix 0: expected bits from 1 to 32"},
		{"ipv4_prefix 33", func(k *limiterKey) { k.v4 = 33 }, "ipv4_prefix 33: expected bits from 1 to 32"},
		{"ipv6_prefix 128", func(k *limiterKey) { k.v6 = 128 }, good},
		{"ipv6_prefix 0", func(k *limiterKey) { k.v6 = 0 }, "ipv6_prefix 0: expected bits from 1 to 128"},
		{"ipv6_prefix 129", func(k *limiterKey) { k.v6 = 129 }, "ipv6_prefix 129: expected bits from 1 to 128"},

		{"max_clients 2", func(k *limiterKey) { k.maxClients = 2 }, good},
		{"max_clients 1", func(k *limiterKey) { k.maxClients = 1 }, "max_clients 1: expected a number of at least 2"},

		{"zone", func(k *limiterKey) { k.zone = "office-2" }, good},
		{"no zone", func(k *limiterKey) { k.zone = "" }, `zone "": expected a name in printable ASCII without spaces, quotes and backslashes`},
		{"zone with a quote", func(k *limiterKey) { k.zone = `a"b` }, `zone "a\"b": expected a name in printable ASCII without spaces, quotes and backslashes`},
		{"zone with a line end", func(k *limiterKey) { k.zone = "a\nb" }, `zone "a\nb": expected a name in printable ASCII without spaces, quotes and backslashes`},
		{"zone beyond ASCII", func(k *limiterKey) { k.zone = "büro" }, `zone "büro": expected a name in printable ASCII without spaces, quotes and backslashes`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			key := limits(10, 0.5)
			tc.change(&key)
			var got string
			if err := key.validate(); err != nil {
				got = err.Error()
			}
			if got != tc.want {
				t.Errorf("validate() = %q, want %q", got, tc.want)
			}
		})
	}
}

func TestCeilSeconds(t *testing.T) {
	for d, want := range map[time.Duration]int64{
		0:                         1,
		1:                         1,
		time.Second - 1:           1,
		time.Second:               1,
		time.Second + 1:           2,
		1999 * time.Millisecond:   2,
		100_000 * time.Second:     100_000,
		100_000*time.Second - 1:   100_000,
		maxFill * time.Second:     maxFill,
		maxFill*time.Second - 999: maxFill,
	} {
		if got := ceilSeconds(d); got != want {
			t.Errorf("ceilSeconds(%v) = %d, want %d", d, got, want)
		}
	}
}

func TestRateLimitFields(t *testing.T) {
	key := limits(10, 0.3) // full after 33.33 s
	key.zone = "office"
	l := newLimiter(key)
	if got, want := l.policy(), `"office";q=10;w=34`; got != want {
		t.Errorf("policy() = %s, want %s", got, want)
	}
	for wait, want := range map[time.Duration]string{
		1:                       `"office";r=0;t=1`,
		1500 * time.Millisecond: `"office";r=0;t=2`,
		3333333333:              `"office";r=0;t=4`,
	} {
		if got := l.state(ceilSeconds(wait)); got != want {
			t.Errorf("state(%v) = %s, want %s", wait, got, want)
		}
	}
}

func TestClientKeyIsPrefix(t *testing.T) {
	key := limits(10, 0.5)
	key.v4, key.v6 = 24, 48
	for addr, want := range map[string]string{
		"192.0.2.129":          "192.0.2.0",
		"2001:db8:1:2:3:4:5:6": "2001:db8:1::",
	} {
		if got := newLimiter(key).keyFor(netip.MustParseAddr(addr)); got != keyOf(want) {
			t.Errorf("keyFor(%s) = %v, want %s", addr, got, want)
		}
	}
}

func TestClientWithoutAddressIsLimited(t *testing.T) {
	s := newSomeone(t, 3, 0.5)
	s.key = s.l.keyFor(netip.Addr{})
	s.allowed(3)
	s.denied(2 * time.Second)
}

// Each of a client's first ten refusals is logged. After that, one line a second carries
// the number of refusals since the last one.
func TestRefusalLogLimit(t *testing.T) {
	s := newSomeone(t, 1, minRefill)
	s.allowed(1)
	lines := func(want ...int64) {
		t.Helper()
		for i, want := range want {
			if got := s.l.take(s.key, int64(s.now)).logCount; got != want {
				t.Fatalf("after %v, refusal %d: a line for %d refusals, want %d", s.now, i+1, got, want)
			}
		}
	}
	lines(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0)
	s.advance(time.Second - 1)
	lines(0)
	s.advance(1)
	lines(5, 0, 0)
	s.advance(2 * time.Second)
	lines(3, 1, 0)
	s.advance(time.Hour)
	lines(2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0)

	someoneElse := *s
	someoneElse.key = keyOf("127.0.0.2")
	someoneElse.allowed(1)
	if got := s.l.take(someoneElse.key, int64(s.now)).logCount; got != 1 {
		t.Errorf("the first refusal of another client: a line for %d refusals, want 1", got)
	}
}

func TestLoggedRefusalsAddUp(t *testing.T) {
	s := newSomeone(t, 1, 0.1)
	var refused, logged int64
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 100_000 {
		s.advance(time.Duration(rnd.ExpFloat64() * float64(200*time.Millisecond)))
		if v := s.l.take(s.key, int64(s.now)); v.ok {
			if v.logCount != 0 {
				t.Fatalf("after %v: take = %+v: a line about an allowed request", s.now, v)
			}
		} else {
			refused++
			logged += v.logCount
		}
	}
	pending := int64(s.l.bucket(s.key, int64(s.now)).unlogged.Load())
	if logged+pending != refused || pending > 100 {
		t.Errorf("%d refusals were logged and %d are pending, want %d in all and few pending", logged, pending, refused)
	}
}

// x/time/rate is the usual limiter of Go programs. It counts tokens in floating point and
// never forgets a client.
func TestSameDecisionsAsXTimeRate(t *testing.T) {
	const each = 200_000
	for _, tc := range []struct {
		burst  int64
		refill float64
	}{{1, 1}, {10, 0.5}, {3, 0.3}, {100, 7}, {1000, 10_000}, {20, maxRefill}, {5, minRefill}, {2, 1.0 / 86400}} {
		t.Run(fmt.Sprintf("burst %d refill %v", tc.burst, tc.refill), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(uint64(tc.burst), math.Float64bits(tc.refill)))
			l := newLimiter(limits(tc.burst, tc.refill))
			// The intervals of the limiter are whole nanoseconds.
			limit := rate.Limit(1e9 / float64(l.interval))
			var clients [5]client.Key
			var oracles [len(clients)]*rate.Limiter
			for i := range clients {
				clients[i] = loopback(i + 1)
				oracles[i] = rate.NewLimiter(limit, int(tc.burst))
			}
			base := time.Unix(1e9, 0)
			var now int64
			var allowed, moved int
			for op := range each {
				// The clients together request slightly more than they are allowed, with
				// occasional long pauses.
				step := rnd.ExpFloat64() * float64(l.interval) / float64(len(clients)) * 0.7
				if rnd.IntN(50*int(tc.burst)) == 0 {
					step = rnd.Float64() * 2 * float64(l.fill)
				}
				now += int64(step)
				i := rnd.IntN(len(clients))
				at := func() time.Time { return base.Add(time.Duration(now)) }
				tokens := oracles[i].TokensAt(at())
				// Floating point cannot decide this close to a whole token unless the
				// bucket is full, and x/time/rate ignores waits of less than a nanosecond.
				for math.Abs(tokens-1) < 1e-6+1.01/float64(l.interval) && tokens != float64(tc.burst) {
					moved++
					now += 1 + l.interval/1000
					tokens = oracles[i].TokensAt(at())
				}
				want := oracles[i].AllowN(at(), 1)
				got := l.take(clients[i], now)
				if got.ok != want {
					t.Fatalf("operation %d after %v, %v tokens: take = %+v, x/time/rate says %v", op, time.Duration(now), tokens, got, want)
				}
				if want {
					allowed++
				} else if wait := (1 - tokens) * float64(l.interval); math.Abs(wait-float64(got.wait)) > 1+1e-6*float64(l.interval) {
					t.Fatalf("operation %d after %v: wait = %v, want about %v", op, time.Duration(now), got.wait, time.Duration(wait))
				}
			}
			if allowed < each/10 || allowed > each*9/10 {
				t.Errorf("%d of %d operations were allowed: too one-sided to mean anything", allowed, each)
			}
			if moved > each/100 {
				t.Errorf("%d of %d decisions were too close to tell", moved, each)
			}
		})
	}
}

// tank is a token bucket in integer arithmetic, written the obvious way: a token is as many
// units as it takes nanoseconds to gain one.
type tank struct{ level, filled int64 }

func (b *tank) take(now, interval, capacity int64) (wait int64) {
	b.level, b.filled = min(capacity, b.level+now-b.filled), now
	if b.level < interval {
		return interval - b.level
	}
	b.level -= interval
	return 0
}

// Here generations are dropped as early as the limiter may ever drop them, and requests
// arrive just before, at and after every critical moment. No client is forgotten too early,
// and every wait is exact to the nanosecond.
func TestSameDecisionsAsUnboundedBuckets(t *testing.T) {
	const each = 250_000
	for _, tc := range []struct {
		burst  int64
		refill float64
	}{{1, 0.5}, {10, 0.5}, {3, 3}, {50, 12_345}, {4, maxRefill}, {2, minRefill}} {
		t.Run(fmt.Sprintf("burst %d refill %v", tc.burst, tc.refill), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(uint64(tc.burst), math.Float64bits(tc.refill)))
			l := newLimiter(limits(tc.burst, tc.refill))
			l.period = l.fill
			var tanks [4]tank
			for i := range tanks {
				tanks[i].level = l.fill
			}
			var now, lastWait int64
			var denied, rotations int
			g := l.gens.Load()
			for op := range each {
				switch rnd.IntN(12) {
				case 0:
					now += rnd.Int64N(l.interval)
				case 1:
					now += lastWait
				case 2:
					now += max(lastWait-1, 0)
				case 3:
					now += l.interval / 4
				case 4:
					if rnd.IntN(2*int(tc.burst)) == 0 {
						now = max(now, g.rotateAt-1+rnd.Int64N(3)) // as a generation ends
					}
				}
				i := rnd.IntN(len(tanks))
				wait := tanks[i].take(now, l.interval, l.fill)
				got := l.take(loopback(i), now)
				if got.ok != (wait == 0) || int64(got.wait) != wait {
					t.Fatalf("operation %d after %v: take = %+v, want wait %v", op, time.Duration(now), got, time.Duration(wait))
				}
				if lastWait = wait; wait > 0 {
					denied++
				}
				if next := l.gens.Load(); next != g {
					g = next
					rotations++
				}
			}
			if denied < each/20 || denied > each*19/20 {
				t.Errorf("%d of %d operations were denied: too one-sided to mean anything", denied, each)
			}
			if rotations < 100 {
				t.Errorf("%d rotations, want many", rotations)
			}
			if n := l.forced.Load(); n != 0 {
				t.Errorf("%d clients were forgotten early, want none", n)
			}
		})
	}
}

// keyOf returns an address.
func keyOf(addr string) client.Key { return client.Address(netip.MustParseAddr(addr)) }

// loopback returns the key of the n-th address of 127.0.0.0/8.
func loopback(n int) client.Key {
	return client.Address(netip.AddrFrom4([4]byte{127, byte(n >> 16), byte(n >> 8), byte(n)}))
}

func TestFiftyThousandClientsAreIndependent(t *testing.T) {
	const n, burst = 50_000, 3
	l := newLimiter(limits(burst, 0.5))
	for round := range burst + 1 {
		for i := range n {
			if v := l.take(loopback(i), int64(round)); v.ok != (round < burst) {
				t.Fatalf("request %d of %v: take = %+v, want ok %v", round+1, loopback(i), v, round < burst)
			}
		}
	}
	if got := l.clients(); got != n {
		t.Errorf("clients() = %d, want %d", got, n)
	}
	// A client that has waited does not affect the others.
	wait := int64(2 * time.Second)
	if v := l.take(loopback(7), wait); !v.ok {
		t.Errorf("after %v: take = %+v, want it allowed", time.Duration(wait), v)
	}
	if v := l.take(loopback(7), wait); v.ok {
		t.Errorf("after %v, again: take = %+v, want it denied", time.Duration(wait), v)
	}
	if v := l.take(loopback(8), wait); !v.ok {
		t.Errorf("after %v, another client: take = %+v, want it allowed", time.Duration(wait), v)
	}
}

// heap returns the bytes in use that are reachable.
func heap() int64 {
	runtime.GC()
	runtime.GC() // what finalizers and pools kept alive
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestMemoryPerClient(t *testing.T) {
	// The map's table doubles: the cost per client depends on how full it is.
	for n, most := range map[int]float64{50_000: 120, 500_000: 140} {
		key := limits(10, 0.5)
		key.maxClients = 2 * n
		before := heap()
		l := newLimiter(key)
		for i := range n {
			l.take(loopback(i), int64(i))
		}
		per := float64(heap()-before) / float64(n)
		if got := l.clients(); got != n {
			t.Errorf("clients() = %d, want %d", got, n)
		}
		t.Logf("%d clients: %.1f bytes each", n, per)
		if per > most {
			t.Errorf("%d clients take %.1f bytes of heap each, want at most %g", n, per, most)
		}
	}
}

func counterValue(t *testing.T) float64 {
	t.Helper()
	var m dto.Metric
	if err := metrics.evictions.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

// All clients are active within one period, so that only the bound drops any.
func TestMemoryIsBoundedByMaxClients(t *testing.T) {
	const maxClients = 20_000
	key := limits(10, 0.5)
	key.maxClients = maxClients
	evicted := counterValue(t)
	before := heap()
	l := newLimiter(key)
	n := 0
	come := func(newcomers int) (bytes int64) {
		for range newcomers {
			if v := l.take(loopback(n), 1); !v.ok {
				t.Fatalf("newcomer %d: take = %+v, want it allowed", n, v)
			}
			n++
			if got := l.clients(); got > maxClients {
				t.Fatalf("clients() = %d after %d newcomers, want at most %d", got, n, maxClients)
			}
		}
		return heap() - before
	}
	full := come(maxClients)
	if got := l.forced.Load(); got != 0 {
		t.Errorf("%d clients were forgotten early before there were more than max_clients, want none", got)
	}
	if later := come(20 * maxClients); later > full*11/10 {
		t.Errorf("the heap grew from %d to %d bytes past max_clients, want no growth", full, later)
	}
	want := n - l.clients()
	if got := l.forced.Load(); got != int64(want) {
		t.Errorf("forced = %d, want %d", got, want)
	}
	if got := counterValue(t) - evicted; got != float64(want) {
		t.Errorf("the metric counts %v, want %d", got, want)
	}
	runtime.KeepAlive(l)
}

// The bound forgets the clients that were idle longest: a client that keeps sending stays
// limited however many others flood the table.
func TestFloodDoesNotResetActiveClient(t *testing.T) {
	const maxClients = 100
	key := limits(1, minRefill)
	key.maxClients = maxClients
	s := &someone{t: t, l: newLimiter(key), key: loopback(1)}
	s.allowed(1)
	newcomer := 1000
	for range 1000 {
		for range maxClients / 4 {
			s.l.take(loopback(newcomer), int64(s.now))
			newcomer++
		}
		s.denied(100_000 * time.Second)
	}
	if s.l.forced.Load() == 0 {
		t.Error("no client was forgotten: this was no flood")
	}
}

// The docs promise: "Only when more than max_clients are active at once is a generation
// dropped early."
func TestNoClientDroppedUpToHalfOfMaxClients(t *testing.T) {
	const maxClients = 100
	key := limits(1, minRefill)
	key.maxClients = maxClients
	l := newLimiter(key)
	forgotten := 0
	for round := range 5 {
		for i := range maxClients / 2 {
			if v := l.take(loopback(i), 1); round == 0 && !v.ok {
				t.Fatalf("client %d: take = %+v, want it allowed", i, v)
			} else if round > 0 && v.ok {
				forgotten++
			}
		}
	}
	if forgotten > 0 || l.forced.Load() > 0 {
		t.Errorf("with %d clients active and max_clients %d, %d found a full bucket and %d were counted as forgotten early, want none",
			maxClients/2, maxClients, forgotten, l.forced.Load())
	}
}

// A client that returns is in both generations for a while, and is tracked throughout.
func TestOnlyDroppedClientsAreCounted(t *testing.T) {
	const maxClients, newcomers = 100, 20_000
	key := limits(1, minRefill)
	key.maxClients = maxClients
	s := &someone{t: t, l: newLimiter(key), key: loopback(1)}
	s.allowed(1)
	for i := range newcomers {
		s.l.take(loopback(1000+i), int64(s.now))
		s.denied(100_000 * time.Second)
	}
	if got := s.l.forced.Load(); got > newcomers {
		t.Errorf("%d clients were counted as forgotten early, of %d that may have been", got, newcomers)
	}
}

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

func TestExactlyBurstIsAdmittedConcurrently(t *testing.T) {
	const burst = 1000
	l := newLimiter(limits(burst, 0.5))
	var admitted atomic.Int64
	runTogether(64, func(int) {
		for range burst / 16 {
			if l.take(loopback(1), 1).ok {
				admitted.Add(1)
			}
		}
	})
	if got := admitted.Load(); got != burst {
		t.Errorf("%d requests admitted, want %d", got, burst)
	}
}

// Some callers are a nanosecond late: they still use a generation that others are
// replacing.
func TestExactlyBurstIsAdmittedWhileGenerationsRotate(t *testing.T) {
	const callers, burst, rounds = 8, 3, 5000
	l := newLimiter(limits(burst, 0.5))
	for round := range rounds {
		key := loopback(round)
		l.take(loopback(1<<20), l.gens.Load().rotateAt) // starts a generation
		ends := l.gens.Load().rotateAt
		var admitted atomic.Int64
		runTogether(callers, func(i int) {
			for range burst {
				if l.take(key, ends-int64(i%2)).ok {
					admitted.Add(1)
				}
			}
		})
		if got := admitted.Load(); got != burst {
			t.Fatalf("round %d: %d requests admitted, want %d", round, got, burst)
		}
	}
}

func TestConcurrentFlood(t *testing.T) {
	const callers, maxClients, each = 16, 64, 5000
	key := limits(1, minRefill)
	key.maxClients = maxClients
	l := newLimiter(key)
	runTogether(callers, func(i int) {
		for n := range each {
			if newcomer := loopback(i*each + n); !l.take(newcomer, 1).ok {
				t.Errorf("the newcomer %v was denied", newcomer)
			}
			if got := l.clients(); got > maxClients+callers {
				t.Errorf("clients() = %d, want at most %d", got, maxClients+callers)
			}
		}
	})
}

func TestTakeAllocatesNothing(t *testing.T) {
	l := newLimiter(limits(maxBurst, 1))
	if got := testing.AllocsPerRun(1000, func() {
		if !l.take(loopback(1), 1).ok {
			t.Fatal("denied")
		}
	}); got != 0 {
		t.Errorf("an allowed request allocates %v times, want 0", got)
	}
	l = newLimiter(limits(1, 1))
	l.take(loopback(1), 1)
	if got := testing.AllocsPerRun(1000, func() {
		if l.take(loopback(1), 1).ok {
			t.Fatal("allowed")
		}
	}); got != 0 {
		t.Errorf("a denied request allocates %v times, want 0", got)
	}
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
	return fmt.Sprintf("http://%s {\n\tasync_proxy {\n\t\t%s\n\t}\n}\n", strings.TrimPrefix(address, "127.0.0.1"), options)
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
			if got, want := res.Header.Get("Proxy-Status"), "; error=http_request_denied"; !strings.HasSuffix(got, want) {
				t.Errorf("Proxy-Status: %q, want a name and %q", got, want)
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

// TestRequestsOutOfOrder checks requests that take their tokens in another order than that
// of their timestamps: each finds the tokens as of the latest timestamp, so burst of them
// pass at once.
func TestRequestsOutOfOrder(t *testing.T) {
	const burst, second = 5, int64(time.Second)
	for _, order := range [][]int64{{4, 3, 2, 1, 0}, {0, 4, 1, 3, 2}, {0, 1, 2, 3, 4}} {
		l, key := newLimiter(limits(burst, 0.001)), keyOf("192.0.2.1")
		for _, at := range order {
			if v := l.take(key, 1000*second+at); !v.ok {
				t.Errorf("in the order %v: number %d waits %v", order, at, v.wait)
			}
		}
		if v := l.take(key, 1000*second); v.ok {
			t.Errorf("in the order %v: one more than burst passes", order)
		}
	}
}

// TestOtherHandlersTakeNoToken checks that health checks, the PAC script and the site's other
// handlers cost no token and work for a client without one.
func TestOtherHandlersTakeNoToken(t *testing.T) {
	for name, serve := range map[string]func(string) string{
		"fast":     func(site string) string { return site },
		"ordinary": func(site string) string { return strings.Replace(site, "async_proxy {", "log\nasync_proxy {", 1) },
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
	loadCaddyfile(t, "{\n\tadmin off\n\tpersist_config off\n\tdefault_bind 127.0.0.1\n\tservers {\n\t\ttrusted_proxies static 127.0.0.1/32\n\t}\n}\n"+w.site(options))
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
	w.load(fmt.Sprintf("http://%s {\n\tasync_proxy burst 1 refill 0.01\n\thandle_errors {\n\t\theader X-From error-route\n\t\trespond \"slow down: {err.status_code}\" {err.status_code}\n\t}\n}\n",
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

// If their buckets are full again by then, clients dropped by the memory bound are not
// counted as forgotten.
func TestFullBucketsAreNotForgottenEarly(t *testing.T) {
	key := limits(2, 1)
	key.maxClients = 100
	l := newLimiter(key)
	for i := range 10_000 {
		l.take(loopback(i), int64(i)*int64(time.Second)/20)
		if got := l.clients(); got > key.maxClients {
			t.Fatalf("clients() = %d, want at most %d", got, key.maxClients)
		}
	}
	if n := l.forced.Load(); n != 0 {
		t.Errorf("%d clients were forgotten early, want none", n)
	}
}
