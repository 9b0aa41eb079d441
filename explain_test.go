// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// explained asks the running proxy, the only one, about a request.
func explained(t testing.TB, from, user, method, target string) (*status.Explanation, error) {
	t.Helper()
	q, err := status.ReadQuestion(url.Values{"client": {from}, "user": {user}, "method": {method}, "target": {target}})
	if err != nil {
		t.Fatal(err)
	}
	sites, err := explainSites(t.Context(), q, true)
	if err != nil {
		return nil, err
	}
	if len(sites) != 1 {
		t.Fatalf("%d sites, want 1", len(sites))
	}
	return &sites[0], nil
}

// decider returns the check that decides, or that of the first address, and the rule.
func decider(e *status.Explanation) string {
	for _, c := range e.Checks {
		if c.Outcome == e.Decision && c.Outcome != status.Allowed || c.Check == status.CheckAddress {
			return strings.Join(strings.Fields(c.Check+" "+c.Address+" "+string(c.Outcome)+" "+c.Rule), " ")
		}
	}
	return ""
}

// statusOf sends a request from an address of this machine, and returns the status of the response.
func statusOf(t *testing.T, proxy, from, method, target, lines string) int {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := dialer.Dial("tcp4", proxy)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\n%s\r\n", method, target, lines)
	res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode
}

// TestExplain checks the policy, the decision and what decides, for policies and rules of all
// kinds. A request from this machine must end in the same way.
func TestExplain(t *testing.T) {
	hosts := map[string][]string{"mixed.test": {"10.0.0.1", "127.0.0.1"}, "ads.test": {"127.0.0.1"}, "local.test": {"127.0.0.1"}}
	w := newWorld(t, strings.TrimSpace(bcryptUsers)+`
		clients 127.0.0.0/8 192.168.0.0/16
		resolvers `+nameServer(t, func(name string, _ int) []string { return hosts[name] })+`
		deny ads.test 10.0.0.0/8
		policy staff {
			users   al*
			clients 127.0.0.0/8 10.0.0.0/8
			allow   local.test 127.0.0.0/24:1024-65535
			deny    203.0.113.0/24 all
		}
		policy reporting {
			users       bob
			report_only rules
			ports       443
			methods     GET
		}
		policy guests {
			clients   127.0.0.9
			anonymous
			match {
				method GET CONNECT
			}
			connect_ports 22
		}
	`, nil)
	origin := w.origin.Listener.Addr().String()
	port := strings.TrimPrefix(origin, "127.0.0.1")
	passwords := map[string]string{"alice": "wonderland", "bob": "builder"}
	range24, local := " allowed allow 127.0.0.0/24:1024-65535", " allowed default"
	for _, tc := range []struct {
		from, user, method, target string
		policy                     string
		decision                   status.Outcome
		by                         string
	}{
		{"127.0.0.1", "", "", "local.test" + port, "", status.Denied, "credentials denied"},
		{"127.0.0.1", "carol", "", "local.test" + port, "", status.Denied, "credentials denied"},
		{"127.0.0.1", "alice", "", "local.test" + port, "staff", status.Allowed, "address " + origin + range24},
		{"127.0.0.1", "alice", "", "LOCAL.test." + port, "staff", status.Allowed, "address " + origin + range24},
		{"127.0.0.1", "alice", "", "http://local.test" + port + "/x?y", "staff", status.Allowed, "address " + origin + range24},
		{"127.0.0.1", "alice", "", "local.test:1023", "staff", status.Allowed, "address 127.0.0.1:1023 allowed allow local.test"},
		{"127.0.0.1", "alice", "", "ads.test:1023", "staff", status.Denied, "name denied deny all"},
		{"127.0.0.1", "alice", "", "mixed.test" + port, "staff", status.Allowed, "address " + origin + range24},
		{"127.0.0.1", "alice", "", "203.0.113.1:443", "staff", status.Denied, "address 203.0.113.1:443 denied deny 203.0.113.0/24"},
		{"127.0.0.1", "alice", "", "127.0.0.1:25", "staff", status.Denied, "port denied ports all but 25"},
		{"127.0.0.1", "alice", "", "nowhere.test" + port, "staff", status.Unresolved, "resolution unresolved"},
		{"192.168.1.1", "alice", "", "local.test" + port, "", status.Denied, "address " + origin + " denied default"},
		{"192.168.1.1", "alice", "", "8.8.8.8:443", "", status.Allowed, "address 8.8.8.8:443" + local},
		{"203.0.113.9", "alice", "", "8.8.8.8:443", "", status.Denied, "client denied clients 127.0.0.0/8 192.168.0.0/16"},
		{"127.0.0.1", "bob", "", "http://ads.test" + port + "/", "reporting", status.Allowed, "address " + origin + " reported ports"},
		{"127.0.0.1", "bob", "HEAD", "http://ads.test:443/", "reporting", status.Allowed, "address 127.0.0.1:443 reported deny ads.test"},
		{"127.0.0.9", "", "", "local.test:22", "guests", status.Allowed, "address 127.0.0.1:22" + local},
		{"127.0.0.9", "", "", "local.test" + port, "guests", status.Denied, "port denied connect_ports 22"},
		{"127.0.0.9", "", "", "http://local.test" + port + "/", "guests", status.Allowed, "address " + origin + local},
		{"127.0.0.9", "", "", "http://ads.test/", "guests", status.Denied, "name denied deny ads.test"},
		{"127.0.0.9", "", "HEAD", "http://local.test" + port + "/", "", status.Denied, "credentials denied"},
	} {
		e, err := explained(t, tc.from, tc.user, tc.method, tc.target)
		if err != nil {
			t.Errorf("%+v: %v", tc, err)
			continue
		}
		if e.Policy != tc.policy || e.Decision != tc.decision || decider(e) != tc.by {
			t.Errorf("%s@%s %s %s: policy %q, %s by %q; want %q, %s by %q", tc.user, tc.from, tc.method, tc.target, e.Policy, e.Decision, decider(e), tc.policy, tc.decision, tc.by)
		}
		if !strings.HasPrefix(tc.from, "127.") || tc.user == "carol" { // Caddy takes seconds to reject an unknown user
			continue
		}
		lines := ""
		if tc.user != "" {
			lines = "Proxy-Authorization: " + login(tc.user, passwords[tc.user]) + "\r\n"
		}
		got := statusOf(t, w.proxy, tc.from, e.Method, tc.target, lines)
		refused := got == http.StatusForbidden || got == http.StatusProxyAuthRequired
		if refused != (e.Decision == status.Denied) || e.Decision == status.Unresolved && got != http.StatusBadGateway {
			t.Errorf("%s@%s %s %s: %s, but a request got %d", tc.user, tc.from, e.Method, tc.target, e.Decision, got)
		}
	}
}

