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

	"github.com/caddyserver/caddy/v2"
	"github.com/puzpuzpuz/xsync/v4"
)

// Bounds on what the limiter accepts. Within them no sum of times below
// overflows an int64 of nanoseconds.
const (
	minBurst, maxBurst   = 1, 1_000_000_000
	minRefill, maxRefill = 0.00001, 1_000_000 // tokens per second: from about one a day to one a microsecond
	maxFill              = 4e9                // seconds from empty to full: some 126 years
	minClients           = 2
)

// limiters holds the limiters in use, by limiterKey. A config that is loaded
// takes its limiters before the config it replaces gives them back, so that
// a client's tokens survive a reload.
var limiters = caddy.NewUsagePool()

// limiterKey is what makes two handlers share one budget for each client: the
// same zone with the same parameters. Changed parameters are another limiter,
// with every bucket full.
type limiterKey struct {
	zone       string
	burst      int64
	refill     float64
	v4, v6     int
	maxClients int
}

// limiter is a token bucket for each client: a bucket holds burst tokens, is
// full at first, loses one with each request and gains refill a second,
// continuously.
//
// It is kept as GCRA (the virtual scheduling algorithm of ITU-T I.371): one
// word per client, the time at which its bucket will be full again. That
// decides exactly as a bucket with a fractional count of tokens would.
//
// Buckets live in two generations. A bucket that nobody touched for as long as
// it takes to fill is full, and so is a bucket that does not exist: dropping a
// generation that was last written to that long ago forgets nothing. Only when
// more than half of max_clients come in that time is a generation dropped
// early; those of its clients that have not come since, the longest idle, then
// find a full bucket. Memory is bounded, and no newcomer is ever locked out.
// Buckets that fill in less than a minute live for a minute, as it is in them
// that a client's last event is noted.
//
// All methods are safe for concurrent use.
type limiter struct {
	key      limiterKey
	interval int64 // nanoseconds from one token to the next
	fill     int64 // nanoseconds from empty to full: burst × interval
	period   int64 // nanoseconds between rotations; at least fill, and eventInterval
	half     int   // clients in a generation that force a rotation
	gens     atomic.Pointer[generations]
	forced   atomic.Int64 // clients forgotten early, since max_clients was reached
}

// generations are the buckets, newest first. A bucket is the time, in
// nanoseconds since epoch, at which it is full.
type generations struct {
	cur, old *buckets
	promoted atomic.Int64 // buckets of old that are in cur, too
	until    int64
}

// bucket is what is known of one client. Its times are nanoseconds since
// epoch; its zero value is a full bucket.
type bucket struct {
	full    atomic.Int64  // when it is full
	quiet   atomic.Int64  // the same for a bucket of log lines
	refused atomic.Uint32 // refusals since the last line
	silent  atomic.Uint32 // until when no event of a refusal is due, in seconds

	// For those who look. A bucket that is forgotten takes them with it.
	requests, rejections atomic.Int64
	seen                 atomic.Int64 // when the last request came; 0: none has
	bytesUp, bytesDown   atomic.Int64 // of messages, and of tunnels that have ended
}

type buckets = xsync.Map[netip.Addr, *bucket]

// A client's refusals are logged one by one as long as they are few: one a
// second, ten at once. Past that they are counted, and the next line tells.
const (
	lineInterval = int64(time.Second)
	lineFill     = 10 * lineInterval
)

// verdict is what the limiter says of one request.
type verdict struct {
	ok      bool
	wait    time.Duration // if !ok: until there is a token, or the client is not blocked any more
	refused int64         // if > 0: log a line, which stands for that many refusals
	event   bool          // emit one
	err     error         // if !ok: why the request is refused, if not for want of a token
}

// validate says what is wrong with the parameters, if anything.
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

// bits returns how many bits of an address make a client.
func (k limiterKey) bits(addr netip.Addr) int {
	if addr.Is4() {
		return k.v4
	}
	return k.v6
}

