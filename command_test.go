// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// commandStart runs `caddy async-proxy` until the test ends.
func commandStart(t *testing.T, args ...string) *world {
	t.Helper()
	admin := freeAddress(t)
	w := &world{t: t, proxy: freeAddress(t), logs: admin}
	w.origin = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello from the origin") }))
	t.Cleanup(func() { closeServer(t, w.origin) })
	cmd := commandOf(t, append([]string{"async-proxy", "--listen", w.proxy, "--admin", admin}, args...)...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(output.String())
		}
	})
	eventually(t, "the proxy to listen", func() bool { return binaryListens(w.proxy) && binaryListens(admin) })
	return w
}

func commandOf(t *testing.T, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, caddyBinary(t), args...)
	dir := t.TempDir()
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	return cmd
}

func TestCommand(t *testing.T) {
	w := commandStart(t, "--burst", "3", "--refill", "0.00001", "--allow", "127.0.0.0/8", "--deny", "all",
		"--auth", "alice:"+strings.Fields(bcryptUsers)[5], "--clients", "127.0.0.0/8", "--access-log", "--debug")
	origin := w.origin.Listener.Addr().String()
	lines := "Proxy-Authorization: " + login("alice", "wonderland") + "\n"
	for _, tc := range []struct {
		target, lines string
		want          int
	}{{origin, lines, 200}, {origin, "", 407}, {"[::1]:80", lines, 403}, {origin, lines, 429}} {
		if res, body := policyRequest(t, w.proxy, http.MethodGet, tc.target, tc.lines); res.StatusCode != tc.want {
			t.Errorf("%s: %s %q, want %d", tc.target, res.Status, body, tc.want)
		}
	}
	for _, tc := range []struct{ args, want string }{
		{"--listen 127.0.0.1:x", "expected an address with a port, such as 127.0.0.1:8080"},
		{"--listen 127.0.0.1", "expected an address with a port, such as 127.0.0.1:8080"},
		{"--listen 8080", "expected an address with a port, such as 127.0.0.1:8080"},
		{"--listen " + takenAddress(t), "address already in use; stop the process that listens there, or choose another address with --listen"},
		{"--listen localhost:3128 --status 127.0.0.1:3128", "--listen localhost:3128 and --status 127.0.0.1:3128 have the same port; expected different ones"},
		{"--listen 0.0.0.0:3128 --clients all --admin localhost:3128", "--listen 0.0.0.0:3128 and --admin localhost:3128 have the same port; expected different ones"},
		{"--admin " + takenAddress(t), "address already in use; stop the process that listens there, or choose another address with --admin"},
		{"--admin localhost", `admin "localhost": expected an address with a port`},
		{"status --address localhost", `address "localhost": expected an address with a port`},
		{"status --address http://127.0.0.1:2019", `address "http://127.0.0.1:2019": expected an address with a port`},
		{"status --sort name", `sort "name": expected last_seen, requests, rejections, bytes, tunnels or tokens for clients, or started, idle or bytes for tunnels`},
		{"status --sort=", `sort "": expected last_seen`},
		{"status --limit 0", `limit "0": expected a number from 1 to 1000`},
		{"status --limit 1001", `limit "1001": expected a number from 1 to 1000`},
		{"status --limit ten", `limit "ten": expected a number from 1 to 1000`},
		{"--burts 5", "unknown flag: --burts; did you mean --burst?"},
		{"--nonsense 5", "unknown flag: --nonsense"},
		{"status --limt 5", "unknown flag: --limt; did you mean --limit?"},
		{"stat", `unexpected argument "stat"; did you mean caddy async-proxy status?`},
		{"8080", `unexpected argument "8080"; expected flags, or one of the commands check, explain and status`},
		{"--deny all extra", `unexpected argument "extra"; a flag has two dashes, takes one value and may be repeated`},
		{"--burst 0", "--burst: the value '0' is not valid; expected a whole number of tokens from 1 to 1000000000"},
		{"--burst x", "burst: the value 'x' is not valid; expected a whole number of tokens from 1 to 1000000000"},
		{"--refill 0", "refill: the value '0' is not valid; expected tokens per second from 0.00001 to 1000000"},
		{"--refill 5/s", "refill: the value '5/s' is not valid; expected tokens per second from 0.00001 to 1000000"},
		{"--clients office", "clients: the value 'office' is not valid; expected all, or addresses"},
		{"--clients 10.1.2.3/8", "clients: 10.1.2.3/8 has bits set beyond its length; write 10.0.0.0/8 for the range, or 10.1.2.3 for the address"},
		{"--allow .example.com", `allow: ".example.com" is not a name; for the name and everything below it, write example.com *.example.com`},
		{"--allow example.com", "allow: example.com has no effect, because no later rule denies what it allows; for an allow-list, add `deny all` after it"},
		{"--auth bob", "expected user:hash"},
		{"--auth bob:plain", "expected user:hash"},
		{"--auth alice:$2a$14$short", "expected user:hash"},
		{"--auth alice:" + publishedHashes[0], `auth: the user "alice" has a hash from Caddy's documentation`},
		{"--burst -1", "burst: the value '-1' is not valid; expected a whole number of tokens"},
		{"--allow a/b", "--allow: the value 'a/b' is not valid; expected addresses, CIDR ranges, names"},
		{"--upstream ftp://x", "expected http://, https:// or socks5://"},
		{"--status localhost", `--status "localhost": expected an address with a port`},
		{"--status http://localhost:9090/", `status "http://localhost:9090/": expected an address with a port`},
		{"--status " + takenAddress(t), "address already in use; stop the process that listens there, or choose another address with --status"},
		{"--actions", "actions: expected --status <addr> with it"},
		{"--access-log access.log", `unexpected argument "access.log"; expected --access-log=access.log`},
	} {
		args := append([]string{"async-proxy", "--listen", freeAddress(t), "--admin", "off"}, strings.Fields(tc.args)...)
		if !strings.HasPrefix(tc.args, "-") {
			args = append(args[:1], strings.Fields(tc.args)...)
		}
		out, err := commandOf(t, args...).CombinedOutput()
		if err == nil || !strings.Contains(strings.ReplaceAll(string(out), `\"`, `"`), tc.want) {
			t.Errorf("%s: %v, %s, want %q", tc.args, err, out, tc.want)
		}
	}
}

