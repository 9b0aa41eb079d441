// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// clientFrom returns the header line with which the tests' client, as a trusted proxy,
// forwards for a client at another address.
func clientFrom(address string) string { return "X-Forwarded-For: " + address + "\n" }

// clientSites are sites and the clients that may use their proxy.
var clientSites = []struct {
	site    string // the site's directives
	clients string // the effective clients option
	open    bool   // any client may use the proxy
}{
	{"async_proxy", "private_ranges", false},
	{`async_proxy {
	clients all
}`, "all", true},
	{`async_proxy {
	clients 10.0.0.0/8 all
}`, "10.0.0.0/8 all", true},
	{`async_proxy {
	clients 10.0.0.0/8 0.0.0.0/0
}`, "10.0.0.0/8 0.0.0.0/0", true},
	{`async_proxy {
	clients 10.0.0.0/8
}`, "10.0.0.0/8", false},
	{"async_proxy {\n" + authUsers + "}", "all", false},
	{"async_proxy {\nclients all\n" + authUsers + "}", "all", false},
	{bcryptUsers + "\nasync_proxy", "all", false},
	{strings.Replace(bcryptUsers, "basic_auth", "basic_auth /private/*", 1) + "\nasync_proxy", "private_ranges", false},
	{"route /private/* {\n" + bcryptUsers + "}\nasync_proxy", "private_ranges", false},
	{`route {
	` + bcryptUsers + `
	async_proxy
}`, "all", false},
	// A matcher for addresses counts as the operator's choice of clients; other matchers do
	// not.
	{"@known remote_ip 203.0.113.0/24\nasync_proxy @known", "all", false},
	{`@known client_ip 203.0.113.0/24
handle @known {
	async_proxy
}`, "all", false},
	{`@known client_ip 203.0.113.0/24
async_proxy @known {
	clients all
}`, "all", false},
	{"@get method GET CONNECT\nasync_proxy @get", "private_ranges", false},
	{"@all remote_ip 0.0.0.0/0 ::/0\nasync_proxy @all", "private_ranges", false},
	{"@others not remote_ip 192.0.2.1\nasync_proxy @others", "private_ranges", false},
	{"@office remote_ip 203.0.113.0/24\nheader @office X-A b\nasync_proxy", "private_ranges", false},
	{`@one {
	remote_ip 203.0.113.0/24
}
@two method GET
route @two {
	respond @one hello
	async_proxy
}`, "private_ranges", false},
	// A handler that rejects all but certain clients counts if it comes first and ends the
	// request.
	{`@others not remote_ip 203.0.113.0/24
abort @others
route {
	async_proxy
}`, "private_ranges", false},
	{`route {
	@others not remote_ip 203.0.113.0/24
	abort @others
	async_proxy
}`, "all", false},
	{`route {
	@others not client_ip 203.0.113.0/24
	handle @others {
		error 403
	}
	async_proxy
}`, "all", false},
	{`route {
	@others not client_ip 203.0.113.0/24
	respond @others 103
	async_proxy
}`, "private_ranges", false},
	{`route {
	@others not client_ip 203.0.113.0/24
	respond @others "" {env.NO_SUCH_STATUS}
	async_proxy
}`, "private_ranges", false},
	{`route {
	@others not remote_ip 203.0.113.0/24
	header @others X-A b
	async_proxy
}`, "private_ranges", false},
	{`route {
	@others {
		not remote_ip 203.0.113.0/24
		path /private/*
	}
	abort @others
	async_proxy
}`, "private_ranges", false},
	{`route {
	@bad remote_ip 192.0.2.1
	abort @bad
	async_proxy
}`, "private_ranges", false},
	// A request takes only one route of a group: the second is no gate.
	{"route {\nhandle /x {\nheader X-A b\n}\nhandle {\n" + bcryptUsers + "}\nasync_proxy\n}", "private_ranges", false},
	{"invoke proxy", "private_ranges", false},
	{"@known client_ip 203.0.113.0/24\ninvoke @known proxy", "all", false},
	{"@known client_ip 203.0.113.0/24\ninvoke @known proxy\n@get method GET\ninvoke @get proxy", "private_ranges", false},
	{"respond /health ok\nasync_proxy", "private_ranges", false},
}

// clientSite returns a Caddyfile with one of the sites.
func clientSite(w *world, site string) string {
	_, port, _ := strings.Cut(w.proxy, ":")
	text := fmt.Sprintf(`http://:%s {
	%s
}
`, port, site)
	if strings.Contains(site, "invoke") {
		text = `&(proxy) {
	async_proxy
}
` + text
	}
	return withServers(w.globals()+text, withWrapper+"trusted_proxies static 127.0.0.1\ntrusted_proxies_strict")
}

