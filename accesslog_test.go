// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// withoutWrapper are options of servers that make Caddy's HTTP server serve the clients.
const withoutWrapper = "keepalive_interval 15s\n"

// accessEntries returns the entries in a file once no more are written.
func accessEntries(t *testing.T, path string) []map[string]any {
	t.Helper()
	var data []byte
	eventually(t, "the last entry", func() bool {
		before := len(data)
		time.Sleep(100 * time.Millisecond)
		data, _ = os.ReadFile(path)
		return len(data) == before
	})
	return parseEntries(t, data, "http.log.")
}

// errorID matches the random IDs of Caddy's errors.
var errorID = regexp.MustCompile(`(\{id=|"err_id":")\w+`)

// parseEntries returns the log entries of a logger and those below it, sorted by the number of
// the request, and without what differs from one request to the next.
func parseEntries(t *testing.T, data []byte, logger string) (entries []map[string]any) {
	t.Helper()
	for line := range bytes.Lines(errorID.ReplaceAll(data, []byte("$1 any"))) {
		var entry map[string]any
		if err := json.Unmarshal(line, &entry); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if name, _ := entry["logger"].(string); !strings.HasPrefix(name, logger) {
			continue
		}
		for _, field := range []string{"ts", "duration"} {
			if _, ok := entry[field]; ok {
				entry[field] = "any"
			}
		}
		entry["request"].(map[string]any)["remote_port"] = "any"
		if fields, ok := entry["resp_headers"].(map[string]any); ok {
			for _, field := range []string{"Date", "Ratelimit", "Ratelimit-Policy"} {
				if _, ok := fields[field]; ok {
					fields[field] = "any"
				}
			}
			delete(fields, "Connection") // depends on what the origin has sent when the response begins
		}
		entries = append(entries, entry)
	}
	number := func(entry map[string]any) string { // an entry may be written after the client has the response
		return fmt.Sprint(entry["request"].(map[string]any)["headers"].(map[string]any)["X-Number"])
	}
	slices.SortFunc(entries, func(a, b map[string]any) int { return strings.Compare(number(a), number(b)) })
	return entries
}

// compareEntries compares the entries of the fast path with those of Caddy's server.
func compareEntries(t *testing.T, fast, ordinary []map[string]any) {
	t.Helper()
	if len(fast) != len(ordinary) {
		t.Fatalf("%d entries on the fast path, %d by Caddy's server", len(fast), len(ordinary))
	}
	for i, fast := range fast {
		ordinary := ordinary[i]
		for _, field := range slices.Sorted(maps.Keys(ordinary)) {
			if !reflect.DeepEqual(fast[field], ordinary[field]) {
				t.Errorf("entry %d: %s is %v on the fast path, %v by Caddy's server", i, field, fast[field], ordinary[field])
			}
		}
		for field := range fast {
			if _, ok := ordinary[field]; !ok {
				t.Errorf("entry %d: %s is %v on the fast path only", i, field, fast[field])
			}
		}
	}
}

// loggedOrigin is an origin whose responses differ in what the access log shows of them.
func loggedOrigin() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello") })
	mux.HandleFunc("/large", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000000")
		_, _ = w.Write(make([]byte, 1_000_000))
	})
	mux.HandleFunc("/chunks", func(w http.ResponseWriter, r *http.Request) {
		for range 3 {
			fmt.Fprint(w, "chunk")
			_ = http.NewResponseController(w).Flush()
		}
	})
	mux.HandleFunc("/cookie", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Set-Cookie", "a=secret")
		w.Header().Add("X-Two", "1")
		w.Header().Add("X-Two", "2")
		w.WriteHeader(http.StatusTeapot)
	})
	mux.HandleFunc("/none", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/same", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNotModified) })
	mux.HandleFunc("/error", func(w http.ResponseWriter, r *http.Request) { http.Error(w, "broken", http.StatusBadGateway) })
	mux.HandleFunc("/hints", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
		fmt.Fprint(w, "hinted")
	})
	mux.HandleFunc("/trailer", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		fmt.Fprint(w, "content")
		w.Header().Set("X-Sum", "7")
	})
	mux.HandleFunc("/cut", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100")
		fmt.Fprint(w, "half")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	return mux
}

