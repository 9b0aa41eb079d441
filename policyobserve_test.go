// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// observedPolicies are two policies, one of them by user, besides the directive's own options. A
// client from 192.0.2.0/24 is a guest, of whom each may send two requests.
const observedPolicies = `clients all
allow 127.0.0.0/8
zone observed
user_from {header.X-User}
policy staff {
	users staff-*
	report_only rules
	deny 127.0.0.2
}
policy guests {
	clients 192.0.2.0/24
	burst 2
	refill 0.00001
}
`

// newPolicyWorld is newWorld with observedPolicies, where the clients name themselves in
// X-Forwarded-For and X-User.
func newPolicyWorld(t *testing.T, more string) *world {
	t.Helper()
	w := newWorld(t, "", nil)
	globals := strings.Replace(w.globals(), "{\n", "{\n\tevents {\n\t\ton rate_limited async_proxy_test\n\t}\n\tservers {\n\t\ttrusted_proxies static 127.0.0.0/8\n\t}\n", 1)
	loadCaddyfile(t, globals+w.site(observedPolicies)+more)
	return w
}

// Clients of the policies in observedPolicies.
const (
	asNobody = "X-Forwarded-For: 198.51.100.1\n"
	asStaff  = "X-Forwarded-For: 198.51.100.2\nX-User: staff-1\n"
	asGuest  = "X-Forwarded-For: 192.0.2.1\n"
)

// TestPolicyInLogs checks that each line about a client's request or tunnel, and each event, has
// the policy that decided. The directive's own options have no name.
func TestPolicyInLogs(t *testing.T) {
	w := newPolicyWorld(t, "")
	echo := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	wantPolicies := func(message, key string, want ...string) {
		t.Helper()
		var got []string
		for _, line := range w.waitLog(message, len(want)) {
			policy, ok := line["policy"]
			if ok && policy == "" {
				t.Errorf("%s: the field policy is empty", message)
			}
			got = append(got, fmt.Sprintf("%v: %v", line[key], policy))
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", message, got, want)
		}
	}
	for _, lines := range []string{asNobody, asStaff, asGuest} {
		policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), lines)
	}
	wantPolicies("request", "client", "192.0.2.1: guests", "198.51.100.1: <nil>", "198.51.100.2: staff")

	var conns []*rawConn
	for _, lines := range []string{asNobody, asGuest} {
		c := w.dial()
		c.send("CONNECT " + echo + " HTTP/1.1\nHost: x\n" + lines + "\n")
		if res, body := c.response(http.MethodConnect); res.StatusCode != http.StatusOK {
			t.Fatalf("%s %s", res.Status, body)
		}
		conns = append(conns, c)
	}
	wantPolicies("CONNECT tunnel", "client", "192.0.2.1: guests", "198.51.100.1: <nil>")
	for _, c := range conns {
		c.Close()
	}
	wantPolicies("CONNECT tunnel closed", "client", "192.0.2.1: guests", "198.51.100.1: <nil>")

	policyRequest(t, w.proxy, http.MethodGet, "127.0.0.2:9", asStaff)
	wantPolicies("would be denied", "client", "198.51.100.2: staff")

	for len(notedEvents) > 0 {
		<-notedEvents
	}
	policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), asGuest)
	wantPolicies("rate limited", "ip", "192.0.2.1: guests")
	if e := <-notedEvents; e.Data["policy"] != "guests" {
		t.Errorf("the event has %v", e.Data)
	}
}

// TestWarnsAboutRulesOfAPolicy checks that what is odd about a policy's rules is logged with its
// name, and that the directive's rules count as those that are asked after them.
func TestWarnsAboutRulesOfAPolicy(t *testing.T) {
	w := newWorld(t, "", nil)
	for _, tc := range []struct {
		rules, policy string
		want          []string
	}{
		{"", "deny all\nallow example.com", []string{"ci: allow example.com: deny all before it decides first"}},
		{"", "ports 80\ndeny example.com:443", []string{"ci: deny example.com:443: port 443 is closed"}},
		{"deny example.com\ndeny example.com", "deny example.net", []string{"<nil>: deny example.com: deny example.com before it decides first"}},
		{"", "allow 8.8.8.8", []string{"ci: allow 8.8.8.8: effect"}},
		{"deny all", "allow example.com", nil},
		{"deny example.com", "deny all", nil},
	} {
		w.forgetLogs()
		w.load(w.site(tc.rules + "\npolicy ci {\n" + tc.policy + "\n}"))
		var got []string
		for _, line := range w.logLines("a rule can never match") {
			got = append(got, fmt.Sprintf("%v: %s: %s", line["policy"], line["rule"], line["why"]))
		}
		for _, line := range w.logLines("a rule has no effect") {
			got = append(got, fmt.Sprintf("%v: %s: effect", line["policy"], line["rule"]))
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%q, policy %q: warnings %q, want %q", tc.rules, tc.policy, got, tc.want)
		}
	}
	if _, _, err := adapt(w.site("deny example.com\npolicy ci {\nallow example.net\n}"), "Caddyfile"); err == nil || !strings.Contains(err.Error(), "example.net has no effect") {
		t.Errorf("an allow that no later rule denies: %v", err)
	}
}

