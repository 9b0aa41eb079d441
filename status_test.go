// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// statusWorld is a world with a status page on its own address.
type statusWorld struct {
	*world
	page string // URL
}

func newStatusWorld(t *testing.T, proxyOptions, statusOptions string) *statusWorld {
	w := &statusWorld{world: newWorld(t, proxyOptions, nil), page: "http://" + freeAddress(t)}
	w.load(w.site(proxyOptions) + w.statusSite(statusOptions))
	return w
}

func (w *statusWorld) statusSite(options string) string {
	return fmt.Sprintf(`%s {
	async_proxy_status {
		%s
	}
}
`, w.page, options)
}

// ask sends a request to the page. fields alternates names and values.
func (w *statusWorld) ask(method, path, body string, fields ...string) (*http.Response, string) {
	w.t.Helper()
	req, err := http.NewRequest(method, w.page+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for i := 0; i < len(fields); i += 2 {
		req.Header.Set(fields[i], fields[i+1])
	}
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       patience,
	}
	res, err := client.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return res, string(text)
}

// eventStream reads the page's events.
type eventStream struct {
	t    *testing.T
	body io.ReadCloser
	r    *bufio.Reader
}

func (w *statusWorld) stream() *eventStream {
	w.t.Helper()
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Get(w.page + "/events")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { res.Body.Close() })
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "text/event-stream" {
		w.t.Fatalf("the stream's response: %s, %q", res.Status, res.Header.Get("Content-Type"))
	}
	return &eventStream{w.t.(*testing.T), res.Body, bufio.NewReader(res.Body)}
}

// next reads one event, up to its empty line.
func (s *eventStream) next() (event, data string) {
	s.t.Helper()
	for {
		line, err := s.r.ReadString('\n')
		if err != nil {
			s.t.Fatalf("the stream ends: %v", err)
		}
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		switch name {
		case "event":
			event = value
		case "data":
			data = value
		case "retry":
		case "":
			return event, data
		default:
			s.t.Fatalf("the stream has the line %q", line)
		}
	}
}

// afterHistory reads up to the first event that is not part of the history, which has more of them if
// a step ends meanwhile.
func (s *eventStream) afterHistory() (event, data string) {
	s.t.Helper()
	for event = "history"; event == "history"; {
		event, data = s.next()
	}
	return event, data
}

// ends waits for the end of the stream.
func (s *eventStream) ends() {
	s.t.Helper()
	done := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, s.r)
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			s.t.Errorf("the stream ends with %v, want an orderly end", err)
		}
	case <-time.After(patience):
		s.t.Fatal("the stream does not end")
	}
}

func TestStatusCaddyfile(t *testing.T) {
	for input, want := range map[string]string{
		"async_proxy_status": `{"handler":"async_proxy_status"}`,
		`async_proxy_status {
}`: `{"handler":"async_proxy_status"}`,
		`async_proxy_status {
	actions
}`: `{"actions":true,"handler":"async_proxy_status"}`,
		`async_proxy_status {
	mask_clients
}`: `{"handler":"async_proxy_status","mask_clients":true}`,
		"async_proxy_status /status* {\nactions}": "",
	} {
		if want == "" {
			continue
		}
		got, err := json.Marshal(handlers(t, `:8080 {
	`+input+`
}
`)[0])
		if err != nil || string(got) != want {
			t.Errorf("%s is %s, want %s", input, got, want)
		}
	}
	exclude := "mask_clients: cannot be combined with actions, which need the clients' addresses, at Caddyfile:5"
	for input, want := range map[string]string{
		"async_proxy_status here": "unexpected argument 'here'; expected a block of options, or nothing, at Caddyfile:2",
		`async_proxy_status {
	acts
}`: "unrecognized option 'acts'; expected actions or mask_clients, at Caddyfile:3",
		`async_proxy_status {
	actions on
}`: "actions: unexpected value 'on'; expected no value, at Caddyfile:3",
		`async_proxy_status {
	mask_clients
	mask_clients
}`: "mask_clients: the option is set twice; expected it once, at Caddyfile:4",
		`async_proxy_status {
	actions {
		close
	}
}`: "actions: unexpected block; expected no value, at Caddyfile:3",
		`async_proxy_status {
	actions
	mask_clients
}`: exclude,
		`async_proxy_status {
	mask_clients
	actions
}`: exclude,
	} {
		_, _, err := adapt(`:8080 {
	`+input+`
}
`, "Caddyfile")
		if want := "parsing caddyfile tokens for 'async_proxy_status': " + want; err == nil || err.Error() != want {
			t.Errorf("%s\ngives %v\nwant  %v", input, err, want)
		}
	}
	if err := validate(t, `{"handler": "async_proxy_status", "actions": true, "mask_clients": true}`); err == nil || !strings.Contains(err.Error(), "mask_clients: cannot be combined with actions") {
		t.Errorf("the options exclude each other in JSON, too: %v", err)
	}
}