// loggedRequests are the heads of requests, each for a connection of its own. ORIGIN stands for
// the address of an origin, and CLOSED for an address without a listener.
var loggedRequests = []string{
	"GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN",
	"GET http://ORIGIN/path?query=1#no HTTP/1.1\nHost: ORIGIN\nUser-Agent: test\nAccept: a\nAccept: b\nx-lower: c",
	"HEAD http://ORIGIN/large HTTP/1.1\nHost: ORIGIN",
	"GET http://ORIGIN/large HTTP/1.1\nHost: ORIGIN",
	"GET http://ORIGIN/chunks HTTP/1.1\nHost: ORIGIN",
	"GET http://ORIGIN/cookie HTTP/1.1\nHost: ORIGIN\nCookie: b=secret\nAuthorization: Basic secret\nProxy-Authorization: Basic c2VjcmV0OnNlY3JldA==",
	"GET http://ORIGIN/none HTTP/1.1\nHost: ORIGIN",
	"GET http://ORIGIN/same HTTP/1.1\nHost: ORIGIN",
	"GET http://ORIGIN/error HTTP/1.1\nHost: ORIGIN",
	"GET http://ORIGIN/hints HTTP/1.1\nHost: ORIGIN",
	"GET http://ORIGIN/trailer HTTP/1.1\nHost: ORIGIN\nTE: trailers",
	"GET http://ORIGIN/cut HTTP/1.1\nHost: ORIGIN",
	"OPTIONS http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nMax-Forwards: 0",
	"DELETE http://ORIGIN/ HTTP/1.1\nHost: ORIGIN",
	"PROPFIND http://ORIGIN/ HTTP/1.1\nHost: ORIGIN",
	"GET http://CLOSED/ HTTP/1.1\nHost: CLOSED",
	"GET http://denied.example/ HTTP/1.1\nHost: denied.example",
	"GET http://name.invalid/ HTTP/1.1\nHost: name.invalid",
	"GET ftp://ORIGIN/ HTTP/1.1\nHost: ORIGIN",
	"GET http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nX-Forwarded-For: 192.0.2.7",
	"CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN",
	"CONNECT CLOSED HTTP/1.1\nHost: CLOSED",
	"CONNECT denied.example:443 HTTP/1.1\nHost: denied.example:443",
	"CONNECT ORIGIN HTTP/1.1\nHost: ORIGIN\nConnection: close",
	"POST http://ORIGIN/ HTTP/1.1\nHost: ORIGIN\nContent-Length: 0",
}

// sendLogged sends a request head over a new connection and reads what follows until the
// response, or the start of the tunnel, is over.
func sendLogged(t *testing.T, f form, proxy, head string) {
	t.Helper()
	conn := f.dial(t, proxy)
	defer conn.Close()
	if strings.HasPrefix(head, "CONNECT") {
		fmt.Fprint(conn, strings.ReplaceAll(head, "\n", "\r\n")+"\r\n\r\n")
		_, _ = conn.Read(make([]byte, 4096))
		return
	}
	fmt.Fprint(conn, strings.ReplaceAll(head, "\n", "\r\n")+"\r\nConnection: close\r\n\r\n")
	_, _ = io.Copy(io.Discard, conn)
}