// takenAddress returns an address with a listener that would allow others to share it.
func takenAddress(t *testing.T) string {
	t.Helper()
	address := freeAddress(t)
	addr, err := caddy.ParseNetworkAddress(address)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := addr.Listen(t.Context(), 0, net.ListenConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.(net.Listener).Close() })
	return address
}

func TestCommandStatus(t *testing.T) {
	w := commandStart(t, "--burst", "3", "--refill", "0.00001")
	for range 5 {
		policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "")
	}
	out, err := commandOf(t, "async-proxy", "status", "--address", w.logs).Output()
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(string(out)), " ")
	for _, want := range []string{"requests 3 forwarded", "refused 2 rate limited", "clients 1 of 1000000 tracked", "127.0.0.1 0.0/3 5 2 0 0 B 63 B"} {
		if !strings.Contains(text, want) {
			t.Errorf("found no %q in\n%s", want, out)
		}
	}
	if strings.Contains(string(out), "\x1b") {
		t.Errorf("control characters in piped output: %q", out)
	}
	var shown statusReport
	out, err = commandOf(t, "async-proxy", "status", "--json", "--address", w.logs).Output()
	if err == nil {
		err = json.Unmarshal(out, &shown)
	}
	if err != nil || shown.Stats.Requests.Forwarded != 3 || shown.Clients.Total != 1 {
		t.Errorf("%v, %s", err, out)
	}
	if out, err := commandOf(t, "async-proxy", "status", "--address", "127.0.0.1:1").CombinedOutput(); err == nil || !strings.Contains(string(out), "use --address for another admin endpoint") {
		t.Errorf("%v, %s", err, out)
	}
}

