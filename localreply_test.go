// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// causeRow is a way in which a request can be refused.
type causeRow struct {
	cause   string
	options string
	method  string // "": GET
	target  string // "": the origin
	lines   string
	before  func(w *world) // runs before the request that must be refused
	status  int
	reason  string
	outcome string // "": refused
}

func causeRows(parent, target string) []causeRow {
	denied, prohibited, connections := "http_request_denied", "destination_ip_prohibited", "connection_limit_reached"
	open := func(w *world) {
		before := gatherMetrics(w.t)
		w.dial().connect(target)
		eventually(w.t, "the tunnel to be counted", func() bool { return len(since(w.t, before)) > 0 })
	}
	return []causeRow{
		{cause: "rate_limited", options: "burst 1\nrefill 0.00001", before: open, status: 429, reason: denied, outcome: "rate_limited"},
		{cause: "blocked", before: func(w *world) {
			currentProcess().blockClient(keyOf("127.0.0.1"), time.Hour)
			w.t.Cleanup(func() { currentProcess().unblock(keyOf("127.0.0.1")) })
		}, status: 429, reason: denied},
		{cause: "rule", options: "deny 127.0.0.0/8", status: 403, reason: denied},
		{cause: "rule", options: "deny localhost", method: "CONNECT", target: "localhost:443", status: 403, reason: denied},
		{cause: "default", target: "169.254.169.254:80", status: 403, reason: prohibited},
		{cause: "default", options: "zone cause-default", method: "CONNECT", target: "10.0.0.1:443", lines: "X-Forwarded-For: 192.0.2.1\n", status: 403, reason: prohibited},
		{cause: "port", method: "CONNECT", target: "127.0.0.1:25", status: 403, reason: denied},
		{cause: "port", options: "ports 443", target: "127.0.0.1:80", status: 403, reason: denied},
		{cause: "client", options: "clients 192.0.2.0/24", status: 403, reason: denied},
		{cause: "auth_required", options: authUsers, status: 407, reason: denied, outcome: "auth_required"},
		{cause: "auth_required", options: authUsers, method: "CONNECT", status: 407, reason: denied, outcome: "auth_required"},
		{cause: "auth_failed", options: authUsers, lines: "Proxy-Authorization: " + login("alice", "?") + "\n", status: 407, reason: denied},
		{cause: "max_tunnels", options: "max_tunnels 1", method: "CONNECT", before: open, status: 503, reason: connections, outcome: "failed"},
		{cause: "tunnels_per_client", options: "max_tunnels 9 per_client 1", method: "CONNECT", before: open, status: 429, reason: connections},
		{cause: "loop", options: "via tester", lines: "Via: 1.1 tester\n", status: 508, reason: "proxy_loop_detected"},
		{cause: "parent", options: "upstream http://" + parent, method: "CONNECT", target: "192.0.2.1:443", status: 403, reason: denied},
		{cause: "", target: "127.0.0.1:1", status: 502, reason: "connection_refused", outcome: "failed"},
		{cause: "", options: "zone cause-bad", target: "127.0.0.1:0", status: 400, reason: "http_request_error"},
	}
}

// TestCauses has a request refused for each cause, on both serving paths, and checks every
// place that reports the cause.
func TestCauses(t *testing.T) {
	target := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
	parent := listen(t, func(conn *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			_, _ = io.WriteString(conn, "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
		}
	})
	for i, row := range causeRows(parent, target) {
		for _, way := range []string{"fast", "ordinary"} {
			t.Run(fmt.Sprintf("%d %s %s", i, row.cause, way), func(t *testing.T) {
				w := newWorld(t, "", nil)
				options := row.options
				if !strings.Contains(options, "zone") {
					options += fmt.Sprintf("\nzone cause-%d-%s", i, way)
				}
				site := w.site(options)
				if way == "ordinary" {
					site = strings.Replace(site, "async_proxy {", "log\nlog_append cause {http.async_proxy.cause}\nasync_proxy {", 1)
				}
				w.load(site)
				row.check(t, w, way)
			})
		}
	}
}

