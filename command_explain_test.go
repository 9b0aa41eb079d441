// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// explainExit runs `caddy async-proxy explain` and returns its exit status and output.
func explainExit(t *testing.T, args ...string) (exit int, stdout, stderr string) {
	t.Helper()
	cmd := commandOf(t, append([]string{"async-proxy", "explain"}, args...)...)
	var out, errors bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errors
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), strings.ReplaceAll(errors.String(), `\"`, `"`)
}

// TestCommandExplain checks the exit statuses and what is printed, for a running proxy and for a file.
func TestCommandExplain(t *testing.T) {
	w := commandStart(t, "--burst", "3", "--refill", "0.00001", "--allow", "127.0.0.0/8", "--deny", "all", "--clients", "127.0.0.0/8")
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, fmt.Appendf(nil, `{
	admin off
}

http://%s {
	async_proxy {
		burst   3
		refill  0.00001
		clients 127.0.0.0/8
		allow   127.0.0.0/8
		deny    all
	}
}
`, w.proxy[strings.LastIndexByte(w.proxy, ':'):]), 0o600); err != nil {
		t.Fatal(err)
	}
	origin := w.origin.Listener.Addr().String()
	for _, tc := range []struct {
		args string
		exit int
		want string // in the output
	}{
		{origin, 0, `CONNECT ` + origin + ` from 127.0.0.1: allowed
  policy           none     the directive's own options
  client           allowed  clients 127.0.0.0/8
  credentials      allowed  not required
  tokens           allowed  burst 3, refill 0.00001LEFT
  method           allowed  methods all
  port             allowed  ports all but 25
  ` + origin + `  allowed  allow 127.0.0.0/8
  route            direct
`},
		{"http://" + origin + "/", 0, "GET http://" + origin + "/ from 127.0.0.1: allowed\n"},
		{"10.0.0.1:443", 1, "  10.0.0.1:443  denied   deny all; to allow it: put an allow rule before it\n"},
		{"name.invalid:443", 2, "  name         allowed     no rule matches it\n  resolution   unresolved  lookup name.invalid."},
	} {
		for source, args := range map[string][]string{"; 127.0.0.1 has 3.0 tokens left": {"--address", w.logs}, "": {"--config", file}} {
			exit, out, errors := explainExit(t, append(args, "--client", "127.0.0.1", tc.args)...)
			if want := strings.Replace(tc.want, "LEFT", source, 1); exit != tc.exit || !strings.Contains(out, want) {
				t.Errorf("%s of %q: exit status %d, want %d\n%s%s\nwant\n%s", tc.args, args, exit, tc.exit, out, errors, want)
			}
			if source == "" {
				continue
			}
			var answer status.Explanations
			exit, out, errors = explainExit(t, append(args, "--json", "--client", "127.0.0.1", tc.args)...)
			if err := json.Unmarshal([]byte(out), &answer); err != nil || exit != tc.exit || len(answer.Sites) != 1 || (answer.Sites[0].Decision == status.Allowed) != (exit == 0) {
				t.Errorf("%s of %q: exit status %d, want %d: %v in %s%s", tc.args, args, exit, tc.exit, err, out, errors)
			}
		}
	}
}

// TestCommandExplainMistakes checks the errors, for which the exit status is 2.
func TestExplanationIsWhole(t *testing.T) {
	var out strings.Builder
	printExplanation(&out, &status.Explanation{Site: ":8080", Decision: status.Denied, Checks: []status.Check{
		{Check: "client", Outcome: status.Denied, Rule: "clients " + strings.Repeat("192.0.2.0/24 ", 100), Detail: "\x1b[2J", Hint: "add 127.0.0.1 to clients"},
	}})
	if text := out.String(); !strings.Contains(text, "…; \ufffd[2J; to allow it: add 127.0.0.1 to clients\n") {
		t.Errorf("%q", text)
	}
}