// The fast path writes the entries that Caddy's HTTP server writes: the same fields with the
// same values and levels, to the same loggers.
func TestAccessLogOnTheFastPath(t *testing.T) {
	for name, row := range map[string]struct {
		log     string // the directive, with FILE for the file
		options string // of the proxy
		servers string // options of the servers
		none    bool   // nothing is logged
		inForms bool   // compare in all forms
	}{
		"plain":            {inForms: true, log: "log {\noutput file FILE\n}"},
		"credentials":      {log: "log {\noutput file FILE\n}", servers: "log_credentials"},
		"a level":          {log: "log {\noutput file FILE\nlevel ERROR\n}"},
		"hostnames":        {log: "log {\nhostnames ORIGINHOST *.example\noutput file FILE\n}"},
		"other hosts":      {log: "log {\nhostnames other.test\noutput file FILE\n}\nhandle_errors {\nrespond sorry\n}", none: true},
		"no hostname":      {log: "log {\nno_hostname\noutput file FILE\n}", none: true},
		"a named logger":   {log: "log special {\noutput file FILE\n}"},
		"a filter":         {log: "log {\noutput file FILE\nformat filter {\nrequest>headers>User-Agent delete\nrequest>remote_ip ip_mask 16\n}\n}"},
		"a hash":           {log: "log {\noutput file FILE\nformat filter {\nrequest>headers>Accept hash\nresp_headers>Content-Type hash\n}\n}"},
		"changed fields":   {log: "log {\noutput file FILE\n}", options: "header_up Accept a changed"},
		"console":          {log: "log {\noutput file FILE\nformat append {\nwrap json\nmark 1\n}\n}"},
		"rate limited":     {log: "log {\noutput file FILE\n}", options: "burst 2\nrefill 0.001"},
		"logins":           {inForms: true, log: "log {\noutput file FILE\n}", options: authUsers},
		"trusted":          {log: "log {\noutput file FILE\n}", servers: "trusted_proxies static 127.0.0.1\ntrusted_proxies_strict"},
		"error routes":     {inForms: true, log: "log {\noutput file FILE\n}\nhandle_errors {\nrespond \"sorry {http.error.status_code}\"\n}"},
		"routes that fail": {log: "log {\noutput file FILE\n}\nhandle_errors {\nerror \"worse\" 507\n}"},
	} {
		for _, f := range forms {
			if f.deployed || f != forms[0] && !row.inForms { // rows bring their own logs
				continue
			}
			t.Run(f.name+"/"+name, func(t *testing.T) {
				w := newWorld(t, "", loggedOrigin())
				dir := t.TempDir()
				closed := freeAddress(t)
				var entries, failures [2][]map[string]any
				logged := 0
				for way := range entries {
					file := filepath.Join(dir, fmt.Sprint(way))
					site := f.site(t, w.site("clients all\nallow 127.0.0.0/8\ndeny denied.example\nzone way"+fmt.Sprint(way)+"\nvia tester\n"+row.options))
					site = strings.Replace(site, "{\n", "{\n"+strings.NewReplacer("FILE", file, "ORIGINHOST", "127.0.0.1").Replace(row.log)+"\n", 1)
					loadCaddyfile(t, withServers(w.globals()+site, f.servers(way == 0)+row.servers))
					c := f.dial(t, w.proxy)
					c.gets(w.origin.URL + "/")
					expectFastPath(t, fmt.Sprint("way ", way), oneIf(way == 0 && !*byNetHTTP))
					_ = c.Close()
					for i, head := range loggedRequests {
						head += fmt.Sprintf("\nX-Number: %02d", i)
						sendLogged(t, f, w.proxy, strings.NewReplacer("ORIGIN", strings.TrimPrefix(w.origin.URL, "http://"), "CLOSED", closed).Replace(head))
					}
					entries[way] = accessEntries(t, file)
					own, err := os.ReadFile(w.logs)
					if err != nil {
						t.Fatal(err)
					}
					failures[way] = parseEntries(t, own[logged:], "http.log.") // the error log, and what goes to no other file
					logged = len(own)
				}
				if t.Logf("%d entries", len(entries[1])); len(entries[1]) == 0 != row.none {
					t.Errorf("%d entries", len(entries[1]))
				}
				if len(entries[1]) > 0 && f.overTLS != (entries[1][0]["request"].(map[string]any)["tls"] != nil) {
					t.Errorf("TLS in the entries: %v", entries[1][0])
				}
				compareEntries(t, entries[0], entries[1])
				compareEntries(t, failures[0], failures[1])
			})
		}
	}
}

// Hosts that the access log leaves out stay out of it on the fast path, whatever else is
// recorded of a request. Only JSON can say so for a site of the fast path.
func TestAccessLogSkipsHosts(t *testing.T) {
	for _, logs := range []string{`"skip_unmapped_hosts":true`, `"skip_hosts":["127.0.0.1"]`, `"skip_unmapped_hosts":true,"logger_names":{"other.test":["a"]}`} {
		for _, routes := range []string{"", "handle_errors {\nrespond sorry\n}\n"} {
			w := newWorld(t, "", nil)
			site := strings.Replace(w.site("allow 127.0.0.0/8"), "{\n", "{\nlog\n"+routes, 1)
			config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(w.globals()+site), nil)
			if err != nil {
				t.Fatal(err)
			}
			config = bytes.Replace(config, []byte(`"logs":{}`), []byte(`"logs":{`+logs+`}`), 1)
			if !bytes.Contains(config, []byte(logs)) {
				t.Fatalf("the config has no logs: %s", config)
			}
			reloadAndWait(t, func() {
				if err := caddy.Load(config, true); err != nil {
					t.Fatal(err)
				}
			})
			w.dial().gets(w.origin.URL + "/")
			policyRequest(t, w.proxy, http.MethodGet, strings.TrimPrefix(freeAddress(t), "http://"), "")
			if lines := w.logLines("handled request"); len(lines) > 0 {
				t.Errorf("%s %q: %v", logs, routes, lines)
			}
		}
	}
}
