// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// lookupClients looks up clients as the admin API does.
func lookupClients(t *testing.T, query string) status.ClientList {
	t.Helper()
	values, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	list, err := program.status.Clients(values, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// loadTrustingForwardedFor loads sites that take clients' addresses from X-Forwarded-For.
func (w *world) loadTrustingForwardedFor(sites string) {
	w.t.Helper()
	loadCaddyfile(w.t, strings.Replace(w.globals(), "{\n", "{\n\tevents {\n\t\ton rate_limited async_proxy_test\n\t}\n\tservers {\n\t\ttrusted_proxies static 127.0.0.0/8\n\t}\n", 1)+sites)
}

// A flood from a client that is blocked or cannot be counted is logged in a few lines that
// stand for all of it.
func TestFloodsOfBlockedAndUncountedClients(t *testing.T) {
	const flood = 200
	for _, tc := range []struct {
		name, options, err string
		status             int
	}{
		{"blocked", "zone flood-1", errBlocked.Error(), http.StatusTooManyRequests},
		{"blocked and exempt", "zone flood-2\nexempt 127.0.0.0/8", errBlocked.Error(), http.StatusTooManyRequests},
		{"uncounted", "zone flood-3\nlimiter test", "the engine is cold", http.StatusServiceUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, "", nil)
			w.loadTrustingForwardedFor(w.site(tc.options))
			if tc.status == http.StatusServiceUnavailable {
				answer(t, 0, errors.New(tc.err), false)
			} else if !currentProcess().blockClient(keyOf("127.0.0.1"), time.Hour) {
				t.Fatal("the client is not blocked")
			}
			start, before := time.Now(), gatherMetrics(t)
			client := w.client()
			for range flood {
				res, err := client.Get(w.origin.URL)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, res.Body)
				res.Body.Close()
				if res.StatusCode != tc.status || res.Header.Get("Retry-After") == "" {
					t.Fatalf("%s, Retry-After %q", res.Status, res.Header.Get("Retry-After"))
				}
			}
			most := 10 + int(time.Since(start)/time.Second) + 1
			var lines []map[string]any
			eventually(t, "the log lines of the first refusals", func() bool {
				lines = w.logLines("request")
				return len(lines) >= 10
			})
			groups := slices.DeleteFunc(lastRefusals(t, "target="+w.origin.Listener.Addr().String()), func(g status.Refusal) bool {
				return g.Last.Before(start) // of another origin, which had the same port
			})
			if len(groups) != 1 || groups[0].Count != flood || groups[0].Status != tc.status {
				t.Errorf("the page has the refusals %+v", groups)
			}
			var covered float64
			for _, line := range lines {
				refused, _ := line["refused"].(float64)
				covered += refused
				if line["error"] != tc.err || line["status"] != float64(tc.status) {
					t.Errorf("line %v", line)
				}
			}
			if len(lines) > most || covered > flood {
				t.Errorf("%d lines cover %v refusals, want at most %d lines for %d", len(lines), covered, most, flood)
			}
			grown := since(t, before)
			if got := grown[`requests_total{kind="forward",outcome="refused"}`] + grown[`requests_total{kind="forward",outcome="failed"}`]; got != flood {
				t.Errorf("%v requests were counted as refused, want %d", got, flood)
			}
			if list := lookupClients(t, ""); len(list.Clients) != 1 || list.Clients[0].Requests != flood || list.Clients[0].Rejections != flood || list.Clients[0].LastSeen.Before(start.Add(-time.Second)) {
				t.Errorf("clients %+v", list)
			}
			select {
			case e := <-notedEvents:
				t.Errorf("got an event, though the client had tokens: %v", e.Data)
			default:
			}
		})
	}
}

// Blocks are listed, and so can be lifted, even if no limiter knows the client.
func TestBlocksListedWithoutBucket(t *testing.T) {
	w := newWorld(t, "", nil)
	other := freeAddress(t)
	w.loadTrustingForwardedFor(w.site("zone one") + siteAt(other, "zone two\nipv4_prefix 24\nipv6_prefix 48"))
	for _, name := range []string{"192.0.2.7", "2001:db8::7", "user alice"} {
		key, err := client.Parse(name)
		if err != nil || !currentProcess().blockClient(key, time.Hour) {
			t.Fatalf("%s is not blocked: %v", name, err)
		}
	}
	for _, query := range []string{"", "limited", "limited=&sort=tokens&order=asc"} {
		list := lookupClients(t, query)
		names := strings.Split(namesOf(list), " ")
		slices.Sort(names)
		if got, want := strings.Join(names, " "), "192.0.2.0/24 192.0.2.7 2001:db8::/48 alice user"; got != want || list.Total != 4 {
			t.Errorf("%q: clients %s, %d in all, want %s", query, got, list.Total, want)
		}
		for _, c := range list.Clients {
			if c.BlockedUntil == nil || time.Until(*c.BlockedUntil) < 59*time.Minute || c.Tokens != float64(c.Burst) || c.Requests != 0 || !c.LastSeen.IsZero() ||
				c.Zone != map[string]string{"192.0.2.7": "one", "192.0.2.0/24": "two", "2001:db8::/48": "two", "user alice": "two"}[c.Client] {
				t.Errorf("%q: %+v", query, c)
			}
		}
	}
	if list := lookupClients(t, "q=Alice"); namesOf(list) != "user alice" {
		t.Errorf("q=Alice: %s", namesOf(list))
	}
	// Clients that send requests are merged with their buckets.
	for _, proxy := range []string{w.proxy, other} {
		if got := w.get(proxy, "X-Forwarded-For", "192.0.2.7"); got != http.StatusTooManyRequests {
			t.Errorf("status %d", got)
		}
	}
	if list := lookupClients(t, "limited&q=192.0.2"); list.Total != 2 || list.Clients[0].Requests != 1 || list.Clients[1].Requests != 1 {
		t.Errorf("clients %+v", list)
	}
	for _, c := range lookupClients(t, "limited").Clients {
		key, err := client.Parse(c.Client)
		if err != nil {
			t.Error(err)
		}
		currentProcess().blockClient(key, 0)
	}
	if list := lookupClients(t, "limited"); list.Total != 0 {
		t.Errorf("still blocked: %+v", list)
	}
}

