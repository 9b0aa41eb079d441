// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// startOutput starts `caddy async-proxy` and returns what it prints until the line that introduces
// the proxy, which is the last element. stop ends the process.
func startOutput(t *testing.T, args ...string) (lines []string, stop func()) {
	t.Helper()
	cmd := commandOf(t, append([]string{"async-proxy"}, args...)...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Cleanup(stop)
	output := bufio.NewScanner(stderr)
	for output.Scan() {
		if lines = append(lines, output.Text()); strings.HasPrefix(output.Text(), "A forward proxy listens on ") {
			go func() { _, _ = io.Copy(io.Discard, stderr) }()
			return lines, stop
		}
	}
	t.Fatalf("there is no introduction in %q", lines)
	return nil, nil
}

// The first start says in one line where the proxy listens, for which clients, and how to use it. The limit suits
// a browser, and the status page, the PAC script and the access log are where the flags put them.
func TestCommandIntroducesItself(t *testing.T) {
	proxy, page, log := freeAddress(t), freeAddress(t), filepath.Join(t.TempDir(), "access.log")
	_, pagePort, _ := net.SplitHostPort(page)
	lines, _ := startOutput(t, "--listen", proxy, "--admin", "off", "--status", "localhost:"+pagePort, "--actions", "--pac", "--access-log="+log)
	want := fmt.Sprintf("A forward proxy listens on %s, for this machine only. To use it: export http_proxy=http://%[1]s https_proxy=http://%[1]s"+
		"  PAC script for browsers: http://%[1]s/proxy.pac  Status page: http://localhost:%s/", proxy, pagePort)
	if got := lines[len(lines)-1]; got != want {
		t.Errorf("the introduction is\n%s\nwant\n%s", got, want)
	}
	var line map[string]any
	for _, text := range lines {
		if strings.Contains(text, `"warn"`) && !strings.Contains(text, "admin endpoint disabled") {
			t.Errorf("a warning: %s", text)
		}
		if strings.Contains(text, "async-proxy listening") {
			if err := json.Unmarshal([]byte(text), &line); err != nil {
				t.Fatal(err)
			}
		}
	}
	for field, want := range map[string]string{
		"burst": "200", "refill": "20", "open_to": "this machine only", "status_pages": "[http://localhost:" + pagePort + "/]",
		"usage": fmt.Sprintf("export http_proxy=http://%s https_proxy=http://%[1]s", proxy),
	} {
		if got := fmt.Sprint(line[field]); got != want {
			t.Errorf("the field %s is %s, want %s", field, got, want)
		}
	}

	get := func(url, host string) (int, string) {
		t.Helper()
		r, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(body)
	}
	for _, host := range []string{"localhost:" + pagePort, page} {
		if status, body := get("http://"+page+"/", host); status != http.StatusOK || !strings.Contains(body, "<title>") {
			t.Errorf("the status page at %s: %d %.100q", host, status, body)
		}
	}
	if status, body := get("http://"+page+"/", "rebound.example.com"); status != http.StatusMisdirectedRequest || body != "The status page is at http://localhost:"+pagePort+"/.\n" {
		t.Errorf("the status page under another name: %d %q", status, body)
	}
	if status, body := get("http://"+proxy+"/proxy.pac", ""); status != http.StatusOK || !strings.Contains(body, "FindProxyForURL") {
		t.Errorf("the PAC script: %d %.100q", status, body)
	}
	eventually(t, "the access log", func() bool {
		text, _ := os.ReadFile(log)
		return strings.Contains(string(text), `"uri":"/proxy.pac"`)
	})
}

// The status page can be on a Unix socket, which has no name that clients would send, and which no web page
// reaches.
func TestCommandWithStatusOnSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	lines, _ := startOutput(t, "--listen", freeAddress(t), "--admin", "off", "--status", "unix/"+socket, "--actions")
	if slices.ContainsFunc(lines, func(line string) bool { return strings.Contains(line, "status page's actions") }) {
		t.Errorf("a warning in %q", lines)
	}
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	res, err := client.Get("http://localhost/snapshot.json")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Error(res.Status)
	}
}

// The introduction says who may use a proxy that other machines can reach, and a status page that they
// can reach is warned about.
func TestCommandSaysWhoMayUseIt(t *testing.T) {
	const (
		reachable = "other machines can reach this status page"
		rebinding = "any web page open in an operator's browser can trigger this status page's actions"
	)
	for _, tc := range []struct {
		listen, args, want string
		warnings           []string
	}{
		{"", "", "clients with private addresses", nil},
		{"", "--clients all", "everybody who can reach it", []string{"open proxy"}},
		{"", "--clients 192.0.2.0/24", "clients from 192.0.2.0/24", nil},
		{"", "--auth alice:HASH", "users who log in", []string{"passwords are sent in clear text"}},
		{"", "--auth alice:HASH --clients 192.0.2.0/24", "users who log in, from 192.0.2.0/24", []string{"passwords are sent in clear text"}},
		{"127.0.0.1", "--auth alice:HASH", "users on this machine who log in", nil},
		{"127.0.0.1", "--clients all", "this machine only", []string{"open proxy"}},
		{"127.0.0.1", "--status :PORT", "this machine only", []string{reachable}},
		{"127.0.0.1", "--status :PORT --actions", "this machine only", []string{reachable, rebinding}},
		{"127.0.0.1", "--status 127.0.0.1:PORT --actions", "this machine only", nil},
	} {
		_, port, _ := net.SplitHostPort(freeAddress(t))
		_, page, _ := net.SplitHostPort(freeAddress(t))
		args := strings.NewReplacer("HASH", strings.Fields(bcryptUsers)[5], "PORT", page).Replace(tc.args)
		lines, stop := startOutput(t, append([]string{"--admin", "off", "--listen", tc.listen + ":" + port}, strings.Fields(args)...)...)
		stop()
		if got := lines[len(lines)-1]; !strings.Contains(got, ", for "+tc.want+". To use it: export http_proxy=http://127.0.0.1:"+port+" ") {
			t.Errorf("%s %s: %s, want %s", tc.listen, tc.args, got, tc.want)
		}
		for _, warning := range []string{"open proxy", "passwords are sent in clear text", reachable, rebinding} {
			if got, want := strings.Contains(strings.Join(lines, "\n"), warning), slices.Contains(tc.warnings, warning); got != want {
				t.Errorf("%s %s: warned %q: %v, want %v", tc.listen, tc.args, warning, got, want)
			}
		}
	}
}
