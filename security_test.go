// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// The tests that docs/security.md names for each threat exist.
func TestSecurityNamesTests(t *testing.T) {
	out, err := exec.Command("grep", "-rhoE", "^func Test\\w+", "--include=*_test.go", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	exists := make(map[string]bool)
	for line := range strings.Lines(string(out)) {
		exists[strings.TrimPrefix(strings.TrimSpace(line), "func ")] = true
	}
	rows := 0
	for _, row := range regexp.MustCompile("(?m)^\\| .* \\| (`Test.*) \\|$").FindAllStringSubmatch(documents(t)["docs/security.md"], -1) {
		rows++
		for _, name := range strings.Split(row[1], ", ") {
			if !exists[strings.Trim(name, "`")] {
				t.Errorf("there is no %s", name)
			}
		}
	}
	if rows < 25 {
		t.Errorf("the table has only %d threats with tests", rows)
	}
}

// A proxy without options serves private clients only, sends no mail, and connects none of them to a
// private address.
func TestSecurityDefaults(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	startMigrated(t, ":3128 {\n\tasync_proxy {\n\t\tburst 100\n\t}\n}\n")
	for request, want := range map[string]int{
		"10.1.2.3 GET http://www.example.com/":             http.StatusOK,
		"10.1.2.3 CONNECT www.example.com:8443":            http.StatusOK,
		"10.1.2.3 CONNECT www.example.com:25":              http.StatusForbidden,
		"10.1.2.3 GET http://local.example.com/":           http.StatusForbidden,
		"10.1.2.3 GET http://intranet.example.com/":        http.StatusForbidden,
		"10.1.2.3 GET http://169.254.169.254/":             http.StatusForbidden,
		"127.0.0.1 GET http://169.254.169.254/":            http.StatusForbidden,
		"127.0.0.1 GET http://127.0.0.1/":                  http.StatusOK,
		"127.0.0.1 GET http://127.0.0.1:3128/":             http.StatusForbidden,
		"127.0.0.1 CONNECT 127.0.0.1:3128":                 http.StatusForbidden,
		"8.8.4.4 GET http://www.example.com/":              http.StatusForbidden,
		"2001:4860:4860::8888 CONNECT www.example.com:443": http.StatusForbidden,
	} {
		from, rest, _ := strings.Cut(request, " ")
		if got := ask(t, "127.0.0.1:3128", from, rest, "", ""); got != want {
			t.Errorf("%s: %d, want %d", request, got, want)
		}
	}
}

// hardened is the running configuration of docs/security.md.
type hardened struct {
	t     *testing.T
	admin string // the socket
	logs  string
}

// startHardened runs the configuration of docs/security.md, with a certificate of the tests.
func startHardened(t *testing.T) *hardened {
	t.Helper()
	_, text, _ := strings.Cut(documents(t)["docs/security.md"], "## A hardened configuration")
	block := fenced.FindStringSubmatch(text)
	if block == nil {
		t.Fatal("docs/security.md has no hardened configuration")
	}
	dir := t.TempDir()
	h := &hardened{t, filepath.Join(dir, "admin.sock"), filepath.Join(dir, "caddy.log")}
	users := filepath.Join(dir, "users")
	hash, err := bcrypt.GenerateFromPassword([]byte("wonderland"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(users, []byte("alice:"+string(hash)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	certificate, key := conntest.CertificateFiles(t)
	config := block[1]
	for _, change := range [][2]string{
		{"unix//run/caddy/admin.sock", "unix/" + h.admin + "\n\tpersist_config off\n\tlog {\n\toutput file " + h.logs + "\n\tformat json\n\tlevel DEBUG\n\t}"},
		{"/etc/caddy/proxy-users", users},
		{":3128, proxy.example.com:3128 {", "https://:3128 {\n\ttls " + certificate + " " + key},
		{"async_proxy {\n\t\thosts", "async_proxy {\n\t\tresolvers 127.0.0.1\n\t\thosts"},
	} {
		if !strings.Contains(config, change[0]) {
			t.Fatalf("the configuration has no %q", change[0])
		}
		config = strings.Replace(config, change[0], change[1], 1)
	}
	loadCaddyfile(t, config)
	return h
}

// dial connects to the proxy over TLS.
func (h *hardened) dial(from string) net.Conn {
	h.t.Helper()
	dialer := &tls.Dialer{NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}, Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}}
	conn, err := dialer.Dial("tcp", "127.0.0.1:3128")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn
}

// ask sends a request and returns the status and the content.
func (h *hardened) ask(from, request, fields string) (int, string) {
	h.t.Helper()
	conn := h.dial(from)
	method, target, _ := strings.Cut(request, " ")
	host := strings.SplitN(strings.TrimPrefix(target, "http://"), "/", 2)[0]
	fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: %s\r\n%s\r\n", request, host, fields)
	res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		h.t.Fatalf("%s: %v", request, err)
	}
	if method == http.MethodConnect {
		return res.StatusCode, ""
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		h.t.Errorf("%s: %v", request, err)
	}
	return res.StatusCode, string(body)
}

// TestHardened sends real requests to the configuration of docs/security.md, for each line of its list.
func TestHardened(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	h := startHardened(t)
	alice := "Proxy-Authorization: " + login("alice", "wonderland") + "\r\n"
	for request, want := range map[string]int{
		"GET http://www.example.com/":             http.StatusOK,
		"CONNECT www.example.com:443":             http.StatusOK,
		"CONNECT www.example.com:80":              http.StatusForbidden,
		"GET http://www.example.com:8080/":        http.StatusForbidden,
		"TRACE http://www.example.com/":           http.StatusForbidden,
		"GET http://www.example.org/":             http.StatusForbidden,
		"CONNECT 8.8.8.8:443":                     http.StatusForbidden,
		"GET http://intranet.example.com/":        http.StatusForbidden,
		"GET http://local.example.com/":           http.StatusForbidden,
		"CONNECT local.example.com:443":           http.StatusForbidden,
		"GET http://169.254.169.254/latest/":      http.StatusForbidden,
		"GET http://127.0.0.1:2019/config/":       http.StatusForbidden,
		"GET http://[64:ff9b::a9fe:a9fe]/latest/": http.StatusForbidden,
	} {
		if status, _ := h.ask("10.1.2.3", request, alice); status != want {
			t.Errorf("%s: %d, want %d", request, status, want)
		}
		if status, _ := h.ask("10.1.2.3", request, ""); status != http.StatusProxyAuthRequired {
			t.Errorf("%s without a login: %d", request, status)
		}
		if status, _ := h.ask("127.0.0.1", request, alice); status != http.StatusForbidden {
			t.Errorf("%s from elsewhere: %d", request, status)
		}
	}
	_, sent := h.ask("10.1.2.3", "GET http://www.example.com/", alice+"From: a@example.com\r\nReferer: http://intranet/\r\nX-Forwarded-For: 10.1.2.3\r\n")
	for _, field := range []string{"From:", "Referer:", "10.1.2.3", "Authorization"} {
		if strings.Contains(sent, field) {
			t.Errorf("the origin got\n%s", sent)
		}
	}
	if status, _ := h.ask("10.1.2.3", "GET http://www.example.com/", alice+"X-Long: "+strings.Repeat("x", 80<<10)+"\r\n"); status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a head of 80 KiB: %d", status)
	}
	h.checkTunnelLimit(alice)
	h.checkGuesses()
	h.checkTraces()
}

// checkTunnelLimit opens as many tunnels as a client may have, and one more. The first is open since
// the requests before.
func (h *hardened) checkTunnelLimit(alice string) {
	h.t.Helper()
	for i := 1; i <= 100; i++ {
		if i%50 == 1 { // a burst is 100 requests
			h.fill("user alice")
		}
		conn := h.dial("10.1.2.4")
		fmt.Fprintf(conn, "CONNECT www.example.com:443 HTTP/1.1\r\nHost: www.example.com:443\r\n%s\r\n", alice)
		res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: http.MethodConnect})
		if err != nil {
			h.t.Fatal(err)
		}
		if limited := res.StatusCode == http.StatusTooManyRequests && strings.Contains(res.Header.Get("Proxy-Status"), "connection_limit_reached"); limited != (i == 100) {
			h.t.Fatalf("tunnel %d: %d %s", i+1, res.StatusCode, res.Header.Get("Proxy-Status"))
		}
	}
}

