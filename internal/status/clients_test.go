// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"net/netip"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// viewOfMany returns a view of n clients, each of which was seen a moment after the previous
// one.
func viewOfMany(n int) *View {
	limits := bucket.Limits{Zone: "many", Burst: 1_000_000, Refill: 1, IPv4Prefix: 32, IPv6Prefix: 64, MaxClients: 4 * n}
	table := bucket.New(limits, time.Second, new(atomic.Int64))
	for i := range n {
		key := client.Address(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
		table.Take(key, int64(i))
	}
	v := emptyView()
	v.in.Tables = func(yield func(*bucket.Table) bool) { yield(table) }
	return v
}

// TestClientsOfMany checks a query over thousands of clients.
func TestClientsOfMany(t *testing.T) {
	v := viewOfMany(50_000)
	now := monotime.Time(int64(time.Hour))
	list, err := v.Clients(map[string][]string{"sort": {"last_seen"}, "limit": {"3"}}, now)
	if err != nil || list.Total != 50_000 || len(list.Clients) != 3 {
		t.Fatalf("%v, %d of %d clients", err, len(list.Clients), list.Total)
	}
	for i, want := range []string{"10.0.195.79", "10.0.195.78", "10.0.195.77"} {
		if got := list.Clients[i].Client; got != want {
			t.Errorf("client %d is %s, want %s", i, got, want)
		}
	}
	if n := v.Stats(now).Clients.Tracked; n != 50_000 {
		t.Errorf("%d clients are tracked", n)
	}
}

func BenchmarkSnapshot(b *testing.B) {
	v := viewOfMany(50_000)
	for b.Loop() {
		v.Snapshot(time.Now())
	}
}

// BenchmarkClients finds the first and later ones of 50,000 clients, in the worst input
// order.
func BenchmarkClients(b *testing.B) {
	v := viewOfMany(50_000)
	for _, query := range []string{"sort=last_seen", "sort=last_seen&order=asc", "sort=last_seen&offset=9900", "sort=last_seen&order=asc&offset=9900"} {
		b.Run(query, func(b *testing.B) {
			values, _ := url.ParseQuery(query)
			for b.Loop() {
				if list, err := v.Clients(values, monotime.Time(int64(time.Hour))); err != nil || len(list.Clients) != 100 {
					b.Fatal(err)
				}
			}
		})
	}
}
