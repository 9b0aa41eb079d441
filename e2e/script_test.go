// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// script serves the files of the status page with data that a test makes up, so that the test knows
// every text on the page.
type script struct {
	t      *testing.T
	server *httptest.Server

	mu      sync.Mutex
	hello   string
	history string
	last    string                 // event
	streams map[chan string]bool   // of the open pages
	full    bool                   // refuses streams
	answers map[string]string      // by the path of the request
	asked   []string               // paths with queries, and forms of actions
	held    map[string]chan string // answers that the test gives later, by the path with the query
}

func newScript(t *testing.T, actions bool) *script {
	s := &script{t: t, streams: make(map[chan string]bool), answers: make(map[string]string), held: make(map[string]chan string)}
	s.hello = fmt.Sprintf(`{"page":"VERSION","actions":%t,"masked":false}`, actions)
	s.history = `{"start":"2026-01-02T12:00:00Z","step_seconds":5,"requests":{},"bytes_up":[],"bytes_down":[],"tunnels":[],"clients":[],"dial_seconds":[],"first_byte_seconds":[]}`
	s.server = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(func() {
		s.server.CloseClientConnections()
		s.server.Close()
	})
	return s
}

func (s *script) open() *page {
	s.t.Helper()
	return open(s.t, "http://localhost:"+port(s.server.Listener.Addr().String())+"/", 1440, "light")
}

func (s *script) serve(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/")
	switch {
	case name == "events":
		s.stream(w, r)
	case r.Method == http.MethodPost || strings.HasSuffix(name, ".json"):
		s.answer(w, r, name)
	default:
		http.ServeFile(w, r, "../internal/status/page/"+name)
	}
}

func (s *script) stream(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	if s.full {
		s.mu.Unlock()
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	events := make(chan string, 100)
	events <- "event: hello\ndata: " + s.hello + "\n\nevent: history\ndata: " + s.history + "\n\n" + s.last
	s.streams[events] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.streams, events)
		s.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "text/event-stream")
	for {
		select {
		case <-r.Context().Done():
			return
		case event, ok := <-events:
			if !ok {
				return
			}
			_, _ = io.WriteString(w, event)
			w.(http.Flusher).Flush()
		}
	}
}

func (s *script) answer(w http.ResponseWriter, r *http.Request, name string) {
	asked := r.URL.RequestURI()[1:]
	if r.Method == http.MethodPost {
		_ = r.ParseForm()
		asked = name + " " + r.PostForm.Encode()
	}
	s.mu.Lock()
	s.asked = append(s.asked, asked)
	answer, ok := s.answers[name]
	held := s.held[asked]
	s.mu.Unlock()
	if held != nil {
		answer, ok = <-held, true
	}
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		answer = `{"error":"It no longer exists."}`
	}
	_, _ = io.WriteString(w, answer)
}

// requests returns what the page has asked for since the last call.
func (s *script) requests() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := strings.Join(s.asked, " ")
	s.asked = nil
	return asked
}

// moment is when the script begins.
var moment = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

// when returns a time in JSON.
func when(seconds float64) string {
	return `"` + moment.Add(time.Duration(seconds*float64(time.Second))).Format(time.RFC3339Nano) + `"`
}

const noSnapshot = `{
	"stats": {
		"version": "v1.2.3", "caddy": "v2.11.0", "go": "go1.26", "started": "2026-01-02T11:00:00Z", "loaded": "2026-01-02T11:00:00Z",
		"requests": {"forwarded": 0, "tunnels": 0, "passed_on": 0, "rate_limited": 0, "refused": 0, "failed": 0, "auth_required": 0},
		"clients": {"tracked": 0, "limit": 1000, "evicted": 0}, "tunnels": {"open": 0, "limit": 0}, "bytes_up": 0, "bytes_down": 0,
		"dials": {"ok": 0, "failed": 0}, "dial_seconds": {"buckets": [0.01, 0.1, 1], "counts": [0, 0, 0, 0]},
		"first_byte_seconds": {"buckets": [0.01, 0.1, 1], "counts": [0, 0, 0, 0]}, "warnings": []
	},
	"clients": {"clients": [], "total": 0}, "tunnels": {"tunnels": [], "total": 0}, "refusals": {"refusals": [], "total": 0, "causes": []},
	"targets": {"targets": [], "total": 0}, "settings": []
}`

