// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"runtime"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// lastRefusals returns the groups of refusals that a query finds, as the admin API does: by
// default, the latest first.
func lastRefusals(t *testing.T, query string) []status.Refusal {
	t.Helper()
	values, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	list, err := program.status.Refusals(values)
	if err != nil {
		t.Fatal(err)
	}
	return list.Refusals
}

// waysOfServing are changes of a site's config that have clients served by package downstream, and
// by Caddy's server.
var waysOfServing = map[string]func(site string) string{
	"fast":     func(site string) string { return site },
	"ordinary": byCaddy,
}

// TestLongTextsOfClients checks that no text that a client sends makes a response, a log line or the list of
// refusals long.
func TestLongTextsOfClients(t *testing.T) {
	w := newWorld(t, "", nil)
	long := strings.Repeat("A", 200_000)
	for way, change := range waysOfServing {
		t.Run(way, func(t *testing.T) {
			w.load(change(w.site("methods GET")))
			for _, tc := range []struct{ method, target, says string }{
				{long, "127.0.0.1:1", "the method AAA"},
				{http.MethodGet, "[::1" + long + "]", "is not an IPv6 address"},
				{http.MethodGet, "127.0.0.1:" + strings.Repeat("1", 200_000), "is not a number from 1 to 65535"},
				{http.MethodGet, long + ".example", "too long"},
			} {
				res, body := policyRequest(t, w.proxy, tc.method, tc.target, "")
				if size := len(body) + len(fmt.Sprint(res.Header)); res.StatusCode < 400 || size > 4096 || res.StatusCode == http.StatusForbidden && !strings.Contains(body, tc.says) {
					t.Errorf("%.10s %.20s: %s with %d bytes: %.100s", tc.method, tc.target, res.Status, size, body)
				}
			}
			for _, r := range lastRefusals(t, "limit=4") {
				if text, err := json.Marshal(r); err != nil || len(text) > 4096 {
					t.Errorf("%v, a refusal of %d bytes", err, len(text))
				}
			}
		})
	}
	for _, line := range w.waitLog("request", 1) {
		if text := fmt.Sprint(line); len(text) > 4096 {
			t.Errorf("a line of %d bytes: %.200s", len(text), text)
		}
	}
}

// TestLongListOfClients checks that a stranger costs no more if the option clients lists many ranges, and
// that no long line is offered to copy.
func TestLongListOfClients(t *testing.T) {
	w := newWorld(t, "", nil)
	ranges := ""
	for i := range 4000 {
		ranges += fmt.Sprintf(" 10.%d.%d.0/24", i/256, i%256)
	}
	w.load(w.site("clients" + ranges))
	if res, _ := policyRequest(t, w.proxy, http.MethodGet, "a.example", ""); res.StatusCode != http.StatusForbidden {
		t.Fatal(res.Status)
	}
	if r := lastRefusals(t, "limit=1&cause=client")[0]; r.Allow != "" || r.Hint != "add 127.0.0.1 to clients" {
		t.Errorf("hint %q, a line of %d bytes", r.Hint, len(r.Allow))
	}
	for p := range currentProcess().proxies.All() {
		const n = 1000
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range n {
			denied := p.deniedClient(netip.MustParseAddr("192.0.2.1"))
			_, _ = denied.Error(), denied.AllowLine()
		}
		runtime.ReadMemStats(&after)
		if each := (after.TotalAlloc - before.TotalAlloc) / n; each > 8192 {
			t.Errorf("a stranger takes %d bytes", each)
		}
	}
}

// TestAllowLines has requests denied, takes the line that the page offers for each, and checks
// that the same request is allowed with that line in the config, and that another is not.
func TestAllowLines(t *testing.T) {
	w := newWorld(t, "", nil)
	origin := w.origin.Listener.Addr().String()
	_, port, _ := strings.Cut(origin, ":")
	for name, row := range map[string]struct {
		options        string // %s: the line
		local          bool   // the client may reach this machine by default
		replaced       string // what it replaces, in options
		method, target string
		cause, line    string
		other          string // a target that stays closed
	}{
		"default":            {options: "%s", target: origin, cause: "default", line: "allow 127.0.0.1", other: "127.0.0.2:" + port},
		"default, by a name": {options: "%s", target: "localhost:" + port, cause: "default", line: "allow 127.0.0.1", other: "127.0.0.2:" + port},
		"rule for addresses": {options: "%s\ndeny 127.0.0.0/8", target: origin, cause: "rule", line: "allow 127.0.0.1", other: "127.0.0.2:" + port},
		"rule for names":     {options: "%s\ndeny localhost", local: true, target: "LocalHost:" + port, cause: "rule", line: "allow localhost"},
		"deny all":           {options: "%s\ndeny all", target: origin, cause: "rule", line: "allow 127.0.0.1", other: "127.0.0.2:" + port},
		"ports":              {options: "allow 127.0.0.1\n%s", replaced: "ports 80 8000-8001", target: origin, cause: "port", line: "ports 80 8000-8001 " + port, other: "127.0.0.1:81"},
		"connect_ports": {options: "allow 127.0.0.1\nports 1-65535\n%s", replaced: "connect_ports 443", method: http.MethodConnect, target: origin, cause: "port",
			line: "connect_ports 443 " + port, other: "127.0.0.1:81"},
		"methods": {options: "allow 127.0.0.1\n%s", replaced: "methods GET", method: "M-SEARCH", target: origin, cause: "method", line: "methods GET M-SEARCH"},
		"clients": {options: "allow 127.0.0.1\n%s", replaced: "clients 10.0.0.0/8 2001:db8::/32", target: origin, cause: "client", line: "clients 10.0.0.0/8 2001:db8::/32 127.0.0.1"},
	} {
		for way, change := range waysOfServing {
			t.Run(name+" "+way, func(t *testing.T) {
				method := row.method
				if method == "" {
					method = http.MethodGet
				}
				lines := policyRemote
				if row.local {
					lines = ""
				}
				load := func(line string) { w.load(change(w.site(strings.Replace(row.options, "%s", line, 1)))) }
				load(row.replaced)
				if res, body := policyRequest(t, w.proxy, method, row.target, lines); res.StatusCode != http.StatusForbidden {
					t.Fatalf("before: %s %s", res.Status, body)
				}
				g := lastRefusals(t, "")[0]
				if g.Cause != row.cause || g.Allow != row.line || g.Client != "127.0.0.1" || g.Target != strings.ToLower(row.target) {
					t.Fatalf("the group is %+v, want the line %q", g, row.line)
				}
				load(g.Allow)
				if res, body := policyRequest(t, w.proxy, method, row.target, lines); res.StatusCode != http.StatusOK {
					t.Errorf("after: %s %s", res.Status, body)
				}
				if row.other == "" {
					return
				}
				if res, body := policyRequest(t, w.proxy, method, row.other, lines); res.StatusCode != http.StatusForbidden {
					t.Errorf("%s is open: %s %s", row.other, res.Status, body)
				}
			})
		}
	}
}