// A client with a tunnel is listed while the tunnel is open.
func TestTunnelsListedWithoutBucket(t *testing.T) {
	w := newWorld(t, "zone old", nil)
	conn := w.dial()
	conn.connect(echoTarget(t))
	w.load(w.site("zone new")) // a new zone that knows no clients
	hear(t, conn, say(t, conn, "0123456789"))
	var list status.ClientList
	eventually(t, "the tunnel's bytes to be counted", func() bool {
		list = lookupClients(t, "")
		return len(list.Clients) == 1 && list.Clients[0].BytesUp > 0 && list.Clients[0].BytesDown > 0
	})
	if list.Total != 1 {
		t.Fatalf("clients %+v", list)
	}
	if c := list.Clients[0]; c.Client != "127.0.0.1" || c.Zone != "old" || c.Tunnels != 1 || c.BytesUp != 10 || c.BytesDown != 10 || time.Since(c.LastSeen) > time.Minute || c.BlockedUntil != nil {
		t.Errorf("client %+v", c)
	}
	if list := lookupClients(t, "limited"); list.Total != 0 {
		t.Errorf("limited: %+v", list)
	}
	w.gets(w.proxy, 200)
	if list := lookupClients(t, ""); list.Total != 2 || list.Clients[0].Zone != "new" || list.Clients[0].Tunnels != 0 || list.Clients[1].Zone != "old" || list.Clients[1].Tunnels != 1 {
		t.Errorf("clients %+v", list)
	}
}

// A request counts once for each client it belongs to, however often the limiter is asked
// about it.
func TestCountsByUser(t *testing.T) {
	w := newWorld(t, "", nil)
	ask := func(user, password string, want int) {
		t.Helper()
		lines := ""
		if user != "" {
			lines = "Proxy-Authorization: " + login(user, password) + "\n"
		}
		if res, body := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), lines); res.StatusCode != want {
			t.Errorf("%s: %s %q, want %d", user, res.Status, body, want)
		}
	}
	counts := func(want string) {
		t.Helper()
		var got []string
		for _, c := range lookupClients(t, "sort=requests").Clients {
			got = append(got, fmt.Sprintf("%s %d %d", c.Client, c.Requests, c.Rejections))
			if time.Since(c.LastSeen) > time.Minute || c.LastSeen.IsZero() {
				t.Errorf("%s was last seen %v", c.Client, c.LastSeen)
			}
		}
		if got := strings.Join(got, ", "); got != want {
			t.Errorf("requests and rejections are %s, want %s", got, want)
		}
	}
	options := authUsers + "burst 2\nrefill 0.00001\nlimit_by user\n"
	w.load(w.site(options + "zone counts-1"))
	start := time.Now()
	ask("alice", "wonderland", 200)
	ask("alice", "wonderland", 200)
	ask("alice", "wonderland", 429)
	ask("alice", "?", 407)
	ask("", "", 407)
	ask("", "", 407)
	ask("", "", 429) // the address is out of tokens
	ask("bob", "builder", 200)
	counts("127.0.0.1 8 1, user alice 3 1, user bob 1 0")
	if c := lookupClients(t, "q=127").Clients[0]; c.LastSeen.Before(start.Add(-time.Second)) {
		t.Errorf("the address was last seen %v", c.LastSeen)
	}

	w.load(w.site(options + "zone counts-2\nreport_only limits"))
	before := gatherMetrics(t)
	for range 3 {
		ask("", "", 407)
	}
	for range 3 {
		ask("alice", "wonderland", 200)
	}
	// The last of each three finds no token, once the address's and once alice's.
	if got := gatherMetrics(t)[`reported_total{what="limits"}`] - before[`reported_total{what="limits"}`]; got != 2 {
		t.Errorf("%v requests were reported, want 2", got)
	}
	counts("127.0.0.1 6 1, user alice 3 1")
}

// namesOf returns the clients' names, in order.
func namesOf(l status.ClientList) string {
	var names []string
	for _, c := range l.Clients {
		names = append(names, c.Client)
	}
	return strings.Join(names, " ")
}