// send sends a snapshot of some seconds after the moment. changes alternates paths in it and values
// in JSON. The total of a list is its length unless it is given.
func (s *script) send(seconds float64, changes ...string) {
	s.t.Helper()
	var snapshot map[string]any
	if err := json.Unmarshal([]byte(noSnapshot), &snapshot); err != nil {
		s.t.Fatal(err)
	}
	changes = append(changes, "stats.time", when(seconds))
	for i := 0; i < len(changes); i += 2 {
		within, names := snapshot, strings.Split(changes[i], ".")
		for _, name := range names[:len(names)-1] {
			within = within[name].(map[string]any)
		}
		var value any
		if err := json.Unmarshal([]byte(changes[i+1]), &value); err != nil {
			s.t.Fatalf("%s: %v", changes[i+1], err)
		}
		last := names[len(names)-1]
		within[last] = value
		if list, ok := value.([]any); ok && within["total"] == 0.0 {
			within["total"] = len(list)
		}
	}
	data, err := json.Marshal(snapshot)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = "event: snapshot\ndata: " + string(data) + "\n\n"
	for events := range s.streams {
		events <- s.last
	}
}

// table returns the texts of the cells that the rows of a table show.
func table(name string) string {
	return fmt.Sprintf(`[...document.querySelectorAll("#%s-table tbody tr")].map((r) => [...r.cells].filter((c) => c.offsetParent).map((c) =>
		c.innerText.replace(/\s+/g, " ").trim()).join("|")).join("\n")`, name)
}

