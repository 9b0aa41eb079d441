// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

//lint:file-ignore SA1019 the client of x/net speaks HTTP/2 and nothing else, as a test of HTTP/2 wants

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// The tests in this file run cmd/caddy as a process and check what is visible from outside:
// exit codes, descriptors, memory.

// binaryOptions configure a binaryCaddy.
type binaryOptions struct {
	global string // global options
	site   string // options of async_proxy, as for newWorld
	secure bool   // adds a second site, over TLS
	shell  string // shell commands to run before Caddy
}

// binaryCaddy is a Caddy in a process of its own. Its world has no origin.
type binaryCaddy struct {
	*world
	options binaryOptions
	secure  string // host:port of the proxy over TLS
	admin   string
	config  string // file
	cmd     *exec.Cmd
	exited  chan struct{}
}

// binaryStart runs a Caddy until the test ends.
func binaryStart(t *testing.T, options binaryOptions) *binaryCaddy {
	t.Helper()
	dir := t.TempDir()
	c := &binaryCaddy{
		world:   &world{t: t, proxy: freeAddress(t), logs: filepath.Join(dir, "caddy.log")},
		options: options, secure: freeAddress(t), admin: freeAddress(t),
		config: filepath.Join(dir, "Caddyfile"), exited: make(chan struct{}),
	}
	c.write(c.caddyfile(options.site))
	c.cmd = c.command("run", "--config", c.config, "--adapter", "caddyfile")
	if options.shell != "" {
		c.cmd.Args = append([]string{"sh", "-c", options.shell + `; exec "$0" "$@"`}, c.cmd.Args...)
		c.cmd.Path = "/bin/sh"
	}
	var output bytes.Buffer
	c.cmd.Stdout, c.cmd.Stderr = &output, &output
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = c.cmd.Wait()
		close(c.exited)
	}()
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		<-c.exited
		if t.Failed() {
			t.Logf("output of Caddy:\n%s", &output)
		}
	})
	eventually(t, "Caddy to run", func() bool {
		select {
		case <-c.exited:
			t.Fatal("Caddy has exited")
		default:
		}
		return binaryListens(c.admin) && binaryListens(c.proxy)
	})
	if options.secure {
		eventually(t, "a certificate", func() bool {
			conn, err := tls.Dial("tcp4", c.secure, &tls.Config{InsecureSkipVerify: true})
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
	}
	return c
}

func binaryListens(address string) bool {
	conn, err := net.Dial("tcp4", address)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// caddyfile returns a config with the given options of async_proxy.
func (c *binaryCaddy) caddyfile(site string) string {
	text := fmt.Sprintf(`{
	admin %s
	persist_config off
	skip_install_trust
	auto_https disable_redirects
	default_bind 127.0.0.1
	%s
	log {
		output file %s
		format json
	}
}
%s`,
		c.admin, c.options.global, c.logs, c.site(site))
	if c.options.secure {
		text += strings.Replace(strings.Replace(c.site(site), "http://"+strings.TrimPrefix(c.proxy, "127.0.0.1"),
			"https://"+strings.TrimPrefix(c.secure, "127.0.0.1"), 1), "async_proxy", `tls internal {
	on_demand
}
async_proxy`, 1)
	}
	return text
}

func (c *binaryCaddy) write(caddyfile string) {
	c.t.Helper()
	if err := os.WriteFile(c.config, []byte(caddyfile), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// awaitExit waits for a process that should exit by itself, and ends it if it does not. A program in Go
// then prints its stacks.
func awaitExit(cmd *exec.Cmd) error {
	late := time.AfterFunc(6*patience, func() {
		_ = cmd.Process.Signal(syscall.SIGQUIT)
		time.Sleep(patience)
		_ = cmd.Process.Kill()
	})
	defer late.Stop()
	return cmd.Wait()
}

// command returns a Caddy command in the test's own environment.
func (c *binaryCaddy) command(args ...string) *exec.Cmd {
	cmd := exec.Command(caddyBinary(c.t), args...)
	dir := filepath.Dir(c.config)
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	return cmd
}

// ask sends a request to the admin endpoint, on its own connection.
func (c *binaryCaddy) ask(method, path, body string) (int, string) {
	c.t.Helper()
	req, err := http.NewRequest(method, "http://"+c.admin+path, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	req.Close = true
	req.Header.Set("Content-Type", "text/caddyfile")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return res.StatusCode, string(text)
}

// reload replaces the options of async_proxy through the admin endpoint.
func (c *binaryCaddy) reload(site string) {
	c.t.Helper()
	if status, text := c.ask(http.MethodPost, "/load", c.caddyfile(site)); status != http.StatusOK {
		c.t.Fatalf("/load: status %d: %s", status, text)
	}
	c.waitReloaded()
}

// waitReloaded waits until no new connection can reach the previous config.
func (c *binaryCaddy) waitReloaded() {
	c.t.Helper()
	eventually(c.t, "the old sockets to be closed", func() bool { return !listeningTwice() })
}

// descriptors returns the number of open descriptors: the lowest of several readings, as
// connections to the admin endpoint come and go.
func (c *binaryCaddy) descriptors() int {
	c.t.Helper()
	fewest := math.MaxInt
	for range 10 {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.cmd.Process.Pid))
		if err != nil {
			c.t.Fatal(err)
		}
		fewest = min(fewest, len(entries))
		time.Sleep(10 * time.Millisecond)
	}
	return fewest
}

// goroutines returns the number of goroutines in the process.
func (c *binaryCaddy) goroutines() int {
	c.t.Helper()
	_, text := c.ask(http.MethodGet, "/debug/pprof/goroutine?debug=1", "")
	return binaryNumber(c.t, text, `total (\d+)`)
}

// settled returns the numbers of descriptors and goroutines once they have stayed the same for a second.
// What has just ended on the wire may still be ending in the process.
func (c *binaryCaddy) settled() (descriptors, goroutines int) {
	c.t.Helper()
	var since time.Time
	eventually(c.t, "descriptors and goroutines to settle", func() bool {
		d, g := c.descriptors(), c.goroutines()
		if d != descriptors || g != goroutines {
			descriptors, goroutines, since = d, g, time.Now()
		}
		return time.Since(since) >= time.Second
	})
	return descriptors, goroutines
}

// resident returns the resident memory of the process in bytes, after a garbage collection.
func (c *binaryCaddy) resident() int {
	c.t.Helper()
	c.ask(http.MethodGet, "/debug/pprof/heap?gc=1", "")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		c.t.Fatal(err)
	}
	return binaryNumber(c.t, string(status), `VmRSS:\s+(\d+) kB`) << 10
}

// binaryNumber returns the number that the group of pattern matches in text.
func binaryNumber(t testing.TB, text, pattern string) int {
	t.Helper()
	match := regexp.MustCompile(pattern).FindStringSubmatch(text)
	if match == nil {
		t.Fatalf("found no %s in %.300q", pattern, text)
	}
	n, err := strconv.Atoi(match[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// binaryEcho runs an echo server that does not splice, and so uses no pipe.
func binaryEcho(t *testing.T) string {
	t.Helper()
	return listen(t, func(c *net.TCPConn) {
		c.SetDeadline(time.Time{})
		buf := make([]byte, 512)
		for {
			n, err := c.Read(buf)
			if _, err2 := c.Write(buf[:n]); err != nil || err2 != nil {
				return
			}
		}
	})
}

// binaryOpen sends a CONNECT for target. Without an error, the connection is a tunnel. res
// is nil if no response arrived in time.
func binaryOpen(proxy, target string, wait time.Duration) (conn *net.TCPConn, res *http.Response, err error) {
	dialled, err := net.DialTimeout("tcp4", proxy, wait)
	if err != nil {
		return nil, nil, err
	}
	conn = dialled.(*net.TCPConn)
	conn.SetDeadline(time.Now().Add(wait))
	if _, err = fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", target); err == nil {
		res, err = http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: http.MethodConnect})
	}
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("CONNECT: %s", res.Status)
	}
	if err != nil {
		conn.Close()
		return nil, res, err
	}
	conn.SetDeadline(time.Time{})
	return conn, res, nil
}

// binaryPing echoes a byte through a tunnel.
func binaryPing(tunnel io.ReadWriter) error {
	if c, ok := tunnel.(net.Conn); ok {
		c.SetDeadline(time.Now().Add(patience))
	}
	got := []byte{0}
	if _, err := tunnel.Write([]byte("x")); err != nil {
		return err
	}
	if _, err := io.ReadFull(tunnel, got); err != nil || got[0] != 'x' {
		return fmt.Errorf("echo: %q, %w", got, err)
	}
	return nil
}

// binaryEach calls f for 0 to n-1, 32 at a time.
func binaryEach(t *testing.T, n int, f func(int) error) {
	t.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, 32)
	for worker := range errs {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n) && errs[worker] == nil; i = next.Add(1) - 1 {
				errs[worker] = f(int(i))
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// binaryTunnels opens n tunnels to an echo server and uses each once.
func binaryTunnels(t *testing.T, proxy string, n int) []*net.TCPConn {
	t.Helper()
	target := binaryEcho(t)
	tunnels := make([]*net.TCPConn, n)
	t.Cleanup(func() { binaryClose(tunnels) })
	binaryEach(t, n, func(i int) (err error) {
		if tunnels[i], _, err = binaryOpen(proxy, target, patience); err != nil {
			return err
		}
		return binaryPing(tunnels[i])
	})
	return tunnels
}

func binaryClose(tunnels []*net.TCPConn) {
	for _, tunnel := range tunnels {
		if tunnel != nil {
			tunnel.Close()
		}
	}
}

// binaryStreams opens n tunnels to an echo server over one HTTP/2 connection.
func binaryStreams(t *testing.T, proxy string, n int) []io.ReadWriter {
	t.Helper()
	target := binaryEcho(t)
	transport := &http2.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	t.Cleanup(transport.CloseIdleConnections)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	streams := make([]io.ReadWriter, n)
	for i := range streams {
		r, w := io.Pipe()
		req, err := http.NewRequestWithContext(ctx, http.MethodConnect, "https://"+proxy, r)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = target
		res, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != http.StatusOK {
			t.Fatal(res.Status)
		}
		streams[i] = struct {
			io.Reader
			io.Writer
		}{res.Body, w}
		if err := binaryPing(streams[i]); err != nil {
			t.Fatal(err)
		}
	}
	return streams
}

// curl runs curl in the test's own environment.
func (c *binaryCaddy) curl(args ...string) string {
	c.t.Helper()
	cmd := exec.Command("curl", append([]string{"-sS", "--max-time", "20"}, args...)...)
	cmd.Env = []string{"HOME=" + filepath.Dir(c.config), "PATH=" + os.Getenv("PATH")}
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("curl %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// statuses returns the statuses of n consecutive requests, each on its own connection. One
// curl sends them all, so that a busy machine does not give the bucket time to fill.
func (c *binaryCaddy) statuses(n int, url string) string {
	c.t.Helper()
	args := []string{"-H", "Connection: close", "-w", "%{http_code} ", "-x", "http://" + c.proxy}
	for range n {
		args = append(args, "-o", "/dev/null", url)
	}
	return c.curl(args...)
}

// status returns the status of one request on its own connection. It retries if the
// connection is closed: a server that has just been replaced may have accepted it.
func (c *binaryCaddy) status(url string) (status string) {
	c.t.Helper()
	eventually(c.t, "a response", func() bool {
		conn := c.dial()
		defer conn.Close()
		conn.send("GET " + url + " HTTP/1.1\nHost: 127.0.0.1:1\nConnection: close\n\n")
		res, err := http.ReadResponse(conn.r, nil)
		if err == nil {
			status = strconv.Itoa(res.StatusCode)
		}
		return err == nil
	})
	return status
}

// binaryHttpbin runs examples/httpbin and returns its two URLs.
func binaryHttpbin(t *testing.T) (plain, secure string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "httpbin")
	if out, err := exec.Command("go", "build", "-o", path, "./examples/httpbin").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	plain, secure = freeAddress(t), freeAddress(t)
	cmd := exec.Command(path, "-http", plain, "-https", secure)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	eventually(t, "httpbin", func() bool { return binaryListens(secure) })
	return "http://" + plain, "https://" + secure
}

// TestBinaryReadme follows the README's walk-through.
func TestBinaryReadme(t *testing.T) {
	plain, secure := binaryHttpbin(t)
	c := binaryStart(t, binaryOptions{site: "burst 10\nrefill 0.5"})

	// What the origin got.
	for _, url := range []string{plain, secure} {
		var seen struct {
			URL     string              `json:"url"`
			Headers map[string][]string `json:"headers"`
		}
		text := c.curl("-k", "-x", "http://"+c.proxy, url+"/get")
		if err := json.Unmarshal([]byte(text), &seen); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		via, client := seen.Headers["Via"], strings.Join(seen.Headers["X-Forwarded-For"], ",")
		if url == plain && (len(via) != 1 || client != "127.0.0.1") || url == secure && (via != nil || client != "") {
			t.Errorf("%s: the origin got %s", url, text)
		}
	}

	// A new bucket, instead of waiting 20 seconds.
	c.reload("burst 10\nrefill 0.5\nzone again")
	ok, limited := strings.Repeat("200 ", 10), strings.Repeat("429 ", 5)
	if got := c.statuses(15, plain+"/get"); got != ok+limited {
		t.Errorf("15 requests in a row: %s", got)
	}
	answer := c.curl("-i", "-x", "http://"+c.proxy, plain+"/get")
	wait := binaryNumber(t, answer, `\nRetry-After: (\d+)\r\n`)
	if wait < 1 || wait > 2 {
		t.Errorf("Retry-After: %d", wait)
	}
	for _, want := range []string{
		`^HTTP/1.1 429 Too Many Requests\r\n`,
		`\nProxy-Status: caddy-async-proxy-[0-9a-f]{8}; error=http_request_denied; details="Too many requests from your address; try again in [12] s"\r\n`,
		fmt.Sprintf(`\nRatelimit: "again";r=0;t=%d\r\n`, wait),
		`\nRatelimit-Policy: "again";q=10;w=20\r\n`,
		fmt.Sprintf(`\r\n\r\nToo many requests from your address; try again in %d s.\n?$`, wait),
	} {
		if !regexp.MustCompile(want).MatchString(answer) {
			t.Errorf("found no %s in\n%s", want, answer)
		}
	}
	time.Sleep(time.Duration(wait) * time.Second)
	if got := c.statuses(2, plain+"/get"); got != "200 429 " {
		t.Errorf("after %d seconds: %s", wait, got)
	}
	time.Sleep(20 * time.Second)
	if got := c.statuses(11, plain+"/get"); got != ok+"429 " {
		t.Errorf("after 20 seconds: %s", got)
	}

	// The log lines.
	host, target := strings.TrimPrefix(plain, "http://"), strings.TrimPrefix(secure, "https://")
	for message, want := range map[string]map[string]string{
		"async-proxy listening": {"level": "info", "burst": "10", "refill": "0.5", "addresses": `\[127.0.0.1:\d+\]`},
		"request": {"level": "info", "method": "GET", "host": host, "path": "/get", "status": "200", "latency": `.+`,
			"client": "127.0.0.1"},
		"rate limited": {"level": "warn", "ip": "127.0.0.1", "method": "GET", "host": host, "path": "/get", "status": "429", "latency": `.+`,
			"reason": "http_request_denied", "cause": "rate_limited", "retry_after": `[12]\..+|2`, "refused": "1"},
		"CONNECT tunnel": {"level": "info", "id": "1", "target": target, "address": target, "client": "127.0.0.1",
			"proto": "HTTP/1.1"},
		"CONNECT tunnel closed": {"level": "info", "id": "1", "target": target, "client": "127.0.0.1", "proto": "HTTP/1.1",
			"bytes_up": `[1-9]\d{2,}`, "bytes_down": `[1-9]\d{2,}`, "duration": `.+`, "reason": "(client|target) closed|client error"}, // curl may close before it has read TLS's close_notify
	} {
		line := c.waitLog(message, 1)[0]
		if line["logger"] != "http.handlers.async_proxy" {
			t.Errorf("%s: logger %v", message, line["logger"])
		}
		for field, pattern := range want {
			if got := fmt.Sprint(line[field]); line[field] == nil || !regexp.MustCompile("^("+pattern+")$").MatchString(got) {
				t.Errorf("%s: %s: got %s, want %s", message, field, got, pattern)
			}
		}
	}
}

// TestBinaryReload replaces the config while a tunnel is open.
func TestBinaryReload(t *testing.T) {
	c := binaryStart(t, binaryOptions{site: "burst 3\nrefill 0.00001"})
	tunnel := binaryTunnels(t, c.proxy, 1)[0]
	check := func(step, want string) {
		t.Helper()
		if err := binaryPing(tunnel); err != nil {
			t.Fatalf("%s: the tunnel: %v", step, err)
		}
		var got string
		for range strings.Fields(want) {
			// Port 1 gives a 502 if a token was left.
			got += c.status("http://127.0.0.1:1/") + " "
		}
		if got != want {
			t.Fatalf("%s: got %s, want %s", step, got, want)
		}
	}
	check("before", "502 502 429 ")
	c.reload("burst 3\nrefill 0.00001\ndial_timeout 9s")
	check("same limits", "429 ")
	c.reload("burst 4\nrefill 0.00001")
	check("another burst", "502 502 502 502 429 ")

	reload := func() (string, error) {
		out, err := c.command("reload", "--config", c.config, "--adapter", "caddyfile", "--address", c.admin).CombinedOutput()
		if err == nil {
			c.waitReloaded()
		}
		return string(out), err
	}
	c.write(c.caddyfile("burst 4\nrefill 0.00001\ndial_timeout 8s"))
	if out, err := reload(); err != nil {
		t.Fatalf("caddy reload: %v\n%s", err, out)
	}
	check("caddy reload, same limits", "429 ")
	c.write(c.caddyfile("burst 2\nrefill 0.00001"))
	if out, err := reload(); err != nil {
		t.Fatalf("caddy reload: %v\n%s", err, out)
	}
	check("caddy reload", "502 502 429 ")

	typo := c.caddyfile("burst ten")
	line := strings.Count(typo[:strings.Index(typo, "burst ten")], "\n") + 1
	want := func(file string) string {
		return fmt.Sprintf("burst: the value 'ten' is not valid; expected a whole number of tokens from 1 to 1000000000, at %s:%d", file, line)
	}
	c.write(typo)
	if out, err := reload(); err == nil || !strings.Contains(out, want(c.config)) {
		t.Errorf("caddy reload with a typo: %v\n%swant %s", err, out, want(c.config))
	}
	check("a typo", "429 ")
	if status, text := c.ask(http.MethodPost, "/load", typo); status != http.StatusBadRequest || !strings.Contains(text, want("Caddyfile")) {
		t.Errorf("/load with a typo: status %d: %s\nwant %s", status, text, want("Caddyfile"))
	}
	check("a typo by /load", "429 ")
	if n := len(c.logLines("CONNECT tunnel closed")); n != 0 {
		t.Errorf("%d tunnels were closed", n)
	}
}

// TestBinaryExit stops a Caddy that has open tunnels.
func TestBinaryExit(t *testing.T) {
	for _, row := range []struct {
		name, global string
		stop         func(*binaryCaddy)
		least        time.Duration
	}{
		{"SIGTERM", "", func(c *binaryCaddy) { _ = c.cmd.Process.Signal(syscall.SIGTERM) }, 0},
		{"SIGTERM with a grace period", "grace_period 2s",
			func(c *binaryCaddy) { _ = c.cmd.Process.Signal(syscall.SIGTERM) }, 2*time.Second - graceMargin},
		{"stop", "", func(c *binaryCaddy) { c.ask(http.MethodPost, "/stop", "") }, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			c := binaryStart(t, binaryOptions{global: row.global, secure: true})
			tunnels := binaryTunnels(t, c.proxy, 100)
			streams := binaryStreams(t, c.secure, 100)
			start := time.Now()
			row.stop(c)
			if row.least > 0 {
				c.waitLog("servers shutting down; grace period initiated", 1)
				if err := errors.Join(binaryPing(tunnels[0]), binaryPing(streams[0])); err != nil {
					t.Errorf("in the grace period: %v", err)
				}
			}
			select {
			case <-c.exited:
			case <-time.After(patience):
				t.Fatal("Caddy did not exit")
			}
			took := time.Since(start)
			t.Logf("took %v", took)
			if took < row.least {
				t.Errorf("took %v, want at least %v", took, row.least)
			}
			if code := c.cmd.ProcessState.ExitCode(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			closed := map[string]int{}
			for _, line := range c.logLines("CONNECT tunnel closed") {
				closed[fmt.Sprint(line["proto"], " ", line["reason"])]++
			}
			if closed["HTTP/1.1 shutdown"] != 100 || closed["HTTP/2.0 shutdown"] != 100 || len(closed) != 2 {
				t.Errorf("closing lines: %v", closed)
			}
		})
	}
}

// checkSettled checks that the process returns to its earlier numbers of descriptors and
// goroutines.
func (c *binaryCaddy) checkSettled(descriptors, goroutines int) {
	c.t.Helper()
	defer func() {
		c.t.Logf("descriptors %d, before %d; goroutines %d, before %d", c.descriptors(), descriptors, c.goroutines(), goroutines)
	}()
	eventually(c.t, "descriptors to be closed", func() bool { return c.descriptors() <= descriptors+2 })
	eventually(c.t, "goroutines to end", func() bool { return c.goroutines() <= goroutines+5 })
}

// TestBinaryIdle measures the cost of an idle tunnel.
func TestBinaryIdle(t *testing.T) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n := 5000
	if limit.Max < 2*uint64(n)+500 { // two per tunnel in this process, and two in Caddy's
		n = (int(limit.Max) - 500) / 2
	}
	c := binaryStart(t, binaryOptions{})
	binaryClose(binaryTunnels(t, c.proxy, 1))
	c.waitLog("CONNECT tunnel closed", 1)
	descriptors, goroutines := c.settled()
	resident := c.resident()

	tunnels := binaryTunnels(t, c.proxy, n)
	if got := c.descriptors() - descriptors; got != 2*n {
		t.Errorf("%d tunnels use %d descriptors, want %d", n, got, 2*n)
	}
	each := (c.resident() - resident) / n
	t.Logf("%d tunnels: %d bytes each, %d goroutines", n, each, c.goroutines()-goroutines)
	if each > 16<<10 {
		t.Errorf("a tunnel uses %d bytes of memory, want at most %d", each, 16<<10)
	}
	binaryClose(tunnels)
	c.checkSettled(descriptors, goroutines)
	if lines := c.waitLog("CONNECT tunnel closed", n+1); len(lines) != n+1 {
		t.Errorf("%d closing lines, want %d", len(lines), n+1)
	}
}

// TestBinaryChurn opens tunnels and closes them, half in order and half by resets.
func TestBinaryChurn(t *testing.T) {
	c := binaryStart(t, binaryOptions{})
	target := binaryEcho(t)
	binaryClose(binaryTunnels(t, c.proxy, 1))
	c.waitLog("CONNECT tunnel closed", 1)
	descriptors, goroutines := c.settled()
	binaryEach(t, 10_000, func(i int) error {
		tunnel, _, err := binaryOpen(c.proxy, target, patience)
		if err != nil {
			return err
		}
		defer tunnel.Close()
		if i%2 > 0 {
			tunnel.SetLinger(0)
		}
		return binaryPing(tunnel)
	})
	c.checkSettled(descriptors, goroutines)
}

// TestBinaryDescriptors makes the process run out of descriptors. A tunnel needs two; one
// more connection beforehand makes the other one of the two fail.
func TestBinaryDescriptors(t *testing.T) {
	c := binaryStart(t, binaryOptions{shell: "ulimit -n 128"})
	target := binaryEcho(t)
	var refused int
	for idle := range 2 {
		var conns []*net.TCPConn
		if idle > 0 {
			conns = append(conns, c.dial().TCPConn)
		}
		for {
			conn, res, err := binaryOpen(c.proxy, target, time.Second)
			if err == nil {
				conns = append(conns, conn)
				continue
			}
			t.Logf("after %d: %v", len(conns), err)
			if res == nil && c.descriptors() < 128 {
				continue // the machine stalls
			}
			if res != nil {
				refused++
				if status := res.Header.Get("Proxy-Status"); res.StatusCode != http.StatusServiceUnavailable || !strings.Contains(status, "; error=proxy_internal_error") {
					t.Errorf("status %d, Proxy-Status %q", res.StatusCode, status)
				}
			}
			break
		}
		if len(conns) < 40 {
			t.Errorf("%d tunnels, want more", len(conns))
		}
		binaryClose(conns)
		eventually(t, "a tunnel", func() bool {
			conn, _, err := binaryOpen(c.proxy, target, time.Second)
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
	}
	if refused == 0 {
		t.Error("got no 503")
	}
	// A client that had to wait for its connection to be accepted, and then disconnected,
	// is logged too.
	var line map[string]any
	eventually(t, "the log line of a 503", func() bool {
		lines := c.logLines("request")
		i := slices.IndexFunc(lines, func(line map[string]any) bool { return line["status"] == 503.0 })
		if i >= 0 {
			line = lines[i]
		}
		return i >= 0
	})
	if line["level"] != "warn" || !strings.Contains(fmt.Sprint(line["error"]), "too many open files") {
		t.Errorf("log line: %v", line)
	}
}

// TestBinaryOverTLS uses an HTTPS proxy.
func TestBinaryOverTLS(t *testing.T) {
	plain, secure := binaryHttpbin(t)
	c := binaryStart(t, binaryOptions{secure: true})
	for _, args := range [][]string{{"-p", plain}, {plain}, {"-k", secure}} {
		last := len(args) - 1
		args[last] += "/get"
		text := c.curl(append([]string{"--proxy", "https://" + c.secure, "--proxy-insecure"}, args...)...)
		if !strings.Contains(text, args[last]) {
			t.Errorf("%v: %s", args, text)
		}
	}
	for _, line := range c.waitLog("CONNECT tunnel closed", 2) {
		// The target may learn of the client's end through TLS and close first.
		if line["reason"] != tunnel.ReasonClient && line["reason"] != tunnel.ReasonTarget {
			t.Errorf("closing line: %v", line)
		}
	}
}

// TestBinaryCommands checks the module and the example config with Caddy's own commands.
func TestBinaryCommands(t *testing.T) {
	for want, args := range map[string][]string{
		"\nhttp.handlers.async_proxy\n": {"list-modules"},
		"Valid configuration":           {"validate", "--config", "Caddyfile.example", "--adapter", "caddyfile"},
	} {
		cmd := exec.Command(caddyBinary(t), args...)
		dir := t.TempDir()
		cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) || strings.Contains(string(out), "async-proxy listening") {
			t.Errorf("caddy %s: %v\n%s", args, err, out)
		}
	}
}

// TestBinaryRules checks the rules for intermediaries against the binary.
func TestBinaryRules(t *testing.T) {
	runRules(t, binaryStart(t, binaryOptions{site: ruleOptions}).proxy, newRuleOrigin)
}