// Which clients may use the proxy is decided at start, for all requests alike, and an open
// proxy is warned about at start.
func TestClientsOfSites(t *testing.T) {
	w := newWorld(t, "", nil)
	for _, row := range clientSites {
		w.forgetLogs()
		loadCaddyfile(t, clientSite(w, row.site))
		line := w.waitLog("async-proxy listening", 1)[0]
		var clients []string
		for _, c := range line["clients"].([]any) {
			clients = append(clients, c.(string))
		}
		if got := strings.Join(clients, " "); got != row.clients {
			t.Errorf("%s\nclients %s, want %s", row.site, got, row.clients)
		}
		data, err := os.ReadFile(w.logs)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(data), `"msg":"open proxy: `); got != row.open {
			t.Errorf("%s\nwarned about: %v, want %v", row.site, got, row.open)
		}
	}
}

// Without a clients option, clients with private addresses may use the proxy. All others
// get a 403 that says so, on either serving path.
func TestClientsByDefault(t *testing.T) {
	w := newWorld(t, "", nil)
	origin := w.origin.Listener.Addr().String()
	const private = "127.0.0.1 127.1.2.3 10.1.2.3 192.168.7.8 172.31.0.1 ::1 fd12::1 ::ffff:10.1.2.3"
	const public = "203.0.113.9 8.8.8.8 172.32.0.1 2001:db8::1 2606:4700::1 ::ffff:8.8.8.8 100.64.0.1 169.254.1.1"
	for _, tc := range []struct{ site, admitted, refused string }{
		{`async_proxy {
	allow 127.0.0.0/8
}`, private, public},
		{`route {
	async_proxy {
		allow 127.0.0.0/8
	}
}`, private, public},
		{`@other method DELETE
async_proxy @other
async_proxy {
	allow 127.0.0.0/8
}`, private, public},
		{`async_proxy {
	allow 127.0.0.0/8
	clients all
}`, private + " " + public, ""},
		{`async_proxy {
	allow 127.0.0.0/8
	clients 203.0.113.0/24
}`, "203.0.113.9", "127.0.0.1 8.8.8.8 2001:db8::1"},
		{`@office client_ip 203.0.113.0/24
async_proxy @office {
	allow 127.0.0.0/8
}
async_proxy {
	allow 127.0.0.0/8
}`,
			"203.0.113.9 " + private, "8.8.8.8 2001:db8::1"},
	} {
		site := strings.ReplaceAll(tc.site, "async_proxy {", "async_proxy {\nburst 1000000\nrefill 1000000")
		loadCaddyfile(t, clientSite(w, site))
		for _, method := range []string{http.MethodGet, http.MethodConnect} {
			for address := range strings.FieldsSeq(tc.admitted) {
				if res, body := policyRequest(t, w.proxy, method, origin, clientFrom(address)); res.StatusCode != http.StatusOK {
					t.Errorf("%s\n%s from %s: %s %s", tc.site, method, address, res.Status, body)
				}
			}
			for address := range strings.FieldsSeq(tc.refused) {
				res, body := policyRequest(t, w.proxy, method, origin, clientFrom(address))
				want := "Denied by proxy: your address, " + strings.TrimPrefix(address, "::ffff:") + ", may not use it.\n"
				if res.StatusCode != http.StatusForbidden || body != want {
					t.Errorf("%s\n%s from %s: %s %q, want 403 %q", tc.site, method, address, res.Status, body, want)
				}
			}
		}
	}
	// Requests that are not proxy requests are not affected.
	loadCaddyfile(t, clientSite(w, "async_proxy\nrespond \"a site\""))
	c := w.dial()
	c.send("GET / HTTP/1.1\nHost: x\n" + clientFrom("8.8.8.8") + "\n")
	if res, body := c.response(http.MethodGet); res.StatusCode != http.StatusOK || body != "a site" {
		t.Errorf("%s %q", res.Status, body)
	}
}

// The option takes effect on a reload, also for open connections.
func TestClientsAfterAReload(t *testing.T) {
	w := newWorld(t, "", nil)
	const site = `async_proxy {
	allow 127.0.0.0/8
	burst 1000000
	refill 1000000
	CLIENTS
}`
	load := func(clients string) { loadCaddyfile(t, clientSite(w, strings.Replace(site, "CLIENTS", clients, 1))) }
	load("clients all")
	c := w.dial()
	get := func(want int) {
		t.Helper()
		c.send("GET " + w.origin.URL + "/ HTTP/1.1\nHost: x\n" + clientFrom("8.8.8.8") + "\n")
		if res, body := c.response(http.MethodGet); res.StatusCode != want {
			t.Errorf("%s %q, want %d", res.Status, body, want)
		}
	}
	get(http.StatusOK)
	load("")
	get(http.StatusForbidden)
	load("clients 8.8.8.0/24")
	get(http.StatusOK)
}

