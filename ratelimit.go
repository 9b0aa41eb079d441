// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/policy"
	"github.com/caddyserver/caddy/v2"
	"github.com/puzpuzpuz/xsync/v4"
)

// Limits of the parameters. Within them, no sum of times below overflows an int64 of
// nanoseconds.
const (
	minBurst, maxBurst   = 1, 1_000_000_000
	minRefill, maxRefill = 0.00001, 1_000_000 // tokens per second: one a day to one a µs
	maxFill              = 4e9                // seconds from empty to full: some 126 years
	minClients           = 2
)

// limiters holds the limiters in use, by limiterKey. A new config acquires its limiters
// before the old one releases them, so that clients' tokens survive a reload.
var limiters = caddy.NewUsagePool()

// limiterKey identifies a limiter. Handlers with the same zone and parameters share one
// budget for each client. Changed parameters make a new limiter, with every bucket full.
type limiterKey struct {
	zone       string
	burst      int64
	refill     float64
	v4, v6     int
	maxClients int
}

// limiter holds a token bucket for each client. A bucket starts full with burst tokens,
// loses one with each request, and continuously gains refill tokens per second.
//
// A bucket is stored as GCRA (the virtual scheduling algorithm of ITU-T I.371): one word,
// the time at which it will be full again. The decisions are exactly those of a bucket with
// a fractional token count.
//
// Buckets live in two generations. A bucket that was not used for as long as it takes to
// fill is full, and so is a bucket that does not exist. Dropping a generation that was last
// written that long ago therefore loses nothing. A generation is dropped early only if more
// than half of max_clients arrive in that time. Those of its clients that have not returned
// since, which are the longest idle, then find a full bucket. This bounds memory without
// ever locking out a new client. Buckets that fill in less than a minute live for a minute,
// because they also record the client's last event.
//
// All methods are safe for concurrent use.
type limiter struct {
	key      limiterKey
	interval int64 // nanoseconds to gain one token
	fill     int64 // nanoseconds from empty to full: burst × interval
	period   int64 // nanoseconds between rotations; at least fill, and eventInterval
	half     int   // number of clients in a generation that forces a rotation
	gens     atomic.Pointer[generations]
	forced   atomic.Int64 // clients dropped early because max_clients was reached
}

// generations are the two generations of buckets.
type generations struct {
	cur, old *buckets
	promoted atomic.Int64 // buckets of old that are in cur too
	rotateAt int64
}

// bucket is the state of one client. Times are nanoseconds since epoch. The zero value is a
// full bucket.
type bucket struct {
	fullAt      atomic.Int64  // when the bucket is full
	logFullAt   atomic.Int64  // when its budget of log lines is full
	unlogged    atomic.Uint32 // refusals since the last log line
	nextEventAt atomic.Uint32 // no event of a refusal until then, in seconds

	// For the status page. They are lost with the bucket.
	requests, rejections atomic.Int64
	lastSeen             atomic.Int64 // when the last request arrived; 0: none has
	bytesUp, bytesDown   atomic.Int64 // of requests, responses and closed tunnels
}

type buckets = xsync.Map[client.Key, *bucket]

// A client's refusals are logged one by one as long as they are few: one a second, ten at
// once. Beyond that they are counted, and the next log line has their number.
const (
	lineInterval = int64(time.Second)
	lineFill     = 10 * lineInterval
)

// decision is the limiter's decision about one request.
type decision struct {
	ok       bool
	wait     time.Duration // if !ok: until there is a token, or the block ends
	logCount int64         // if > 0: write a log line for that many refusals
	event    bool          // emit an event
	err      error         // if !ok: why the request is refused; nil: no token
}

// validate returns an error that names the first invalid parameter.
func (k limiterKey) validate() error {
	switch {
	case k.burst < minBurst || k.burst > maxBurst:
		return fmt.Errorf("burst %d: expected a number of tokens from %d to %d", k.burst, minBurst, maxBurst)
	case !(k.refill >= minRefill && k.refill <= maxRefill): // also when NaN
		return fmt.Errorf("refill %v: expected tokens per second from 0.00001 (about one a day) to %d", k.refill, maxRefill)
	case float64(k.burst)/k.refill > maxFill:
		return fmt.Errorf("burst %d with refill %v: an empty bucket would take more than %.0f seconds to fill; expected a smaller burst or a larger refill",
			k.burst, k.refill, float64(maxFill))
	case k.v4 < 1 || k.v4 > 32:
		return fmt.Errorf("ipv4_prefix %d: expected bits from 1 to 32", k.v4)
	case k.v6 < 1 || k.v6 > 128:
		return fmt.Errorf("ipv6_prefix %d: expected bits from 1 to 128", k.v6)
	case k.maxClients < minClients:
		return fmt.Errorf("max_clients %d: expected a number of at least %d", k.maxClients, minClients)
	}
	if !validZone(k.zone) {
		return fmt.Errorf("zone %q: expected a name in printable ASCII without spaces, quotes and backslashes", k.zone)
	}
	return nil
}