// validZone reports whether a name can stand in a RateLimit field as it is.
func validZone(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(c rune) bool {
		return c <= ' ' || c > '~' || c == '"' || c == '\\'
	})
}

// newLimiter makes the limiter for a valid key, with every bucket full.
func newLimiter(key limiterKey) *limiter {
	l := &limiter{key: key, half: key.maxClients / 2}
	l.interval = max(1, int64(math.Round(float64(time.Second)/key.refill)))
	l.fill = key.burst * l.interval
	l.period = max(l.fill, int64(eventInterval))
	l.gens.Store(&generations{cur: newBuckets(), old: newBuckets()})
	return l
}

func newBuckets() *buckets {
	return xsync.NewMap[netip.Addr, *bucket]()
}

// Destruct implements caddy.Destructor: nothing but memory is held.
func (l *limiter) Destruct() error { return nil }

// client returns the address that shares a bucket with addr: the network of
// ipv4_prefix or ipv6_prefix bits that it is in. A v4-mapped address counts as
// IPv4. The zero Addr, a client without an address, such as on a Unix socket,
// is a client like any other.
func (l *limiter) client(addr netip.Addr) netip.Addr {
	if !addr.IsValid() {
		return addr
	}
	addr = addr.Unmap().WithZone("")
	bits := l.key.bits(addr)
	if bits == addr.BitLen() {
		return addr
	}
	p, _ := addr.Prefix(bits) // fails only for bits that validate refuses
	return p.Addr()
}

// take removes one token from the client's bucket, or says how long until
// there is one. A request that is refused costs nothing. now is the time since
// epoch; concurrent callers may come with slightly older ones.
func (l *limiter) take(client netip.Addr, now int64) verdict {
	b := l.bucket(client, now)
	now = b.came(now)
	if wait := takeToken(&b.full, now, l.interval, l.fill); wait > 0 {
		return b.refuse(wait, now, nil)
	}
	return verdict{ok: true}
}

// block refuses a request of a client that is blocked for that long.
func (l *limiter) block(client netip.Addr, now int64, wait time.Duration) verdict {
	b := l.bucket(client, now)
	now = b.came(now)
	return b.refuse(int64(wait), now, errBlocked)
}

// came notes that a request has come, and returns the time for it: the latest at
// which one has come. Requests may be counted in another order than they came in,
// and one that is counted late would find the tokens of an earlier time.
func (b *bucket) came(now int64) int64 {
	b.requests.Add(1)
	for {
		seen := b.seen.Load()
		if now <= seen {
			return seen
		}
		if b.seen.CompareAndSwap(seen, now) {
			return now
		}
	}
}

// refuse is the verdict on a request that is refused for that long: for want of
// a token, or for err.
func (b *bucket) refuse(wait, now int64, err error) verdict {
	v := verdict{wait: time.Duration(wait), err: err}
	b.refused.Add(1)
	b.rejections.Add(1)
	if takeToken(&b.quiet, now, lineInterval, lineFill) == 0 {
		v.refused = int64(b.refused.Swap(0))
	}
	if err != nil {
		return v
	}
	if until := b.silent.Load(); now >= int64(until)*int64(time.Second) {
		v.event = b.silent.CompareAndSwap(until, uint32(ceilSeconds(time.Duration(now)+eventInterval)))
	}
	return v
}

// takeToken takes a token from a bucket that is full at the time in full, gains
// one each interval and fills up in fill. It returns 0, or how long until there
// is a token.
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

// bucket finds the client's bucket in the newer generation, brings it there
// from the older one, or makes a full one.
func (l *limiter) bucket(client netip.Addr, now int64) *bucket {
	var b *bucket // survives a rotation that the client itself brings about
	for {
		g := l.gens.Load()
		if now >= g.until {
			l.rotate(g, now)
			continue
		}
		if b, ok := g.cur.Load(client); ok {
			return b
		}
		old, promoted := g.old.Load(client)
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
		stored, loaded := g.cur.LoadOrStore(client, b)
		if promoted && !loaded {
			g.promoted.Add(1)
		}
		// A rotation in between may have left the bucket behind in a generation
		// that nobody looks into any more: then look again.
		if b = stored; l.gens.Load() == g {
			return b
		}
	}
}

