// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
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
	_ "github.com/caddyserver/caddy/v2/modules/standard"
	"github.com/redis/rueidis"
)

// patience bounds every wait in the tests. Nothing should take that long: it turns a hang
// into a failure.
const patience = 20 * time.Second

// eventually waits until condition holds, for at most patience.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// nextPort starts below the ephemeral port range, so that the kernel gives no port away
// between its choice here and its use.
var nextPort atomic.Int64

func init() { nextPort.Store(27000 + int64(os.Getpid()%4000)) }

// freeAddress returns a loopback address that nothing listens on, a different one each
// time.
func freeAddress(t testing.TB) string {
	t.Helper()
	for {
		ln, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", nextPort.Add(1)))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return ln.Addr().String()
	}
}

// engines returns the command names of the installed servers.
func engines(t testing.TB) []string {
	t.Helper()
	found := []string{"redis-server"}
	if _, err := exec.LookPath("valkey-server"); err == nil {
		found = append(found, "valkey-server")
	}
	return found
}

// process is a process that a test has started.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
	output bytes.Buffer
}

// start runs a command until the test ends.
func start(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{cmd: cmd, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.output, &p.output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("output of %s:\n%s", cmd.Args[0], &p.output)
		}
	})
	return p
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.exited
}

func (p *process) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// engine is a Redis or Valkey in its own process.
type engine struct {
	*process
	t       testing.TB
	command string
	address string
	dir     string
	args    []string
	ask     rueidis.Client // nil if the arguments keep a plain client out
}

// startEngine runs a server with some arguments until the test ends.
func startEngine(t testing.TB, command string, args ...string) *engine {
	t.Helper()
	e := &engine{t: t, command: command, address: freeAddress(t), dir: t.TempDir(), args: args}
	e.run()
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{e.address}, ForceSingleClient: true, DisableCache: true})
	if err == nil {
		e.ask = client
		t.Cleanup(client.Close)
	}
	return e
}

// run starts the server, or restarts it after a kill.
func (e *engine) run() {
	e.t.Helper()
	_, port, _ := net.SplitHostPort(e.address)
	args := append([]string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--dir", e.dir, "--enable-debug-command", "yes"}, e.args...)
	e.process = start(e.t, exec.Command(e.command, args...))
	e.waitListen()
}

func (e *engine) waitListen() {
	e.t.Helper()
	eventually(e.t, e.command+" to listen", func() bool { return listens(e.address) })
}

func listens(address string) bool {
	conn, err := net.Dial("tcp4", address)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// do sends a command and returns the answer as text.
func (e *engine) do(words ...string) string {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), patience)
	defer cancel()
	var answer any
	var err error
	eventually(e.t, "an answer to "+strings.Join(words, " "), func() bool {
		answer, err = e.ask.Do(ctx, e.ask.B().Arbitrary(words...).Build()).ToAny()
		return err == nil || rueidis.IsRedisNil(err) || isAnswer(err)
	})
	if isAnswer(err) && !rueidis.IsRedisNil(err) {
		e.t.Fatalf("%q: %v", words, err)
	}
	return fmt.Sprint(answer)
}

// bucketKeys returns the keys of buckets, without the probe's.
func (e *engine) bucketKeys() []string {
	e.t.Helper()
	return strings.Fields(strings.Trim(e.do("KEYS", "async_proxy:[0-9]*"), "[]"))
}

// bucket returns the contents of the only bucket, or "" if there is none.
func (e *engine) bucket() string {
	e.t.Helper()
	switch keys := e.bucketKeys(); len(keys) {
	case 0:
		return ""
	case 1:
		return e.do("GET", keys[0])
	default:
		e.t.Fatalf("got the keys %q, want one", keys)
		return ""
	}
}

// world is a Caddy in this process with one async_proxy site, and an origin. There is only
// one Caddy per process, so tests with a world cannot run in parallel.
type world struct {
	t      testing.TB
	proxy  string // host:port
	origin string // URL
	logs   string // file of Caddy's log, JSON lines
}

func startOrigin(t testing.TB) string {
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "hello") }))
	t.Cleanup(origin.Close)
	return origin.URL
}

// newWorld starts a proxy with options of async_proxy.
func newWorld(t testing.TB, options string) *world {
	t.Helper()
	w := &world{t: t, proxy: freeAddress(t), origin: startOrigin(t), logs: filepath.Join(t.TempDir(), "caddy.log")}
	w.load(options)
	return w
}

