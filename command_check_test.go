// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// writeCertificate writes the tests' certificate and its key, and returns their names for the
// option tls.
func writeCertificate(t *testing.T) string {
	t.Helper()
	certificate, key := filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	private, err := x509.MarshalPKCS8PrivateKey(tlsCertificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		certificate: {Type: "CERTIFICATE", Bytes: tlsCertificate.Certificate[0]},
		key:         {Type: "PRIVATE KEY", Bytes: private},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certificate + " " + key
}

// TestCommandCheck checks every kind of listener of one Caddy, and that the checks leave no trace.
func TestCommandCheck(t *testing.T) {
	certificate := writeCertificate(t)
	ca, _, _ := strings.Cut(certificate, " ")
	socket := filepath.Join(t.TempDir(), "proxy.sock")
	ports := map[string]string{"tls": freeAddress(t), "mtls": freeAddress(t), "proxied": freeAddress(t), "route": freeAddress(t)}
	site := func(port, scheme, options string) string {
		return fmt.Sprintf("%s://:%s {\n%s\nasync_proxy {\nburst 1\nrefill 0.00001\n}\n}\n", scheme, strings.Split(ports[port], ":")[1], options)
	}
	wrapped := func(port, wrappers string) string {
		return fmt.Sprintf("servers %s {\nlistener_wrappers {\nproxy_protocol {\nallow 192.0.2.0/24\nfallback_policy REQUIRE\n}\n%s\n}\n}\n", ports[port], wrappers)
	}
	c := binaryStart(t, binaryOptions{global: wrapped("proxied", "tls\nasync_proxy") + wrapped("route", "")})
	config := c.caddyfile("burst 1\nrefill 0.00001") +
		site("tls", "https", "tls "+certificate) +
		site("mtls", "https", "tls "+certificate+" {\nclient_auth {\nmode require_and_verify\ntrust_pool file "+ca+"\n}\n}") +
		site("proxied", "https", "tls "+certificate) +
		site("route", "http", "") +
		"http:// {\nbind unix/" + socket + "\nasync_proxy\n}\n"
	if code, text := c.ask(http.MethodPost, "/load", config); code != http.StatusOK {
		t.Fatalf("/load: status %d: %s", code, text)
	}
	check := func(args ...string) (string, error) {
		out, err := commandOf(t, append([]string{"async-proxy", "check", "--address", c.admin, "--timeout", patience.String()}, args...)...).CombinedOutput()
		return string(out), err
	}
	for range 3 { // more than burst
		out, err := check()
		for _, address := range []string{c.proxy, socket, ports["tls"], ports["mtls"], ports["proxied"], ports["route"]} {
			if err != nil || !strings.Contains(out, address+" answers\n") {
				t.Fatalf("%s: %v, %s", address, err, out)
			}
		}
	}
	var stats status.Stats
	if err := fetchAdmin(c.admin, "stats", &stats); err != nil {
		t.Fatal(err)
	}
	if r := stats.Requests; r.Forwarded+r.Tunnels+r.PassedOn+r.RateLimited+r.Refused+r.Failed != 0 || stats.Clients.Tracked != 0 {
		t.Errorf("the checks were counted: %+v", stats)
	}
	data, err := os.ReadFile(c.logs)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var entry struct{ Level, Logger, Msg string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(entry.Logger, "http.handlers.async_proxy") && entry.Level != "debug" && entry.Msg != "async-proxy listening" && !strings.Contains(entry.Msg, "option hosts") && !strings.Contains(entry.Msg, "strict_sni_host") && !strings.Contains(entry.Msg, "served by Caddy") {
			t.Errorf("the checks left %s", line)
		}
	}

	// The process hangs.
	if err := c.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if out, err := check("--timeout", "200ms"); err == nil || !strings.Contains(out, "no response within the time limit") {
		t.Errorf("a process that hangs: %v, %s", err, out)
	}
	if err := c.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}

	// Caddy runs, but no proxy.
	if code, text := c.ask(http.MethodPost, "/load", "{\nadmin "+c.admin+"\npersist_config off\n}\n"); code != http.StatusOK {
		t.Fatalf("/load: status %d: %s", code, text)
	}
	if out, err := commandOf(t, "async-proxy", "status", "--address", c.admin).CombinedOutput(); err == nil || !strings.Contains(string(out), "no async_proxy is running") {
		t.Errorf("status without a proxy: %v, %s", err, out)
	}
	if out, err := check(); err == nil || !strings.Contains(out, "no async_proxy is running") {
		t.Errorf("no proxy: %v, %s", err, out)
	}
	for args, want := range map[string]string{
		"--timeout 0s":          "timeout 0s: expected a positive duration such as 3s",
		"--address localhost":   `address "localhost": expected an address with a port`,
		"--address 127.0.0.1:1": "use --address for another admin endpoint",
	} {
		cmd := commandOf(t, append([]string{"async-proxy", "check"}, strings.Fields(args)...)...)
		out, err := cmd.CombinedOutput()
		if exit, _ := err.(*exec.ExitError); exit == nil || exit.ExitCode() != 1 || !strings.Contains(strings.ReplaceAll(string(out), `\"`, `"`), want) {
			t.Errorf("%s: %v, %s, want %q", args, err, out, want)
		}
	}
}

