// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// globals returns global options that send Caddy's log to the world's file.
func (w *world) globals() string {
	return fmt.Sprintf(`{
	admin off
	persist_config off
	default_bind 127.0.0.1
	log {
		output file %s
		format json
		level DEBUG
	}
}
`, w.logs)
}

// forgetLogs empties the log file.
func (w *world) forgetLogs() {
	w.t.Helper()
	if err := os.Truncate(w.logs, 0); err != nil {
		w.t.Fatal(err)
	}
}

// A site with a host would silently answer proxy requests with an empty 200.
func TestWarnsAboutHostInSiteAddress(t *testing.T) {
	w := newWorld(t, "", nil)
	_, port, _ := strings.Cut(w.proxy, ":")
	for _, tc := range []struct {
		name, sites string // PORT stands for the port
		want        []any  // the hosts in the warning; nil: no warning
	}{
		{"no host", `http://:PORT {
	async_proxy
}`, nil},
		{"a host", `http://proxy.example.com:PORT {
	async_proxy
}`, []any{"proxy.example.com"}},
		{"two hosts", `http://a.example:PORT, http://b.example:PORT {
	async_proxy
}`, []any{"a.example", "b.example"}},
		{"an address of this machine", `http://127.0.0.1:PORT {
	async_proxy
}`, []any{"127.0.0.1"}},
		{"a host and all others", `http://proxy.example.com:PORT, http://:PORT {
	async_proxy
}`, nil},
		{"all others and a host", `http://:PORT, http://proxy.example.com:PORT {
	async_proxy
}`, nil},
		{"a host, in a route", `http://proxy.example.com:PORT {
	route {
		async_proxy
	}
}`, []any{"proxy.example.com"}},
		{"no host, in a route", `http://:PORT {
	route {
		async_proxy
	}
}`, nil},
		{"a host, with a matcher", `http://proxy.example.com:PORT {
	@get method GET CONNECT
	async_proxy @get
}`, []any{"proxy.example.com"}},
		{"another site has a host", `http://:PORT {
	async_proxy
}
http://www.example.com:PORT {
	respond hello
}`, nil},
		{"another site has none", `http://proxy.example.com:PORT {
	async_proxy
}
http://:PORT {
	respond hello
}`, []any{"proxy.example.com"}},
		{"a host with a path", `http://proxy.example.com:PORT/path/* {
	async_proxy
}`, []any{"proxy.example.com"}},
		{"a host with a path, all others with another", `http://proxy.example.com:PORT/a/*, http://:PORT/b/* {
	async_proxy
}`, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w.forgetLogs()
			loadCaddyfile(t, w.globals()+strings.ReplaceAll(tc.sites, "PORT", port))
			if n := len(w.logLines("async-proxy listening")); n != 1 {
				t.Fatalf("%d lines say that the proxy listens, want 1", n)
			}
			data, err := os.ReadFile(w.logs)
			if err != nil {
				t.Fatal(err)
			}
			var hosts []any
			for text := range strings.Lines(string(data)) {
				var line map[string]any
				if err := json.Unmarshal([]byte(text), &line); err != nil {
					t.Fatalf("log line %q: %v", text, err)
				}
				if message, _ := line["msg"].(string); strings.HasPrefix(message, "this proxy's site has a host name") {
					if line["level"] != "warn" || hosts != nil {
						t.Errorf("log line %v, want one at level warn", line)
					}
					hosts, _ = line["hosts"].([]any)
				}
			}
			if !reflect.DeepEqual(hosts, tc.want) {
				t.Errorf("the warning is about the hosts %v, want %v", hosts, tc.want)
			}
		})
	}
}

func TestListeningIsLogged(t *testing.T) {
	w := newWorld(t, "burst 20\nrefill 2.5", nil)
	check := func(want ...map[string]any) {
		t.Helper()
		lines := w.waitLog("async-proxy listening", len(want))
		if len(lines) != len(want) {
			t.Fatalf("%d lines say that the proxy listens, want %d", len(lines), len(want))
		}
		for i, line := range lines {
			for name, want := range want[i] {
				if !reflect.DeepEqual(line[name], want) {
					t.Errorf("line %d: %s = %v, want %v", i+1, name, line[name], want)
				}
			}
		}
	}
	first := map[string]any{"level": "info", "logger": "http.handlers.async_proxy", "addresses": []any{w.proxy}, "burst": 20.0, "refill": 2.5}
	check(first)

	w.load(w.site("burst 30\nrefill 3"))
	second := map[string]any{"addresses": []any{w.proxy}, "burst": 30.0, "refill": 3.0}
	check(first, second)

	other := freeAddress(t)
	w.load(w.site("") + siteAt(other, "burst 7"))
	lines := w.waitLog("async-proxy listening", 4)[2:]
	listening := map[any]any{}
	for _, line := range lines {
		listening[line["addresses"].([]any)[0]] = line["burst"]
	}
	if want := map[any]any{w.proxy: 1e6, other: 7.0}; !reflect.DeepEqual(listening, want) {
		t.Errorf("listening proxies and their bursts: %v, want %v", listening, want)
	}
}

func TestListeningIsNotLoggedByAValidation(t *testing.T) {
	w := newWorld(t, "", nil)
	w.forgetLogs()
	config, _, err := adapt(w.globals()+w.site("burst 5"), "Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	var c caddy.Config
	if err := json.Unmarshal(config, &c); err != nil {
		t.Fatal(err)
	}
	if err := caddy.Validate(&c); err != nil {
		t.Fatal(err)
	}
	if lines := w.logLines("async-proxy listening"); len(lines) != 0 {
		t.Errorf("a validation logs %v", lines)
	}
	if lines := w.logLines("adjusted config"); len(lines) == 0 {
		t.Error("a validation logs nothing: this test sees nothing")
	}
	w.gets(w.proxy, 200) // the previous config still runs
}
