// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
)

// checkHitters compares a sketch with what was really added.
func checkHitters(t *testing.T, h *heavyHitters, added map[string]int64) {
	t.Helper()
	var total, sums int64
	for _, n := range added {
		total += n
	}
	n := 0
	h.each(func(name string) {
		n++
		sum, before, ok := h.counted(name)
		if sums += sum + before; !ok || sum > added[name] || sum+before < added[name] {
			t.Errorf("%s: %d, and at most %d before, of %d", name, sum, before, added[name])
		}
	})
	if sums != total || n > h.size || n != len(h.order) || n != h.found.Size() {
		t.Errorf("%d names with the sum %d, want %d with %d", n, sums, h.size, total)
	}
	for name, sum := range added {
		if _, _, ok := h.counted(name); !ok && sum > total/int64(h.size) {
			t.Errorf("%s is not listed, with %d of %d", name, sum, total)
		}
	}
}

// TestHeavyHitters checks that names with a large part of the total are found, whatever the order:
// early, late, all the time, among names that come once, or with few large numbers.
func TestHeavyHitters(t *testing.T) {
	const n = 20_000
	r := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(r, 1.1, 1, 5000)
	for name, next := range map[string]func(i int) (string, int64){
		"few":            func(i int) (string, int64) { return fmt.Sprint(i % 20), 1 },
		"zipf":           func(int) (string, int64) { return fmt.Sprint(zipf.Uint64()), 1 },
		"zipf of bytes":  func(int) (string, int64) { return fmt.Sprint(zipf.Uint64()), r.Int64N(1 << 30) },
		"once each":      func(i int) (string, int64) { return fmt.Sprint(i), 1 },
		"one among many": func(i int) (string, int64) { return fmt.Sprint(i * (i % 10 & 1)), 1 },
		"early":          func(i int) (string, int64) { return fmt.Sprint(max(0, i-n/10)), 1 },
		"late":           func(i int) (string, int64) { return fmt.Sprint(min(n-n/10, i)), 1 },
		"one large":      func(i int) (string, int64) { return fmt.Sprint(i), int64(1 + i/(n/2)*(1-min(1, i%(n/2)))*n) },
	} {
		t.Run(name, func(t *testing.T) {
			h, added := newHeavyHitters(64), make(map[string]int64)
			for i := range n {
				name, value := next(i)
				h.add(name, value)
				added[name] += value
				if i%997 == 0 {
					checkHitters(t, h, added)
				}
			}
			checkHitters(t, h, added)
		})
	}
}

// TestHeavyHittersConcurrently checks that nothing is lost or counted twice while names replace each
// other.
func TestHeavyHittersConcurrently(t *testing.T) {
	h := newHeavyHitters(4)
	var mu sync.Mutex
	added := make(map[string]int64)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			own := make(map[string]int64)
			r := rand.New(rand.NewPCG(uint64(w), 1))
			for range 20_000 {
				name, n := fmt.Sprint(r.IntN(6)), 1+r.Int64N(9)
				h.add(name, n)
				own[name] += n
			}
			mu.Lock()
			defer mu.Unlock()
			for name, n := range own {
				added[name] += n
			}
		})
	}
	wg.Wait()
	checkHitters(t, h, added)
}

// TestReplacedHitterIsNotListed checks that a reader does not take what marks a name as replaced for its
// sum, in the moment in which the name can still be found.
func TestReplacedHitterIsNotListed(t *testing.T) {
	h := newHeavyHitters(1)
	h.add("a", 5)
	h.add("b", 1)
	b, _ := h.found.Load("b")
	b.sum.Store(math.MinInt64)
	b.sum.Add(3) // by an add that has found it before
	if sum, before, found := h.counted("b"); found {
		t.Errorf("%d, and at most %d before", sum, before)
	}
}