// bits returns how many bits of an address identify a client.
func (k limiterKey) bits(key client.Key) int {
	if key.Addr().Is4() {
		return k.v4
	}
	return k.v6
}

// validZone reports whether a name needs no escaping in a RateLimit field.
func validZone(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(c rune) bool {
		return c <= ' ' || c > '~' || c == '"' || c == '\\'
	})
}

// newLimiter returns the limiter for a valid key, with every bucket full.
func newLimiter(key limiterKey) *limiter {
	l := &limiter{key: key, half: key.maxClients / 2}
	l.interval = max(1, int64(math.Round(float64(time.Second)/key.refill)))
	l.fill = key.burst * l.interval
	l.period = max(l.fill, int64(eventInterval))
	l.gens.Store(&generations{cur: newBuckets(), old: newBuckets()})
	return l
}

func newBuckets() *buckets {
	return xsync.NewMap[client.Key, *bucket]()
}

// Destruct implements caddy.Destructor. A limiter holds nothing but memory.
func (l *limiter) Destruct() error { return nil }

// keyFor returns the key of addr's bucket: its network of ipv4_prefix or ipv6_prefix bits.
// Clients without an address share a bucket.
func (l *limiter) keyFor(addr netip.Addr) client.Key {
	return client.Network(addr, l.key.v4, l.key.v6)
}

// take takes one token from the client's bucket, or returns how long until there is one. A
// denied request costs nothing. now is the time since epoch; concurrent callers may pass
// slightly older times.
func (l *limiter) take(key client.Key, now int64) decision {
	b := l.bucket(key, now)
	now = b.recordRequest(now)
	if wait := takeToken(&b.fullAt, now, l.interval, l.fill); wait > 0 {
		return b.refuse(wait, now, nil)
	}
	return decision{ok: true}
}

// block denies a request of a client that stays blocked for the duration wait.
func (l *limiter) block(key client.Key, now int64, wait time.Duration) decision {
	b := l.bucket(key, now)
	now = b.recordRequest(now)
	return b.refuse(int64(wait), now, errBlocked)
}

// recordRequest records a request, and returns the latest time at which one has arrived. Requests may
// be counted out of order, and one that is counted late must not find the tokens of an
// earlier time.
func (b *bucket) recordRequest(now int64) int64 {
	b.requests.Add(1)
	for {
		seen := b.lastSeen.Load()
		if now <= seen {
			return seen
		}
		if b.lastSeen.CompareAndSwap(seen, now) {
			return now
		}
	}
}

// refuse returns the verdict for a request that is denied for the duration wait: because of
// err, or if err is nil, because there is no token.
func (b *bucket) refuse(wait, now int64, err error) decision {
	v := decision{wait: time.Duration(wait), err: err}
	b.unlogged.Add(1)
	b.rejections.Add(1)
	if takeToken(&b.logFullAt, now, lineInterval, lineFill) == 0 {
		v.logCount = int64(b.unlogged.Swap(0))
	}
	if err != nil {
		return v
	}
	if until := b.nextEventAt.Load(); now >= int64(until)*int64(time.Second) {
		v.event = b.nextEventAt.CompareAndSwap(until, uint32(ceilSeconds(time.Duration(now)+eventInterval)))
	}
	return v
}

// takeToken takes a token from a bucket that is full at the time in full, gains a token each
// interval, and takes the time fill to fill up. It returns 0, or how long until there is a
// token.
func takeToken(full *atomic.Int64, now, interval, fill int64) int64 {
	for {
		was := full.Load()
		next := max(was, now) + interval
		if over := next - now - fill; over > 0 {
			return over
		}
		if full.CompareAndSwap(was, next) {
			return 0
		}
	}
}

