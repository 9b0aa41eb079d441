// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
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