// fill fills a client's bucket through the admin socket.
func (h *hardened) fill(client string) {
	h.t.Helper()
	socket := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", h.admin) }}}
	defer socket.CloseIdleConnections()
	r, err := http.NewRequest(http.MethodDelete, "http://localhost/async_proxy/clients/"+url.PathEscape(client), nil)
	if err != nil {
		h.t.Fatal(err)
	}
	res, err := socket.Do(r)
	if err != nil {
		h.t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode >= 300 {
		h.t.Fatalf("filling the bucket of %s: %s", client, res.Status)
	}
}

// checkGuesses guesses passwords until the client has to wait.
func (h *hardened) checkGuesses() {
	h.t.Helper()
	for i := range 10 {
		if status, _ := h.ask("10.9.8.7", "GET http://www.example.com/", "Proxy-Authorization: "+login("alice", fmt.Sprint("guess", i))+"\r\n"); status != http.StatusProxyAuthRequired {
			h.t.Errorf("guess %d: %d", i+1, status)
		}
	}
	if status, _ := h.ask("10.9.8.7", "GET http://www.example.com/", "Proxy-Authorization: "+login("alice", "guess")+"\r\n"); status != http.StatusTooManyRequests {
		h.t.Errorf("guess 11: %d", status)
	}
}

// checkTraces checks what the log says of all that, and that nothing listens for administrators but
// the socket.
func (h *hardened) checkTraces() {
	h.t.Helper()
	log, err := os.ReadFile(h.logs)
	if err != nil {
		h.t.Fatal(err)
	}
	for _, secret := range []string{"wonderland", "guess1", login("alice", "wonderland")} {
		if strings.Contains(string(log), secret) {
			h.t.Errorf("the log contains %s", secret)
		}
	}
	if !strings.Contains(string(log), `"user":"alice"`) || strings.Contains(string(log), "clients are served by Caddy's HTTP server") {
		h.t.Errorf("the log lacks the user, or something keeps async_proxy from serving the clients itself")
	}
	if binaryListens("127.0.0.1:2019") {
		h.t.Error("the admin endpoint listens on TCP")
	}
	info, err := os.Stat(h.admin)
	if err != nil || info.Mode().Perm()&0o077 != 0 {
		h.t.Errorf("the admin socket: %v, %v", info.Mode(), err)
	}
}