// The directive needs no order option: authentication for the site comes before it, and so
// does the proxy.
func TestStatusOrder(t *testing.T) {
	var names []string
	for _, handler := range handlers(t, `:8080 {
		reverse_proxy 127.0.0.1:1
		async_proxy_status /status*
		basic_auth {
			bob $2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi
		}
		async_proxy
	}`) {
		names = append(names, handler["handler"].(string))
	}
	if want := []string{"authentication", "async_proxy", "async_proxy_status", "reverse_proxy"}; !slices.Equal(names, want) {
		t.Errorf("the order of handlers is %v, want %v", names, want)
	}
}

// statusSyntax returns the options that a description of the syntax names.
func statusSyntax(t *testing.T, text string) []string {
	t.Helper()
	_, rest, found := strings.Cut(text, "async_proxy_status [<matcher>] {\n")
	block, _, found2 := strings.Cut(rest, "}")
	if !found || !found2 {
		t.Fatal("found no syntax")
	}
	return strings.Fields(block)
}

func TestStatusSyntaxNamesEveryOption(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "status.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var doc string
	ast.Inspect(file, func(n ast.Node) bool {
		if f, ok := n.(*ast.FuncDecl); ok && f.Name.Name == "UnmarshalCaddyfile" {
			doc = f.Doc.Text()
		}
		return true
	})
	page, err := os.ReadFile("docs/observability.md")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"the comment": doc, "docs/observability.md": string(page)} {
		if got := statusSyntax(t, text); !slices.Equal(got, []string{"actions", "mask_clients"}) {
			t.Errorf("%s names the options %v", name, got)
		}
	}
}

// The page's links are relative: it must not be served under a path without a trailing
// slash.
func TestStatusPageUnderAPath(t *testing.T) {
	w := newStatusWorld(t, "", "")
	_, want := w.ask("GET", "/", "")
	for _, site := range []string{
		"async_proxy_status /a/status*",
		`handle_path /a/status* {
	async_proxy_status
}`,
		`handle /a/status* {
	async_proxy_status
}`,
	} {
		w.load(w.page + ` {
	` + site + `
}
`)
		res, _ := w.ask("GET", "/a/status", "")
		location, err := res.Location()
		if err != nil || location.String() != w.page+"/a/status/" {
			t.Errorf("%s: redirected to %v, %v", site, location, err)
		}
		if res, text := w.ask("GET", "/a/status/", ""); res.StatusCode != http.StatusOK || text != want {
			t.Errorf("%s: %s, %d bytes", site, res.Status, len(text))
		}
		for _, part := range []string{"app.js", "snapshot.json"} {
			if res, _ := w.ask("GET", "/a/status/"+part, ""); res.StatusCode != http.StatusOK {
				t.Errorf("%s: %s: %s", site, part, res.Status)
			}
		}
	}
	w.load(w.page + ` {
	async_proxy_status
}
`)
	for path, want := range map[string]string{"//evil": "evil/", "/http:evil": "./http:evil/", "/a/%2Fevil": "evil/"} {
		if res, _ := w.ask("GET", path, ""); res.Header.Get("Location") != want {
			t.Errorf("%s: redirected to %q, want %q", path, res.Header.Get("Location"), want)
		}
	}
}