// The flags select the clients and tunnels, and their order.
func TestCommandStatusSelects(t *testing.T) {
	w := commandStart(t)
	// Clients 127.0.1.1 to 127.0.1.3 open a tunnel each, to an address that contains "127.0.0.1",
	// and the second makes the most requests.
	for _, i := range []byte{1, 2, 2, 2, 3} {
		from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, i)}}
		conn, err := from.Dial("tcp4", w.proxy)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", w.origin.Listener.Addr())
		if line, err := bufio.NewReader(conn).ReadString('\n'); !strings.HasPrefix(line, "HTTP/1.1 200 ") {
			t.Fatalf("%q, %v", line, err)
		}
	}
	for _, tc := range []struct{ flags, clients, tunnels string }{
		{"--limit 1", "127.0.1.3", ""},
		{"--sort requests --limit 1", "127.0.1.2", ""},
		{"--sort tunnels --limit 1", "127.0.1.2", ""},
		{"--sort started", "127.0.1.3 127.0.1.2 127.0.1.1", "127.0.1.3 127.0.1.2 127.0.1.2 127.0.1.2 127.0.1.1"},
		{"--sort idle --limit 2", "127.0.1.3 127.0.1.2", "127.0.1.1 127.0.1.2"},
		{"--client 127.0.1.2", "127.0.1.2", "127.0.1.2 127.0.1.2 127.0.1.2"},
		{"--client 127.0.1.2 --limit 1", "127.0.1.2", "127.0.1.2"},
		{"--client 127.0.0.1", "", ""}, // the target of every tunnel
	} {
		var shown statusReport
		out, err := commandOf(t, append([]string{"async-proxy", "status", "--json", "--address", w.logs}, strings.Fields(tc.flags)...)...).Output()
		if err == nil {
			err = json.Unmarshal(out, &shown)
		}
		var tunnels []string
		for _, each := range shown.Tunnels.Tunnels {
			tunnels = append(tunnels, each.Client)
		}
		got := strings.Join(tunnels, " ")
		if anyOrder := tc.tunnels == "" && tc.clients != ""; err != nil || namesOf(shown.Clients) != tc.clients || got != tc.tunnels && !anyOrder {
			t.Errorf("%s: %v: clients %q and tunnels %q, want %q and %q", tc.flags, err, namesOf(shown.Clients), got, tc.clients, tc.tunnels)
		}
	}
}

// TestCommandStatusOnATerminal checks the screen that --watch draws.
func TestCommandStatusOnATerminal(t *testing.T) {
	tmux, err := exec.LookPath("tmux")
	if err != nil {
		t.Skip("tmux is not installed; apt-get install tmux")
	}
	w := commandStart(t)
	socket := t.TempDir() + "/tmux"
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(tmux, append([]string{"-S", socket, "-f", "/dev/null"}, args...)...)
		cmd.Env = append(os.Environ(), "SHELL=/bin/sh") // the user's may be nologin
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("tmux %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	run("new-session", "-d", "-x", "80", "-y", "24", "env LC_ALL=C.UTF-8 "+caddyBinary(t)+" async-proxy status --watch --address "+w.logs)
	defer func() { _ = exec.Command(tmux, "-S", socket, "kill-server").Run() }()
	shows := func(what string) string {
		t.Helper()
		var screen string
		eventually(t, what+" on the screen", func() bool {
			screen = run("capture-pane", "-p")
			return strings.Contains(screen, what)
		})
		return screen
	}
	shows("0 forwarded")
	policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "")
	if screen := shows("1 forwarded"); strings.Count(screen, "forwarded") != 1 || strings.Contains(screen, "\x1b") {
		t.Errorf("the screen:\n%s", screen)
	}

	// More lines than fit leave the head in place.
	for i := range 20 {
		from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(i))}}
		conn, err := from.Dial("tcp4", w.proxy)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: x\r\n\r\n", w.origin.Listener.Addr())
	}
	screen := shows("and 15 more tunnels")
	lines := strings.Split(strings.TrimRight(screen, "\n"), "\n")
	if len(lines) > 23 || !strings.HasPrefix(lines[0], "async_proxy ") || !strings.HasSuffix(lines[len(lines)-1], "more tunnels") ||
		!strings.Contains(screen, "and 16 more clients") {
		t.Errorf("the screen of %d lines:\n%s", len(lines), screen)
	}

	// Restart Caddy.
	if _, err := caddycmd.AdminAPIRequest(w.logs, http.MethodPost, "/stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	if screen := shows("no answer, retrying"); !strings.Contains(strings.ReplaceAll(screen, "\n", ""), "use --address for another admin endpoint") {
		t.Errorf("the screen:\n%s", screen)
	}
	cmd := commandOf(t, "async-proxy", "--listen", w.proxy, "--admin", w.logs)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if screen := shows("0 forwarded"); strings.Contains(screen, "cannot reach") || strings.Contains(screen, "more clients") {
		t.Errorf("the screen:\n%s", screen)
	}
}

