// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// A proxy request that no async_proxy handles is refused, with the listener wrapper and without: an
// empty 200 to CONNECT would mean an open tunnel.
func TestUnclaimedRequestsAreRefused(t *testing.T) {
	for name, wrapper := range map[string]string{"with the wrapper": withWrapper, "without": ""} {
		t.Run(name, func(t *testing.T) { unclaimedRequestsAreRefused(t, wrapper) })
	}
}

func unclaimedRequestsAreRefused(t *testing.T, wrapper string) {
	w := newWorld(t, "", nil)
	origin := w.origin.Listener.Addr().String()
	_, port, _ := strings.Cut(w.proxy, ":")
	const groups = `@a client_ip 203.0.113.0/24
@b client_ip 198.51.100.0/24
async_proxy @a {
	allow 127.0.0.0/8
}
async_proxy @b
`
	for _, tc := range []struct {
		sites   string // PORT stands for the port
		lines   string
		connect int
		get     int
		warning string // at start; "": none
	}{
		{"http://:PORT {\n" + groups + "}", "", 421, 421, "every async_proxy of this site has a matcher"},
		{"http://:PORT {\n" + groups + "}", clientFrom("203.0.113.1"), 200, 200, "every async_proxy of this site has a matcher"},
		{`http://:PORT {
	` + groups + `header X-A b
}
http://www.example.com:PORT {
	respond hello
}`, "", 421, 421, "every async_proxy of this site has a matcher"},
		{`http://proxy.example.com:PORT {
	async_proxy
}`, "", 421, 421, "this proxy's site has a host name"},
		{`http://proxy.example.com:PORT {
	async_proxy
}
http://www.example.com:PORT {
	respond hello
}`, "", 421, 421, "this proxy's site has a host name"},
		{`http://:PORT {
	@never method DELETE
	route {
		async_proxy @never
	}
	async_proxy @never
}`, "", 421, 421, "every async_proxy of this site has a matcher"},
		{`http://:PORT {
	route {
		header X-A b
		async_proxy
	}
}`, "", 200, 200, ""},
		{`http://:PORT {
	@never method DELETE
	handle @never {
		async_proxy
	}
	handle {
		header X-A b
	}
}`, "", 421, 421, "every async_proxy of this site has a matcher"},
		{`http://www.example.com:PORT {
	respond hello
}
http://:PORT {
	@never method DELETE
	route {
		route @never {
			async_proxy
		}
	}
}`, "", 421, 421, "every async_proxy of this site has a matcher"},
		// Responses of other handlers to such requests are passed on.
		{`http://:PORT {
	` + groups + `respond no 403
}`, "", 403, 403, ""},
		{`http://:PORT {
	` + groups + `respond /path no 403
	abort /path2
}`, "", 421, 421, "every async_proxy of this site has a matcher"},
		{`http://:PORT {
	` + groups + `async_proxy
}`, "", 200, 200, ""},
		{`http://:PORT {
	` + groups + `handle {
		respond no 404
	}
}`, "", 404, 404, ""},
		{`http://:PORT {
	` + groups + `reverse_proxy ORIGIN
}`, "", 0, 200, ""},
	} {
		sites := strings.NewReplacer("PORT", port, "ORIGIN", origin).Replace(tc.sites)
		w.forgetLogs()
		loadCaddyfile(t, withServers(w.globals()+sites, wrapper+"trusted_proxies static 127.0.0.1\ntrusted_proxies_strict"))
		data, err := os.ReadFile(w.logs)
		if err != nil {
			t.Fatal(err)
		}
		for _, warning := range []string{"every async_proxy of this site has a matcher", "this proxy's site has a host name"} {
			want := 0
			if warning == tc.warning {
				want = 1
			}
			if got := strings.Count(string(data), warning); got != want {
				t.Errorf("%s\n%d warnings %q, want %d", sites, got, warning, want)
			}
		}
		for method, want := range map[string]int{http.MethodConnect: tc.connect, http.MethodGet: tc.get} {
			if want == 0 {
				continue
			}
			res, body := policyRequest(t, w.proxy, method, origin, tc.lines)
			if res.StatusCode != want || want == 421 && body != "No proxy here handles this request.\n" {
				t.Errorf("%s\n%s: %s %q, want %d", sites, method, res.Status, body, want)
			}
		}
	}
	// Sites that are not proxies respond as before.
	loadCaddyfile(t, w.globals()+"http://:"+port+` {
	@never method DELETE
	async_proxy @never
	header X-A b
}`)
	c := w.dial()
	c.send("GET / HTTP/1.1\nHost: x\n\n")
	if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusOK || res.Header.Get("X-A") != "b" {
		t.Errorf("%s %v", res.Status, res.Header)
	}
	if res, _ := policyRequest(t, w.proxy, http.MethodConnect, origin, ""); res.StatusCode != http.StatusMisdirectedRequest {
		t.Errorf("%s", res.Status)
	}
	if lines := w.waitLog("no async_proxy of this server handles this request: none matches it, or its site has a host name in its address", 1); lines[0]["host"] != origin {
		t.Errorf("log %v", lines)
	}
}

