// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
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
	loads   int                    // of the page
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
	p := open(s.t, "http://localhost:"+port(s.server.Listener.Addr().String())+"/", 1440, "light")
	run[bool](p, "!!(window.clock = performance.now(), performance.now = () => window.clock)") // else the page would miss snapshots
	return p
}

func (s *script) serve(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/")
	switch {
	case name == "events":
		s.stream(w, r)
	case r.Method == http.MethodPost || strings.HasSuffix(name, ".json"):
		s.answer(w, r, name)
	default:
		if name == "" {
			s.mu.Lock()
			s.loads++
			s.mu.Unlock()
		}
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
	const targets = "[...document.querySelectorAll('#tunnels-table tbody th')].map((e) => e.innerText.trim()).join()"
	p.choose("Show only this policy", "default")
	p.shows("the tunnel without a policy", targets, "b.example:443")
	p.choose("Show only this policy", "")
	p.fill("Filter tunnels by client or target", "A.ex")
	p.shows("the tunnel that matches", targets, "a.example:443")
	p.clean()
}

// client returns a client of the snapshot in JSON.
func client(name string, requests int, more string) string {
	return fmt.Sprintf(`{"client":%q,"zone":"one","tokens":5,"burst":5,"requests":%d,"rejections":0,"bytes_up":0,"bytes_down":0,"tunnels":0,"last_seen":%s%s}`, name, requests, when(0), more)
}

// point moves the pointer to the middle of an element.
func (p *page) point(selector string) {
	p.t.Helper()
	at := run[[]float64](p, fmt.Sprintf(`(() => { const e = document.querySelector(%q); e.scrollIntoView({ block: "center" }); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()`, selector))
	p.do(chromedp.MouseEvent("mouseMoved", at[0], at[1]))
}

// TestRowsKeepTheirPlaces checks that nothing moves under the pointer, and how rows are sorted.
func TestRowsKeepTheirPlaces(t *testing.T) {
	s := newScript(t, false)
	clients := func(at float64, list ...string) { s.send(at, "clients.clients", "["+strings.Join(list, ",")+"]") }
	const names = "[...document.querySelectorAll('#clients-table tbody th')].map((e) => e.innerText.replace(/.*[.]/, '')).join()"
	const sorted = "[...document.querySelectorAll('#clients-table thead th[aria-sort]')].map((e) => e.innerText + ' ' + e.ariaSort).join()"
	clients(0, client("192.0.2.10", 5, ""), client("192.0.2.9", 5, ""), client("192.0.2.9", 4, ""))
	p := s.open()
	if run[bool](p, "[...document.querySelectorAll('#clients-table .do')].some((cell) => cell.offsetParent)") {
		t.Error("there are buttons for actions, which are off")
	}
	p.press("Requests")
	p.shows("equal counts, by the first column, and a name that occurs twice", names, "9,10,9")
	p.shows("the order", sorted, "Requests descending")
	p.point("#clients-table tbody tr")
	clients(1, client("192.0.2.10", 5, ""), client("192.0.2.9", 6, ""), client("192.0.2.7", 7, ""), client("192.0.2.9", 8, ""))
	p.shows("a new row, at the end", names, "9,10,9,7")
	p.press("Requests")
	p.shows("another order, although the pointer is there", names, "10,9,7,9")
	p.shows("the other order", sorted, "Requests ascending")
	clients(2, client("192.0.2.7", 1, ""), client("192.0.2.10", 5, ""))
	p.shows("fewer rows", names, "10,7")
	p.fill("Filter clients by address", "192")
	p.shows("the order, as the filter has changed", names, "7,10")
	clients(3, client("192.0.2.7", 9, ""), client("192.0.2.10", 5, ""))
	p.shows("the count", "document.querySelector('#clients-table tbody tr').cells[4].innerText", "9")
	p.shows("the old order", names, "7,10")
	p.point("h1")
	clients(4, client("192.0.2.7", 9, ""), client("192.0.2.10", 5, ""))
	p.shows("the order, as the pointer has left", names, "10,7")

	refusal := func(cause string) string {
		return fmt.Sprintf(`{"cause":%q,"reason":"x","client":"192.0.2.1","target":"a:80","status":403,"detail":"","count":1,"first":%s,"last":%[2]s}`, cause, when(0))
	}
	const causes = "[...document.querySelectorAll('#refusals-table tbody tr.group span:first-child')].map((e) => e.innerText).join()"
	s.send(5, "refusals.refusals", "["+refusal("rule")+"]")
	p.shows("a group", causes, "rule")
	p.point("#refusals-table tbody tr:not(.group)")
	s.send(6, "refusals.refusals", "["+refusal("port")+","+refusal("rule")+"]", "targets.total", "6")
	p.shows("the snapshot", "document.getElementById('targets-count').innerText", "0 of 6")
	p.shows("no other group under the pointer", causes, "rule")
	p.point("h1")
	s.send(7, "refusals.refusals", "["+refusal("port")+","+refusal("rule")+"]")
	p.shows("both groups", causes, "port,rule")
	s.send(8, "refusals.refusals", "["+refusal("port")+"]")
	p.shows("one group", causes, "port")
	p.clean()
}

// top returns an expression for the first row of the first chart that has the color of a series.
func top(series string) string {
	return strings.Replace(strings.Replace(colored(series), ") n++", ") return Math.floor(i / 4 / canvas.width)", 1), "return n", "return Infinity", 1)
}

// TestRates checks what the page computes from counters: across a gap, and after a restart.
func TestRates(t *testing.T) {
	s := newScript(t, false)
	s.send(0, "clients.clients", "["+client("192.0.2.1", 3, "")+"]")
	p := s.open()
	const tiles = "[...document.querySelectorAll('#tiles > div')].map((e) => (e.className + ' ' + e.innerText).replace(/\\s+/g, ' ').replace('tile ', '').trim()).join('\\n')"
	const legends = "[...document.querySelectorAll('.chart .legend')].map((e) => e.innerText.replace(/\\s+/g, ' ').trim()).join('\\n')"
	p.shows("nothing yet", tiles, "Requests 0/s 0 since start\nRate limited 0% 0 in the last minute\nOpen tunnels 0 no limit\nThroughput 0B/s down 0 B/s up\nConnecting – none in the last minute\nClients tracked 0 of 1 k")
	now := []string{
		"stats.requests.forwarded", "30", "stats.requests.rate_limited", "30", "stats.requests.refused", "20", "stats.bytes_up", "2000", "stats.bytes_down", "10000",
		"stats.tunnels", `{"open":9,"limit":10}`, "stats.dials.failed", "3", "stats.clients", `{"tracked":950,"limit":1000,"evicted":1500}`,
		"stats.dial_seconds.counts", "[1,98,1,0]", "stats.first_byte_seconds.counts", "[0,0,0,4]", "clients.clients", "[" + client("192.0.2.1", 17, "") + "]",
		"stats.warnings", `[{"code":"tunnels_near_limit","text":"Tunnels."}]`,
	}
	s.send(2, now...)
	p.shows("two seconds later", tiles, "Requests 40/s 80 since start\nbad Rate limited 38% 30 in the last minute\nbad Open tunnels 9 of 10 · 90 %\n"+
		"Throughput 5.0kB/s down 1.0 kB/s up\nConnecting 55ms p99 100 ms · 3 failed\nbad Clients tracked 950 of 1 k · 1.5 k forgotten early")
	p.shows("the legends", legends, "Forwarded 15 Tunnels 0 Passed on 0 Rate limited 15 Refused 10 Asked to log in 0 Failed 0\nDown 5.0 kB/s Up 1.0 kB/s\nOpen 9\nConnecting p50 55 ms · p99 100 ms First byte p50 1 s · p99 1 s")
	p.shows("the requests of a client per second", "document.querySelector('#clients-table tbody tr').cells[3].innerText", "7")
	p.shows("the title", "document.title", "40/s · async_proxy")
	s.send(3, append(now, "stats.requests", `{"forwarded":45,"tunnels":0,"passed_on":0,"rate_limited":45,"refused":30,"failed":0,"auth_required":0}`)...)
	p.until("the refused requests, on top of those that were forwarded", top("refused")+" < "+top("forwarded"), patience)
	const lines = "document.querySelectorAll('#tiles .spark-line')[2].getAttribute('d').split('M').length - 1 + ''"
	p.shows("one line", lines, "1")
	s.send(12, now...)
	p.shows("a gap", lines, "2")
	p.shows("no rate across the gap", tiles+".split('\\n')[0]", "Requests 0/s 80 since start")
	s.send(13, "stats.started", when(12), "stats.requests.forwarded", "500", "stats.clients.evicted", "1", "stats.warnings", `[{"code":"clients_forgotten","text":"Clients."}]`)
	p.shows("no rate after a restart", tiles+".split('\\n')[0]", "Requests 0/s 500 since start")
	p.shows("no latencies of another process", tiles+".split('\\n')[4]", "Connecting – none in the last minute")
	p.shows("forgotten clients", tiles+".split('\\n')[5]", "warn Clients tracked 0 of 1 k · 1 forgotten early")
	s.send(14, "stats.started", when(12), "stats.requests.forwarded", "699", "stats.requests.rate_limited", "1")
	p.shows("few limited requests", tiles+".split('\\n')[1]", "warn Rate limited 14% 46 in the last minute")
	p.clean()
}

// TestAsksTheServer checks what the page asks for if a snapshot has not all rows.
func TestAsksTheServer(t *testing.T) {
	s := newScript(t, false)
	s.answers["clients.json"] = `{"clients":[` + client("192.0.2.77", 1, "") + `],"total":1}`
	s.answers["tunnels.json"] = `{"tunnels":[],"total":1}`
	s.answers["refusals.json"] = `{"refusals":[],"total":1,"causes":[]}`
	many := func(at float64) {
		s.send(at, "clients.clients", "["+client("192.0.2.1", 3, `,"policy":"staff"`)+"]", "clients.total", "500", "tunnels.total", "500", "refusals.total", "500")
	}
	many(0)
	p := s.open()
	p.shows("the number of clients", "document.getElementById('clients-count').innerText", "1 of 500")
	ask := func(want string) {
		t.Helper()
		deadline := time.Now().Add(patience)
		wanted := strings.Fields(want)
		var got []string
		for len(got) < len(wanted) && time.Now().Before(deadline) {
			time.Sleep(20 * time.Millisecond)
			got = append(got, strings.Fields(s.requests())...)
		}
		slices.Sort(got) // the browser asks several questions at once, which arrive in any order
		slices.Sort(wanted)
		if !slices.Equal(got, wanted) {
			t.Errorf("the page asks for %s, want %s", got, wanted)
		}
	}
	head := func(table, label string) {
		t.Helper()
		run[bool](p, fmt.Sprintf("[...document.querySelectorAll('#%s-table thead button')].find((b) => b.innerText === %q).click() ?? true", table, label))
	}
	head("clients", "Last seen")
	ask("clients.json?limit=100&sort=last_seen&order=asc")
	p.shows("the answer", "document.querySelector('#clients-table tbody th').innerText", "192.0.2.77")
	head("clients", "Bucket")
	ask("clients.json?limit=100&sort=tokens&order=asc")
	run[bool](p, "document.getElementById('clients-limited').click() ?? true")
	ask("clients.json?limit=100&sort=tokens&order=asc&limited=")
	head("clients", "Client")
	ask("clients.json?limit=100&limited=")
	run[bool](p, "document.getElementById('clients-limited').click() ?? true")
	p.shows("the client of the snapshot", "document.querySelector('#clients-table tbody th').innerText", "192.0.2.1")
	head("tunnels", "Age")
	ask("tunnels.json?limit=200&sort=started&order=asc")
	head("tunnels", "Idle")
	ask("tunnels.json?limit=200&sort=idle&order=desc")
	head("tunnels", "Target")
	head("refusals", "Last")
	ask("refusals.json?limit=200&sort=last&order=asc")
	head("refusals", "Count")
	ask("refusals.json?limit=200&sort=count&order=desc")
	many(1)
	run[bool](p, "(window.clock += 3000) > 0")
	many(2)
	ask("refusals.json?limit=200&sort=count&order=desc")
	head("refusals", "Target")
	p.choose("Show only this policy", "staff")
	p.until("three questions", "document.getElementById('clients-count').innerText === '0 of 500'", patience)
	ask("clients.json?limit=100&policy=staff tunnels.json?limit=200&policy=staff refusals.json?limit=200&policy=staff")
	p.choose("Show only this policy", "")

	// The answer to an older question comes late.
	late := make(chan string)
	s.held["clients.json?limit=100&q=192"] = late
	filter := func(id, text string) {
		run[bool](p, fmt.Sprintf("((e) => { e.value = %q; e.dispatchEvent(new Event('input')); return true })(document.getElementById(%q))", text, id))
	}
	filter("clients-filter", " 192")
	ask("clients.json?limit=100&q=192")
	filter("clients-filter", "192.0")
	ask("clients.json?limit=100&q=192.0")
	p.shows("the answer", "document.querySelector('#clients-table tbody th').innerText", "192.0.2.77")
	late <- `{"clients":[` + client("192.0.2.88", 1, "") + `],"total":1}`
	filter("tunnels-filter", "B")
	ask("tunnels.json?limit=200&q=b")
	filter("refusals-filter", "c")
	ask("refusals.json?limit=200&q=c")
	p.shows("the same answer", "document.querySelector('#clients-table tbody th').innerText", "192.0.2.77")
	delete(s.answers, "clients.json")
	filter("clients-filter", "192.0.2")
	p.shows("the error", "document.getElementById('note').innerText", "It no longer exists.")
}

// TestAsksNothingAboutMaskedClients checks that the page filters what it has while the server masks
// clients, which refuses to search for them.
func TestAsksNothingAboutMaskedClients(t *testing.T) {
	s := newScript(t, false)
	s.hello = strings.Replace(s.hello, `"masked":false`, `"masked":true`, 1)
	s.answers["clients.json"] = `{"clients":[` + client("192.0.2.0/24", 1, "") + `],"total":1}`
	s.send(0, "clients.clients", "["+client("192.0.2.0/24", 1, "")+","+client("198.51.100.0/24", 1, "")+"]", "clients.total", "500")
	p := s.open()
	p.fill("Filter clients by address", "192")
	p.shows("what matches", "document.getElementById('clients-count').innerText", "1 of 500")
	p.press("Rejected")
	p.shows("the answer", "document.querySelector('#clients-table tbody th').innerText", "192.0.2.0/24")
	if got, want := s.requests(), "clients.json?limit=100&sort=rejections&order=desc"; got != want {
		t.Errorf("the page asks for %s, want %s", got, want)
	}
	p.clean()
}

// TestWarningsHold checks that a warning at its threshold does not flicker.
func TestWarningsHold(t *testing.T) {
	s := newScript(t, false)
	s.send(0, "stats.warnings", `[{"code":"a","site":":8080","text":"<b>One</b>."},{"code":"other_process","text":"Two."},{"code":"other_process","text":"Three."}]`)
	p := s.open()
	const texts = "[...document.querySelectorAll('#warnings p')].map((e) => e.innerText).join('|')"
	p.shows("the warnings", texts, ":8080 <b>One</b>.|Two.|Three.")
	s.send(4, "stats.warnings", `[{"code":"other_process","text":"Three."}]`)
	p.shows("the next snapshot", "document.getElementById('about').innerText", "v1.2.3 · Caddy v2.11.0 · go1.26 · up 1 h")
	s.send(4.5, "stats.warnings", `[{"code":"a","site":":8080","text":"Other."},{"code":"other_process","text":"Three."}]`)
	p.shows("all of them, with a text that has changed", texts, ":8080 Other.|Two.|Three.")
	s.send(5.1, "stats.warnings", `[{"code":"other_process","text":"Three."}]`)
	p.shows("those of the last five seconds", texts, ":8080 Other.|Three.")
	s.send(30)
	p.shows("none", texts, "")
	p.clean()
}

// TestActions checks what the buttons send, and that the page says how it went.
func TestActions(t *testing.T) {
	s := newScript(t, true)
	s.answers["refill"], s.answers["block"] = "{}", "{}"
	s.send(0, "clients.clients", "["+client("192.0.2.1", 3, `,"policy":"staff"`)+","+client("192.0.2.2", 3, `,"blocked_until":`+when(60))+"]",
		"tunnels.tunnels", `[{"id":7,"client":"192.0.2.1","target":"b.example:443","address":"198.51.100.1:443","proto":"HTTP/1.1","started":`+when(0)+`,"idle_seconds":0,"bytes_up":0,"bytes_down":0}]`)
	p := s.open()
	did := func(button, request, note string) {
		t.Helper()
		p.press(button)
		p.shows("the note", "document.getElementById('note').innerText", note)
		if got := s.requests(); got != request {
			t.Errorf("%s sends %q, want %q", button, got, request)
		}
	}
	did("Refill the bucket of 192.0.2.1 in policy staff", "refill client=192.0.2.1&policy=staff&zone=one", "192.0.2.1 has a full bucket in policy staff.")
	did("Refill the bucket of 192.0.2.2", "refill client=192.0.2.2&policy=default&zone=one", "192.0.2.2 has a full bucket.")
	did("Unblock 192.0.2.2", "block client=192.0.2.2&for=0s", "192.0.2.2 is no longer blocked.")
	did("Close tunnel 7 to b.example:443", "close tunnel=7", "It no longer exists.")
	p.press("Block 192.0.2.1")
	run[bool](p, "document.getElementById('block').addEventListener('close', () => window.cancelled = true) ?? true")
	p.press("Cancel")
	p.until("the end of the dialog", "window.cancelled", patience)
	p.press("Block 192.0.2.1")
	p.shows("the client", "document.getElementById('block-client').innerText", "192.0.2.1")
	run[bool](p, "(document.getElementById('block-for').value = '1h') === '1h'")
	run[bool](p, "document.querySelector('#block button.danger').click() ?? true")
	p.shows("the note", "document.getElementById('note').innerText", "192.0.2.1 is blocked for 1 hour.")
	if got := s.requests(); got != "block client=192.0.2.1&for=1h" {
		t.Errorf("the dialog sends %q", got)
	}
}

// TestWhereALineBelongs checks what the page says about a line that it has copied.
func TestWhereALineBelongs(t *testing.T) {
	s := newScript(t, false)
	refusals := []struct{ fields, place string }{
		{`"cause":"rule","rule":"deny all","allow":"allow a"`, "Put it before deny all."},
		{`"cause":"rule","policy":"staff","rule":"deny all","allow":"allow b"`, "Put it before deny all, in the policy staff."},
		{`"cause":"default","allow":"allow c"`, ""},
		{`"cause":"default","policy":"staff","allow":"allow d"`, "Put it into the policy staff."},
		{`"cause":"port","policy":"staff","allow":"ports 80 443"`, "It replaces the option ports of the policy staff."},
		{`"cause":"client","policy":"staff","allow":"clients private_ranges 192.0.2.1"`, "It replaces the option clients."},
	}
	var list []string
	for _, r := range refusals {
		list = append(list, fmt.Sprintf(`{%s,"reason":"x","client":"192.0.2.1","target":"a:80","status":403,"detail":"","count":1,"first":%s,"last":%[2]s}`, r.fields, when(0)))
	}
	s.send(0, "refusals.refusals", "["+strings.Join(list, ",")+"]")
	p := s.open()
	for _, r := range refusals {
		_, line, _ := strings.Cut(r.fields, `"allow":"`)
		line = strings.TrimSuffix(line, `"`)
		p.copyLine(line)
		if got := p.pasted(); got != line {
			t.Errorf("the clipboard has %q, want %q", got, line)
		}
		p.shows("the note about "+line, "document.getElementById('note').innerText", strings.TrimSpace("Copied: "+line+". "+r.place))
	}
	p.clean()
}

// TestConnection checks that the page finds out that its stream has died, rests while it is hidden,
// and loads a new version of itself.
func TestConnection(t *testing.T) {
	s := newScript(t, false)
	s.send(0, "settings", `[{"site":":1","settings":[]}]`)
	p := s.open()
	expect := func(what string, want int, of func() int) {
		t.Helper()
		got := -1
		for deadline := time.Now().Add(patience); got != want && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			s.mu.Lock()
			got = of()
			s.mu.Unlock()
		}
		if got != want {
			t.Errorf("%d %s, want %d", got, what, want)
		}
	}
	streams := func() int { return len(s.streams) }
	const state = "document.getElementById('state').innerText"
	p.shows("the site", "document.querySelector('#sites').innerText", ":1")
	s.send(1, "settings", `[{"site":":2","settings":[]}]`)
	p.shows("the other site", "document.querySelector('#sites').innerText", ":2")
	s.send(2)
	p.shows("no site", "document.querySelector('#sites').innerText", "This config has no async_proxy.")

	run[bool](p, "(window.clock += 5000) > 0")
	p.shows("the state", state, "Reconnecting")
	s.mu.Lock()
	for events := range s.streams {
		delete(s.streams, events) // that the page will close
	}
	s.mu.Unlock()
	run[bool](p, "(window.clock += 6000) > 0")
	expect("streams", 1, streams)
	p.shows("the state", state, "Live")

	run[bool](p, `!!(window.setTimeout = ((f, after) => after === 300000 ? f() : 0))`)
	hide := func(hidden bool) {
		run[bool](p, fmt.Sprintf("Object.defineProperty(document, 'hidden', { value: %t, configurable: true }) && document.dispatchEvent(new Event('visibilitychange'))", hidden))
	}
	hide(true)
	expect("streams", 0, streams)
	hide(false)
	expect("streams", 1, streams)
	p.clean()

	run[bool](p, `!!(window.setTimeout = ((f, after) => { if (after === 3000) window.later = f }))`)
	s.mu.Lock()
	s.full = true
	for events := range s.streams {
		close(events)
		delete(s.streams, events)
	}
	s.mu.Unlock()
	p.shows("why there is no stream", "document.getElementById('note').innerText", "Too many viewers; retrying.")
	p.shows("the state", state, "Reconnecting")
	s.mu.Lock()
	s.full, s.hello = false, `{"page":"another","actions":false,"masked":false}`
	s.mu.Unlock()
	run[bool](p, "window.later() ?? true")
	expect("loads", 2, func() int {
		if s.loads > 1 {
			s.hello = `{"page":"VERSION","actions":false,"masked":false}`
		}
		return min(s.loads, 2)
	})
}