func TestStatusFits(t *testing.T) {
	for _, tc := range []struct{ height, clients, tunnels, wantClients, wantTunnels int }{
		{24, 100, 100, 5, 5}, {25, 100, 100, 6, 5}, {24, 2, 100, 2, 8}, {24, 100, 1, 9, 1}, {24, 0, 0, 0, 0}, {50, 3, 4, 3, 4}, {14, 9, 9, 0, 0}, {1, 9, 9, 0, 0},
	} {
		s := statusReport{Clients: status.ClientList{Clients: make([]status.Client, tc.clients), Total: 200}, Tunnels: status.TunnelList{Tunnels: make([]status.Tunnel, tc.tunnels), Total: 200}}
		s.fit(tc.height)
		if clients, tunnels := len(s.Clients.Clients), len(s.Tunnels.Tunnels); clients != tc.wantClients || tunnels != tc.wantTunnels {
			t.Errorf("of %d clients and %d tunnels there are %d and %d in %d lines, want %d and %d", tc.clients, tc.tunnels, clients, tunnels, tc.height, tc.wantClients, tc.wantTunnels)
		}
		var out strings.Builder
		s.print(&out)
		if n := strings.Count(out.String(), "\n"); tc.height > 13 && n > tc.height-1 {
			t.Errorf("%d lines were printed for a screen of %d", n, tc.height)
		}
	}
	if got, want := screenUpdate("one\ntwo and more\nthree\nfour\n", 8, 4), "\x1b[Hone\x1b[K\ntwo an…\x1b[K\nthree\x1b[K\n\x1b[J"; got != want {
		t.Errorf("the screen got %q, want %q", got, want)
	}
}

// TestStatusPrints checks the output for tunnels, total traffic, and clients in several
// zones, and policies.
func TestStatusPrints(t *testing.T) {
	var s statusReport
	s.Stats.Time = time.Now()
	s.Stats.Tunnels.Open, s.Stats.Tunnels.BytesUp, s.Stats.Tunnels.BytesDown = 1, 2000, 3000
	s.Stats.BytesUp, s.Stats.BytesDown = 12_000, 23_000
	blocked := s.Stats.Time.Add(time.Minute)
	s.Clients.Clients = []status.Client{{Client: "192.0.2.1", Zone: "one", Burst: 3, LastSeen: s.Stats.Time.Add(-time.Minute)}, {Client: "192.0.2.1", Zone: "one", Burst: 3, BlockedUntil: &blocked}}
	for range 2 {
		var out strings.Builder
		s.print(&out)
		text := strings.Join(strings.Fields(out.String()), " ")
		zones := s.Clients.Clients[1].Zone == "two"
		for what, want := range map[string]bool{
			"tunnels 1 open 2.0 kB up 3.0 kB down": true, "traffic 35 kB in all 12 kB up 23 kB down": true,
			"CLIENT TOKENS": !zones, "CLIENT ZONE TOKENS": zones, "192.0.2.1 0.0/3": !zones, "192.0.2.1 one 0.0/3": zones, "192.0.2.1 two blocked 1m": zones, "0 B 1m ago": true, "0 B never": true,
		} {
			if strings.Contains(text, what) != want {
				t.Errorf("%q: %v, want %v, in\n%s", what, !want, want, out.String())
			}
		}
		s.Clients.Clients[1].Zone = "two"
	}
	s.Clients.Clients[1].Policy = "guests"
	s.Tunnels.Tunnels = []status.Tunnel{{ID: 7, Client: "192.0.2.1", Policy: "staff", Target: "example.com:443", Started: s.Stats.Time}}
	var out strings.Builder
	s.print(&out)
	text := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{"CLIENT ZONE POLICY TOKENS", "192.0.2.1 two guests blocked", "192.0.2.1 one 0.0/3", "TUNNEL CLIENT POLICY TARGET", "7 192.0.2.1 staff example.com:443"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestUnits(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 9949: "9.9 kB", 9950: "10 kB", 999_499: "999 kB", 999_500: "1.0 MB", 1_500_000_000: "1.5 GB", 1 << 62: "4.6 EB"} {
		if got := formatSize(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{0: "0s", -1: "0s", 1234 * time.Millisecond: "1.2s", 61 * time.Second: "1m1s", time.Hour: "1h", 90 * time.Minute: "1h30m", 47 * time.Hour: "47h", 100 * time.Hour: "4d"} {
		if got := formatAge(d); got != want {
			t.Errorf("age(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestPrintMore(t *testing.T) {
	for n, want := range []string{"", "and 1 more client\n", "and 2 more clients\n"} {
		var b strings.Builder
		if printMore(&b, n, "clients"); b.String() != want {
			t.Errorf("%d more: %q, want %q", n, b.String(), want)
		}
	}
}
