// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package bucket

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// taker is a limiter as the benchmarks use it.
type taker interface {
	take(key client.Key) (ok bool)
}

// ourTaker is the table at a fixed time, so that the clock is not measured.
type ourTaker struct{ *Table }

func (l ourTaker) take(key client.Key) bool { return l.Table.Take(key, 1).Allowed }

// xTaker is what most Go programs do: x/time/rate in a sync.Map, which never forgets a
// client.
type xTaker struct {
	limit   rate.Limit
	burst   int
	now     time.Time
	clients sync.Map
}

func (l *xTaker) take(key client.Key) bool {
	b, ok := l.clients.Load(key)
	if !ok {
		b, _ = l.clients.LoadOrStore(key, rate.NewLimiter(l.limit, l.burst))
	}
	return b.(*rate.Limiter).AllowN(l.now, 1)
}

// BenchmarkTake measures one decision, on one goroutine per CPU.
func BenchmarkTake(b *testing.B) {
	for _, bench := range []struct {
		name    string
		burst   int64
		clients int // clients that return; 0: each comes once
		want    bool
	}{
		{"deny/1", 1, 1, false},
		{"allow/1", MaxBurst, 1, true},
		{"allow/1k", MaxBurst, 1000, true},
		{"allow/200k", MaxBurst, 200_000, true},
		{"flood", 1, 0, true},
	} {
		for _, implementation := range []struct {
			name string
			make func() taker
		}{
			{"async_proxy", func() taker { return ourTaker{newTable(limits(bench.burst, 1))} }},
			{"x-time-rate", func() taker { return &xTaker{limit: 1, burst: int(bench.burst), now: time.Unix(1e9, 0)} }},
		} {
			b.Run(bench.name+"/"+implementation.name, func(b *testing.B) {
				l := implementation.make()
				for i := range bench.clients {
					if !l.take(loopback(i)) {
						b.Fatalf("the first request of %v was denied", loopback(i))
					}
				}
				var last atomic.Uint64
				b.ReportAllocs()
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					// Each goroutine has its own networks and its own step.
					first := last.Add(1) << 40
					step := int(first>>40)*2 + 7919
					for n := 0; pb.Next(); n++ {
						key := newcomer(first + uint64(n))
						if bench.clients > 0 {
							key = loopback(n * step % bench.clients)
						}
						if ok := l.take(key); ok != bench.want {
							b.Errorf("take(%v) = %v, want %v", key, ok, bench.want)
							return
						}
					}
				})
			})
		}
	}
}

// newcomer returns the n-th of many IPv6 clients.
func newcomer(n uint64) client.Key {
	addr := [16]byte{0: 0x20, 1: 0x01}
	for i := range 8 {
		addr[15-i] = byte(n >> (8 * i))
	}
	return client.Address(netip.AddrFrom16(addr))
}
