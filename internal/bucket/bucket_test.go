// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package bucket

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// limits returns limits that are the defaults of the proxy otherwise.
func limits(burst int64, refill float64) Limits {
	return Limits{Zone: "default", Burst: burst, Refill: refill, IPv4Prefix: 32, IPv6Prefix: 64, MaxClients: 1_000_000}
}

func newTable(l Limits) *Table { return New(l, time.Minute, new(atomic.Int64)) }

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

// someone is a client of a limiter. Time passes only when a test says so.
type someone struct {
	t   *testing.T
	l   *Table
	key client.Key
	now time.Duration
}

func newSomeone(t *testing.T, burst int64, refill float64) *someone {
	return &someone{t: t, l: newTable(limits(burst, refill)), key: keyOf("127.0.0.1")}
}

// allowed makes n requests at once, all of which must be allowed.
func (s *someone) allowed(n int) {
	s.t.Helper()
	for i := range n {
		if got, want := s.l.Take(s.key, int64(s.now)), (Decision{Allowed: true}); got != want {
			s.t.Fatalf("after %v, request %d of %d: Take = %+v, want %+v", s.now, i+1, n, got, want)
		}
	}
}

// denied makes one request, which must be denied with the given wait.
func (s *someone) denied(wait time.Duration) {
	s.t.Helper()
	if got := s.l.Take(s.key, int64(s.now)); got.Allowed || got.Wait != wait {
		s.t.Fatalf("after %v: Take = %+v, want it denied with wait %v", s.now, got, wait)
	}
}

// advance advances the time.
func (s *someone) advance(d time.Duration) { s.now += d }