func TestStatusJSON(t *testing.T) {
	w := newStatusWorld(t, "allow 127.0.0.0/8\nburst 5\nrefill 0.001", "")
	w.dial().connect(echoTarget(t))
	members := func(text string) (list []string, m map[string]json.RawMessage) {
		if err := json.Unmarshal([]byte(text), &m); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		return slices.Sorted(maps.Keys(m)), m
	}
	check := func(what, text string, want ...string) map[string]json.RawMessage {
		t.Helper()
		got, m := members(text)
		for _, name := range want {
			if !slices.Contains(got, name) {
				t.Errorf("%s has the members %v, and not %s", what, got, name)
			}
		}
		return m
	}
	eventually(t, "the tunnel", func() bool {
		_, text := w.ask("GET", "/tunnels.json", "")
		return strings.Contains(text, `"total":1`)
	})
	res, text := w.ask("GET", "/snapshot.json", "")
	if res.Header.Get("Content-Type") != "application/json" || res.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("Content-Type %q, Cache-Control %q", res.Header.Get("Content-Type"), res.Header.Get("Cache-Control"))
	}
	snap := check("a snapshot", text, "stats", "clients", "tunnels", "refusals", "settings")
	stats := check("stats", string(snap["stats"]), "version", "caddy", "go", "started", "loaded", "time", "requests", "clients", "tunnels", "bytes_up", "bytes_down", "dials", "dial_seconds", "first_byte_seconds")
	check("requests", string(stats["requests"]), "forwarded", "tunnels", "passed_on", "rate_limited", "refused", "failed", "auth_required")
	check("tunnels", string(stats["tunnels"]), "open", "limit")
	for _, name := range []string{"dial_seconds", "first_byte_seconds"} {
		var h struct {
			Buckets []float64
			Counts  []int64
		}
		if err := json.Unmarshal(stats[name], &h); err != nil || len(h.Counts) != len(h.Buckets)+1 {
			t.Errorf("%s: %d buckets, %d counts, %v", name, len(h.Buckets), len(h.Counts), err)
		}
	}
	for _, part := range []string{"clients", "tunnels"} {
		list := check(part, string(snap[part]), part, "total")
		var entries []json.RawMessage
		if err := json.Unmarshal(list[part], &entries); err != nil || len(entries) != 1 || string(list["total"]) != "1" {
			t.Fatalf("%s: %s", part, snap[part])
		}
		if part == "clients" {
			check("a client", string(entries[0]), "client", "zone", "tokens", "burst", "refill", "requests", "rejections", "bytes_up", "bytes_down", "tunnels", "last_seen")
		} else {
			check("a tunnel", string(entries[0]), "id", "client", "target", "address", "proto", "started", "idle_seconds", "bytes_up", "bytes_down")
		}
		_, text := w.ask("GET", "/"+part+".json?limit=10", "")
		check(part+".json", text, part, "total")
	}
	check("refusals", string(snap["refusals"]), "refusals", "total", "causes")
	if snap["settings"][0] != '[' {
		t.Errorf("settings: %s, want a list", snap["settings"])
	}
	if res, text := w.ask("GET", "/clients.json?sort=beauty", ""); res.StatusCode != http.StatusBadRequest || !strings.Contains(text, "beauty") {
		t.Errorf("a wrong sort: %s, %s", res.Status, text)
	}
}

