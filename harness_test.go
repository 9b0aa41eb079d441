// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	_ "github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// patience bounds every wait in the tests. Nothing should take that long: it turns a hang
// into a failure.
const patience = 20 * time.Second

// world is a Caddy in this process with one async_proxy site, and an origin. There is only
// one Caddy per process, so tests with a world cannot run in parallel.
type world struct {
	t      testing.TB
	proxy  string           // host:port of the proxy
	origin *httptest.Server // answers with handler
	logs   string           // file of Caddy's log, JSON lines
}

// newWorld starts a proxy with the given options, one per line, and an origin on loopback
// that answers with handler. "burst 1000000" and "refill 1000000" apply unless options
// override them.
func newWorld(t testing.TB, options string, handler http.Handler) *world {
	t.Helper()
	w := &world{t: t, proxy: freeAddress(t), logs: filepath.Join(t.TempDir(), "caddy.log")}
	if handler == nil {
		handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "hello from the origin") })
	}
	forgetCredentials()
	w.origin = httptest.NewServer(handler)
	t.Cleanup(func() { closeServer(t, w.origin) })
	w.load(w.site(options))
	return w
}

// closeServer closes a server whose handlers should have returned. Close would wait for those that have
// not, and so would the test, which may have failed for the same reason.
func closeServer(t testing.TB, server *httptest.Server) {
	t.Helper()
	closed := make(chan struct{})
	go func() {
		server.CloseClientConnections()
		server.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(patience):
		t.Error("a handler of the origin has not returned")
	}
}

// site returns the Caddyfile of a proxy with the given options.
func (w *world) site(options string) string {
	for _, option := range []string{"burst", "refill"} {
		if !strings.Contains(options, option) {
			options += "\n" + option + " 1000000"
		}
	}
	return fmt.Sprintf(`http://%s {
	async_proxy {
		%s
	}
}
`, strings.TrimPrefix(w.proxy, "127.0.0.1"), options)
}

// inRoute makes Caddy's HTTP server serve a site's connections: nested in another
// directive, async_proxy does not add its listener wrapper.
func inRoute(site string) string {
	return strings.Replace(site, "\tasync_proxy", "\troute {\nasync_proxy", 1) + "}\n"
}

// byCaddy makes Caddy's HTTP server serve a site's connections, because another handler gets
// the requests first.
func byCaddy(site string) string { return strings.Replace(site, "{\n", "{\n\tvars way ordinary\n", 1) }

// byNetHTTP makes Caddy's HTTP server serve the tests' clients: any server options at all
// replace the listener wrapper.
var byNetHTTP = flag.Bool("nethttp", false, "have clients served by Caddy's HTTP server")

// load replaces the running config with sites, in Caddyfile syntax. The global options are
// the world's: logs go to w.logs.
func (w *world) load(sites string) {
	w.t.Helper()
	servers := ""
	if *byNetHTTP {
		servers = "\tservers {\n\t\tkeepalive_interval 15s\n\t}\n"
	}
	loadCaddyfile(w.t, fmt.Sprintf("{\n\tadmin off\n\tpersist_config off\n\tskip_install_trust\n\tgrace_period 5s\n\tdefault_bind 127.0.0.1\n\tlog {\n\t\toutput file %s\n\t\tformat json\n\t\tlevel DEBUG\n\t}\n%s}\n%s", w.logs, servers, sites))
}

// loadCaddyfile runs a Caddyfile until the test ends.
func loadCaddyfile(t testing.TB, caddyfile string) {
	t.Helper()
	reloadAndWait(t, func() { startCaddyfile(t, caddyfile) })
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping: %v", err)
		}
	})
}

// serversRemain is set once a test has waited in vain for servers to stop. No later test of the process
// would do better.
var serversRemain bool

// reloadAndWait loads a config and waits until the previous servers have stopped. When a reload
// returns, they may still accept a connection, which they close or serve as before, and
// their sockets may still be open.
func reloadAndWait(t testing.TB, load func()) {
	t.Helper()
	if serversRemain {
		t.Fatal("the servers of an earlier test have not stopped")
	}
	old := acceptGoroutines()
	load()
	serversRemain = true
	eventually(t, "the old servers to stop", func() bool {
		now := acceptGoroutines()
		return !slices.ContainsFunc(old, func(id string) bool { return slices.Contains(now, id) }) && !listeningTwice()
	})
	serversRemain = false
}