// Caddy provisions named routes and error routes too late for an async_proxy that is only there. The
// listener wrapper, or another async_proxy, helps.
func TestUnclaimedRequestsBesideLateRoutes(t *testing.T) {
	w := newWorld(t, "", nil)
	_, port, _ := strings.Cut(w.proxy, ":")
	named := "&(proxy) {\nasync_proxy\n}\nhttp://:" + port + " {\n@never method DELETE\ninvoke @never proxy\n"
	inErrors := "http://:" + port + " {\nerror /path 500\nhandle_errors {\nasync_proxy\n}\n"
	for _, tc := range []struct {
		site, servers string
		works         bool
	}{
		{named, withWrapper, true},
		{named + "async_proxy @never\n", "trusted_proxies static 127.0.0.1\ntrusted_proxies_strict", true},
		{named, "trusted_proxies static 127.0.0.1\ntrusted_proxies_strict", false},
		{inErrors, withWrapper, true},
		{inErrors, "trusted_proxies static 127.0.0.1\ntrusted_proxies_strict", false},
	} {
		text := withServers(w.globals()+tc.site+"}", tc.servers)
		if !tc.works {
			config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
			if err != nil {
				t.Fatal(err)
			}
			if err := caddy.Load(config, true); err == nil || !strings.Contains(err.Error(), "add the listener wrapper async_proxy to the server (global options: servers { listener_wrappers { async_proxy } })") {
				t.Errorf("%s\n%v", text, err)
			}
			continue
		}
		loadCaddyfile(t, text)
		if res, _ := policyRequest(t, w.proxy, http.MethodConnect, w.origin.Listener.Addr().String(), ""); res.StatusCode != http.StatusMisdirectedRequest {
			t.Errorf("%s\n%s", text, res.Status)
		}
	}
}

// The same holds over HTTP/2 and HTTP/3, unless the request is for the server itself.
func TestUnclaimedRequestsInFramesAreRefused(t *testing.T) {
	w := newWorld(t, "", nil)
	secure := freeAddress(t)
	_, port, _ := strings.Cut(secure, ":")
	loadCaddyfile(t, "{\nskip_install_trust\n"+strings.TrimPrefix(w.globals(), "{\n")+"https://:"+port+
		" {\ntls internal {\non_demand\n}\n@never method DELETE\nasync_proxy @never\nheader X-A b\nrespond /path hello\n}")
	conn := dialTLS(t, secure, "h2")
	for name, ask := range map[string]loginClient{"HTTP/2": http2LoginClient(t, conn), "HTTP/3": http3LoginClient(t, secure)} {
		for url, want := range map[string]string{
			"http://www.example.com/": "421 No proxy here handles this request.\n", "http://localhost/": "200 ",
			"http://localhost:" + port + "/": "200 ",
		} {
			if res, body := ask(http.MethodGet, url, ""); fmt.Sprint(res.StatusCode, " ", body) != want {
				t.Errorf("%s, %s: %s %q, want %q", name, url, res.Status, body, want)
			}
		}
	}
	// A handler's response is passed on, whatever the host.
	if res, body := http2LoginClient(t, dialTLS(t, secure, "h2"))(http.MethodGet, "http://www.example.com/path", ""); body != "hello" {
		t.Errorf("%s %q", res.Status, body)
	}
}

// trusted_proxies without strict mode believes what a client claims about itself.
func TestWarnsAboutTrustedProxiesWithoutStrict(t *testing.T) {
	w := newWorld(t, "", nil)
	for servers, want := range map[string]bool{
		"":                                 false,
		"trusted_proxies static 127.0.0.1": true,
		"trusted_proxies static 127.0.0.1\ntrusted_proxies_strict": false,
		"trusted_proxies_strict":                                   false,
	} {
		w.forgetLogs()
		loadCaddyfile(t, withServers(w.globals()+w.site(""), withWrapper+servers))
		w.waitLog("async-proxy listening", 1)
		data, err := os.ReadFile(w.logs)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(data), "trusted_proxies without trusted_proxies_strict"); got != want {
			t.Errorf("%q: warned about: %v, want %v", servers, got, want)
		}
	}
}

// CONNECT has its own ports, also through a parent, for open tunnels, and where rules are
// only reported.
func TestConnectPorts(t *testing.T) {
	w := newWorld(t, "", nil)
	origin := w.origin.Listener.Addr().String()
	_, port, _ := strings.Cut(origin, ":")
	for _, tc := range []struct {
		options      string
		connect, get int
		rule         string
	}{
		{"connect_ports 1", 403, 200, "connect_ports"},
		{"connect_ports 1\nports " + port, 403, 200, "connect_ports"},
		{"connect_ports " + port + "\nports 1", 200, 403, "ports"},
		{"connect_ports 1-65535\nports 1-65535", 200, 200, ""},
		{"ports 1", 403, 403, "ports"},
		{"connect_ports 1\nreport_only rules", 200, 200, ""},
		{"connect_ports 1\nupstream http://127.0.0.1:9", 403, 502, "connect_ports"},
	} {
		w.forgetLogs()
		w.load(w.site(tc.options))
		for method, want := range map[string]int{http.MethodConnect: tc.connect, http.MethodGet: tc.get} {
			if res, body := policyRequest(t, w.proxy, method, origin, ""); res.StatusCode != want {
				t.Errorf("%q: %s: %s %s, want %d", tc.options, method, res.Status, body, want)
			}
		}
		if tc.rule != "" {
			eventually(t, "a line with the rule "+tc.rule, func() bool {
				for _, line := range w.logLines("request") {
					if line["rule"] == tc.rule {
						return true
					}
				}
				return false
			})
		}
	}
	// recheck_tunnels closes an open tunnel whose port has been closed.
	w.load(w.site(""))
	c := w.dial()
	c.connect(origin)
	w.load(w.site("recheck_tunnels\nconnect_ports 1"))
	if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != "forbidden" {
		t.Errorf("line %v", line)
	}
}