func TestStatusStream(t *testing.T) {
	w := newStatusWorld(t, "", "actions")
	one, two := w.stream(), w.stream()
	for _, s := range []*eventStream{one, two} {
		event, data := s.next()
		if want := regexp.MustCompile(`^\{"page":"[0-9a-f]{16}","actions":true,"masked":false\}$`); event != "hello" || !want.MatchString(data) {
			t.Errorf("first comes %s: %s, want hello: %s", event, data, want)
		}
		event, data = s.next()
		var history status.History
		if err := json.Unmarshal([]byte(data), &history); event != "history" || err != nil || history.StepSeconds != 5 {
			t.Errorf("next comes %s, %v: %.100s", event, err, data)
		}
		for event == "history" { // a step may end before the first snapshot
			event, data = s.next()
		}
		var snap map[string]json.RawMessage
		if err := json.Unmarshal([]byte(data), &snap); event != "snapshot" || err != nil || snap["stats"] == nil {
			t.Errorf("then comes %s, %v: %.100s", event, err, data)
		}
	}
}

// An open page must not keep a config or Caddy from stopping.
func TestStatusStreamEnds(t *testing.T) {
	w := newStatusWorld(t, "", "")
	s := w.stream()
	s.next()
	w.load(w.site("") + w.statusSite("actions"))
	s.ends()
	s = w.stream()
	if _, hello := s.next(); !strings.Contains(hello, `"actions":true`) {
		t.Errorf("after the reload the page got %s", hello)
	}
	stopped := make(chan error, 1)
	go func() { stopped <- caddy.Stop() }()
	s.ends()
	select {
	case err := <-stopped:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("Caddy does not stop")
	}
}

func TestStatusActions(t *testing.T) {
	w := newStatusWorld(t, "allow 127.0.0.0/8\nburst 3\nrefill 0.001", "actions")
	target := echoTarget(t)
	conn := w.dial()
	conn.connect(target)
	var list struct {
		Tunnels []struct {
			ID     uint64 `json:"id"`
			Target string `json:"target"`
		} `json:"tunnels"`
	}
	eventually(t, "the tunnel", func() bool {
		_, text := w.ask("GET", "/tunnels.json?q="+url.QueryEscape(target), "")
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			t.Fatal(err)
		}
		return len(list.Tunnels) == 1
	})
	id := fmt.Sprint(list.Tunnels[0].ID)
	for _, tc := range []struct {
		path, body string
		fields     []string
		status     int
		want       string
	}{
		{"/close", "tunnel=" + id, []string{"Sec-Fetch-Site", "cross-site"}, 403, "another origin"},
		{"/close", "tunnel=" + id, []string{"Sec-Fetch-Site", "same-site"}, 403, "another origin"},
		{"/close", "tunnel=" + id, []string{"Origin", "http://evil.example"}, 403, "another origin"},
		{"/close", "tunnel=" + id, []string{"Origin", "null"}, 403, "another origin"},
		{"/close", "tunnel=x", nil, 400, "tunnel: expected"},
		{"/close", "", nil, 400, "tunnel: expected"},
		{"/close", "tunnel=999999", nil, 404, "no longer exists"},
		{"/open", "tunnel=" + id, nil, 404, "no such action"},
		{"/refill", "client=everybody", nil, 400, "client: expected"},
		{"/refill", "client=192.0.2.200", nil, 404, "no longer exists"},
		{"/block", "client=127.0.0.1", nil, 400, "for: expected"},
		{"/block", "client=127.0.0.1&for=-1m", nil, 400, "for: expected"},
		{"/block", "client=127.0.0.1&for=1000d", nil, 400, "for: expected"},
		{"/close", "tunnel=" + id, []string{"Sec-Fetch-Site", "same-origin"}, 200, `{"done":true}`},
		{"/close", "tunnel=" + id, nil, 404, "no longer exists"},
	} {
		if res, text := w.ask("POST", tc.path, tc.body, tc.fields...); res.StatusCode != tc.status || !strings.Contains(text, tc.want) || res.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s %s %v: %s %s", tc.path, tc.body, tc.fields, res.Status, text)
		}
	}
	conn.expectReset() // the tunnel's connection

	client := w.client()
	get := func() int {
		res, err := client.Get(w.origin.URL)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		return res.StatusCode
	}
	eventually(t, "the client to be limited", func() bool { return get() == http.StatusTooManyRequests })
	if res, text := w.ask("POST", "/refill", "client=127.0.0.1", "Origin", w.page); res.StatusCode != http.StatusOK {
		t.Errorf("refill: %s %s", res.Status, text)
	}
	for range 3 {
		if status := get(); status != http.StatusOK {
			t.Errorf("with a full bucket the client got %d", status)
		}
	}
	lines := w.waitLog("operator's action", 4)
	if last := lines[len(lines)-1]; last["action"] != "refill" || last["client"] != "127.0.0.1" || last["by"] != "127.0.0.1" || last["done"] != true {
		t.Errorf("the log has %v", last)
	}
}