// setTokens sets the number of tokens in the bucket, for bursts too large to use up.
func (s *someone) setTokens(tokens int64) {
	s.l.entry(s.key, int64(s.now)).fullAt.Store(int64(s.now) + s.l.fill - tokens*s.l.interval)
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
		{1, MaxRefill, time.Microsecond, time.Microsecond},
		{1, MinRefill, 100_000 * time.Second, 100_000 * time.Second},
		{1, 1.0 / 86400, day, day},
		{10, 1.0 / 86400, day, 10 * day},
		{3, 0.3, 3333333333, 3 * 3333333333},
		{1000, 700_000, 1429, 1000 * 1429},
		{MaxBurst, MaxRefill, time.Microsecond, 1000 * time.Second},
		{MaxBurst, 0.25, 4 * time.Second, maxFill * time.Second}, // the longest possible
		{40_000, MinRefill, 100_000 * time.Second, maxFill * time.Second},
	} {
		t.Run(fmt.Sprintf("burst %d refill %v", tc.burst, tc.refill), func(t *testing.T) {
			s := newSomeone(t, tc.burst, tc.refill)
			if err := s.l.Limits.Validate(); err != nil {
				t.Fatalf("Validate() = %v, want no error", err)
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

func TestClientKeyIsPrefix(t *testing.T) {
	lim := limits(10, 0.5)
	lim.IPv4Prefix, lim.IPv6Prefix = 24, 48
	for addr, want := range map[string]string{
		"192.0.2.129":          "192.0.2.0",
		"2001:db8:1:2:3:4:5:6": "2001:db8:1::",
	} {
		if got := newTable(lim).Key(netip.MustParseAddr(addr)); got != keyOf(want) {
			t.Errorf("Key(%s) = %v, want %s", addr, got, want)
		}
	}
}

func TestClientWithoutAddressIsLimited(t *testing.T) {
	s := newSomeone(t, 3, 0.5)
	s.key = s.l.Key(netip.Addr{})
	s.allowed(3)
	s.denied(2 * time.Second)
}

// Each of a client's first ten refusals is logged. After that, one line a second carries
// the number of refusals since the last one.
func TestRefusalLogLimit(t *testing.T) {
	s := newSomeone(t, 1, MinRefill)
	s.allowed(1)
	lines := func(want ...int64) {
		t.Helper()
		for i, want := range want {
			if got := s.l.Take(s.key, int64(s.now)).LogCount; got != want {
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
	if got := s.l.Take(someoneElse.key, int64(s.now)).LogCount; got != 1 {
		t.Errorf("the first refusal of another client: a line for %d refusals, want 1", got)
	}
}

func TestLoggedRefusalsAddUp(t *testing.T) {
	s := newSomeone(t, 1, 0.1)
	var refused, logged int64
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 100_000 {
		s.advance(time.Duration(rnd.ExpFloat64() * float64(200*time.Millisecond)))
		if v := s.l.Take(s.key, int64(s.now)); v.Allowed {
			if v.LogCount != 0 {
				t.Fatalf("after %v: Take = %+v: a line about an allowed request", s.now, v)
			}
		} else {
			refused++
			logged += v.LogCount
		}
	}
	pending := int64(s.l.entry(s.key, int64(s.now)).unlogged.Load())
	if logged+pending != refused || pending > 100 {
		t.Errorf("%d refusals were logged and %d are pending, want %d in all and few pending", logged, pending, refused)
	}
}

// x/time/rate is the usual limiter of Go programs. It counts tokens in floating point and
// never forgets a client.
func TestSameDecisionsAsXTimeRate(t *testing.T) {
	conntest.OnOneGoroutine(t)
	const each = 200_000
	for _, tc := range []struct {
		burst  int64
		refill float64
	}{{1, 1}, {10, 0.5}, {3, 0.3}, {100, 7}, {1000, 10_000}, {20, MaxRefill}, {5, MinRefill}, {2, 1.0 / 86400}} {
		t.Run(fmt.Sprintf("burst %d refill %v", tc.burst, tc.refill), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(uint64(tc.burst), math.Float64bits(tc.refill)))
			l := newTable(limits(tc.burst, tc.refill))
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
				got := l.Take(clients[i], now)
				if got.Allowed != want {
					t.Fatalf("operation %d after %v, %v tokens: Take = %+v, x/time/rate says %v", op, time.Duration(now), tokens, got, want)
				}
				if want {
					allowed++
				} else if wait := (1 - tokens) * float64(l.interval); math.Abs(wait-float64(got.Wait)) > 1+1e-6*float64(l.interval) {
					t.Fatalf("operation %d after %v: wait = %v, want about %v", op, time.Duration(now), got.Wait, time.Duration(wait))
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
	conntest.OnOneGoroutine(t)
	const each = 250_000
	for _, tc := range []struct {
		burst  int64
		refill float64
	}{{1, 0.5}, {10, 0.5}, {3, 3}, {50, 12_345}, {4, MaxRefill}, {2, MinRefill}} {
		t.Run(fmt.Sprintf("burst %d refill %v", tc.burst, tc.refill), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(uint64(tc.burst), math.Float64bits(tc.refill)))
			l := newTable(limits(tc.burst, tc.refill))
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
				got := l.Take(loopback(i), now)
				if got.Allowed != (wait == 0) || int64(got.Wait) != wait {
					t.Fatalf("operation %d after %v: Take = %+v, want wait %v", op, time.Duration(now), got, time.Duration(wait))
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
			if n := l.evicted.Load(); n != 0 {
				t.Errorf("%d clients were forgotten early, want none", n)
			}
		})
	}
}

// loopback returns the key of the n-th address of 127.0.0.0/8.
func loopback(n int) client.Key {
	return client.Address(netip.AddrFrom4([4]byte{127, byte(n >> 16), byte(n >> 8), byte(n)}))
}

func TestFiftyThousandClientsAreIndependent(t *testing.T) {
	conntest.OnOneGoroutine(t)
	const n, burst = 50_000, 3
	l := newTable(limits(burst, 0.5))
	for round := range burst + 1 {
		for i := range n {
			if v := l.Take(loopback(i), int64(round)); v.Allowed != (round < burst) {
				t.Fatalf("request %d of %v: Take = %+v, want ok %v", round+1, loopback(i), v, round < burst)
			}
		}
	}
	if got := l.Len(); got != n {
		t.Errorf("Len() = %d, want %d", got, n)
	}
	// A client that has waited does not affect the others.
	wait := int64(2 * time.Second)
	if v := l.Take(loopback(7), wait); !v.Allowed {
		t.Errorf("after %v: Take = %+v, want it allowed", time.Duration(wait), v)
	}
	if v := l.Take(loopback(7), wait); v.Allowed {
		t.Errorf("after %v, again: Take = %+v, want it denied", time.Duration(wait), v)
	}
	if v := l.Take(loopback(8), wait); !v.Allowed {
		t.Errorf("after %v, another client: Take = %+v, want it allowed", time.Duration(wait), v)
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
	conntest.OnOneGoroutine(t)
	// The map's table doubles: the cost per client depends on how full it is.
	for n, most := range map[int]float64{50_000: 120, 500_000: 140} {
		lim := limits(10, 0.5)
		lim.MaxClients = 2 * n
		before := heap()
		l := newTable(lim)
		for i := range n {
			l.Take(loopback(i), int64(i))
		}
		per := float64(heap()-before) / float64(n)
		if got := l.Len(); got != n {
			t.Errorf("Len() = %d, want %d", got, n)
		}
		t.Logf("%d clients: %.1f bytes each", n, per)
		if per > most {
			t.Errorf("%d clients take %.1f bytes of heap each, want at most %g", n, per, most)
		}
	}
}

// All clients are active within one period, so that only the bound drops any.
func TestMemoryIsBoundedByMaxClients(t *testing.T) {
	conntest.OnOneGoroutine(t)
	const maxClients = 20_000
	lim := limits(10, 0.5)
	lim.MaxClients = maxClients
	before := heap()
	l := newTable(lim)
	n := 0
	come := func(newcomers int) (bytes int64) {
		for range newcomers {
			if v := l.Take(loopback(n), 1); !v.Allowed {
				t.Fatalf("newcomer %d: Take = %+v, want it allowed", n, v)
			}
			n++
			if got := l.Len(); got > maxClients {
				t.Fatalf("Len() = %d after %d newcomers, want at most %d", got, n, maxClients)
			}
		}
		return heap() - before
	}
	full := come(maxClients)
	if got := l.evicted.Load(); got != 0 {
		t.Errorf("%d clients were forgotten early before there were more than max_clients, want none", got)
	}
	if later := come(20 * maxClients); later > full*11/10 {
		t.Errorf("the heap grew from %d to %d bytes past max_clients, want no growth", full, later)
	}
	want := n - l.Len()
	if got := l.evicted.Load(); got != int64(want) {
		t.Errorf("evicted = %d, want %d", got, want)
	}
	runtime.KeepAlive(l)
}

// The bound forgets the clients that were idle longest: a client that keeps sending stays
// limited however many others flood the table.
func TestFloodDoesNotResetActiveClient(t *testing.T) {
	const maxClients = 100
	lim := limits(1, MinRefill)
	lim.MaxClients = maxClients
	s := &someone{t: t, l: newTable(lim), key: loopback(1)}
	s.allowed(1)
	newcomer := 1000
	for range 1000 {
		for range maxClients / 4 {
			s.l.Take(loopback(newcomer), int64(s.now))
			newcomer++
		}
		s.denied(100_000 * time.Second)
	}
	if s.l.evicted.Load() == 0 {
		t.Error("no client was forgotten: this was no flood")
	}
}

// The docs promise: "Only when more than max_clients are active at once is a generation
// dropped early."
func TestNoClientDroppedUpToHalfOfMaxClients(t *testing.T) {
	const maxClients = 100
	lim := limits(1, MinRefill)
	lim.MaxClients = maxClients
	l := newTable(lim)
	forgotten := 0
	for round := range 5 {
		for i := range maxClients / 2 {
			if v := l.Take(loopback(i), 1); round == 0 && !v.Allowed {
				t.Fatalf("client %d: Take = %+v, want it allowed", i, v)
			} else if round > 0 && v.Allowed {
				forgotten++
			}
		}
	}
	if forgotten > 0 || l.evicted.Load() > 0 {
		t.Errorf("with %d clients active and max_clients %d, %d found a full bucket and %d were counted as forgotten early, want none",
			maxClients/2, maxClients, forgotten, l.evicted.Load())
	}
}

// A client that returns is in both generations for a while, and is tracked throughout.
func TestOnlyDroppedClientsAreCounted(t *testing.T) {
	const maxClients, newcomers = 100, 20_000
	lim := limits(1, MinRefill)
	lim.MaxClients = maxClients
	s := &someone{t: t, l: newTable(lim), key: loopback(1)}
	s.allowed(1)
	for i := range newcomers {
		s.l.Take(loopback(1000+i), int64(s.now))
		s.denied(100_000 * time.Second)
	}
	if got := s.l.evicted.Load(); got > newcomers {
		t.Errorf("%d clients were counted as forgotten early, of %d that may have been", got, newcomers)
	}
}

func TestExactlyBurstIsAdmittedConcurrently(t *testing.T) {
	const burst = 1000
	l := newTable(limits(burst, 0.5))
	var admitted atomic.Int64
	runTogether(64, func(int) {
		for range burst / 16 {
			if l.Take(loopback(1), 1).Allowed {
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
	l := newTable(limits(burst, 0.5))
	for round := range rounds {
		key := loopback(round)
		l.Take(loopback(1<<20), l.gens.Load().rotateAt) // starts a generation
		ends := l.gens.Load().rotateAt
		var admitted atomic.Int64
		runTogether(callers, func(i int) {
			for range burst {
				if l.Take(key, ends-int64(i%2)).Allowed {
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
	lim := limits(1, MinRefill)
	lim.MaxClients = maxClients
	l := newTable(lim)
	runTogether(callers, func(i int) {
		for n := range each {
			if newcomer := loopback(i*each + n); !l.Take(newcomer, 1).Allowed {
				t.Errorf("the newcomer %v was denied", newcomer)
			}
			if got := l.Len(); got > maxClients+callers {
				t.Errorf("Len() = %d, want at most %d", got, maxClients+callers)
			}
		}
	})
}

func TestTakeAllocatesNothing(t *testing.T) {
	l := newTable(limits(MaxBurst, 1))
	if got := testing.AllocsPerRun(1000, func() {
		if !l.Take(loopback(1), 1).Allowed {
			t.Fatal("denied")
		}
	}); got != 0 {
		t.Errorf("an allowed request allocates %v times, want 0", got)
	}
	l = newTable(limits(1, 1))
	l.Take(loopback(1), 1)
	if got := testing.AllocsPerRun(1000, func() {
		if l.Take(loopback(1), 1).Allowed {
			t.Fatal("allowed")
		}
	}); got != 0 {
		t.Errorf("a denied request allocates %v times, want 0", got)
	}
}

// TestRequestsOutOfOrder checks requests that take their tokens in another order than that
// of their timestamps: each finds the tokens as of the latest timestamp, so burst of them
// pass at once.
func TestRequestsOutOfOrder(t *testing.T) {
	const burst, second = 5, int64(time.Second)
	for _, order := range [][]int64{{4, 3, 2, 1, 0}, {0, 4, 1, 3, 2}, {0, 1, 2, 3, 4}} {
		l, key := newTable(limits(burst, 0.001)), keyOf("192.0.2.1")
		for _, at := range order {
			if v := l.Take(key, 1000*second+at); !v.Allowed {
				t.Errorf("in the order %v: number %d waits %v", order, at, v.Wait)
			}
		}
		if v := l.Take(key, 1000*second); v.Allowed {
			t.Errorf("in the order %v: one more than burst passes", order)
		}
	}
}

// If their buckets are full again by then, clients dropped by the memory bound are not
// counted as forgotten.
func TestFullBucketsAreNotForgottenEarly(t *testing.T) {
	lim := limits(2, 1)
	lim.MaxClients = 100
	l := newTable(lim)
	for i := range 10_000 {
		l.Take(loopback(i), int64(i)*int64(time.Second)/20)
		if got := l.Len(); got > lim.MaxClients {
			t.Fatalf("Len() = %d, want at most %d", got, lim.MaxClients)
		}
	}
	if n := l.evicted.Load(); n != 0 {
		t.Errorf("%d clients were forgotten early, want none", n)
	}
}

// An event is due at a refusal, and again at the first refusal after a minute.
func TestEventOnceAMinute(t *testing.T) {
	s := newSomeone(t, 1, MinRefill)
	s.allowed(1)
	for _, tc := range []struct {
		after time.Duration
		want  bool
	}{
		{0, true}, {0, false}, {time.Second, false}, {time.Minute - time.Second - 1, false}, {1, true}, {0, false},
		{time.Minute - 1, false}, {2 * time.Minute, true}, {time.Second, false},
	} {
		s.advance(tc.after)
		if v := s.l.Take(s.key, int64(s.now)); v.Allowed || v.Event != tc.want {
			t.Errorf("at %v: %+v, want event = %v", s.now, v, tc.want)
		}
	}
}

// That includes buckets that fill up again long before, while other clients send requests.
func TestEventOnceAMinuteOfABucketThatFillsSooner(t *testing.T) {
	s := newSomeone(t, 1, 1)
	limited := func() (event bool) {
		s.allowed(1)
		return s.l.Take(s.key, int64(s.now)).Event
	}
	if !limited() {
		t.Error("got no event at first")
	}
	for range 11 {
		s.advance(5 * time.Second)
		s.l.Take(loopback(5), int64(s.now))
	}
	if limited() {
		t.Errorf("another event at %v", s.now)
	}
	s.advance(5 * time.Second)
	if !limited() {
		t.Errorf("got no event at %v", s.now)
	}
}

// The wait is the same, however many requests are denied at the same time.
func TestConcurrentSharedDenials(t *testing.T) {
	const burst = 50
	l := newTable(limits(burst, 0.5))
	key := keyOf("192.0.2.1")
	runTogether(burst, func(int) {
		if v := l.Take(key, 0); !v.Allowed {
			t.Errorf("Take = %+v", v)
		}
	})
	runTogether(burst, func(int) { l.Drain(key, 0, time.Second) })
	if got := l.Take(key, 0); got.Wait != time.Second {
		t.Errorf("Take = %+v, want a wait of 1s", got)
	}
}