// rotate makes the newer generation of g the older one and drops that. When
// several callers come at once, one of them does it. What is dropped was last
// written to when g began, and is full if that is long enough ago.
func (l *limiter) rotate(g *generations, now int64) {
	early := now < g.until-l.period+l.fill
	if l.gens.CompareAndSwap(g, &generations{cur: newBuckets(), old: g.cur, until: now + l.period}) && early {
		n := g.old.Size() - int(g.promoted.Load())
		l.forced.Add(int64(n))
		metrics.evictions.Add(float64(n))
	}
}

// clients returns how many clients are tracked, never more than max_clients by
// more than the number of concurrent callers.
func (l *limiter) clients() int {
	g := l.gens.Load()
	return g.cur.Size() + g.old.Size() - int(g.promoted.Load())
}

// policy and state are the values of the RateLimit-Policy and RateLimit fields
// (draft-ietf-httpapi-ratelimit-headers-10): the quota and the seconds in which
// it is refilled; that nothing is left and the seconds until there is a token.
func (l *limiter) policy() string {
	return fmt.Sprintf(`"%s";q=%d;w=%d`, l.key.zone, l.key.burst, ceilSeconds(time.Duration(l.fill)))
}

func (l *limiter) state(seconds int64) string {
	return `"` + l.key.zone + `";r=0;t=` + strconv.FormatInt(seconds, 10)
}

// refuseLimited answers a request that found no token.
func (h *Handler) refuseLimited(w http.ResponseWriter, r *http.Request, v *visit, verdict verdict) error {
	if verdict.err != nil {
		return h.refuseUncounted(w, r, v, verdict)
	}
	a := h.limitedAnswer(ceilSeconds(verdict.wait))
	v.limited = true
	v.refusedBy(&a.refusal)
	v.count(nil)
	if verdict.refused > 0 {
		h.logLimited(r, v, verdict, false)
		v.addRecent(&a.refusal)
	}
	if verdict.event {
		h.events.limited(h.Zone, v, verdict)
	}
	header := w.Header()
	values := [...]string{a.retryAfter, h.policy, a.state} // one allocation for three
	header["Retry-After"], header["Ratelimit-Policy"], header["Ratelimit"] = values[:1:1], values[1:2:2], values[2:]
	return h.writeAnswer(w, r, &a.refusal, a.proxyStatus, a.body)
}

// limitedAnswer is what a client gets that is to wait for some seconds. In a
// flood of refusals that is the same one again and again, so that the last one
// is kept.
type limitedAnswer struct {
	refusal
	seconds                        int64
	retryAfter, state, proxyStatus string
	body                           []byte
}

func (h *Handler) limitedAnswer(seconds int64) *limitedAnswer {
	if a := h.limited.Load(); a != nil && a.seconds == seconds {
		return a
	}
	retry := strconv.FormatInt(seconds, 10)
	a := &limitedAnswer{
		refusal:     *causeRateLimited.refusal(nil, seconds),
		seconds:     seconds,
		retryAfter:  retry,
		state:       h.limiter.state(seconds),
		proxyStatus: h.proxyStatus(deniedRequest),
	}
	a.body = []byte(a.text + "\n")
	h.limited.Store(a)
	return a
}

// ceilSeconds rounds up to whole seconds, at least 1, so that a client that
// waits that long is not too early.
func ceilSeconds(d time.Duration) int64 {
	return max(1, int64((d+time.Second-1)/time.Second))
}

// epoch is the start of the limiter's clock, which is monotonic.
var epoch = time.Now()

// sinceEpoch is t on the limiter's clock. t must carry a monotonic reading.
func sinceEpoch(t time.Time) int64 { return int64(t.Sub(epoch)) }