// siteConfig returns a config with one site.
func siteConfig(proxy, logs, admin, options string) string {
	_, port, _ := net.SplitHostPort(proxy)
	return fmt.Sprintf("{\n\tadmin %s\n\tpersist_config off\n\tskip_install_trust\n\tgrace_period 5s\n\tdefault_bind 127.0.0.1\n\tmetrics\n\tlog {\n\t\toutput file %s\n\t\tformat json\n\t\tlevel DEBUG\n\t}\n}\nhttp://:%s {\n\tasync_proxy {\n\t\t%s\n\t}\n}\n",
		admin, logs, port, options)
}

// load replaces the running config.
func (w *world) load(options string) {
	w.t.Helper()
	text := siteConfig(w.proxy, w.logs, "off", options)
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		w.t.Fatalf("adapting: %v\n%s", err, text)
	}
	old := serving()
	if err := caddy.Load(config, true); err != nil {
		w.t.Fatalf("loading: %v\n%s", err, text)
	}
	// When a reload returns, the old servers may still accept a connection and close it.
	eventually(w.t, "the old servers to stop", func() bool {
		now := serving()
		return !slices.ContainsFunc(old, func(id string) bool { return slices.Contains(now, id) })
	})
	w.t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			w.t.Errorf("stopping: %v", err)
		}
	})
}

// serving returns the IDs of the goroutines in which Caddy's servers accept connections.
func serving() []string {
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

// get sends a request for url through a proxy, on its own connection.
func get(proxy, url string) (*http.Response, error) {
	conn, err := net.DialTimeout("tcp4", proxy, patience)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	req.Close = true
	if err := req.WriteProxy(conn); err != nil {
		return nil, err
	}
	return readResponse(conn, req)
}

// gets sends requests one after the other and checks their statuses.
func (w *world) gets(want ...int) {
	w.t.Helper()
	for i, want := range want {
		res, err := get(w.proxy, w.origin)
		if err != nil {
			w.t.Fatal(err)
		}
		if res.StatusCode != want {
			w.t.Errorf("request %d: status %d, want %d", i+1, res.StatusCode, want)
		}
	}
}

// untilCounted sends requests until Redis has counted one: the first may precede the
// connection to Redis.
func (w *world) untilCounted(e *engine) {
	w.t.Helper()
	eventually(w.t, "Redis to count", func() bool { w.gets(200); return e.bucket() != "" })
}

// rush sends n concurrent requests, spread over proxies, and counts the responses by
// status. longest is how long the slowest took.
func rush(t testing.TB, n int, origin string, proxies ...string) (statuses map[int]int, longest time.Duration) {
	t.Helper()
	statuses = make(map[int]int)
	var mu sync.Mutex
	var wg sync.WaitGroup
	conns := make([]net.Conn, n)
	for i := range conns {
		conn, err := net.DialTimeout("tcp4", proxies[i%len(proxies)], patience)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		conns[i] = conn
	}
	for _, conn := range conns {
		wg.Go(func() {
			req, err := http.NewRequest(http.MethodGet, origin, nil)
			if err != nil {
				t.Error(err)
				return
			}
			start := time.Now()
			if err = req.WriteProxy(conn); err != nil {
				t.Error(err)
				return
			}
			res, err := readResponse(conn, req)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			statuses[res.StatusCode]++
			longest = max(longest, time.Since(start))
		})
	}
	wg.Wait()
	return statuses, longest
}

// logLines returns the lines of a log with the given message.
func logLines(t testing.TB, file, message string) []map[string]any {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var lines []map[string]any
	for text := range strings.Lines(string(data)) {
		var line map[string]any
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			continue // still being written
		}
		if line["msg"] == message {
			lines = append(lines, line)
		}
	}
	return lines
}

const (
	failedLine = "redis does not answer; clients are not counted together until it does"
	stillLine  = "redis still does not answer"
	backLine   = "redis answers again"
)

// states counts the log lines about Redis being gone and back.
func (w *world) states() (failed, back int) {
	w.t.Helper()
	return len(logLines(w.t, w.logs, failedLine)), len(logLines(w.t, w.logs, backLine))
}

// client returns an http.Client that uses a proxy.
func client(t testing.TB, proxy string) *http.Client {
	transport := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: proxy}), MaxIdleConnsPerHost: 64}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: patience}
}

// readResponse reads a response and its content.
func readResponse(conn net.Conn, req *http.Request) (*http.Response, error) {
	res, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	res.Body = io.NopCloser(bytes.NewReader(body))
	return res, err
}