// TestTargets checks that the list has the largest first, by requests or by bytes, and can be
// searched.
func TestTargets(t *testing.T) {
	v := emptyView()
	for i := range 2 * maxTargets { // once each
		v.Served(fmt.Sprintf("h%d.example:443", i))
	}
	for i := range 30 {
		name := fmt.Sprintf("Busy%d.example:443", i)
		for range 2000 + i {
			v.Served(name)
		}
		v.Transferred(name, int64(100-i))
		v.Transferred(fmt.Sprintf("large%d.example:443", i), int64(1000+i))
	}
	v.Transferred("nothing.example:443", 0)
	for query, want := range map[string]string{
		"limit=2": "busy29 busy28", "limit=2&offset=1": "busy28 busy27", "sort=bytes&limit=2": "large29 large28", "sort=bytes&order=asc&limit=1": "busy29",
		"q=BUSY0": "busy0", "q=nothing": "", "sort=bytes&q=nothing": "", "sort=bytes&q=busy7": "busy7",
	} {
		list := targetsOf(t, v, query)
		var got []string
		for _, each := range list.Targets {
			got = append(got, strings.TrimSuffix(each.Target, ".example:443"))
		}
		if text := strings.Join(got, " "); text != want || !strings.Contains(query, "limit") && list.Total != len(got) {
			t.Errorf("%q: %q of %d, want %q", query, text, list.Total, want)
		}
	}
	busy := targetsOf(t, v, "q=busy9.").Targets[0]
	if *busy.Requests+busy.RequestsBefore < 2009 || *busy.Requests > 2009 || *busy.Requests < 2000 || *busy.Bytes != 91 {
		t.Errorf("%+v", busy)
	}
	if total := targetsOf(t, v, "").Total; total != maxTargets {
		t.Errorf("%d targets are listed by requests", total)
	}
	if list := v.targets.top(snapshotTargets).Targets; len(list) != 2*snapshotTargets || list[snapshotTargets-1].Target != "busy10.example:443" || list[snapshotTargets].Target != "large29.example:443" || list[snapshotTargets].Requests != nil {
		t.Errorf("the snapshot has %d targets: %+v", len(list), list)
	}
	few := emptyView()
	few.Served("a.example:443")
	few.Transferred("a.example:443", 1)
	if list := few.targets.top(snapshotTargets).Targets; len(list) != 1 {
		t.Errorf("one target is listed as %+v", list)
	}
	odd := "\x1b[2J" + strings.Repeat("a", 10_000)
	v.Transferred(odd, 1<<40)
	v.Transferred(odd, 1<<40)
	if list := targetsOf(t, v, "sort=bytes&limit=1").Targets; len(list[0].Target) > 256 || strings.Contains(list[0].Target, "\x1b") || *list[0].Bytes != 1<<41 {
		t.Errorf("%+v", list)
	}
}

func targetsOf(t *testing.T, v *View, query string) TargetList {
	t.Helper()
	list, err := v.Targets(parseQuery(t, query))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestTargetsTakeNoMemory checks that a request to a listed target allocates nothing.
func TestTargetsTakeNoMemory(t *testing.T) {
	v := emptyView()
	v.Served("a.example:443")
	if n := testing.AllocsPerRun(100, func() { v.Served("a.example:443") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkServed measures counting a request to a listed target, from one and from many goroutines,
// and to ever new ones.
func BenchmarkServed(b *testing.B) {
	b.Run("listed", func(b *testing.B) {
		v := emptyView()
		for b.Loop() {
			v.Served("www.example.com:443")
		}
	})
	b.Run("parallel", func(b *testing.B) {
		v := emptyView()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				v.Served("www.example.com:443")
			}
		})
	})
	b.Run("new", func(b *testing.B) {
		v, names := emptyView(), make([]string, 100_000)
		for i := range names {
			names[i] = fmt.Sprintf("www%d.example.com:443", i)
		}
		for i := 0; b.Loop(); i++ {
			v.Served(names[i%len(names)])
		}
	})
}