// TestExplainLimits checks what is said of limits, and that asking uses nothing up and leaves no trace.
func TestExplainLimits(t *testing.T) {
	w := newWorld(t, `
		burst 3
		refill 0.00001
		max_tunnels 2 per_client 1
		policy reporting {
			clients     127.0.0.2
			report_only limits
		}
		exempt 127.0.0.3
	`, nil)
	origin := w.origin.Listener.Addr().String()
	ask := func(from, method, target string) (e *status.Explanation, checks map[string]status.Check) {
		t.Helper()
		e, err := explained(t, from, "", method, target)
		if err != nil {
			t.Fatal(err)
		}
		checks = make(map[string]status.Check)
		for _, c := range e.Checks {
			checks[c.Check] = c
		}
		return e, checks
	}
	for range 10 {
		if e, checks := ask("127.0.0.1", "", origin); e.Decision != status.Allowed || *e.Limits.Tokens != 3 || checks["tokens"].Detail != "127.0.0.1 has 3.0 tokens left" || checks["tunnels"].Detail != "process: 0 of 2 open, client: 0 of 1 open" {
			t.Fatalf("at first: %s, %+v", e.Decision, checks)
		}
	}
	if n := provisioned(t)[0].directive.limiter.Len(); n != 0 {
		t.Errorf("%d clients are tracked after questions", n)
	}
	conn := w.dial()
	conn.connect(origin)
	e, checks := ask("127.0.0.1", "", origin)
	if e.Decision != status.Denied || checks["tunnels"].Outcome != status.Denied || *e.Limits.Tunnels[1].Open != 1 || int(*e.Limits.Tokens) != 2 {
		t.Errorf("with a tunnel: %s, %+v", e.Decision, checks)
	}
	if got := statusOf(t, w.proxy, "127.0.0.1", http.MethodConnect, origin, ""); got != http.StatusTooManyRequests {
		t.Errorf("a second tunnel: %d", got)
	}
	if e, checks := ask("127.0.0.1", "", "http://"+origin); e.Decision != status.Allowed || checks["tunnels"].Check != "" {
		t.Errorf("a GET beside a tunnel: %s, %+v", e.Decision, checks)
	}
	if got := statusOf(t, w.proxy, "127.0.0.1", http.MethodGet, "http://"+origin, ""); got != http.StatusOK {
		t.Errorf("a GET beside a tunnel: %d", got)
	}
	if e, checks := ask("127.0.0.1", "", "http://"+origin); e.Decision != status.Denied || checks["tokens"].Outcome != status.Denied || checks["tokens"].Detail != "127.0.0.1 has 0.0 tokens left" {
		t.Errorf("without tokens: %s, %+v", e.Decision, checks)
	}
	for range 3 {
		statusOf(t, w.proxy, "127.0.0.2", http.MethodGet, "http://"+origin, "")
	}
	if e, checks := ask("127.0.0.2", "", "http://"+origin); e.Decision != status.Allowed || checks["tokens"].Outcome != status.Reported || !slices.Contains(e.Notes, "report_only limits: not enforced") {
		t.Errorf("with report_only limits: %s, %+v, %q", e.Decision, checks, e.Notes)
	}
	if e, checks := ask("127.0.0.3", "", origin); e.Decision != status.Allowed || checks["tokens"].Rule != "exempt" {
		t.Errorf("exempt: %s, %+v", e.Decision, checks)
	}
	if !currentProcess().blockClient(client.Network(netip.MustParseAddr("127.0.0.3"), 32, 64), time.Minute) {
		t.Fatal("no block")
	}
	if e, checks := ask("127.0.0.3", "", origin); e.Decision != status.Denied || !strings.HasPrefix(checks["tokens"].Detail, "an operator has blocked 127.0.0.3 for another ") {
		t.Errorf("blocked: %s, %+v", e.Decision, checks)
	}
}