// TestPolicyMetrics checks that requests count for their policy, across reloads, and that the
// counters of a policy go with the last config that has it.
func TestPolicyMetrics(t *testing.T) {
	w := newPolicyWorld(t, "")
	check := func(when string, want map[string]float64) {
		t.Helper()
		var got map[string]float64
		eventually(t, fmt.Sprintf("%s: %v", when, want), func() bool {
			got = make(map[string]float64)
			for name, value := range gatherMetrics(t) {
				labels, ok := strings.CutPrefix(name, "policy_requests_total")
				if ok && (value != 0 || strings.Contains(labels, `"ok"`)) && !strings.Contains(labels, directivePolicy) {
					got[labels] = value
				}
			}
			return maps.Equal(got, want)
		})
	}
	byDefault := gatherMetrics(t)[`policy_requests_total{outcome="ok",policy="default"}`]
	ask := func() {
		for _, lines := range []string{asNobody, asStaff, asStaff, asGuest, asGuest, asGuest} {
			policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), lines)
		}
	}
	ask()
	want := map[string]float64{
		`{outcome="ok",policy="staff"}`: 2, `{outcome="ok",policy="guests"}`: 2, `{outcome="rate_limited",policy="guests"}`: 1,
	}
	check("at first", want)
	w.load(w.site(strings.Replace(observedPolicies, "policy staff {\n", "policy staff {\nburst 100000\n", 1)))
	check("after a reload", want)
	if n := gatherMetrics(t)[`policy_requests_total{outcome="ok",policy="default"}`] - byDefault; n != 1 {
		t.Errorf("%v requests count for the directive's own options, want 1", n)
	}
	w.load(w.site(observedPolicies[:strings.Index(observedPolicies, "policy guests")]))
	check("without one of them", map[string]float64{`{outcome="ok",policy="staff"}`: 2})
	w.load(w.site(observedPolicies))
	check("with a new one of that name", map[string]float64{`{outcome="ok",policy="staff"}`: 2, `{outcome="ok",policy="guests"}`: 0})
}

