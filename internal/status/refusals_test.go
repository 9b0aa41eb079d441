// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// at is a time that is n seconds after the others of a test.
func at(n int) time.Time { return time.Now().Add(time.Duration(n) * time.Second) }

func noDetails() RefusalDetails { return RefusalDetails{} }

func findRefusals(t *testing.T, v *View, query string) RefusalList {
	t.Helper()
	list, err := v.Refusals(parseQuery(t, query))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func parseQuery(t *testing.T, query string) url.Values {
	t.Helper()
	values, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	return values
}

// denied returns the key of a denial by a rule.
func denied(target string) RefusalKey {
	return RefusalKey{Cause: "rule", Reason: "http_request_denied", Client: netip.MustParseAddr("192.0.2.1"), Target: target, Rule: "deny x"}
}

// TestRefusalGroups checks that each part of a key makes another group, and that a group has the
// number of its refusals, the times of the first and the last, and what the first of them was.
func TestRefusalGroups(t *testing.T) {
	v, keys := emptyView(), []RefusalKey{denied("a:1")}
	for _, change := range []func(k *RefusalKey){
		func(k *RefusalKey) { k.Cause = "port" },
		func(k *RefusalKey) { k.Cause, k.Reason = "", "dns_error" },
		func(k *RefusalKey) { k.Client = netip.MustParseAddr("192.0.2.2") },
		func(k *RefusalKey) { k.User = "alice" },
		func(k *RefusalKey) { k.Policy = "guests" },
		func(k *RefusalKey) { k.Method = "PUT" },
		func(k *RefusalKey) { k.Target = "b:1" },
		func(k *RefusalKey) { k.Rule = "deny y" },
		func(k *RefusalKey) { k.Address = netip.MustParseAddr("10.0.0.1") },
	} {
		k := keys[0]
		change(&k)
		keys = append(keys, k)
	}
	start := at(0)
	for n := range 3 {
		for i, k := range keys {
			v.Refused(k, start.Add(time.Duration(10*n+i)*time.Second), func() RefusalDetails {
				if n > 0 {
					t.Errorf("details of refusal %d of %+v", n, k)
				}
				return RefusalDetails{Status: 403 + n, Detail: fmt.Sprint("detail ", i), Hint: "hint", Allow: "allow"}
			})
		}
	}
	v.Refused(keys[0], start.Add(-time.Second), noDetails) // began earlier, and was refused later
	list := findRefusals(t, v, "")
	if list.Total != len(keys) || len(list.Refusals) != len(keys) {
		t.Fatalf("%d groups, want %d", list.Total, len(keys))
	}
	for i, g := range list.Refusals { // the last is the first
		n := len(keys) - 1 - i
		want := int64(3)
		if n == 0 {
			want = 4
		}
		if g.Count != want || g.Detail != fmt.Sprint("detail ", n) || g.Status != 403 || g.Hint != "hint" || g.Allow != "allow" ||
			!g.First.Equal(start.Add(time.Duration(n)*time.Second)) || !g.Last.Equal(start.Add(time.Duration(20+n)*time.Second)) {
			t.Errorf("group %d is %+v", n, g)
		}
	}
	if want := []RefusalCause{{Cause: "port", Count: 3, Groups: 1}, {Cause: "rule", Count: 25, Groups: 8}, {Reason: "dns_error", Count: 3, Groups: 1}}; fmt.Sprint(list.Causes) != fmt.Sprint(want) {
		t.Errorf("causes %+v, want %+v", list.Causes, want)
	}
}

func TestRefusalQueries(t *testing.T) {
	v := emptyView()
	v.in.DirectivePolicy = "default"
	add := func(n int, change func(k *RefusalKey)) {
		k := denied("a.example:1")
		change(&k)
		for range n {
			v.Refused(k, at(n), noDetails)
		}
	}
	add(1, func(k *RefusalKey) { k.Target = "one.example:443" })
	add(3, func(k *RefusalKey) { k.User, k.Policy = "Alice", "staff" })
	add(2, func(k *RefusalKey) { k.Cause, k.Reason, k.Client = "", "dns_error", netip.MustParseAddr("2001:db8::1") })
	for query, want := range map[string]string{
		"": "3 2 1", "sort=count": "3 2 1", "sort=count&order=asc": "1 2 3", "sort=first&order=asc": "1 2 3", "limit=1": "3", "limit=1&offset=1": "2",
		"cause=rule": "3 1", "cause=dns_error": "2", "cause=nothing": "", "client=192.0.2": "3 1", "client=ALICE": "3", "client=user+alice": "3", "client=user": "3", "client=2001:DB8": "2",
		"q=DNS_": "2", "q=one.ex": "1", "q=deny+X": "3 2 1", "q=alice": "3", "q=db8": "2", "q=http_request": "3 1", "q=nothing": "",
		"target=ONE": "1", "policy=staff": "3", "policy=default": "2 1", "policy=default&client=192": "1",
	} {
		list := findRefusals(t, v, query)
		var got []string
		for _, g := range list.Refusals {
			got = append(got, fmt.Sprint(g.Count))
		}
		if text := strings.Join(got, " "); text != want || !strings.Contains(query, "limit") && list.Total != len(got) {
			t.Errorf("%q: %q of %d, want %q", query, text, list.Total, want)
		}
	}
	k := denied("a.example:1")
	k.Address = netip.MustParseAddr("10.0.0.1")
	v.Refused(k, at(4), noDetails)
	if got := findRefusals(t, v, "limit=1").Refusals[0].Address; got != "10.0.0.1" {
		t.Errorf("the address %q", got)
	}
	for query, want := range map[string]string{"sort=target": `sort "target": expected last, first or count`, "limit=0": "limit", "order=up": "order"} {
		if _, err := v.Refusals(parseQuery(t, query)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", query, err)
		}
	}
}

// TestRefusalsAreBounded checks that a client that asks for ever new targets replaces the groups
// whose last refusal is the oldest, that all refusals are still counted, and that other causes
// keep their groups.
func TestRefusalsAreBounded(t *testing.T) {
	v := emptyView()
	other := denied("other:1")
	other.Cause = "port"
	v.Refused(other, at(0), noDetails)
	start := at(0)
	for i := range 3 * maxGroups {
		now := start.Add(time.Duration(i) * time.Second)
		v.Refused(denied(fmt.Sprintf("t%d:1", i)), now, noDetails)
		v.Refused(denied("t0:1"), now, noDetails) // goes on
	}
	list := findRefusals(t, v, "cause=rule&limit=1000")
	if list.Total != maxGroups || v.refusals.groups.Size() != maxGroups+1 {
		t.Errorf("%d groups, and %d of all causes", list.Total, v.refusals.groups.Size())
	}
	kept := make(map[string]int64)
	for _, g := range list.Refusals {
		kept[g.Target] = g.Count
	}
	if kept["t0:1"] != 3*maxGroups+1 || kept[fmt.Sprintf("t%d:1", 3*maxGroups-1)] != 1 || kept[fmt.Sprintf("t%d:1", 2*maxGroups+1)] != 1 || kept[fmt.Sprintf("t%d:1", 2*maxGroups)] != 0 {
		t.Errorf("kept %v", kept)
	}
	if got := fmt.Sprint(list.Causes); got != fmt.Sprint([]RefusalCause{{Cause: "port", Count: 1, Groups: 1}, {Cause: "rule", Count: 6 * maxGroups, Groups: maxGroups, Dropped: 2 * maxGroups}}) {
		t.Errorf("causes %v", got)
	}
}

// TestRefusalsKeepNoRequest checks that the texts of a group are its own, and not parts of a request
// that would stay in memory with them.
func TestRefusalsKeepNoRequest(t *testing.T) {
	v := emptyView()
	request := strings.Repeat("a", 10_000)
	k := denied(request[:5])
	k.User, k.Method, k.Rule = request[:6], request[:7], request[:8]
	v.Refused(k, at(0), func() RefusalDetails { return RefusalDetails{Detail: request[:9]} })
	g := findRefusals(t, v, "").Refusals[0]
	for _, text := range []string{g.Target, g.User, g.Method, g.Rule, g.Detail} {
		if unsafe.StringData(text) == unsafe.StringData(request) {
			t.Errorf("%q is a part of the request", text)
		}
	}
}

// TestRefusalTexts checks that texts of clients are printable and short, and do not keep the
// request that they are parts of in memory.
func TestRefusalTexts(t *testing.T) {
	v := emptyView()
	long := strings.Repeat("a", 100_000)
	for range 2 {
		k := denied("\x1b[2J\u202e" + long)
		k.User, k.Method, k.Rule = "\a"+long, "\r\n"+long, "deny \x00"+long
		v.Refused(k, at(0), func() RefusalDetails {
			return RefusalDetails{Detail: "\x1b" + long, Hint: "\x1b" + long, Allow: "methods " + long}
		})
	}
	list := findRefusals(t, v, "")
	if list.Total != 1 {
		t.Fatalf("%d groups", list.Total)
	}
	g := list.Refusals[0]
	for _, text := range []string{g.Target, g.User, g.Method, g.Rule, g.Detail, g.Hint} {
		if text == "" || len(text) > printable.MaxText || text != printable.Text(text) {
			t.Errorf("%d bytes: %.40q", len(text), text)
		}
	}
	if g.Allow != "" {
		t.Errorf("a line of %d bytes is offered", len(g.Allow))
	}
}

// TestRefusalsConcurrently checks that no refusal is lost, whether its group is found, made or
// dropped at that moment.
func TestRefusalsConcurrently(t *testing.T) {
	const workers, each = 8, 4000
	v := emptyView()
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range each {
				v.Refused(denied(fmt.Sprint((i*7+w)%(maxGroups+50))), time.Now(), noDetails)
				if i%1000 == 0 {
					v.Snapshot(time.Now())
				}
			}
		})
	}
	wg.Wait()
	list := findRefusals(t, v, "limit=1000")
	if c := list.Causes[0]; c.Count != workers*each || c.Groups != maxGroups || list.Total != maxGroups || c.Dropped == 0 {
		t.Errorf("%+v, want %d refusals", c, workers*each)
	}
}

