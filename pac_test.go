// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/dop251/goja"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// pacRuntime runs a script as browsers do, with the only helper function that it needs.
func pacRuntime(t *testing.T, script string) func(url, host string) string {
	t.Helper()
	vm := goja.New()
	if err := vm.Set("isInNet", func(host, network, mask string) bool {
		addr, err := netip.ParseAddr(host)
		if err != nil {
			t.Errorf("isInNet(%q) would resolve a name", host)
			return false
		}
		bits, _ := net.IPMask(net.ParseIP(mask).To4()).Size()
		return netip.PrefixFrom(netip.MustParseAddr(network), bits).Contains(addr)
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.RunString(script); err != nil {
		t.Fatalf("%v\n%s", err, script)
	}
	find, ok := goja.AssertFunction(vm.Get("FindProxyForURL"))
	if !ok {
		t.Fatalf("the script lacks the function\n%s", script)
	}
	return func(url, host string) string {
		result, err := find(goja.Undefined(), vm.ToValue(url), vm.ToValue(host))
		if err != nil {
			t.Errorf("%s: %v\n%s", url, err, script)
			return ""
		}
		return result.String()
	}
}

// The script bypasses the proxy only for destinations that are closed by default or listed
// by the operator. Rule denials are left to the proxy.
func TestPAC(t *testing.T) {
	const private = "http://10.1.2.3/ http://192.168.1.1/ http://172.16.0.1/ http://100.64.0.1/ http://127.0.0.1/ http://127.1.2.3:80/ http://169.254.169.254/ http://0.0.0.0/ http://[::1]/ http://[fd00::1]/ http://[fe80::1]/ http://[2001:db8::1]/"
	const near = "http://intranet/ http://localhost/ http://LOCALHOST:8080/ http://a.localhost/ http://printer.local/"
	const public = "http://example.com/ https://example.com/ http://8.8.8.8/ http://172.32.0.1/ http://[2606:4700::1]/ http://[::ffff:808:808]/ ftp://example.com/ http://example.com:8080/a:25/ http://u@example.com:80/ http://example.com:25/"
	for _, tc := range []struct {
		options, proxied, direct string
	}{
		{"", public, private + " " + near + " http://own.example/ http://127.0.0.1:1/"},
		// Deny rules and ports do not bypass the proxy.
		{"deny ads.example *.ads.test 8.8.8.0/24", public + " http://ads.example/ http://a.ads.test/ http://8.8.8.8/", private + " " + near},
		{"allow *.good.test:443 1.1.1.1\ndeny all", public + " https://a.good.test/ http://a.good.test/", private + " " + near},
		{"deny public", public, private + " " + near},
		{"deny private", public, private + " " + near},
		{"ports 80 443", public + " http://example.com:9000/ http://example.com:22/", private + " " + near},
		{"deny all:8080", public, private + " " + near},
		{"report_only rules\nports 443\ndeny all", public, private + " " + near},
		// If a rule opens a part of a class that is closed by default, the whole class goes
		// to the proxy: only the proxy knows the rules.
		{"allow 10.1.0.0/16", public + " http://10.1.2.3/ http://10.2.2.3/", "http://192.168.1.1/ http://127.0.0.1/ http://[fd00::1]/ " + near},
		{"allow intern.example.com 127.0.0.1\ndeny all", public + " http://news.example.org/ http://127.0.0.1/", "http://10.1.2.3/ " + near},
		{"allow fd12::/16", public + " http://[fd12::1]/ http://[fd00::1]/", "http://10.1.2.3/ http://[fe80::1]/ http://[::1]/ " + near},
		{"allow private", public + " http://10.1.2.3/ http://192.168.1.1/ http://[fd00::1]/ http://[2001:db8::1]/ http://[::1]/", "http://169.254.169.254/ http://[fe80::1]/ http://0.0.0.0/ " + near},
		{"allow_from static 10.0.0.0/8", public + " http://10.1.2.3/ http://192.168.1.1/", near},
		{"allow intranet\ndeny all", public + " http://intranet/ http://extranet/", private + " http://localhost/ http://a.localhost/ http://printer.local/"},
		{"allow printer.local app.localhost\ndeny all", public + " http://printer.local/ http://scanner.local/ http://app.localhost/", private + " http://intranet/ http://localhost/"},
		{"allow *.local localhost\ndeny all", public + " http://printer.local/ http://localhost/", private + " http://intranet/ http://a.localhost/"},
		{"allow all 10.0.0.0/8\ndeny ads.example", public + " http://10.1.2.3/", "http://192.168.1.1/ " + near},
		// The operator's list takes precedence.
		{`serve_pac {
	direct *.corp.example WIKI.example 8.8.8.0/24 [2606:4700::]
	direct 2001:4860::/32
}
deny all`,
			"http://corp.example/ http://x.wiki.example/ http://8.8.9.1/ http://[2606:4700::1]/ http://xcorp.example/ http://[2001:4861::1]/ http://example.com/",
			"http://a.corp.example/ https://A.B.corp.example/ http://wiki.example/ http://wiki.example./ http://8.8.8.8/ http://[2606:4700::]/ http://[2001:4860:1:2:3:4:5:6]/ http://[2001:4860::]/ " + private + " " + near},
		{`serve_pac {
	direct 10.1.0.0/16
}
allow 10.0.0.0/8`, "http://10.2.2.3/", "http://10.1.2.3/"},
		{`serve_pac {
	direct private_ranges
}
allow private`, "http://169.254.1.1.example/", "http://10.2.2.3/ http://[fd00::1]/"},
	} {
		options := tc.options
		if !strings.Contains(options, "serve_pac") {
			options = "serve_pac\n" + options
		}
		w := newWorld(t, "hosts own.example\n"+options, nil)
		conn := w.dial()
		conn.send("GET /proxy.pac HTTP/1.1\nHost: proxy.example:8080\n\n")
		res, script := conn.response(http.MethodGet)
		if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "application/x-ns-proxy-autoconfig" {
			t.Fatalf("%s, Content-Type %q", res.Status, res.Header.Get("Content-Type"))
		}
		find := pacRuntime(t, script)
		for url := range strings.FieldsSeq(tc.proxied) {
			if got, want := find(url, pacHost(url)), "PROXY proxy.example:8080"; got != want {
				t.Errorf("%q: %s: %s, want %s", tc.options, url, got, want)
			}
		}
		for url := range strings.FieldsSeq(tc.direct) {
			if got := find(url, pacHost(url)); got != "DIRECT" {
				t.Errorf("%q: %s: %s, want DIRECT", tc.options, url, got)
			}
		}
	}
}

// Any client may read the script, so it reveals no rules.
func TestPACRevealsNoRules(t *testing.T) {
	w := newWorld(t, "serve_pac", nil)
	script := func() string {
		conn := w.dial()
		conn.send("GET /proxy.pac HTTP/1.1\nHost: " + w.proxy + "\n\n")
		_, script := conn.response(http.MethodGet)
		return script
	}
	without := script()
	for _, rules := range []string{
		"deny secret.example *.secret.test 8.8.8.0/24", "allow secret.example 1.1.1.1:443\ndeny all", "ports 4711", "deny 10.1.2.0/24",
	} {
		w.load(w.site("serve_pac\n" + rules))
		if got := script(); got != without {
			t.Errorf("%q: the script is\n%s\nand without rules\n%s", rules, got, without)
		}
	}
	w.load(w.site("serve_pac\nallow 10.1.2.0/24 secret secret.local\ndeny all"))
	if got := script(); strings.Contains(got, "10.1.2") || strings.Contains(got, "secret") {
		t.Errorf("the script is\n%s", got)
	}
}

// pacHost returns the host that browsers pass to FindProxyForURL.
func pacHost(url string) string {
	_, rest, _ := strings.Cut(url, "://")
	rest, _, _ = strings.Cut(rest, "/")
	host, _, _ := hostport.Split(rest[strings.IndexByte(rest, '@')+1:])
	return host
}

func TestPACOfSites(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{options: "serve_pac /wpad.dat\n" + authUsers})
	for _, tc := range []struct{ address, host, want string }{
		{w.plain, w.plain, "PROXY " + w.plain},
		{w.plain, "proxy.example", "PROXY proxy.example:80"},
		{w.plain, "[2001:db8::1]", "PROXY [2001:db8::1]:80"},
		{w.tls, "proxy.example:8443", "HTTPS proxy.example:8443"},
		{w.tls, "proxy.example", "HTTPS proxy.example:443"},
		{w.plain, `a"-alert(1)-"`, ""},
	} {
		conn, err := net.Dial("tcp", tc.address)
		if err != nil {
			t.Fatal(err)
		}
		if tc.address == w.tls {
			conn = tls.Client(conn, clientTLS("http/1.1"))
		}
		fmt.Fprintf(conn, "GET /wpad.dat HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", tc.host)
		raw := &rawConn{t: t, r: bufio.NewReader(conn)}
		res, script := raw.response(http.MethodGet)
		conn.Close()
		if tc.want == "" {
			if res.StatusCode != http.StatusBadRequest {
				t.Errorf("%s: %s", tc.host, res.Status)
			}
			continue
		}
		if got := pacRuntime(t, script)("http://example.com/", "example.com"); got != tc.want {
			t.Errorf("%s at %s: %s, want %s", tc.host, tc.address, got, tc.want)
		}
	}
	if line := w.waitLog("request", 5)[0]; line["status"] != 200.0 || line["path"] != "/wpad.dat" {
		t.Errorf("line %v", line)
	}
	// Another path goes to the next handler, and HEAD has no content.
	conn := dialRaw(t, w.plain)
	conn.send("HEAD /wpad.dat HTTP/1.1\nHost: x\n\n")
	if res, body := conn.response(http.MethodHead); res.StatusCode != http.StatusOK || body != "" || res.ContentLength <= 0 {
		t.Errorf("%s %q %d", res.Status, body, res.ContentLength)
	}
	conn.send("POST /wpad.dat HTTP/1.1\nHost: x\nContent-Length: 0\n\n")
	if res, body := conn.response(http.MethodPost); strings.Contains(body, "FindProxyForURL") {
		t.Errorf("%s %q", res.Status, body)
	}
}