func (row causeRow) check(t *testing.T, w *world, way string) {
	if row.before != nil {
		row.before(w)
	}
	method, target, outcome := row.method, row.target, row.outcome
	if method == "" {
		method = http.MethodGet
	}
	if target == "" {
		target = w.origin.Listener.Addr().String()
	}
	if outcome == "" {
		outcome = "refused"
	}
	before, causes := gatherMetrics(t), program.status.Stats(time.Now()).Causes
	res, body := policyRequest(t, w.proxy, method, target, row.lines)
	if got := ownStatus(t, res.Header)["error"]; res.StatusCode != row.status || got != row.reason {
		t.Errorf("%s, Proxy-Status %q, %q; want %d with %s", res.Status, got, body, row.status, row.reason)
	}
	if phrase := reasonPhrase(strings.TrimSuffix(body, "\n")); method == http.MethodConnect && res.Status != fmt.Sprint(row.status, " ", phrase) {
		t.Errorf("the status line has %q, the content %q", res.Status, body)
	}
	row.checkLog(t, w, method, target)
	kind := map[string]string{http.MethodGet: "forward", http.MethodConnect: "tunnel"}[method]
	want := map[string]float64{
		fmt.Sprintf("requests_total{kind=%q,outcome=%q}", kind, outcome):         1,
		fmt.Sprintf("refusals_total{cause=%q,reason=%q}", row.cause, row.reason): 1,
	}
	if got := since(t, before); !maps.Equal(got, want) {
		t.Errorf("growth %v, want %v", got, want)
	}
	if now := program.status.Stats(time.Now()).Causes; row.cause != "" && now[row.cause] != causes[row.cause]+1 {
		t.Errorf("the stats' causes are %v, and were %v", now, causes)
	}
	if last := lastRefusals(t, ""); row.cause == "auth_required" {
		if len(last) > 0 && last[0].Cause == row.cause {
			t.Errorf("a challenge is among the refusals: %v", last[0])
		}
	} else if g := last[0]; g.Cause != row.cause || g.Reason != row.reason || g.Target != target || g.Status != row.status || g.Count < 1 {
		t.Errorf("the last refusal is %+v", g)
	}
	if way == "ordinary" {
		eventually(t, "the access log with the cause", func() bool {
			return slices.ContainsFunc(w.logLines("handled request"), func(line map[string]any) bool {
				return line["status"] == float64(row.status) && line["cause"] == row.cause
			})
		})
	}
}

// checkLog checks the fields of a refused request's log line.
func (row causeRow) checkLog(t *testing.T, w *world, method, target string) {
	message := "request"
	if row.cause == "rate_limited" {
		message = "rate limited"
	}
	line := w.waitLog(message, 1)[0]
	cause, _ := line["cause"].(string)
	path := "/"
	if method == http.MethodConnect {
		path = ""
	}
	latency, ok := line["latency"].(float64)
	if cause != row.cause || line["reason"] != row.reason || line["method"] != method || line["host"] != target ||
		line["path"] != path || line["status"] != float64(row.status) || !ok || latency < 0 {
		t.Errorf("line %v", line)
	}
}

// TestDeniedTexts checks that the client is told what is not allowed, and the log what
// would allow it.
func TestDeniedTexts(t *testing.T) {
	w := newWorld(t, "deny ads.test 203.0.113.0/24:80-90\nports 80-100", nil)
	for i, row := range []struct{ target, text, hint string }{
		{"ads.test:80", "Denied by proxy: a rule denies ads.test:80.", "put an allow rule before it"},
		{"203.0.113.1:80", "Denied by proxy: a rule denies 203.0.113.1:80.", "put an allow rule before it"},
		{"203.0.113.1:91", "Denied by proxy: no rule allows 203.0.113.1:91 (its address is private or local).", "allow 203.0.113.1"},
		{"ads.test:443", "Denied by proxy: port 443 is closed.", "add 443 to ports"},
		{"127.0.0.1:25", "Denied by proxy: port 25 is closed.", "add 25 to ports"},
	} {
		for n, method := range []string{http.MethodGet, http.MethodConnect} {
			if res, body := policyRequest(t, w.proxy, method, row.target, policyRemote); res.StatusCode != 403 || body != row.text+"\n" {
				t.Errorf("%s %s: %s %q, want %q", method, row.target, res.Status, body, row.text)
			}
			if line := w.waitLog("request", 2*i+n+1)[2*i+n]; line["hint"] != row.hint || line["level"] != "warn" {
				t.Errorf("%s %s: line %v, want the hint %q", method, row.target, line, row.hint)
			}
		}
	}
}