// bucket returns the client's bucket from the newer generation. It moves it there from the
// older one, or creates a full one.
func (l *limiter) bucket(key client.Key, now int64) *bucket {
	var b *bucket // kept across a rotation that this call causes
	for {
		g := l.gens.Load()
		if now >= g.rotateAt {
			l.rotate(g, now)
			continue
		}
		if b, ok := g.cur.Load(key); ok {
			return b
		}
		old, promoted := g.old.Load(key)
		if promoted {
			b = old
		}
		if g.cur.Size() >= l.half {
			l.rotate(g, now)
			continue
		}
		if b == nil {
			b = new(bucket)
		}
		stored, loaded := g.cur.LoadOrStore(key, b)
		if promoted && !loaded {
			g.promoted.Add(1)
		}
		// A concurrent rotation may have left the bucket in a generation that is no longer
		// read. Look it up again then.
		if b = stored; l.gens.Load() == g {
			return b
		}
	}
}

// rotate drops the older generation of g and starts a new one. Of several concurrent
// callers, one does it. The buckets that are dropped were last written when g began; if that
// is long enough ago, they are full.
func (l *limiter) rotate(g *generations, now int64) {
	early := now < g.rotateAt-l.period+l.fill
	if l.gens.CompareAndSwap(g, &generations{cur: newBuckets(), old: g.cur, rotateAt: now + l.period}) && early {
		n := g.old.Size() - int(g.promoted.Load())
		l.forced.Add(int64(n))
		metrics.evictions.Add(float64(n))
	}
}

// clients returns how many clients are tracked. It exceeds max_clients by at most the number
// of concurrent callers.
func (l *limiter) clients() int {
	g := l.gens.Load()
	return g.cur.Size() + g.old.Size() - int(g.promoted.Load())
}

// policy returns the value of the RateLimit-Policy field
// (draft-ietf-httpapi-ratelimit-headers-10): the quota, and the seconds that it takes to
// refill.
func (l *limiter) policy() string {
	return fmt.Sprintf(`"%s";q=%d;w=%d`, l.key.zone, l.key.burst, ceilSeconds(time.Duration(l.fill)))
}

// state returns the value of the RateLimit field: no tokens remain, and the seconds until
// there is one.
func (l *limiter) state(seconds int64) string {
	return `"` + l.key.zone + `";r=0;t=` + strconv.FormatInt(seconds, 10)
}

// refuseLimited responds to a request that the limiter has denied.
func (h *Handler) refuseLimited(w http.ResponseWriter, r *http.Request, v *transaction, verdict decision) error {
	if verdict.err != nil {
		return h.refuseUncounted(w, r, v, verdict)
	}
	a := h.limitedAnswer(ceilSeconds(verdict.wait))
	v.rateLimited = true
	v.setRefusal(&a.refusal)
	v.count(nil)
	if verdict.logCount > 0 {
		h.logLimited(r, v, verdict, false)
		v.addRecent(&a.refusal)
	}
	if verdict.event {
		h.events.emitRateLimited(h.Zone, v, verdict)
	}
	header := w.Header()
	values := [...]string{a.retryAfter, h.policy, a.state} // one allocation for all three
	header["Retry-After"], header["Ratelimit-Policy"], header["Ratelimit"] = values[:1:1], values[1:2:2], values[2:]
	return h.writeRefusal(w, r, &a.refusal, a.proxyStatus, a.body)
}

// limitedAnswer is the response to a client that has to wait for some seconds. In a flood of
// refusals it is the same again and again, so the last one is cached.
type limitedAnswer struct {
	refusal
	seconds                        int64
	retryAfter, state, proxyStatus string
	body                           []byte
}

func (h *Handler) limitedAnswer(seconds int64) *limitedAnswer {
	if a := h.limitedResponse.Load(); a != nil && a.seconds == seconds {
		return a
	}
	retry := strconv.FormatInt(seconds, 10)
	a := &limitedAnswer{
		refusal:     *causeRateLimited.refusal(nil, seconds),
		seconds:     seconds,
		retryAfter:  retry,
		state:       h.limiter.state(seconds),
		proxyStatus: h.proxyStatus(policy.DeniedRequest),
	}
	a.body = []byte(a.text + "\n")
	h.limitedResponse.Store(a)
	return a
}

// ceilSeconds rounds up to whole seconds, at least 1, so that a client that waits that long
// does not return too early.
func ceilSeconds(d time.Duration) int64 {
	return max(1, int64((d+time.Second-1)/time.Second))
}
