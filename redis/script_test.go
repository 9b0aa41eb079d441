// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	asyncproxy "github.com/asyncproxy/caddy-async-proxy"
	"github.com/redis/rueidis"
)

// virtualTake returns the script with a clock that the test sets, in ARGV[5] and ARGV[6],
// and without expiry by the real clock.
func virtualTake(t testing.TB) *rueidis.Lua {
	t.Helper()
	text := takeText
	for real, virtual := range map[string]string{
		"redis.call('TIME')":                             "{ARGV[5], ARGV[6]}",
		", 'PXAT', string.format('%d', gone))\nreturn 0": ")\nreturn 0",
	} {
		if strings.Count(text, real) != 1 {
			t.Fatalf("the script does not contain %q exactly once", real)
		}
		text = strings.Replace(text, real, virtual, 1)
	}
	return rueidis.NewLuaScript(text)
}

// tank is a token bucket in integer arithmetic, written the obvious way: a token is as many
// units as it takes nanoseconds to gain one. The tests of async_proxy's local buckets use
// the same oracle.
type tank struct{ level, filled int64 }

func (b *tank) take(now, interval, capacity int64) (wait int64) {
	b.level, b.filled = min(capacity, b.level+now-b.filled), now
	if b.level < interval {
		return interval - b.level
	}
	b.level -= interval
	return 0
}

// Requests arrive just before, at and after every critical moment, and keys expire as early
// as they ever may. Every wait is exact to the nanosecond.
func TestSameDecisionsAsInMemory(t *testing.T) {
	const each = 10_000
	for _, command := range engines(t) {
		e := startEngine(t, command)
		script := virtualTake(t)
		for _, tc := range []struct {
			burst    int64
			interval time.Duration
		}{
			{1, 2 * time.Second}, {10, 2 * time.Second}, {3, 333333333}, {50, 81004}, {4, 1000}, {7, 3333},
			{2, 100_000 * time.Second}, {1_000_000_000, 4 * time.Second}, {40_000, 100_000 * time.Second},
		} {
			t.Run(fmt.Sprintf("%s burst %d interval %v", command, tc.burst, tc.interval), func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(uint64(tc.burst), uint64(tc.interval)))
				interval, capacity := int64(tc.interval), tc.burst*int64(tc.interval)
				args := bucketArgs(tc.burst, tc.interval)
				const base = 1_795_455_000 * 1_000_000 // µs since 1970
				var tanks [2]tank
				for i := range tanks {
					tanks[i].level = capacity
				}
				if tc.burst > 1000 { // too many to use up: begin with few
					for i := range tanks {
						tanks[i].level = 20*interval + 7
						full := base*1000 + capacity - tanks[i].level
						e.do("SET", "tank"+strconv.Itoa(i), fmt.Sprintf("%d.%09d", full/1e9, full%1e9))
					}
				}
				var now, lastWait int64 // ns since base, in whole µs
				var denied, expired int
				for op := range each {
					switch rnd.IntN(12) {
					case 0:
						now += rnd.Int64N(interval)
					case 1:
						now += lastWait
					case 2:
						now += max(lastWait-1000, 0)
					case 3:
						now += interval / 4
					case 4:
						if tc.burst <= 1000 && rnd.IntN(2*int(tc.burst)) == 0 {
							now += rnd.Int64N(2 * capacity)
						}
					}
					now = now / 1000 * 1000
					i := rnd.IntN(len(tanks))
					key := "tank" + strconv.Itoa(i)
					if now-tanks[i].filled >= capacity-tanks[i].level && rnd.IntN(2) == 0 {
						e.do("DEL", key)
						expired++
					}
					want := tanks[i].take(now, interval, capacity)
					at := base + now/1000
					got, err := script.Exec(t.Context(), e.ask, []string{key},
						append(args[:4:4], strconv.FormatInt(at/1e6, 10), strconv.FormatInt(at%1e6, 10))).AsInt64()
					if err != nil || got != want {
						t.Fatalf("operation %d after %v: %d, %v; want a wait of %v", op, time.Duration(now), got, err, time.Duration(want))
					}
					if lastWait = want; want > 0 {
						denied++
					}
				}
				if denied < each/20 || denied > each*19/20 {
					t.Errorf("%d of %d operations were denied: too one-sided to mean anything", denied, each)
				}
				if tc.burst <= 1000 && expired == 0 {
					t.Error("no key expired")
				}
				e.do("FLUSHALL")
			})
		}
	}
}

