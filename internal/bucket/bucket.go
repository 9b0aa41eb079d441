// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package bucket limits the rate of requests with a token bucket for each client, in bounded
// memory. It offers Table, which decides about requests, and with each denial whether to log
// it and to emit an event. It never knows what a request is, how a denial is answered, or
// where lines, events and figures go.
package bucket

import (
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// Table holds a token bucket for each client. A bucket starts full with Burst tokens, loses
// one with each request, and continuously gains Refill tokens per second.
//
// A bucket is stored as GCRA (the virtual scheduling algorithm of ITU-T I.371): one word,
// the time at which it will be full again. The decisions are exactly those of a bucket with
// a fractional token count.
//
// Buckets live in two generations. A bucket that was not used for as long as it takes to
// fill is full, and so is a bucket that does not exist. Dropping a generation that was last
// written that long ago therefore loses nothing. A generation is dropped early only if more
// than half of MaxClients arrive in that time. Those of its clients that have not returned
// since, which are the longest idle, then find a full bucket. This bounds memory without
// ever locking out a new client. Buckets that fill sooner than the interval of events live
// for that interval, because they also record the client's last event.
//
// Times are nanoseconds of a monotonic clock. All methods are safe for concurrent use.
type Table struct {
	Limits Limits // the limits that New was called with; must not be changed

	interval      int64 // nanoseconds to gain one token
	fill          int64 // nanoseconds from empty to full: Burst × interval
	eventInterval time.Duration
	period        int64 // nanoseconds between rotations; at least fill, and eventInterval
	half          int   // number of clients in a generation that forces a rotation
	gens          atomic.Pointer[generations]
	evicted       *atomic.Int64 // clients dropped early because MaxClients was reached
}

// generations are the two generations of buckets.
type generations struct {
	cur, old *entries
	promoted atomic.Int64 // entries of old that are in cur too
	rotateAt int64
}

type entries = xsync.Map[client.Key, *Entry]

// Entry is the state of one client. The zero value is that of a client with a full bucket.
type Entry struct {
	fullAt      atomic.Int64  // when the bucket is full
	logFullAt   atomic.Int64  // when its budget of log lines is full
	unlogged    atomic.Uint32 // denials since the last log line
	nextEventAt atomic.Uint32 // no event of a denial until then, in seconds

	// For the status page. They are lost with the entry.
	requests, rejections atomic.Int64
	lastSeen             atomic.Int64 // when the last request arrived; 0: none has
	bytesUp, bytesDown   atomic.Int64 // of requests, responses and closed tunnels
}

// A client's denials are logged one by one as long as they are few: one a second, ten at
// once. Beyond that they are counted, and the next log line has their number.
const (
	lineInterval = int64(time.Second)
	lineFill     = 10 * lineInterval
)

// Decision is the decision about one request.
type Decision struct {
	Allowed  bool
	Wait     time.Duration // if denied: until there is a token, or the block ends
	LogCount int64         // if > 0: write a log line for that many denials
	Event    bool          // emit an event
	Err      error         // if denied: why; nil: no token
}

// New returns a table for valid limits, with every bucket full. A client causes at most one
// event per eventInterval. The table adds the clients that it drops early to evicted.
func New(limits Limits, eventInterval time.Duration, evicted *atomic.Int64) *Table {
	t := &Table{
		Limits: limits, interval: int64(limits.Interval()), fill: int64(limits.Fill()),
		eventInterval: eventInterval, half: limits.MaxClients / 2, evicted: evicted,
	}
	t.period = max(t.fill, int64(eventInterval))
	t.gens.Store(&generations{cur: newEntries(), old: newEntries()})
	return t
}

func newEntries() *entries {
	return xsync.NewMap[client.Key, *Entry]()
}

// Destruct releases the table, which holds nothing but memory. It lets a pool count the users
// of a table.
func (t *Table) Destruct() error { return nil }

// Key returns the key of addr's bucket: its network of IPv4Prefix or IPv6Prefix bits. Clients
// without an address share a bucket.
func (t *Table) Key(addr netip.Addr) client.Key {
	return client.Network(addr, t.Limits.IPv4Prefix, t.Limits.IPv6Prefix)
}

// KeyOf returns the key of the bucket of an address or a user that key identifies.
func (t *Table) KeyOf(key client.Key) client.Key {
	if key.User() != "" {
		return key
	}
	return t.Key(key.Addr())
}

// Bits returns how many bits of an address identify a client.
func (t *Table) Bits(key client.Key) int {
	if key.Addr().Is4() {
		return t.Limits.IPv4Prefix
	}
	return t.Limits.IPv6Prefix
}

// Name returns how a client is shown: as an address, a network if its addresses share a
// bucket, or a user.
func (t *Table) Name(key client.Key) string {
	name, addr := key.String(), key.Addr()
	if bits := t.Bits(key); addr.IsValid() && bits < addr.BitLen() {
		name += "/" + strconv.Itoa(bits)
	}
	return name
}

// Take takes one token from the client's bucket, or returns how long until there is one. A
// denied request costs nothing. Concurrent callers may pass slightly older times.
func (t *Table) Take(key client.Key, now int64) Decision {
	e := t.entry(key, now)
	now = e.recordRequest(now)
	if wait := takeToken(&e.fullAt, now, t.interval, t.fill); wait > 0 {
		return t.deny(e, wait, now, nil)
	}
	return Decision{Allowed: true}
}

// Block denies a request for the duration wait because of err, whether or not there is a
// token.
func (t *Table) Block(key client.Key, now int64, wait time.Duration, err error) Decision {
	e := t.entry(key, now)
	now = e.recordRequest(now)
	return t.deny(e, int64(wait), now, err)
}

// Deny denies a request that is already recorded for the duration wait: because of err, or
// if err is nil, because there is no token.
func (t *Table) Deny(key client.Key, now int64, wait time.Duration, err error) Decision {
	return t.deny(t.entry(key, now), int64(wait), now, err)
}

// RecordRequest records a request that takes no token.
func (t *Table) RecordRequest(key client.Key, now int64) { t.entry(key, now).recordRequest(now) }

// Refund refunds one token to the client's bucket.
func (t *Table) Refund(key client.Key, now int64) { t.entry(key, now).fullAt.Add(-t.interval) }

// Drain empties the client's bucket until there is a token after the duration wait. A caller
// that learned wait from elsewhere may pass a slightly older time. The bucket's wait then
// ends slightly early and never late.
func (t *Table) Drain(key client.Key, now int64, wait time.Duration) {
	t.entry(key, now).fullAt.Store(now + t.fill - t.interval + int64(wait))
}

// Reserve takes one of the client's tokens, or reserves the next one, which the bucket gains after
// wait. If wait would be longer than patience, it takes none and returns ok = false.
func (t *Table) Reserve(key client.Key, now int64, patience time.Duration) (wait time.Duration, ok bool) {
	full := &t.entry(key, now).fullAt
	for {
		was := full.Load()
		next := max(was, now) + t.interval
		over := time.Duration(max(0, next-now-t.fill))
		if over > patience {
			return over, false
		}
		if full.CompareAndSwap(was, next) {
			return over, true
		}
	}
}

// WaitTime returns how long it takes until the client has a token.
func (t *Table) WaitTime(key client.Key, now int64) time.Duration {
	return time.Duration(max(0, max(t.entry(key, now).fullAt.Load(), now)+t.interval-now-t.fill))
}

// Fill fills the client's bucket. It reports whether the client is tracked.
func (t *Table) Fill(key client.Key) (found bool) {
	g := t.gens.Load()
	for _, entries := range []*entries{g.cur, g.old} {
		if e, ok := entries.Load(key); ok {
			e.fullAt.Store(0)
			found = true
		}
	}
	return found
}

// AddBytes counts bytes for a client, if it is tracked.
func (t *Table) AddBytes(key client.Key, up, down int64) {
	if e, ok := t.find(key); ok && up+down > 0 {
		e.bytesUp.Add(up)
		e.bytesDown.Add(down)
	}
}

// find returns the client's entry, if it is tracked.
func (t *Table) find(key client.Key) (e *Entry, ok bool) {
	g := t.gens.Load()
	if e, ok = g.cur.Load(key); !ok {
		e, ok = g.old.Load(key)
	}
	return e, ok
}

// TokensOf returns how many tokens the client's bucket holds. It does not begin to track the
// client.
func (t *Table) TokensOf(key client.Key, now int64) float64 {
	if e, ok := t.find(key); ok {
		return t.Tokens(e, now)
	}
	return float64(t.Limits.Burst)
}

// Tokens returns how many tokens the bucket of e holds.
func (t *Table) Tokens(e *Entry, now int64) float64 {
	return min(float64(t.Limits.Burst), max(0, float64(now+t.fill-e.fullAt.Load())/float64(t.interval)))
}

// Len returns how many clients are tracked. It exceeds MaxClients by at most the number of
// concurrent callers.
func (t *Table) Len() int {
	g := t.gens.Load()
	return g.cur.Size() + g.old.Size() - int(g.promoted.Load())
}

// Each calls f for every client that is tracked.
func (t *Table) Each(f func(client.Key, *Entry)) {
	g := t.gens.Load()
	g.cur.Range(func(key client.Key, e *Entry) bool { f(key, e); return true })
	g.old.Range(func(key client.Key, e *Entry) bool {
		if _, promoted := g.cur.Load(key); !promoted {
			f(key, e)
		}
		return true
	})
}

// entry returns the client's entry from the newer generation. It moves it there from the
// older one, or creates one with a full bucket.
func (t *Table) entry(key client.Key, now int64) *Entry {
	var e *Entry // kept across a rotation that this call causes
	for {
		g := t.gens.Load()
		if now >= g.rotateAt {
			t.rotate(g, now)
			continue
		}
		if e, ok := g.cur.Load(key); ok {
			return e
		}
		old, promoted := g.old.Load(key)
		if promoted {
			e = old
		}
		if g.cur.Size() >= t.half {
			t.rotate(g, now)
			continue
		}
		if e == nil {
			e = new(Entry)
		}
		stored, loaded := g.cur.LoadOrStore(key, e)
		if promoted && !loaded {
			g.promoted.Add(1)
		}
		// A concurrent rotation may have left the entry in a generation that is no longer
		// read. Look it up again then.
		if e = stored; t.gens.Load() == g {
			return e
		}
	}
}

// rotate drops the older generation of g and starts a new one. Of several concurrent
// callers, one does it. The entries that are dropped were last written when g began; if that
// is long enough ago, their buckets are full.
func (t *Table) rotate(g *generations, now int64) {
	early := now < g.rotateAt-t.period+t.fill
	if t.gens.CompareAndSwap(g, &generations{cur: newEntries(), old: g.cur, rotateAt: now + t.period}) && early {
		t.evicted.Add(int64(g.old.Size()) - g.promoted.Load())
	}
}

// deny returns the decision about a request of e that is denied for the duration wait:
// because of err, or if err is nil, because there is no token.
func (t *Table) deny(e *Entry, wait, now int64, err error) Decision {
	d := Decision{Wait: time.Duration(wait), Err: err}
	e.unlogged.Add(1)
	e.rejections.Add(1)
	if takeToken(&e.logFullAt, now, lineInterval, lineFill) == 0 {
		d.LogCount = int64(e.unlogged.Swap(0))
	}
	if err != nil {
		return d
	}
	if until := e.nextEventAt.Load(); now >= int64(until)*int64(time.Second) {
		next := time.Duration(now) + t.eventInterval + time.Second - 1 // rounded up
		d.Event = e.nextEventAt.CompareAndSwap(until, uint32(next/time.Second))
	}
	return d
}

// recordRequest records a request, and returns the latest time at which one has arrived.
// Requests may be counted out of order, and one that is counted late must not find the tokens
// of an earlier time.
func (e *Entry) recordRequest(now int64) int64 {
	e.requests.Add(1)
	for {
		seen := e.lastSeen.Load()
		if now <= seen {
			return seen
		}
		if e.lastSeen.CompareAndSwap(seen, now) {
			return now
		}
	}
}

// Requests returns how many requests have arrived.
func (e *Entry) Requests() int64 { return e.requests.Load() }

// Rejections returns how many requests were denied.
func (e *Entry) Rejections() int64 { return e.rejections.Load() }

// LastSeen returns when the last request arrived, or 0 if none has.
func (e *Entry) LastSeen() int64 { return e.lastSeen.Load() }

// Bytes returns how many bytes AddBytes has counted.
func (e *Entry) Bytes() (up, down int64) { return e.bytesUp.Load(), e.bytesDown.Load() }

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