// The JSON option has the same default and errors.
func TestClientsInJSON(t *testing.T) {
	for clients, want := range map[string]string{
		`["all"]`:                       "",
		`["private_ranges", "8.8.8.8"]`: "",
		`["everybody"]`:                 `clients: the value 'everybody' is not valid; expected all`,
	} {
		h := fmt.Sprintf(`{"handler": "async_proxy", "clients": %s}`, clients)
		var config *caddy.Config
		text := fmt.Sprintf(`{"admin": {"disabled": true}, "apps": {"http": {"servers": {"s": {"listen": ["127.0.0.1:0"], "routes": [{"handle": [%s]}]}}}}}`, h)
		if err := json.Unmarshal([]byte(text), &config); err != nil {
			t.Fatal(err)
		}
		if err := caddy.Validate(config); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", clients, err, want)
		}
	}
}

// Passwords on a port without TLS that other machines can reach cause a warning. The
// socket's actual address decides.
func TestWarnsAboutPasswordsWithoutTLS(t *testing.T) {
	w := newWorld(t, "", nil)
	_, port, _ := strings.Cut(w.proxy, ":")
	handedOver := func(address string) string {
		ln, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		file, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { file.Close() })
		return fmt.Sprintf("fd/%d", file.Fd())
	}
	for _, row := range []struct {
		site string
		want bool
	}{
		{"http://:PORT {\nbind 0.0.0.0\nasync_proxy {\n" + bcryptUsers + "}\n}", true},
		{"http://:PORT {\nbind ::\nasync_proxy {\n" + bcryptUsers + "}\n}", true},
		{"http://:PORT {\nbind 127.0.0.1 0.0.0.0\nasync_proxy {\n" + bcryptUsers + "}\n}", true},
		{`http://:PORT {
	bind 0.0.0.0
	async_proxy
}`, false},
		{"http://:PORT {\nbind 127.0.0.1\nasync_proxy {\n" + bcryptUsers + "}\n}", false},
		{"http://:PORT {\nbind localhost\nasync_proxy {\n" + bcryptUsers + "}\n}", false},
		{"http://:PORT {\nbind unix/" + t.TempDir() + "/socket\nasync_proxy {\n" + bcryptUsers + "}\n}", false},
		{"https://:PORT {\nbind 0.0.0.0\ntls internal {\non_demand\n}\nasync_proxy {\n" + bcryptUsers + "}\n}", false},
		{"http://:PORT {\nbind " + handedOver("0.0.0.0:0") + "\nasync_proxy {\n" + bcryptUsers + "}\n}", true},
		{"http://:PORT {\nbind " + handedOver("127.0.0.1:0") + "\nasync_proxy {\n" + bcryptUsers + "}\n}", false},
	} {
		w.forgetLogs()
		globals := strings.Replace(w.globals(), "{\n", "{\nskip_install_trust\n", 1)
		loadCaddyfile(t, globals+strings.ReplaceAll(row.site, "PORT", port))
		w.waitLog("async-proxy listening", 1)
		data, err := os.ReadFile(w.logs)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(data), `"msg":"passwords are sent in clear text`); got != row.want {
			t.Errorf("%s\nwarned about: %v, want %v", row.site, got, row.want)
		}
	}
}

// The settings on the status page show which clients may use the proxy.
func TestClientsInTheSettings(t *testing.T) {
	w := newWorld(t, "", nil)
	for options, want := range map[string]status.Setting{
		"":                            {Option: "clients", Value: "private_ranges", Default: true},
		"clients all":                 {Option: "clients", Value: "all", Default: false},
		"clients 10.0.0.0/8 fd00::/8": {Option: "clients", Value: "10.0.0.0/8 fd00::/8", Default: false},
		authUsers:                     {Option: "clients", Value: "all", Default: true},
	} {
		w.load(w.site(options))
		var got []status.Setting
		for _, site := range program.status.Snapshot(time.Now()).Settings {
			for _, s := range site.Settings {
				if s.Option == "clients" {
					got = append(got, s)
				}
			}
		}
		if !reflect.DeepEqual(got, []status.Setting{want}) {
			t.Errorf("%q: %v, want %v", options, got, want)
		}
	}
}

// TestOpenToNamesAnonymousPolicies checks that the proxy's line at its start does not say that all
// clients log in when those of some policies need not.
func TestOpenToNamesAnonymousPolicies(t *testing.T) {
	w := newWorld(t, "", nil)
	guests, tills := "\npolicy guests {\nclients 127.0.0.2\nanonymous\n}", "\npolicy tills {\nclients 127.0.0.3\nanonymous\n}"
	for _, row := range []struct{ policies, want string }{
		{"", "users on this machine who log in"},
		{"\npolicy staff {\nclients 127.0.0.2\n}", "users on this machine who log in"},
		{guests, "users on this machine who log in and anonymous clients of the policy guests"},
		{guests + tills, "users on this machine who log in and anonymous clients of the policies guests tills"},
	} {
		w.forgetLogs()
		w.load(w.site(bcryptUsers + row.policies))
		if got := w.waitLog("async-proxy listening", 1)[0]["open_to"]; got != row.want {
			t.Errorf("%q: open to %v, want %s", row.policies, got, row.want)
		}
	}
}