// shows waits until an expression is a text.
func (p *page) shows(what, expression, want string) {
	p.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		got := run[string](p, expression)
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			p.clean()
			p.t.Fatalf("%s:\n%s\nwant\n%s", what, got, want)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestNumbers checks how the page writes numbers.
func TestNumbers(t *testing.T) {
	s := newScript(t, false)
	s.send(0)
	p := s.open()
	for call, want := range map[string]string{
		"short(0)": "0", "short(0.44)": "0.4", "short(7)": "7", "short(9.94)": "9.9", "short(9.96)": "10", "short(12.4)": "12", "short(999)": "999",
		"short(999.6)": "1 k", "short(1234)": "1.2 k", "short(1.5e6)": "1.5 M", "short(2e9)": "2 G",
		"count(1234567.6)": "1,234,568",
		"bytesText(0)":     "0 B", "bytesText(999)": "999 B", "bytesText(1000)": "1.0 kB", "bytesText(12345)": "12 kB", "bytesText(1.5e6)": "1.5 MB", "bytesText(3e15)": "3.0 PB",
		"percent(0)": "0", "percent(0.0123)": "1.2", "percent(0.456)": "46", "percent(NaN)": "0",
		"span(-3)": "0 s", "span(59.9)": "59 s", "span(60)": "1 min", "span(192)": "3 min 12 s", "span(7500)": "2 h 5 min", "span(86400 * 3 + 4 * 3600)": "3 d 4 h",
		"latency(null).join(' ')": "– ", "latency(0.0015).join(' ')": "1.5 ms", "latency(0.25).join(' ')": "250 ms", "latency(1.25).join(' ')": "1.3 s",
		"clock(0).slice(-6)": ":00:00", "clock(13 * 3600).length": "8",
	} {
		if got := run[string](p, "import('./base.js').then((base) => String(base."+call+"))"); got != want {
			t.Errorf("%s: %q, want %q", call, got, want)
		}
	}
	p.clean()
}

// TestColumns checks the text of every cell, and that texts of clients are no HTML.
func TestColumns(t *testing.T) {
	s := newScript(t, true)
	const html = "<img src=x onerror=alert(1)>"
	s.send(100,
		"stats.loaded", when(40), "stats.commit", `"0123456789ab"`,
		"clients.clients", `[
			{"client":"192.0.2.1","zone":"one","tokens":4.97,"burst":5,"requests":1234,"rejections":5,"bytes_up":600,"bytes_down":900,"tunnels":2,"last_seen":`+when(99)+`},
			{"client":"192.0.2.1","zone":"two","policy":"staff","tokens":0.99,"burst":5000,"requests":0,"rejections":0,"bytes_up":0,"bytes_down":0,"tunnels":0,"last_seen":`+when(88)+`},
			{"client":"user `+html+`","zone":"one","tokens":50.9,"burst":100,"requests":0,"rejections":0,"bytes_up":0,"bytes_down":0,"tunnels":0,"blocked_until":`+when(190)+`}]`,
		"tunnels.tunnels", `[
			{"id":7,"client":"192.0.2.1","target":"b.example:443","address":"198.51.100.1:443","proto":"HTTP/1.1","started":`+when(35)+`,"idle_seconds":0.7,"bytes_up":1500,"bytes_down":2500000},
			{"id":8,"client":"192.0.2.2","user":"`+html+`","policy":"staff","target":"a.example:443","address":"198.51.100.2:443","proto":"websocket","started":`+when(90)+`,"idle_seconds":9.8,"bytes_up":0,"bytes_down":0}]`,
		"refusals.refusals", `[
			{"cause":"rule","reason":"http_request_denied","client":"192.0.2.1","user":"alice","policy":"staff","target":"`+html+`:80","rule":"deny a","status":403,"detail":"Denied.","hint":"","allow":"allow a","count":1,"first":`+when(10)+`,"last":`+when(99.5)+`},
			{"cause":"method","reason":"http_request_denied","client":"192.0.2.1","method":"PUT","target":"b:80","status":403,"detail":"The method.","hint":"add PUT to methods","count":1000,"first":`+when(40)+`,"last":`+when(40)+`},
			{"reason":"dns_error","client":"192.0.2.9","target":"c:80","address":"192.0.2.77","status":502,"detail":"No such name.","count":1,"first":`+when(50)+`,"last":`+when(60)+`}]`,
		"refusals.causes", `[{"cause":"method","count":1000,"groups":1,"dropped":0},{"cause":"rule","count":1,"groups":1,"dropped":1200},{"reason":"dns_error","count":1,"groups":1,"dropped":0}]`,
		"targets.targets", `[{"target":"a.example:443","requests":1200,"bytes":1500,"bytes_before":2000},{"target":"b:80","bytes":9000},{"target":"c:80","requests":7,"requests_before":3}]`,
		"targets.total", "30",
		"settings", `[{"site":":8080","settings":[{"option":"burst","value":"`+html+`","default":false},{"option":"refill","value":"1","default":true}],"policies":[{"policy":"staff","settings":[{"option":"burst","value":"9","default":false}]},{"policy":"night","settings":[]}]}]`,
	)
	p := s.open()
	p.shows("the clients", table("clients"), strings.Join([]string{
		"192.0.2.1 one|–|4.9 / 5|0|1,234|5|2|1.5 kB|now|RefillBlock",
		"192.0.2.1 twolimited|staff|0.9 / 5,000|0|0|0|0|0 B|12 s ago|RefillBlock",
		"user " + html + " oneblocked, 1 min 30 s left|–|50 / 100|0|0|0|0|0 B|never|RefillUnblock",
	}, "\n"))
	p.shows("the tunnels", table("tunnels"), strings.Join([]string{
		"a.example:443|" + html + " @ 192.0.2.2|staff|websocket|10 s|9 s|0 B|0 B|Close",
		"b.example:443|192.0.2.1|–|HTTP/1.1|1 min 5 s|–|1.5 kB|2.5 MB|Close",
	}, "\n"))
	p.shows("the refusals", table("refusals"), strings.Join([]string{
		"method1,000 refusals",
		"PUT b:80|192.0.2.1|–|The method.|403|1,000|1 min ago|1 min ago|add PUT to methods",
		"rule1 refusal · 1,200 older groups dropped",
		html + ":80|alice @ 192.0.2.1|staff|deny a|403|1|1 min 30 s ago|now|Copy allow line",
		"dns_error1 failure",
		"c:80|192.0.2.9|–|No such name.|502|1|50 s ago|40 s ago|",
	}, "\n"))
	p.shows("the targets", table("targets"), "a.example:443|1,200|≥ 1.5 kB\nc:80|≥ 7|–\nb:80|–|9.0 kB")
	for what, each := range map[string]struct{ expression, want string }{
		"the total of targets":     {"document.getElementById('targets-count').innerText", "3 of 30"},
		"the version":              {"document.getElementById('about').innerText", "v1.2.3 (0123456789ab) · Caddy v2.11.0 · go1.26 · up 1 h 1 min · config 1 min old"},
		"the settings":             {"document.getElementById('sites').innerText.replace(/\\s+/g, ' ')", ":8080 burst " + html + " refill 1 (default) policy staff burst 9 policy night"},
		"the default":              {"[...document.querySelectorAll('#settings .default')].map((e) => e.firstChild.innerText).join()", "refill"},
		"the policies":             {"[...document.querySelectorAll('#policy option')].map((o) => o.innerText).join()", "All policies,Without a policy,night,staff"},
		"the status of a failure":  {"document.querySelectorAll('#refusals .s5').length + ' of ' + document.querySelectorAll('#refusals .status').length", "1 of 3"},
		"what a row is about":      {"[...document.querySelectorAll('#refusals-table tbody tr:not(.group) th')].map((e) => e.title).join()", "PUT b:80: The method.," + html + ":80: Denied.,c:80 (192.0.2.77): No such name."},
		"the time of a refusal":    {"[...document.querySelectorAll('#refusals-table td.num.soft')].at(-1).title", moment.Add(60 * time.Second).Local().Format("2006-01-02 15:04:05")},
		"what may be missing":      {"[...document.querySelectorAll('#targets-table td')].map((e) => e.title).join()", ",and at most 2.0 kB before it was listed,and at most 3 before it was listed,,,"},
		"the address of a tunnel":  {"document.querySelector('#tunnels-table tbody th').title", "a.example:443 (198.51.100.2:443)"},
		"the order of the clients": {"[...document.querySelectorAll('#clients-table thead th')].find((h) => h.ariaSort).innerText", "Last seen"},
	} {
		p.shows(what, each.expression, each.want)
	}
	if n := run[int](p, "document.querySelectorAll('img').length"); n > 0 {
		t.Errorf("%d texts are HTML", n)
	}
	p.accessible()
	p.clean()
}
