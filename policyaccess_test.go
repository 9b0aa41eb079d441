// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// Without the option clients, authentication opens a proxy to all addresses. A policy whose clients
// need no credentials must not open it to strangers by that.
func TestPolicyAnonymousIsNotOpen(t *testing.T) {
	const anonymous = "policy guests {\nCONDITION\nanonymous\n}"
	for _, tc := range []struct {
		name, options, condition string
		near, far                int // a client with a private address, and one without
		warned                   bool
	}{
		{"no condition", "", "", 200, 407, false},
		{"a matcher for requests", "", "match {\nmethod GET CONNECT\n}", 200, 407, false},
		{"addresses", "", "clients 192.0.2.0/24 127.0.0.0/8", 200, 200, false},
		{"an address matcher", "", "match {\nclient_ip 192.0.2.0/24 127.0.0.0/8\n}", 200, 200, false},
		{"all addresses", "", "clients 0.0.0.0/0", 200, 200, true},
		{"users", "user_from {http.request.header.X-User}", "users robot", 200, 200, false},
		{"all clients of the directive", "clients all", "", 200, 200, true},
		{"all clients of the directive, but some in the policy", "clients all", "clients 127.0.0.0/8", 200, 407, false},
		{"some clients of the directive", "clients 127.0.0.0/8", "", 200, 403, false},
		{"some clients of the directive, all in the policy", "clients 127.0.0.0/8", "clients 0.0.0.0/0", 200, 403, false},
	} {
		w := newWorld(t, "", nil)
		site := w.site(authUsers + "allow 127.0.0.0/8\n" + tc.options + "\n" + strings.Replace(anonymous, "CONDITION", tc.condition, 1))
		loadCaddyfile(t, withServers(w.globals()+site, withWrapper+trustsLoopback))
		origin := w.origin.Listener.Addr().String()
		for lines, want := range map[string]int{from("127.0.0.5"): tc.near, from("192.0.2.1"): tc.far} {
			for _, method := range []string{http.MethodGet, http.MethodConnect} {
				if res, body := policyRequest(t, w.proxy, method, origin, lines+"X-User: robot\n"); res.StatusCode != want {
					t.Errorf("%s: %s from %q: %s %q, want %d", tc.name, method, lines, res.Status, body, want)
				}
			}
			if tc.far != http.StatusForbidden {
				if res, body := policyRequest(t, w.proxy, http.MethodGet, origin, lines+as("bob", "builder")); res.StatusCode != http.StatusOK {
					t.Errorf("%s: a login from %q: %s %q", tc.name, lines, res.Status, body)
				}
			}
		}
		const warning = "open proxy: anyone who can reach this address can use it; restrict it with the option clients, or add basic_auth or a remote_ip matcher"
		if lines := w.logLines(warning); (len(lines) > 0) != tc.warned {
			t.Errorf("%s: the warnings are %v", tc.name, lines)
		}
	}
}

// A policy whose matcher fails must not be passed over: the next one may allow more. Policies that
// do not matter for a request may fail.
func TestPolicyMatcherFails(t *testing.T) {
	const failing = "match {\nexpression `int({http.request.header.X-Number}) == 1`\n}\n"
	const options = `user_from {http.request.header.X-User}
		policy first {
			clients 127.0.0.0/8
			match {
				header X-First 1
			}
		}
		policy numbers {
			users *
			` + failing + `
			methods GET CONNECT
		}
		policy second {
			users bob
		}`
	w := newWorld(t, "", nil)
	for way, site := range map[string]string{"fast": w.site(options), "ordinary": byCaddy(w.site(options))} {
		w.load(site)
		w.forgetLogs()
		for _, tc := range []struct {
			lines string
			want  int
		}{
			{"X-User: alice\nX-Number: 1\n", 200}, {"X-User: bob\nX-Number: 2\n", 200}, {"X-User: alice\nX-Number: x\n", 500}, {"X-User: bob\nX-Number: x\n", 500},
			{"X-User: alice\nX-Number: x\nX-First: 1\n", 200}, {"X-Number: x\n", 200},
		} {
			for _, method := range []string{http.MethodGet, http.MethodConnect} {
				if res, _ := policyRequest(t, w.proxy, method, w.origin.Listener.Addr().String(), tc.lines); res.StatusCode != tc.want {
					t.Errorf("%s: %s with %q: %s, want %d", way, method, tc.lines, res.Status, tc.want)
				}
			}
		}
		lines := 0
		for _, line := range w.waitLog("request", 8) {
			if line["status"] == 500.0 {
				lines++
				if text := fmt.Sprint(line["error"]); !strings.Contains(text, "policy numbers: ") {
					t.Errorf("%s: the line is %v", way, line)
				}
			}
		}
		if lines != 4 {
			t.Errorf("%s: %d lines", way, lines)
		}
	}
}

