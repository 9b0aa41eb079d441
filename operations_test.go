// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKubernetesPod runs the Caddyfile of contrib/kubernetes as its pod does: as an ordinary user, with
// a read-only root and an empty /tmp. It is ready, alive and measured, serves requests, and
// leaves a tunnel open when it is asked to stop.
func TestKubernetesPod(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	cmd, output := startPod(t)
	get := func(url string) (int, string) {
		res, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	eventually(t, "the port", func() bool { return binaryListens("127.0.0.1:3128") && binaryListens("127.0.0.1:9180") })
	if status, _ := get("http://127.0.0.1:9180/healthz"); status != http.StatusOK {
		t.Errorf("/healthz: %d", status)
	}
	if _, text := get("http://127.0.0.1:9180/config/"); text != "" {
		t.Errorf("another path: %s", text)
	}
	for request, want := range map[string]int{
		"10.1.2.3 GET http://www.example.com/": http.StatusOK, "10.1.2.3 GET http://www.example.org/": http.StatusForbidden,
		"10.1.2.3 CONNECT intranet.example.com:443": http.StatusForbidden, "192.168.1.1 GET http://www.example.com/": http.StatusForbidden,
	} {
		from, rest, _ := strings.Cut(request, " ")
		if got := ask(t, "127.0.0.1:3128", from, rest, "", ""); got != want {
			t.Errorf("%s: %d, want %d", request, got, want)
		}
	}
	if _, text := get("http://127.0.0.1:9180/metrics"); !strings.Contains(text, "caddy_async_proxy_requests_total") {
		t.Error("no metrics")
	}
	checkStop(t, cmd)
	if strings.Contains(output.String(), "read-only file system") {
		t.Errorf("it wants to write to its root:\n%s", output)
	}
	if t.Failed() {
		t.Logf("%s", output)
	}
}

// checkStop checks that a pod that has to stop closes its port, and exits when its last tunnel ends.
func checkStop(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 1, 2, 3)}}
	tunnel, err := dialer.Dial("tcp", "127.0.0.1:3128")
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Close()
	reader := bufio.NewReader(tunnel)
	fmt.Fprint(tunnel, "CONNECT www.example.com:443 HTTP/1.1\r\nHost: www.example.com:443\r\n\r\n")
	if res, err := http.ReadResponse(reader, &http.Request{Method: http.MethodConnect}); err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("a tunnel: %v, %v", res, err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the port to close", func() bool { return !binaryListens("127.0.0.1:3128") })
	fmt.Fprint(tunnel, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") // the target speaks HTTP at port 443 here
	if res, err := http.ReadResponse(reader, nil); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("the tunnel after SIGTERM: %v", err)
	}
	tunnel.Close()
	if err := awaitExit(cmd); err != nil {
		t.Errorf("its end: %v", err)
	}
}

// startPod runs Caddy in a root of its own, which is read-only. It returns the command, for which
// the caller must wait, and its output.
func startPod(t *testing.T) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	root := t.TempDir()
	caddyfile, err := filepath.Abs("contrib/kubernetes/Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	user := "--userspec=65532:65532"
	if rootIsNobodyElse(t) {
		user = "" // there is no other user, and this one is an ordinary one outside
	}
	script := `
		mount -t tmpfs -o mode=755 root "$ROOT"
		mkdir -p "$ROOT/usr/bin" "$ROOT/etc/caddy" "$ROOT/tmp"
		cp "$CADDY" "$ROOT/usr/bin/caddy"
		cp "$CADDYFILE" "$ROOT/etc/caddy/Caddyfile"
		for dir in /proc /lib /lib64 /usr/lib; do # the program of the tests is not a static one
			if [ -d "$dir" ]; then mkdir -p "$ROOT$dir" && mount --rbind "$dir" "$ROOT$dir"; fi
		done
		mount -o remount,bind,ro "$ROOT"
		mount -t tmpfs -o mode=1777 tmp "$ROOT/tmp"
		cd "$ROOT"
		exec env -i XDG_CONFIG_HOME=/tmp/config XDG_DATA_HOME=/tmp/data "$(command -v chroot)" $USERSPEC "$ROOT" /usr/bin/caddy run --config /etc/caddy/Caddyfile`
	cmd := exec.Command("unshare", "--mount", "sh", "-ec", script)
	cmd.Env = append(os.Environ(), "ROOT="+root, "CADDY="+caddyBinary(t), "CADDYFILE="+caddyfile, "USERSPEC="+user)
	output := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return cmd, output
}