func TestCommandExplainMistakes(t *testing.T) {
	w := commandStart(t)
	dir := t.TempDir()
	for name, text := range map[string]string{
		"none.caddyfile": "http://:8080 {\n\trespond hello\n}\n", "broken.caddyfile": "http://:8080 {\n\tasync_proxy {\n\t\tburst x\n\t}\n}\n",
		"invalid.json":    `{"apps":{"http":{"servers":{"a":{"listen":[":8080"],"routes":[{"handle":[{"handler":"async_proxy","burst":-1}]}]}}}}}`,
		"proxy.caddyfile": "http://:8080 {\n\tasync_proxy\n}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct{ args, want string }{
		{"", "0 targets; expected one, as host:port or a URL"},
		{"a:80 b:80", "2 targets; expected one, as host:port or a URL"},
		{"a:80", "--client: missing; expected the IP address of the client"},
		{"--client office a:80", `--client "office": expected an IP address`},
		{"--client 10.0.0.0/8 a:80", `client "10.0.0.0/8": expected an IP address`},
		{"--clients 10.0.0.1 a:80", "unknown flag: --clients; did you mean --client?"},
		{"--client 10.0.0.1 --address 127.0.0.1:1 a:80", "connection refused; start the proxy, or use --address for another admin endpoint"},
		{"--client 10.0.0.1 --address localhost a:80", `--address "localhost": expected an address with a port`},
		{"--client 10.0.0.1 --address 127.0.0.1:1 --config x a:80", "--address: cannot be combined with --config"},
		{"--client 10.0.0.1 --adapter caddyfile a:80", "--adapter: expected --config as well"},
		{"--client 10.0.0.1 --address " + w.logs + " example.com", `"msg":"target "example.com" for CONNECT: the port is missing; expected host:port for CONNECT, or an http:// or https:// URL for other methods"}`},
		{"--client 10.0.0.1 --address " + w.logs + " --method GET a:80", "expected host:port for CONNECT, or an http:// or https:// URL"},
		{"--client 10.0.0.1 --config DIR/missing.json a:80", "no such file or directory"},
		{"--client 10.0.0.1 --config DIR/none.caddyfile a:80", "none.caddyfile has no async_proxy"},
		{"--client 10.0.0.1 --config DIR/broken.caddyfile a:80", "burst: the value 'x' is not valid"},
		{"--client 10.0.0.1 --config DIR/invalid.json a:80", "burst: the value '-1' is not valid; expected a whole number of tokens"},
		{"--client 10.0.0.1 --config DIR/proxy.caddyfile a", "the port is missing"},
	} {
		exit, out, errors := explainExit(t, strings.Fields(strings.ReplaceAll(tc.args, "DIR", dir))...)
		if exit != 2 || out != "" || !strings.Contains(errors, tc.want) {
			t.Errorf("%s: exit status %d, printed %q, %s, want %q", tc.args, exit, out, errors, tc.want)
		}
	}
	if exit, out, _ := explainExit(t, "--client", "10.0.0.1", "--config", filepath.Join(dir, "proxy.caddyfile"), "name.invalid:80"); exit != 2 || !strings.Contains(out, ": unresolved\n") {
		t.Errorf("a name without addresses: exit status %d, %s", exit, out)
	}
	// A configuration is only read: the files of its logs stay as they are.
	logs := filepath.Join(dir, "logs")
	logging := "{\n\tlog {\n\t\toutput file " + logs + "/caddy.log\n\t}\n}\nhttp://:8080 {\n\tlog {\n\t\toutput file " + logs + "/access.log\n\t}\n\tasync_proxy\n}\n"
	if err := os.WriteFile(filepath.Join(dir, "logs.caddyfile"), []byte(logging), 0o600); err != nil {
		t.Fatal(err)
	}
	if exit, out, errors := explainExit(t, "--client", "10.0.0.1", "--config", filepath.Join(dir, "logs.caddyfile"), "1.1.1.1:443"); exit != 0 {
		t.Errorf("with logs: exit status %d, %s, %s", exit, out, errors)
	}
	if entries, err := os.ReadDir(logs); !os.IsNotExist(err) {
		t.Errorf("explain has created %v, %v", entries, err)
	}
	if exit, _, errors := explainExit(t, "--client", "10.0.0.1", "--address", adminOnly(t), "a:80"); exit != 2 || !strings.Contains(errors, "the running config has no async_proxy") {
		t.Errorf("without a proxy: exit status %d, %s", exit, errors)
	}
}

// TestQueryErrors checks what commands say about an admin endpoint that cannot be asked.
func TestQueryErrors(t *testing.T) {
	const query = `performing request: Get "http://127.0.0.1/async_proxy/stats": `
	for text, want := range map[string]string{
		query + "dial unix /run/a.sock: connect: permission denied":         "querying unix//run/a.sock: " + query + "dial unix /run/a.sock: connect: permission denied; only root and the user that the proxy runs as may ask it",
		query + "dial unix /run/a.sock: connect: no such file or directory": "querying unix//run/a.sock: " + query + "dial unix /run/a.sock: connect: no such file or directory; start the proxy, or use --address for another admin endpoint",
		`caddy responded with error: HTTP 404: {"error":"not found"}`:       `querying unix//run/a.sock: caddy responded with error: HTTP 404: {"error":"not found"}; use --address for another admin endpoint`,
		"caddy responded with error: HTTP 400: Client sent an HTTP request": "querying unix//run/a.sock: caddy responded with error: HTTP 400: Client sent an HTTP request; use --address for another admin endpoint",
		`caddy responded with error: HTTP 400: {"error":"a is not a name"}`: "a is not a name",
	} {
		if got := queryError("unix//run/a.sock", errors.New(text)).Error(); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

// adminOnly runs a Caddy without a proxy until the test ends, and returns the address of its admin
// endpoint.
func adminOnly(t *testing.T) string {
	t.Helper()
	admin := freeAddress(t)
	config := filepath.Join(t.TempDir(), "caddy.json")
	if err := os.WriteFile(config, fmt.Appendf(nil, `{"admin":{"listen":%q}}`, admin), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := commandOf(t, "run", "--config", config)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	eventually(t, "the admin endpoint to listen", func() bool { return binaryListens(admin) })
	return admin
}
