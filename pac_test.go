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
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dop251/goja"
)

// pacRuntime runs a script as browsers do, of whose functions it needs one.
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
		t.Fatalf("there is no function\n%s", script)
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

func TestPAC(t *testing.T) {
	many := filepath.Join(t.TempDir(), "many")
	var lines strings.Builder
	for i := range 2 * maxPACConditions {
		fmt.Fprintf(&lines, "h%04d.example\n", i)
	}
	if err := os.WriteFile(many, []byte(lines.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		rules, proxied, direct string
	}{
		{"", "http://example.com/ https://example.com/ http://8.8.8.8/ http://172.32.0.1/ http://[2606:4700::1]/ ftp://example.com/ http://example.com:8080/a:25/ http://u@example.com:80/",
			"http://intranet/ http://localhost/ http://LOCALHOST:8080/ http://a.localhost/ http://printer.local/ http://127.0.0.1/ http://127.1.2.3:80/ http://10.1.2.3/ http://192.168.1.1/ http://172.16.0.1/ http://169.254.169.254/ http://100.64.0.1/ http://[::1]/ http://[fd00::1]/ http://[fe80::1]/ http://0.0.0.0/ http://example.com:25/ http://own.example/ http://127.0.0.1:1/"},
		{"deny ads.example *.ads.test 8.8.8.0/24", "http://x.ads.example/ http://ads.test/ http://8.8.9.1/ http://bads.test/", "http://ads.example/ http://ADS.example/ http://a.b.ads.test/ http://8.8.8.8/ http://ads.example./"},
		{"allow *.good.test:443 1.1.1.1\ndeny all", "https://a.good.test/ http://a.good.test:443/ http://1.1.1.1/", "http://a.good.test/ https://good.test/ https://example.com/ http://8.8.8.8/"},
		{"allow 10.0.0.0/8", "http://10.1.2.3/ http://example.com/", "http://192.168.1.1/"},
		{"allow private", "http://10.1.2.3/ http://192.168.1.1/", "http://intranet/"},
		{"deny public", "http://example.com/", "http://8.8.8.8/"},
		{"allow all", "http://example.com/ http://8.8.8.8/", "http://10.1.2.3/"},
		{"ports 80 443 8000-8999", "http://example.com/ https://example.com/ http://example.com:8500/", "http://example.com:9000/ http://example.com:22/ https://example.com:25/"},
		{"deny all:8080", "http://example.com/", "http://example.com:8080/"},
		// What is allowed is the proxy's, though it would go DIRECT otherwise, and
		// though not all of a rule can be said.
		{"allow intranet printer.local app.localhost", "http://intranet/ http://printer.local/ http://app.localhost/", "http://extranet/ http://scanner.local/ http://localhost/"},
		{"allow all 10.0.0.0/8", "http://example.com/ http://10.1.2.3/", "http://intranet/ http://192.168.1.1/"},
		{"allow private", "http://[fd00::1]/ http://[2001:db8::1]/ http://[::1]/", "http://169.254.169.254/ http://[fe80::1]/ http://0.0.0.0/"},
		{"allow public\ndeny all", "http://8.8.8.8/ http://[2606:4700::1]/ http://[2001:4860::1]/", "http://10.1.2.3/ http://[fd00::1]/ http://example.com/"},
		{"allow [2001:db8::]:80\nallow 2606:4700::/32\ndeny all", "http://[2606:4700::1]/ http://[2001:db8::]/", "http://8.8.8.8/ http://example.com/"},
		{"allow_from static 8.8.8.0/24\ndeny all", "http://8.8.8.8/", "http://example.com/"},
		{"allow_file " + many + "\ndeny all", "http://h0001.example/ http://h1999.example/", ""},
		{"deny_file " + many, "http://example.com/", "http://h0001.example/"},
		{"report_only rules\nports 443\ndeny ads.example", "http://ads.example/ http://example.com:25/", "http://10.1.2.3/"},
		{"report_only rules\ndeny all\nallow 10.1.0.0/16", "http://10.1.2.3/", "http://10.2.2.3/"},
	} {
		w := newWorld(t, "serve_pac\nhosts own.example\n"+tc.rules, nil)
		conn := w.dial()
		conn.send("GET /proxy.pac HTTP/1.1\nHost: " + w.proxy + "\n\n")
		res, script := conn.response(http.MethodGet)
		if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "application/x-ns-proxy-autoconfig" {
			t.Fatalf("%s, Content-Type %q", res.Status, res.Header.Get("Content-Type"))
		}
		find := pacRuntime(t, script)
		for url := range strings.FieldsSeq(tc.proxied) {
			if got, want := find(url, pacHost(url)), "PROXY "+w.proxy; got != want {
				t.Errorf("%q: %s: %s, want %s", tc.rules, url, got, want)
			}
		}
		for url := range strings.FieldsSeq(tc.direct) {
			if got := find(url, pacHost(url)); got != "DIRECT" {
				t.Errorf("%q: %s: %s, want DIRECT", tc.rules, url, got)
			}
		}
	}
}

// pacHost is the host that browsers give to FindProxyForURL.
func pacHost(url string) string {
	_, rest, _ := strings.Cut(url, "://")
	rest, _, _ = strings.Cut(rest, "/")
	host, _, _ := cutPort(rest[strings.IndexByte(rest, '@')+1:])
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
	// Another path is the next handler's, and HEAD has no content.
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