// TestPolicyOnStatus checks that clients, tunnels and refusals are listed with their policies, can
// be selected by them, and that a bucket is refilled in one policy or in all.
func TestPolicyOnStatus(t *testing.T) {
	w := newPolicyWorld(t, "")
	asBoth := strings.Replace(asStaff, "198.51.100.2", "192.0.2.1", 1) // the guest's address, but staff
	echo := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	for _, lines := range []string{asNobody, asBoth} {
		c := w.dial()
		c.send("CONNECT " + echo + " HTTP/1.1\nHost: x\n" + lines + "\n")
		if res, body := c.response(http.MethodConnect); res.StatusCode != http.StatusOK {
			t.Fatalf("%s %s", res.Status, body)
		}
	}
	for range 3 {
		policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), asGuest)
	}
	for query, want := range map[string][]string{
		"": {"192.0.2.1 guests", "192.0.2.1 staff", "198.51.100.1 "}, "policy=guests": {"192.0.2.1 guests"}, "policy=default": {"198.51.100.1 "},
		"policy=staff&q=198": nil, "policy=nobody": nil, "policy=guests&limited": {"192.0.2.1 guests"},
	} {
		var got []string
		list := lookupClients(t, query)
		for _, c := range list.Clients {
			got = append(got, c.Client+" "+c.Policy)
		}
		if slices.Sort(got); !slices.Equal(got, want) || list.Total != len(want) {
			t.Errorf("clients?%s: %q of %d, want %q", query, got, list.Total, want)
		}
	}
	for query, want := range map[string][]string{
		"": {"192.0.2.1 staff", "198.51.100.1 "}, "policy=staff": {"192.0.2.1 staff"}, "policy=default": {"198.51.100.1 "}, "policy=guests": nil,
	} {
		values, _ := url.ParseQuery(query)
		list, err := program.status.Tunnels(values, time.Now())
		var got []string
		for _, c := range list.Tunnels {
			got = append(got, c.Client+" "+c.Policy)
		}
		if slices.Sort(got); err != nil || !slices.Equal(got, want) || list.Total != len(want) {
			t.Errorf("tunnels?%s: %v, %q of %d, want %q", query, err, got, list.Total, want)
		}
	}
	snap := program.status.Snapshot(time.Now())
	if r := snap.Refusals.Refusals[0]; r.Policy != "guests" || r.Client != "192.0.2.1" {
		t.Errorf("the refusal %+v", r)
	}
	text, err := json.Marshal(snap)
	if err != nil || strings.Contains(string(text), `"policy":""`) {
		t.Errorf("%v: the directive's own options have a policy in %s", err, text)
	}

	full := func(want ...string) {
		t.Helper()
		var got []string
		for _, c := range lookupClients(t, "q=192.0.2.1").Clients {
			if c.Tokens >= float64(c.Burst) && c.Policy == "guests" {
				got = append(got, c.Policy)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("full buckets %q, want %q", got, want)
		}
	}
	guest := keyOf("192.0.2.1")
	for _, of := range [][2]string{{"observed", "staff"}, {"", "staff"}} {
		if !currentProcess().refillClient(guest, of[0], of[1]) {
			t.Errorf("the client is not known in %q", of)
		}
	}
	for _, of := range [][2]string{{"observed", "default"}, {"observed", "nobody"}, {"other", "guests"}} {
		if currentProcess().refillClient(guest, of[0], of[1]) {
			t.Errorf("the client is known in %q", of)
		}
	}
	full()
	for _, of := range [][2]string{{"observed", "guests"}, {"observed", ""}, {"", "guests"}} {
		if !currentProcess().refillClient(guest, of[0], of[1]) {
			t.Errorf("the client is not known in %q", of)
		}
		full("guests")
		policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), asGuest)
		full()
	}
}

// TestPolicySettings checks that the settings of a policy are its conditions and what it sets,
// without secrets and in printable characters.
func TestPolicySettings(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(w.site(`user_from {header.X-User}
burst 7
refill 3
upstream http://boss:s3cret@127.0.0.1:9
header_up X-Key s3cret
policy empty {
	clients private_ranges 192.0.2.0/24
}
policy full {
	users staff-* "<b>` + "\u202e" + `*"
	match {
		method GET
		header X-Token s3cret
	}
	burst 7
	tunnel_idle_timeout off
	allow example.com:443 *.example.com
	deny all
	max_tunnels 5
	report_only rules
	methods GET HEAD
	upstream socks5://boss:s3cret@127.0.0.2:1080
	header_up X-Key s3cret
}
`))
	var got []string
	var site status.Site
	for _, site = range program.status.Snapshot(time.Now()).Settings {
		for _, y := range site.Policies {
			for _, s := range y.Settings {
				got = append(got, fmt.Sprintf("%s: %s %s", y.Policy, s.Option, s.Value))
				if s.Default {
					t.Errorf("%s: what the policy sets is shown as a default", s.Option)
				}
			}
		}
	}
	want := []string{
		"empty: clients private_ranges 192.0.2.0/24",
		"full: users staff-* <b>" + printable.Text("\u202e") + "*", "full: match header method",
		"full: burst 7", "full: allow example.com:443 *.example.com", "full: deny all", "full: methods GET HEAD", "full: report_only rules",
		"full: upstream socks5://127.0.0.2:1080", "full: max_tunnels 5", "full: tunnel_idle_timeout off", "full: header_up, header_down on",
	}
	if !slices.Equal(got, want) {
		t.Errorf("settings\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if i := slices.IndexFunc(site.Settings, func(s status.Setting) bool { return s.Option == "upstream" }); i < 0 || site.Settings[i].Value != "http://127.0.0.1:9" {
		t.Errorf("the directive's settings %v", site.Settings)
	}
	if text := fmt.Sprint(site); strings.Contains(text, "s3cret") || strings.Contains(text, "boss") || strings.Contains(text, "\u202e") {
		t.Errorf("the settings are %s", text)
	}
}