// take runs the unmodified script.
func (e *engine) take(key string, burst int64, interval time.Duration) time.Duration {
	e.t.Helper()
	wait, err := takeScript.Exec(e.t.Context(), e.ask, []string{key}, bucketArgs(burst, interval)).AsInt64()
	if err != nil {
		e.t.Fatalf("%s: %v", key, err)
	}
	return time.Duration(wait)
}

// A key expires at the end of the millisecond in which its bucket is full.
func TestKeysExpireWhenFull(t *testing.T) {
	for _, command := range engines(t) {
		e := startEngine(t, command)
		for _, interval := range []time.Duration{1, time.Microsecond, 1_700_000, 100 * time.Millisecond, time.Hour, 100_000 * time.Second} {
			for range 20 { // at different fractions of a millisecond
				e.take("a", 40_000, interval)
				kept := e.do("EVAL", "return (redis.call('GET', 'a') or 'full') .. ' ' .. redis.call('PEXPIRETIME', 'a')", "0")
				full, gone, _ := strings.Cut(kept, " ")
				if full == "full" && interval <= 1_700_000 {
					continue
				}
				ns, err := strconv.ParseInt(strings.Replace(full, ".", "", 1), 10, 64)
				if want := strconv.FormatInt(ns/1e6+1, 10); err != nil || gone != want {
					t.Errorf("%s: interval %v: the bucket is full at %s s and the key goes at %s ms, want %s", command, interval, full, gone, want)
				}
			}
			e.do("FLUSHALL")
		}
		e.take("a", 1, 50*time.Millisecond)
		eventually(t, "the key to expire", func() bool { return e.do("EXISTS", "a") == "0" })
	}
}

// A value under a bucket's key that is not a bucket is replaced.
func TestWhatIsNoBucket(t *testing.T) {
	for _, command := range engines(t) {
		e := startEngine(t, command)
		for _, words := range []string{"RPUSH a 1", "HSET a b c", "SET a nonsense", "SET a 1e300", "SET a -5.000000000", "SET a 1795455000", "SADD a b", "XADD a * b c"} {
			e.do(strings.Fields(words)...)
			if wait := e.take("a", 1, time.Hour); wait != 0 {
				t.Errorf("%s: %s: a wait of %v, want none", command, words, wait)
			}
			if wait := e.take("a", 1, time.Hour); wait < time.Hour-time.Minute || wait > time.Hour {
				t.Errorf("%s: %s: then a wait of %v, want 1h", command, words, wait)
			}
			e.do("DEL", "a")
		}
	}
}

// If the server's clock goes back by a year, clients wait for a token and not for a year.
func TestClockGoesBack(t *testing.T) {
	e := startEngine(t, "redis-server")
	full := time.Now().AddDate(1, 0, 0)
	e.do("SET", "a", fmt.Sprintf("%d.%09d", full.Unix(), full.Nanosecond()))
	if wait := e.take("a", 10, time.Minute); wait != time.Minute {
		t.Errorf("a wait of %v, want 1m", wait)
	}
	if got := e.do("GET", "a"); !strings.HasPrefix(got, strconv.FormatInt(full.Unix(), 10)) {
		t.Errorf("a denial wrote %s", got)
	}
}