// TestExplainWayOut checks the parent and what bypasses it. The parent resolves names, so only rules
// for names apply.
func TestExplainWayOut(t *testing.T) {
	newWorld(t, `
		upstream http://office:secret@127.0.0.1:1
		no_upstream *.direct.test
		resolvers `+nameServer(t, func(string, int) []string { return []string{"8.8.8.8"} })+`
		allow a.test
		deny *.test:1234
		policy own {
			clients  10.0.0.0/8
			upstream socks5://office:secret@127.0.0.1:2
		}
	`, nil)
	for _, tc := range []struct{ from, target, parent, by string }{
		{"192.168.1.1", "x.test:443", "http://127.0.0.1:1", ""},
		{"192.168.1.1", "x.test:1234", "http://127.0.0.1:1", "name denied deny *.test:1234"},
		{"192.168.1.1", "http://x.test:1234", "http://127.0.0.1:1", "name denied deny *.test:1234"},
		{"192.168.1.1", "10.0.0.1:443", "http://127.0.0.1:1", "name denied default"},
		{"192.168.1.1", "x.direct.test:443", "", "address 8.8.8.8:443 allowed default"},
		{"10.0.0.1", "x.test:443", "socks5://127.0.0.1:2", ""},
	} {
		e, err := explained(t, tc.from, "", "", tc.target)
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(e)
		if err != nil || e.Parent != tc.parent || decider(e) != tc.by || strings.Contains(string(text), "secret") {
			t.Errorf("%s: %v, parent %q by %q in %s; want %q by %q", tc.target, err, e.Parent, decider(e), text, tc.parent, tc.by)
		}
	}
}

// TestExplainNotes checks what cannot be known about a request from a question.
func TestExplainNotes(t *testing.T) {
	newWorld(t, "policy posts {\nmatch {\nheader X-Team ops\n}\ndeny all\n}", nil)
	e, err := explained(t, "127.0.0.1", "alice", "", "127.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"user alice is ignored: without basic_auth or user_from, clients have no user", "match: evaluated without header fields and TLS"}
	if e.User != "" || e.Policy != "" || !slices.Equal(e.Notes, want) {
		t.Errorf("user %q, policy %q, %q; want %q", e.User, e.Policy, e.Notes, want)
	}
}

// TestExplainMistakes checks the errors for questions that no client can ask.
func TestExplainMistakes(t *testing.T) {
	newWorld(t, "", nil)
	for _, tc := range []struct{ method, target, want string }{
		{"", "example.com", "the port is missing; expected host:port for CONNECT, or an http:// or https:// URL"},
		{"", "example.com:x", `invalid port ":x" after host`},
		{"", "example.com:0", `the port "0" is not a number from 1 to 65535`},
		{"", "alice:secret@example.com:80", "user names and passwords do not belong in a request target"},
		{"", "ftp://example.com/", `the scheme "ftp" is neither http nor https`},
		{"", "http://[::1", "missing ']' in host"},
		{"", "a.test:80 HTTP/1.1\r\nX:", "unexpected space or control character"},
		{"GET", "/index.html", "it is a path of this server"},
		{"GET", "example.com:443", "expected host:port for CONNECT, or an http:// or https:// URL"},
		{"CONNECT", "http://example.com/", "expected host:port for CONNECT"},
		{"G(T", "http://example.com/", "invalid method"},
	} {
		if e, err := explained(t, "127.0.0.1", "", tc.method, tc.target); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s %q: %+v, %v; want %q", tc.method, tc.target, e, err, tc.want)
		}
	}
}