// TestProbe checks what is no answer.
func TestProbe(t *testing.T) {
	tcp := func(serve func(*net.TCPConn)) status.Listener {
		return status.Listener{Network: "tcp", Address: listen(t, serve)}
	}
	says := func(text string) func(*net.TCPConn) {
		return func(conn *net.TCPConn) {
			fmt.Fprint(conn, text)
			_ = conn.CloseWrite()
		}
	}
	silent := tcp(func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
	silentTLS := silent
	silentTLS.TLS = true
	otherTLS := tcp(says("HTTP/1.1 200 OK\r\n\r\n"))
	otherTLS.TLS = true
	for name, tc := range map[string]struct {
		listener status.Listener
		want     string // "" if that is an answer
	}{
		"nothing listens": {status.Listener{Network: "tcp", Address: freeAddress(t)}, unix.ECONNREFUSED.Error()},
		"silence":         {silent, "timeout"},
		"silence, TLS":    {silentTLS, "timeout|deadline"},
		"a close":         {tcp(says("")), "unexpected EOF"},
		"no HTTP":         {tcp(says("220 ready\r\n")), "malformed HTTP"},
		"no TLS":          {otherTLS, "does not look like a TLS handshake"},
		"503":             {tcp(says("HTTP/1.1 503 No\x1b\r\nContent-Length: 0\r\n\r\n")), `the response is 503 No`},
		"404":             {tcp(says("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")), ""},
	} {
		t.Run(name, func(t *testing.T) {
			limit := patience
			if strings.HasPrefix(name, "silence") {
				limit = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			err := probe(ctx, tc.listener)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !regexp.MustCompile(tc.want).MatchString(err.Error()) || !strings.Contains(err.Error(), tc.listener.Address)) {
				t.Errorf("%v, want %q", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), "\x1b") {
				t.Errorf("control characters in %q", err)
			}
		})
	}
}

// TestCommandVersion checks that the program names the versions of all of its parts, in both of its
// commands.
func TestCommandVersion(t *testing.T) {
	out, err := commandOf(t, "version").Output()
	if want := `^async_proxy \S+ \(([0-9a-f]{12}, )?go1\.\S+\) in Caddy v2\.\S+ h1:\S+\n$`; err != nil || !regexp.MustCompile(want).Match(out) {
		t.Errorf("%v, %q, want %s", err, out, want)
	}
	w := commandStart(t)
	out, err = commandOf(t, "async-proxy", "status", "--address", w.logs).Output()
	if want := `^async_proxy \S+ \(([0-9a-f]{12}, )?go1\.\S+\) in Caddy v2\.\S+, up `; err != nil || !regexp.MustCompile(want).Match(out) {
		t.Errorf("%v, %q, want %s", err, out, want)
	}
}

// A mistake in CADDY_ADMIN is one in CADDY_ADMIN, not in an address that the command does not name.
func TestCommandsCheckAdminVariable(t *testing.T) {
	for _, command := range [][]string{{"status"}, {"check"}, {"explain", "--client", "10.0.0.1", "a:80"}} {
		cmd := commandOf(t, append([]string{"async-proxy"}, command...)...)
		cmd.Env = append(cmd.Env, "CADDY_ADMIN=garbage")
		out, err := cmd.CombinedOutput()
		if want := `CADDY_ADMIN \"garbage\": expected an address with a port`; err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, %s, want %s", command[0], err, out, want)
		}
	}
}