func TestStatusActionsAreOff(t *testing.T) {
	for _, options := range []string{"", "mask_clients"} {
		w := newStatusWorld(t, "", options)
		for _, action := range []string{"/close", "/refill", "/block"} {
			if res, text := w.ask("POST", action, "tunnel=1&client=127.0.0.1&for=1m", "Sec-Fetch-Site", "same-origin"); res.StatusCode != http.StatusForbidden || !strings.Contains(text, "option actions") {
				t.Errorf("%s: %s %s", action, res.Status, text)
			}
		}
	}
}

// A page that masks clients shows no full address anywhere.
func TestStatusMasksClients(t *testing.T) {
	w := newStatusWorld(t, "allow 127.0.0.0/8", "mask_clients")
	w.dial().connect(echoTarget(t))
	other := freeAddress(t)
	w.load(w.site("allow 127.0.0.0/8") + siteAt(other, "clients 192.0.2.0/24") + w.statusSite("mask_clients"))
	policyRequest(t, other, http.MethodGet, "192.0.2.1", "")
	stream := w.stream()
	_, hello := stream.next()
	_, event := stream.afterHistory() // which has no clients
	_, snap := w.ask("GET", "/snapshot.json", "")
	_, clients := w.ask("GET", "/clients.json", "")
	_, tunnels := w.ask("GET", "/tunnels.json", "")
	if !strings.Contains(hello, `"masked":true`) {
		t.Errorf("hello: %s", hello)
	}
	for name, text := range map[string]string{"event": event, "snapshot.json": snap, "clients.json": clients, "tunnels.json": tunnels} {
		if strings.Contains(text, `"client":"127.0.0.1"`) || strings.Contains(text, "127.0.0.1, may not") || !strings.Contains(text, `"client":"127.0.0.0/24"`) {
			t.Errorf("%s: %s", name, text)
		}
	}
	if want := "your address, 127.0.0.0/24, may not use it"; !strings.Contains(event, want) || !strings.Contains(snap, want) {
		t.Errorf("no refusal contains %q: %s", want, snap)
	}
	for _, path := range []string{"/clients.json?q=127.0.0.1", "/tunnels.json?q=127.0.0.1"} {
		if res, _ := w.ask("GET", path, ""); res.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %s", path, res.Status)
		}
	}
}

// A site that accepts any Host also accepts that of a hostile page.
func TestWarnsAboutActionsWithoutHost(t *testing.T) {
	w := newStatusWorld(t, "", "")
	_, port, _ := strings.Cut(strings.TrimPrefix(w.page, "http://"), ":")
	const status = `async_proxy_status {
	actions
}`
	for name, tc := range map[string]struct {
		site string // PORT stands for the port
		want int    // warnings
	}{
		"no host": {`http://:PORT {
	` + status + `
}`, 1},
		"no host, in a route": {`http://:PORT {
	route /status* {
		` + status + `
	}
}`, 1},
		"no host, for a network": {`http://:PORT {
	@office remote_ip 127.0.0.0/8
	route @office {
		` + status + `
	}
}`, 1},
		"no host, no actions": {`http://:PORT {
	async_proxy_status
}`, 0},
		"a host": {`http://localhost:PORT {
	` + status + `
}`, 0},
		"an address": {`http://127.0.0.1:PORT {
	` + status + `
}`, 0},
		"a host and all others": {`http://localhost:PORT, http://:PORT {
	` + status + `
}`, 1},
		"a matcher of hosts": {`http://:PORT {
	@own host localhost
	route @own {
		` + status + `
	}
}`, 0},
		"no host, with passwords": {`http://:PORT {
	basic_auth {
		bob $2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi
	}
	` + status + `
}`, 0},
	} {
		t.Run(name, func(t *testing.T) {
			w.forgetLogs()
			w.load(w.site("") + strings.ReplaceAll(tc.site, "PORT", port) + "\n")
			w.waitLog("async-proxy listening", 1)
			data, err := os.ReadFile(w.logs)
			if err != nil {
				t.Fatal(err)
			}
			lines := regexp.MustCompile(`(?m)^.*DNS rebinding.*$`).FindAllString(string(data), -1)
			if len(lines) != tc.want || tc.want > 0 && (!strings.Contains(lines[0], `"level":"warn"`) || !strings.Contains(lines[0], `"logger":"http.handlers.async_proxy_status"`)) {
				t.Errorf("%d warnings, want %d: %v", len(lines), tc.want, lines)
			}
		})
	}
}

