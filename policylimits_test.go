// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// asks sends requests one after the other, each on its own connection and with one of the lines,
// and returns the statuses.
func (w *world) asks(t *testing.T, lines map[string]string, requests string) string {
	t.Helper()
	var got []string
	for name := range strings.FieldsSeq(requests) {
		more, known := lines[name]
		if !known {
			t.Fatalf("there are no lines for %q", name)
		}
		res, _ := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), more)
		got = append(got, fmt.Sprint(res.StatusCode))
	}
	return strings.Join(got, " ")
}

// policyPeople are clients, by what they send: users by their credentials, or by user_from.
var policyPeople = map[string]string{
	"-": "", "a": as("alice", "wonderland"), "b": as("bob", "builder"), "x": as("alice", "x"),
	"r": "X-User: robot\n", "s": "X-User: other\n", "ra": "X-User: robot\n" + as("alice", "wonderland"), "p": "X-Poor: 1\n",
}

// TestPolicyBuckets checks which bucket a request is charged to: that of its policy, for its
// client or for its user.
func TestPolicyBuckets(t *testing.T) {
	const robots = "user_from {http.request.header.X-User}\n"
	const poor = "policy poor {\nmatch {\nheader X-Poor 1\n}\n"
	for i, tc := range []struct{ name, options, requests, want string }{
		{"each policy has its own", "burst 2\n" + poor + "burst 1\n}", "p p - - - p", "200 429 200 200 429 429"},
		{"the same limits, but its own", "burst 2\n" + poor + "report_only rules\n}", "- - - p p p", "200 200 429 200 200 429"},
		{"by user_from without a login", robots + "burst 1\nlimit_by user", "r r s s -", "200 429 200 429 200"},
		{"by client, although there is a user", robots + "burst 1", "r s", "200 429"},
		{"only in a policy", robots + "burst 2\npolicy robots {\nusers r*\nburst 1\nlimit_by user\n}", "r r - s - r", "200 429 200 200 429 429"},
		{"not in a policy", robots + "burst 1\nlimit_by user\npolicy robots {\nusers r* o*\nlimit_by client_ip\n}", "r s - -", "200 429 200 429"},
		{"the policy after the login counts", robots + authUsers + `burst 9
			limit_by user
			policy robots {
				users r*
			}
			policy people {
				users alice
				limit_by client_ip
				burst 1
			}`, "ra a ra", "200 429 429"},
		{"a failed login costs the user nothing", authUsers + "burst 2\nlimit_by user\nfailed_logins off", "x x x a a a", "407 407 407 200 200 429"},
		{"report_only limits in a policy", "burst 1\n" + poor + "report_only limits\n}", "p p p - -", "200 200 200 200 429"},
		{"report_only limits but in a policy", "burst 1\nreport_only limits\n" + poor + "report_only rules\n}", "p p - - -", "200 429 200 200 200"},
		{"exempt clients in a policy", "burst 1\nexempt 127.0.0.1\n" + poor + "burst 1\n}", "p p p", "200 200 200"},
	} {
		w := newWorld(t, fmt.Sprintf("zone policy-%d\nrefill 0.00001\n%s", i, tc.options), nil)
		if !strings.Contains(tc.options, "burst") {
			t.Fatal(tc.name)
		}
		if got := w.asks(t, policyPeople, tc.requests); got != tc.want {
			t.Errorf("%s: %s gives %s, want %s", tc.name, tc.requests, got, tc.want)
		}
	}
}

// A request for this server itself has no policy: it is neither limited nor refused by one.
func TestPolicyNotForOwnRequests(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(strings.Replace(w.site("policy everybody {\nburst 1\nrefill 0.00001\nmethods CONNECT\n}"), "async_proxy {", "respond \"a site {http.async_proxy.policy}\"\nasync_proxy {", 1))
	for range 3 {
		conn := w.dial()
		conn.send("GET / HTTP/1.1\nHost: x\n\n")
		if res, body := conn.response(http.MethodGet); res.StatusCode != http.StatusOK || body != "a site " {
			t.Errorf("%s %q", res.Status, body)
		}
	}
}

// TestPolicyBlocks checks that a block holds for a client and a user in all policies, whichever of
// them is limited.
func TestPolicyBlocks(t *testing.T) {
	const options = `user_from {http.request.header.X-User}
		limit_by user
		policy robots {
			users robot
		}
		policy others {
			users other
			limit_by client_ip
		}`
	for name, tc := range map[string]struct{ options, requests, block, want, text string }{
		"the address of users":  {options, "r s -", "127.0.0.1", "429 429 429", "your address"},
		"a user":                {options, "r s -", "robot", "429 200 200", "this user"},
		"a user by its address": {options, "s r -", "other", "429 200 200", "this user"},
		"users who log in":      {authUsers + "limit_by user", "a b x", "127.0.0.1", "429 429 429", "your address"},
		"a user who logs in":    {authUsers + "limit_by user", "a b", "alice", "429 200", "this user"},
	} {
		w := newWorld(t, tc.options, nil)
		key := client.User(tc.block)
		if tc.block == "127.0.0.1" {
			key = keyOf(tc.block)
		}
		process := provisioned(t)[0].process
		process.blockClient(key, time.Minute)
		if got := w.asks(t, policyPeople, tc.requests); got != tc.want {
			t.Errorf("%s: %s gives %s, want %s", name, tc.requests, got, tc.want)
		}
		first, _, _ := strings.Cut(tc.requests, " ")
		if _, body := policyRequest(t, w.proxy, http.MethodGet, "a.example", policyPeople[first]); !strings.Contains(body, tc.text) {
			t.Errorf("%s: %q, want %q", name, body, tc.text)
		}
		process.unblock(key)
		if got := w.asks(t, policyPeople, first); got != "200" {
			t.Errorf("%s: %s after the block", name, got)
		}
	}
}