// startCaddyfile does not wait until the previous config has stopped. With TLS sites, Caddy
// would also listen on port 80, which may be in use or need privileges: startCaddyfile
// disables that unless the Caddyfile says otherwise.
func startCaddyfile(t testing.TB, caddyfile string) {
	t.Helper()
	if options, ok := strings.CutPrefix(caddyfile, "{\n"); ok && !strings.Contains(caddyfile, "auto_https") {
		caddyfile = "{\n\tauto_https disable_redirects\n" + options
	}
	config, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		t.Fatalf("adapting: %v\n%s", err, caddyfile)
	}
	for _, warning := range warnings {
		if !strings.Contains(warning.Message, "not formatted") {
			t.Logf("adapting: %v", warning)
		}
	}
	if err := caddy.Load(config, true); err != nil {
		t.Fatalf("loading: %v\n%s", err, caddyfile)
	}
}

// acceptGoroutines returns the IDs of the goroutines in which Caddy's servers accept
// connections.
func acceptGoroutines() []string {
	stacks := make([]byte, 4<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	var ids []string
	for stack := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(stack, "net/http.(*Server).Serve(") && strings.Contains(stack, "created by github.com/caddyserver/caddy/v2/modules/caddyhttp.") {
			ids = append(ids, strings.Fields(stack)[1])
		}
	}
	return ids
}

// ownPorts are the ports that freeAddress has returned.
var ownPorts sync.Map

// listeningTwice reports whether any address of these tests has two listening sockets. It is
// false on systems that do not tell.
func listeningTwice() bool {
	sockets, err := os.Open("/proc/net/tcp")
	if err != nil {
		return false
	}
	defer sockets.Close()
	seen := make(map[string]bool)
	lines := bufio.NewScanner(sockets)
	lines.Scan() // the headings
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || fields[3] != "0A" {
			break // The connections follow. Earlier tests leave thousands.
		}
		var address, port int
		_, _ = fmt.Sscanf(fields[1], "%x:%x", &address, &port)
		if _, own := ownPorts.Load(port); own && seen[fields[1]] {
			return true
		}
		seen[fields[1]] = true
	}
	return false
}

// nextPort starts below the ephemeral port range, so that the kernel gives no port away
// between its choice here and its use. Processes started together, as fuzz workers are, get
// separate ranges.
var nextPort atomic.Int64

func init() {
	first := 20000 + int64(os.Getpid()*8%4000)
	_, _ = fmt.Sscan(os.Getenv(partEnv), &first)
	nextPort.Store(first)
}

// freeAddress returns a loopback address that nothing listens on, a different one each
// time, also among the processes of one run.
func freeAddress(t testing.TB) string {
	t.Helper()
	for {
		port := nextPort.Add(1)
		if !claimPort(port) {
			continue
		}
		ln, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		ownPorts.Store(ln.Addr().(*net.TCPAddr).Port, true)
		return ln.Addr().String()
	}
}

// claimPort reports whether no other process of the run has claimed a port. The directory that they
// share has a file for each claim.
func claimPort(port int64) bool {
	caddy := os.Getenv(caddyEnv)
	if caddy == "" {
		return true
	}
	claim, err := os.OpenFile(filepath.Join(filepath.Dir(caddy), fmt.Sprintf("port-%d", port)), os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		_ = claim.Close()
	}
	return !errors.Is(err, fs.ErrExist)
}

// client returns an http.Client that uses the proxy, with its own connections.
func (w *world) client() *http.Client {
	transport := &http.Transport{
		Proxy:              http.ProxyURL(&url.URL{Scheme: "http", Host: w.proxy}),
		DisableCompression: true,
	}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}

// dial opens a raw connection to the proxy.
func (w *world) dial() *rawConn { return dialRaw(w.t, w.proxy) }

// logLines returns the lines of Caddy's log with the given message, or all of them if it is "".
func (w *world) logLines(message string) []map[string]any {
	w.t.Helper()
	data, err := os.ReadFile(w.logs)
	if err != nil {
		w.t.Fatal(err)
	}
	var lines []map[string]any
	for text := range strings.Lines(string(data)) {
		if !strings.HasSuffix(text, "\n") {
			break // still being written
		}
		var line map[string]any
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			w.t.Fatalf("log line %q: %v", text, err)
		}
		if message == "" || line["msg"] == message {
			lines = append(lines, line)
		}
	}
	return lines
}

// waitLog waits until there are n lines with the given message.
func (w *world) waitLog(message string, n int) []map[string]any {
	w.t.Helper()
	var lines []map[string]any
	eventually(w.t, fmt.Sprintf("%d log lines %q", n, message), func() bool {
		lines = w.logLines(message)
		return len(lines) >= n
	})
	return lines
}