// TestStatusThroughProxy checks that no client of the proxy can see or use the status page,
// whatever is allowed: the proxy does not connect to its server, and the page refuses
// requests that came through the proxy. Another site stays reachable.
func TestStatusThroughProxy(t *testing.T) {
	w := newStatusWorld(t, "allow private\nvia tester", "actions")
	page, other := strings.TrimPrefix(w.page, "http://"), freeAddress(t)
	w.load(w.site("allow private\nvia tester") + w.statusSite("actions") + "http://" + other + ` {
	respond "another site"
}
`)
	for _, lines := range []string{"", policyRemote} {
		accessDenied(t, w.proxy, http.MethodConnect, page, lines)
		accessDenied(t, w.proxy, http.MethodGet, page, lines)
		policyOpen(t, w.proxy, http.MethodGet, other, lines, "another site")
	}
	if res, _ := w.ask(http.MethodGet, "/snapshot.json", ""); res.StatusCode != http.StatusOK {
		t.Errorf("directly: %s", res.Status)
	}
	for path, method := range map[string]string{"/snapshot.json": http.MethodGet, "/events": http.MethodGet, "/": http.MethodGet, "/refill": http.MethodPost} {
		body := ""
		if method == http.MethodPost {
			body = "client=127.0.0.1"
		}
		if res, text := w.ask(method, path, body, "Via", "1.1 other, 1.1 tester"); res.StatusCode != http.StatusForbidden || !strings.Contains(text, "through the proxy") {
			t.Errorf("%s %s through the proxy: %s %.100s", method, path, res.Status, text)
		}
	}
	if res, _ := w.ask(http.MethodGet, "/snapshot.json", "", "Via", "1.1 other"); res.StatusCode != http.StatusOK {
		t.Errorf("through another proxy: %s", res.Status)
	}
}

// TestStatusBesideProxy checks that a page on the proxy's own port works, although
// async_proxy adds itself to Via before it passes the request on.
func TestStatusBesideProxy(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(strings.Replace(w.site("via tester"), "\n}\n", "\n\tasync_proxy_status\n}\n", 1))
	conn := w.dial()
	conn.send("GET /snapshot.json HTTP/1.1\nHost: x\n\n")
	if res, _ := conn.response(http.MethodGet); res.StatusCode != http.StatusOK {
		t.Errorf("the page's response: %s", res.Status)
	}
}

// TestStatusPagesAfterReload checks that the proxy's line at a start names the pages of its own config
// only. The old config still runs when the line is written.
func TestStatusPagesAfterReload(t *testing.T) {
	w := newStatusWorld(t, "", "")
	w.load(w.site("") + w.statusSite("actions"))
	w.load(w.site(""))
	var got []string
	for _, line := range w.waitLog("async-proxy listening", 4)[1:] {
		got = append(got, fmt.Sprint(line["status_pages"]))
	}
	if page := "[" + w.page + "/]"; !slices.Equal(got, []string{page, page, "[]"}) {
		t.Errorf("status pages %q, want %s twice, and then none", got, page)
	}
}