func TestBucketKey(t *testing.T) {
	for want, b := range map[string]asyncproxy.Bucket{
		"p:10:2000000000:192.0.2.0/24:default": {Zone: "default", Client: netip.MustParsePrefix("192.0.2.0/24"), Burst: 10, Interval: 2 * time.Second},
		"p:1:1:2001:db8::/64:a:b":              {Zone: "a:b", Client: netip.MustParsePrefix("2001:db8::/64"), Burst: 1, Interval: 1},
		"p:1:1:unix:default":                   {Zone: "default", Burst: 1, Interval: 1},
		"p:1:1:unix:default ci":                {Zone: "default", Policy: "ci", Burst: 1, Interval: 1},
		`p:1:1:"alice":default`:                {Zone: "default", User: "alice", Burst: 1, Interval: 1},
		`p:1:1:192.0.2.0/24:a\x7bb\x7d`:        {Zone: "a{b}", Client: netip.MustParsePrefix("192.0.2.0/24"), Burst: 1, Interval: 1},
		`p:1:1:"a\x7db\x7b":default`:           {Zone: "default", User: "a}b{", Burst: 1, Interval: 1},
		`p:1:1:"a\\x7db":default`:              {Zone: "default", User: `a\x7db`, Burst: 1, Interval: 1},
		`p:1:1:"a\":b":default`:                {Zone: "default", User: `a":b`, Burst: 1, Interval: 1},
	} {
		if got := bucketKey("p", b); got != want {
			t.Errorf("bucketKey(%+v) = %q, want %q", b, got, want)
		}
	}
}

// FuzzBucketKey checks that different buckets have different keys.
func FuzzBucketKey(f *testing.F) {
	f.Add("default", []byte{192, 0, 2, 1}, 32, int64(10), int64(2e9), "a:10", []byte{192, 0, 2, 1}, 24, int64(10), int64(2e9))
	f.Add("a:10", make([]byte, 16), 64, int64(5), int64(2000), "a", []byte("0123456789abcdef"), 64, int64(10), int64(5))
	f.Add("a{", []byte{192, 0, 2, 1}, 32, int64(10), int64(2e9), "a}", []byte{192, 0, 2, 1}, 32, int64(10), int64(2e9))
	f.Fuzz(func(t *testing.T, zone1 string, addr1 []byte, bits1 int, burst1, interval1 int64, zone2 string, addr2 []byte, bits2 int, burst2, interval2 int64) {
		if strings.Contains(zone1+zone2, `\`) {
			return // zones cannot contain a backslash
		}
		bucket := func(zone string, addr []byte, bits int, burst, interval int64) asyncproxy.Bucket {
			a, _ := netip.AddrFromSlice(addr)
			prefix, _ := a.Prefix(bits)
			return asyncproxy.Bucket{Zone: zone, Client: prefix, Burst: burst, Interval: time.Duration(interval)}
		}
		b1, b2 := bucket(zone1, addr1, bits1, burst1, interval1), bucket(zone2, addr2, bits2, burst2, interval2)
		if k1, k2 := bucketKey("p", b1), bucketKey("p", b2); (k1 == k2) != (b1 == b2) {
			t.Errorf("%+v has the key %q, %+v %q", b1, k1, b2, k2)
		}
	})
}

// FuzzTake checks that whatever is stored under a key, the script takes a token or returns
// a wait, at most the wait for the first token of an empty bucket.
func FuzzTake(f *testing.F) {
	e := startEngine(f, "redis-server")
	f.Add("1795455000.000000000", int64(10), int64(2e9))
	f.Add("99999999999999999999.999999999", int64(1), int64(1))
	f.Add("", int64(1_000_000_000), int64(4e9))
	f.Fuzz(func(t *testing.T, kept string, burst, interval int64) {
		burst, interval = 1+max(burst, -burst-1)%1_000_000_000, 1+max(interval, -interval-1)%1e14
		if burst > 4e18/interval {
			burst = 4e18 / interval
		}
		e := *e
		e.t = t
		e.do("SET", "a", kept)
		wait, err := takeScript.Exec(t.Context(), e.ask, []string{"a"}, bucketArgs(burst, time.Duration(interval))).AsInt64()
		if err != nil || wait < 0 || wait > interval {
			t.Errorf("kept %q, burst %d, interval %d: wait %d, %v", kept, burst, interval, wait, err)
		}
		if got := e.do("GET", "a"); wait == 0 && got == kept {
			t.Errorf("kept %q, burst %d, interval %d: a token was taken, and is still there", kept, burst, interval)
		}
	})
}