// eventually waits until condition holds, for at most patience.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	conntest.Eventually(t, what, condition)
}

// rawConn is a connection for tests that spell out every byte.
type rawConn struct {
	*net.TCPConn
	t    testing.TB
	r    *bufio.Reader
	over *tls.Conn // nil: without TLS
}

func dialRaw(t testing.TB, address string) *rawConn {
	t.Helper()
	conn, err := net.DialTimeout("tcp4", address, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	return &rawConn{TCPConn: conn.(*net.TCPConn), t: t, r: bufio.NewReader(conn)}
}

// awaitRead waits until the proxy has read everything that was sent. On systems that do not
// tell, it waits for a moment.
func (c *rawConn) awaitRead() {
	c.t.Helper()
	asInFile := func(addr net.Addr) string {
		to := netip.MustParseAddrPort(addr.String())
		ip := to.Addr().Unmap().As4()
		return fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(ip[:]), to.Port())
	}
	near, far := asInFile(c.LocalAddr()), asInFile(c.RemoteAddr())
	eventually(c.t, "the proxy to read what was sent", func() bool {
		sockets, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			time.Sleep(100 * time.Millisecond)
			return true
		}
		for line := range strings.Lines(string(sockets)) {
			fields := strings.Fields(line)
			if len(fields) < 5 || fields[1] != near && fields[2] != near || fields[1] != far && fields[2] != far {
				continue
			}
			if fields[4] != "00000000:00000000" { // bytes that are not acknowledged, and not read
				return false
			}
		}
		return true
	})
}

// send writes a text whose lines may end with a bare \n.
func (c *rawConn) send(text string) {
	c.t.Helper()
	text = strings.ReplaceAll(strings.ReplaceAll(text, "\r\n", "\n"), "\n", "\r\n")
	if _, err := io.WriteString(c, text); err != nil {
		c.t.Fatal(err)
	}
}

// response reads a response to a request of the given method, and its body to the end.
func (c *rawConn) response(method string) (*http.Response, string) {
	c.t.Helper()
	res, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		c.t.Fatalf("reading a response: %v", err)
	}
	if method == http.MethodConnect && res.StatusCode == http.StatusOK {
		return res, ""
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Fatalf("reading a body: %v (so far %q)", err, body)
	}
	res.Body.Close()
	return res, string(body)
}

// connect opens a tunnel to target.
func (c *rawConn) connect(target string) {
	c.t.Helper()
	c.send("CONNECT " + target + " HTTP/1.1\nHost: " + target + "\n\n")
	if res, body := c.response(http.MethodConnect); res.StatusCode != http.StatusOK {
		c.t.Fatalf("CONNECT %s: %s: %s", target, res.Status, body)
	}
}

// readAll reads until the peer closes or half-closes.
func (c *rawConn) readAll() string {
	c.t.Helper()
	data, err := io.ReadAll(c.r)
	if err != nil {
		c.t.Fatalf("reading to the end: %v (so far %q)", err, data)
	}
	return string(data)
}

// expectReset fails the test unless a reset is the next thing to arrive.
func (c *rawConn) expectReset() {
	c.t.Helper()
	if data, err := io.ReadAll(c.r); !errors.Is(err, syscall.ECONNRESET) || len(data) > 0 {
		c.t.Errorf("%q, then %v; want a reset", data, err)
	}
}

// listen runs serve for each connection to a new loopback listener and returns the
// listener's address. The end of the test closes all connections.
func listen(t testing.TB, serve func(*net.TCPConn)) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(patience))
			go func() {
				defer conn.Close()
				serve(conn.(*net.TCPConn))
			}()
		}
	}()
	return ln.Addr().String()
}

// socketPair returns the two ends of a loopback TCP connection.
func socketPair(t testing.TB) (inside, outside net.Conn) {
	t.Helper()
	return conntest.Pair(t)
}

// provisioned returns the handlers of the running config.
func provisioned(t *testing.T) (list []*proxy) {
	t.Helper()
	p, err := acquireProcess()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = releaseProcess() }()
	p.proxies.Range(func(h *proxy, _ struct{}) bool {
		list = append(list, h)
		return true
	})
	return list
}

// disconnectWatchDelay is at least how long an exchange, and a client connection, runs before
// it watches for client disconnect.
const disconnectWatchDelay = 20 * time.Millisecond