// TestPolicyMethods checks the option methods, in the directive and in a policy.
func TestPolicyMethods(t *testing.T) {
	const some = "methods GET OPTIONS CONNECT"
	for name, options := range map[string]string{"directive": some, "policy": "methods POST\npolicy everybody {\n" + some + "\n}", "inherited": some + "\npolicy everybody {\nburst 7000\n}"} {
		w := newTunnelWorld(t, tunnelSetup{options: "hosts localhost\n" + options})
		o := newPolicyOrigin(t)
		for _, protocol := range tunnelProtocols {
			ask := newPolicyClient(t, w, protocol, o.address)
			for method, want := range map[string]int{"GET": 200, "OPTIONS": 200, "HEAD": 403, "POST": 403, "get": 403, "PATCH": 403} {
				if got, _ := ask(method, ""); got != want {
					t.Errorf("%s, %s: %s: %d, want %d", name, protocol, method, got, want)
				}
			}
			w.client(t, protocol).open(o.address).Close()
		}
		for _, line := range w.waitLog("request", 6*len(tunnelProtocols)) {
			if line["status"] == 403.0 && (line["cause"] != "method" || line["rule"] != "methods" || !strings.HasPrefix(fmt.Sprint(line["hint"]), "add ")) {
				t.Errorf("%s: the line is %v", name, line)
			}
		}
		waitNoTunnels(t)
		w.reload(t, tunnelSetup{options: "hosts localhost\n" + strings.ReplaceAll(options, " CONNECT", "")})
		for _, protocol := range tunnelProtocols {
			if refused := w.client(t, protocol).refused(o.address); refused.status != http.StatusForbidden || !strings.Contains(refused.proxyStatus, "http_request_denied") {
				t.Errorf("%s, %s: CONNECT: %d, Proxy-Status %q", name, protocol, refused.status, refused.proxyStatus)
			}
		}
		w.reload(t, tunnelSetup{options: "hosts localhost\nreport_only rules\n" + options})
		if got, _ := newPolicyClient(t, w, "h2", o.address)("POST", ""); got != http.StatusOK {
			t.Errorf("%s, report_only: %d", name, got)
		}
		if line := w.waitLog("would be denied", 1)[0]; line["rule"] != "methods" || line["client"] != "127.0.0.1" {
			t.Errorf("%s: the line is %v", name, line)
		}
	}
}

// The rules of a policy are asked first, and then the directive's, about names as about addresses.
func TestPolicyRulesBeforeDirective(t *testing.T) {
	w := newWorld(t, "", nil)
	origin := w.origin.Listener.Addr().String()
	_, port, _ := strings.Cut(origin, ":")
	for i, tc := range []struct {
		directive, own        string
		byName, byAddress     int // of localhost and 127.0.0.1, in the policy
		elsewhere, elsewhere2 int // without the policy
	}{
		{"", "", 200, 200, 200, 200},
		{"", "deny localhost", 403, 200, 200, 200},
		{"", "deny 127.0.0.0/8 ::1", 403, 403, 200, 200},
		{"deny localhost", "", 403, 200, 403, 200},
		{"deny localhost", "allow localhost", 200, 200, 403, 200},
		{"deny all", "allow localhost", 200, 403, 403, 403},
		{"deny all", "allow localhost 127.0.0.0/8", 200, 200, 403, 403},
		{"deny 127.0.0.0/8 ::1", "allow 127.0.0.1", 200, 200, 403, 403},
		{"deny 127.0.0.0/8 ::1", "allow 127.0.0.1:1", 403, 403, 403, 403},
		{"deny 127.0.0.0/8 ::1", "allow 127.0.0.1:" + port + "\ndeny all", 200, 200, 403, 403},
		{"allow 127.0.0.1\ndeny all", "deny localhost", 403, 200, 200, 200},
		{"allow localhost\ndeny localhost all", "deny 127.0.0.1:1", 200, 403, 200, 403},
		{"deny localhost", "allow localhost\ndeny 127.0.0.0/8 ::1", 403, 403, 403, 200},
		{"report_only rules\ndeny localhost", "deny 127.0.0.0/8", 200, 200, 200, 200},
		{"deny localhost", "report_only rules\ndeny 127.0.0.0/8 ::1", 200, 200, 403, 200},
		{"ports 1", "ports " + port, 200, 200, 403, 403},
		{"ports " + port, "connect_ports 1\ndeny a.example", 403, 403, 200, 200}, // CONNECT only
	} {
		w.load(w.site("burst 1000000\n" + tc.directive + "\npolicy some {\nmatch {\nheader X-Policy some\n}\n" + tc.own + "\n}"))
		for _, method := range []string{http.MethodGet, http.MethodConnect} {
			for _, ask := range []struct {
				authority, lines string
				want             int
			}{
				{"localhost:" + port, "X-Policy: some\n", tc.byName}, {origin, "X-Policy: some\n", tc.byAddress},
				{"localhost:" + port, "", tc.elsewhere}, {origin, "", tc.elsewhere2},
			} {
				if strings.Contains(tc.own, "connect_ports") && method == http.MethodGet {
					ask.want = 200
				}
				if res, body := policyRequest(t, w.proxy, method, ask.authority, ask.lines); res.StatusCode != ask.want {
					t.Errorf("row %d (%q, %q): %s %s with %q: %s %q, want %d", i, tc.directive, tc.own, method, ask.authority, ask.lines, res.Status, body, ask.want)
				}
			}
		}
	}
}