// TestRequestLogLines checks that each response's log line has the request's target and
// outcome, without the query.
func TestRequestLogLines(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(strings.TrimSuffix(strings.TrimSpace(inRoute(w.site(""))), "}\n}") + "error /broken 418\nrespond /here 201\n}\n}\n")
	origin := w.origin.Listener.Addr().String()
	for i, row := range []struct {
		request, host, path string
		status              float64
	}{
		{"GET http://" + origin + "/some?secret=1 HTTP/1.1\nHost: " + origin, origin, "/some", 200},
		{"GET http://127.0.0.1:0/zero?secret=1 HTTP/1.1\nHost: x", "127.0.0.1:0", "/zero", 400},
		{"CONNECT nowhere HTTP/1.1\nHost: nowhere", "nowhere", "", 400},
		{"GET /broken?secret=1 HTTP/1.1\nHost: proxy.test", "proxy.test", "/broken", 418},
		{"GET /here?secret=1 HTTP/1.1\nHost: proxy.test", "proxy.test", "/here", 201},
		{"GET /nothing?secret=1 HTTP/1.1\nHost: proxy.test", "proxy.test", "/nothing", 421},
	} {
		conn := w.dial()
		conn.send(row.request + "\n\n")
		method, _, _ := strings.Cut(row.request, " ")
		if res, _ := conn.response(method); float64(res.StatusCode) != row.status {
			t.Errorf("%q: %s, want %v", row.request, res.Status, row.status)
		}
		line := w.waitLog("request", i+1)[i]
		if latency, ok := line["latency"].(float64); line["method"] != method || line["host"] != row.host || line["path"] != row.path ||
			line["status"] != row.status || !ok || latency < 0 {
			t.Errorf("%q: line %v", row.request, line)
		}
	}
	if lines := fmt.Sprint(w.logLines("request")); strings.Contains(lines, "secret") {
		t.Errorf("the lines contain the query: %s", lines)
	}
}

// TestCausesTable checks that the documentation has the status, the error type and the label
// of each cause, and no other labels.
func TestCausesTable(t *testing.T) {
	responses, err := os.ReadFile("docs/reference.md")
	if err != nil {
		t.Fatal(err)
	}
	logs, err := os.ReadFile("docs/observability.md")
	if err != nil {
		t.Fatal(err)
	}
	_, labels, _ := strings.Cut(string(logs), "| `cause` |")
	labels, _, _ = strings.Cut(labels, "\n\n")
	documented := make(map[cause]bool)
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*`) \\|").FindAllStringSubmatch(labels, -1) {
		for label := range strings.SplitSeq(row[1], ", ") {
			documented[cause(strings.Trim(label, "`"))] = false
		}
	}
	options := regexp.MustCompile(`\b(option|basic_auth|clients|max_tunnels|per_client|ports|allow rule|deny rule|upstream|no_upstream)\b`)
	for c, row := range causes {
		if options.MatchString(row.text) {
			t.Errorf("%s: the text %q is meant for operators", c, row.text)
		}
		if _, ok := documented[row.label]; row.label != "" && !ok {
			t.Errorf("docs/observability.md does not explain the cause %s", row.label)
		}
		documented[row.label] = true
		if line := regexp.MustCompile(fmt.Sprintf(`(?m)^\| ([0-9]+, )*%d(, [0-9]+)* \|.*$`, row.status)).FindString(string(responses)); !strings.Contains(line, "`"+row.errorType+"`") && row.status != statusClientClosedRequest {
			t.Errorf("%s: docs/reference.md does not name %s with status %d: %q", c, row.errorType, row.status, line)
		}
		if row.outcome != "" && !slices.Contains(dialOutcomes, row.outcome) {
			t.Errorf("%s: unknown outcome %q of a dial", c, row.outcome)
		}
	}
	for label, ok := range documented {
		if !ok {
			t.Errorf("docs/observability.md explains the cause %q, which no response has", label)
		}
	}
}

// TestCausesTexts checks that each text is a whole sentence with the arguments that it gets,
// and that the rows of failed attempts to connect are complete.
func TestCausesTexts(t *testing.T) {
	for c, row := range causes {
		switch indexed := strings.Contains(row.text, "%["); {
		case row.text == "" || row.status == 0 || row.errorType == "":
			t.Errorf("%s: the row is incomplete: %+v", c, row)
		case row.outcome != "" && strings.Contains(row.text, "%") && !indexed && !strings.HasPrefix(row.text, "Denied by proxy: "):
			t.Errorf("%s: %q does not name its arguments", c, row.text)
		case indexed:
			text := c.failure(errors.New("something"), "origin.test:443").text
			if strings.Contains(text, "!") || !strings.HasSuffix(text, ".") {
				t.Errorf("%s: %q", c, text)
			}
		}
	}
	for path, dials := range map[string]bool{"internal/egress/dialcause.go": true, "internal/origin/cause.go": false} {
		source, err := os.ReadFile(path)
		constants := regexp.MustCompile(`(?m)^\t\w+ +Cause = "(\w+)"`).FindAllSubmatch(source, -1)
		if err != nil || len(constants) == 0 {
			t.Fatalf("there are no causes: %v", err)
		}
		for _, constant := range constants {
			if row, ok := causes[cause(constant[1])]; !ok || dials && row.outcome == "" {
				t.Errorf("no row, or no outcome, for %s", constant[1])
			}
		}
	}
}
