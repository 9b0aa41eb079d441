// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// fencedSquid matches the code blocks of a Markdown file that are configurations of Squid.
var fencedSquid = regexp.MustCompile("(?ms)^```squid\n(.*?)^```")

// TestMigratingFromSquid compares the configuration of Squid in docs/migrating.md with the policies
// beside it: both ask the same clients for credentials, and deny the same requests.
func TestMigratingFromSquid(t *testing.T) {
	text, err := os.ReadFile("docs/migrating.md")
	if err != nil {
		t.Fatal(err)
	}
	at := fencedSquid.FindSubmatchIndex(text)
	if at == nil {
		t.Fatal("docs/migrating.md has no configuration of Squid")
	}
	// The subnets of the example are subnets of loopback here, which a client can choose among.
	local := strings.NewReplacer("192.168.", "127.0.", "http_port 3128\n", "", "/etc/squid/passwd", "/dev/null", "async_proxy {", "async_proxy {\ndial_timeout 200ms")
	hosts := filepath.Join(t.TempDir(), "hosts") // so that Squid does not wait for DNS
	if err := os.WriteFile(hosts, []byte("127.0.0.9 example.com code.example.com packages.example.com eu.packages.example.com\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(hosts); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		_ = os.Chmod(dir, 0o755) // Squid changes to another user
	}
	squid := startPeer(t, "squid", peerProxies[0].args, strings.Replace(peerProxies[0].config, "acl loop src 127.0.0.0/8\nhttp_access allow loop\n",
		"hosts_file "+hosts+"\n"+local.Replace(string(text[at[2]:at[3]])), 1))
	block := fenced.FindSubmatch(text[at[1]:])
	proxy := freeAddress(t)
	loadCaddyfile(t, "{\nadmin off\n}\n"+strings.Replace(local.Replace(string(block[1])), ":3128, proxy.example.com:3128 {", strings.TrimPrefix(proxy, "127.0.0.1")+" {\nbind 127.0.0.1", 1))

	for _, request := range []struct{ from, request, host string }{
		{"127.0.10.1", "CONNECT example.com:443", "example.com:443"},
		{"127.0.10.1", "GET http://example.com/", "example.com"},
		{"127.0.10.1", "CONNECT www.ads.example.net:443", "www.ads.example.net:443"},
		{"127.0.20.1", "CONNECT code.example.com:443", "code.example.com:443"},
		{"127.0.20.1", "GET http://eu.packages.example.com/a", "eu.packages.example.com"},
		{"127.0.20.1", "GET http://packages.example.com/a", "packages.example.com"},
		{"127.0.20.1", "CONNECT example.com:443", "example.com:443"},
		{"127.0.20.1", "CONNECT code.example.com:22", "code.example.com:22"},
		{"127.0.30.1", "CONNECT example.com:443", "example.com:443"},
		{"127.0.30.1", "CONNECT example.com:80", "example.com:80"},
		{"127.0.30.1", "GET http://example.com:8080/", "example.com:8080"},
		{"127.0.30.1", "GET http://ads.example.net/", "ads.example.net"},
		{"127.0.40.1", "CONNECT example.com:443", "example.com:443"},
	} {
		text := request.request + " HTTP/1.1\r\nHost: " + request.host + "\r\n\r\n"
		want, got := verdict(t, squid, request.from, text), verdict(t, proxy, request.from, text)
		// Ours asks for credentials before it says anything about rules.
		if got != want && !(want == http.StatusForbidden && got == http.StatusProxyAuthRequired && request.from == "127.0.10.1") {
			t.Errorf("%s from %s: %d, and %d from Squid", request.request, request.from, got, want)
		}
	}
}

// verdict sends a request to a proxy from a local address, and returns the status of a denial, or
// 200 if the proxy tried to reach the destination.
func verdict(t *testing.T, proxy, from, request string) int {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 10 * time.Second}
	conn, err := dialer.Dial("tcp", proxy)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := conn.Write([]byte(request)); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("%s: %v", request, err)
	}
	if res.StatusCode == http.StatusForbidden || res.StatusCode == http.StatusProxyAuthRequired {
		return res.StatusCode
	}
	return http.StatusOK
}