// A log file that somebody renames gets the next lines under its new name, also after a reload.
func TestRenamedLogGetsTheNextLines(t *testing.T) {
	w := newWorld(t, "", nil)
	renamed := w.logs + ".1"
	if err := os.Rename(w.logs, renamed); err != nil {
		t.Fatal(err)
	}
	for round := range 2 {
		c := w.dial()
		c.send(fmt.Sprintf("GET http://%s/round-%d HTTP/1.1\nHost: x\n\n", w.origin.Listener.Addr(), round))
		c.response(http.MethodGet)
		eventually(t, "the line", func() bool {
			text, _ := os.ReadFile(renamed)
			return strings.Contains(string(text), fmt.Sprintf("/round-%d", round))
		})
		w.load(w.site(""))
	}
	if _, err := os.Stat(w.logs); err == nil {
		t.Error("Caddy has opened the file again")
	}
}

// Caddy raises its soft limit of descriptors to the hard limit.
func TestDescriptorLimitIsRaised(t *testing.T) {
	c := binaryStart(t, binaryOptions{shell: "ulimit -Sn 256; ulimit -Hn 3000"})
	var limit unix.Rlimit
	if err := unix.Prlimit(c.cmd.Process.Pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		t.Fatal(err)
	}
	// Go leaves one, to know later whether the program has changed the limit itself.
	if limit.Cur < 2999 || limit.Max != 3000 {
		t.Errorf("the limits are %d and %d", limit.Cur, limit.Max)
	}
}

// Connections to one address of a target are limited by the local ports, those to another are not.
func TestLocalPortsLimitOneTarget(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	w := newWorld(t, "", nil)
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40009"), 0o644); err != nil {
		t.Fatal(err)
	}
	open := func(i int, target string) int {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 50000 + i}} // outside the range
		conn, err := dialer.Dial("tcp", w.proxy)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		fmt.Fprintf(conn, "CONNECT %[1]s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", target)
		res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: http.MethodConnect})
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode
	}
	for i := range 10 {
		if status := open(i, "127.0.0.5:443"); status != http.StatusOK {
			t.Fatalf("tunnel %d: %d", i+1, status)
		}
	}
	if status := open(10, "127.0.0.5:443"); status != http.StatusServiceUnavailable {
		t.Errorf("tunnel 11 to the same address: %d", status)
	}
	for i, target := range []string{"127.0.0.5:80", "127.0.0.6:443"} {
		if status := open(11+i, target); status != http.StatusOK {
			t.Errorf("a tunnel to %s: %d", target, status)
		}
	}
}

// Two processes share a port while one takes over from the other, and the tunnels of the old one go on.
func TestUpgradeOnOnePort(t *testing.T) {
	old := binaryStart(t, binaryOptions{global: "grace_period 1m"})
	tunnels := binaryTunnels(t, old.proxy, 20)
	next := &binaryCaddy{world: &world{t: t, proxy: old.proxy, logs: old.logs + ".next"}, admin: freeAddress(t), config: old.config + ".next"}
	next.write(next.caddyfile(""))
	next.cmd = next.command("run", "--config", next.config, "--adapter", "caddyfile")
	if err := next.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = next.cmd.Process.Kill()
		_ = next.cmd.Wait()
	})
	eventually(t, "the second process to listen, too", listeningTwice) // its admin endpoint is ready earlier
	if err := old.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first process to stop listening", func() bool { return !listeningTwice() })
	for range 20 {
		if !binaryListens(next.proxy) {
			t.Fatal("the port is closed")
		}
	}
	for _, tunnel := range append(tunnels, binaryTunnels(t, next.proxy, 20)...) {
		if err := binaryPing(tunnel); err != nil {
			t.Errorf("a tunnel: %v", err)
		}
	}
	binaryClose(tunnels)
	eventually(t, "the first process to exit", func() bool {
		select {
		case <-old.exited:
			return true
		default:
			return false
		}
	})
}