// TestRefusalsTakeNoMemory checks that a refusal of a known group allocates nothing.
func TestRefusalsTakeNoMemory(t *testing.T) {
	v, k, now := emptyView(), denied("a:1"), time.Now()
	v.Refused(k, now, noDetails)
	if n := testing.AllocsPerRun(100, func() { v.Refused(k, now, func() RefusalDetails { return RefusalDetails{Detail: k.Target} }) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestRefusalsAreMasked checks that a page that masks clients shows none in a refusal, no user, and
// does not tell by a search who the clients are.
func TestRefusalsAreMasked(t *testing.T) {
	v := emptyView()
	k := denied("target.example:1")
	k.Cause, k.User = "client", "alice"
	v.Refused(k, at(0), func() RefusalDetails {
		return RefusalDetails{Detail: "your address, 192.0.2.1, may not use it", Hint: "add 192.0.2.1 to clients", Allow: "clients 10.0.0.0/8 192.0.2.1"}
	})
	v.Refused(denied("target.example:2"), at(0), func() RefusalDetails { return RefusalDetails{Allow: "allow target.example"} })
	page := &Page{View: v, MaskClients: true, CameThroughProxy: func(*http.Request) bool { return false }}
	for _, path := range []string{"/snapshot.json", "/refusals.json"} {
		text := get(t, page, path, http.StatusOK)
		if strings.Contains(text, "192.0.2.1") || strings.Contains(text, "alice") || strings.Count(text, `"client":"192.0.2.0/24"`) != 2 || !strings.Contains(text, `"allow":"allow target.example"`) {
			t.Errorf("%s: %s", path, text)
		}
	}
	for _, query := range []string{"refusals.json?client=192.0.2.1", "tunnels.json?client=192.0.2.1", "clients.json?q=192"} {
		get(t, page, "/"+query, http.StatusForbidden)
	}
	var list RefusalList
	if err := json.Unmarshal([]byte(get(t, page, "/refusals.json?target=ample:2", http.StatusOK)), &list); err != nil || list.Total != 1 {
		t.Errorf("%v, %+v", err, list)
	}
}

// BenchmarkRefused measures counting a refusal: of a known group, of one from many goroutines, and of
// ever new ones.
func BenchmarkRefused(b *testing.B) {
	k, now := denied("www.example.com:443"), time.Now()
	b.Run("known", func(b *testing.B) {
		v := emptyView()
		for b.Loop() {
			v.Refused(k, now, noDetails)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		v := emptyView()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				v.Refused(k, now, noDetails)
			}
		})
	})
	b.Run("new", func(b *testing.B) {
		v, n := emptyView(), 0
		for b.Loop() {
			n++
			k.Target = fmt.Sprintf("www%d.example.com:443", n)
			v.Refused(k, now.Add(time.Duration(n)), noDetails)
		}
	})
}
