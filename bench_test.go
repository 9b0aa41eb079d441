// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"errors"
	"flag"
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
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The benchmarks in this file measure the operator's cost: the CPU time of the proxy's
// process per request. Clients and origin run in the test's own process. Compare the metric
// proxy-µs/op between rows of one run; absolute figures depend on the machine.

const benchClients = 32

// tenPolicies are options with ten policies, of which the last one is for the clients of benchmarks.
var tenPolicies = func() string {
	options := "burst 1000000000\nrefill 1000000\n"
	for i := range 9 {
		options += fmt.Sprintf("policy p%d {\nclients 10.%d.0.0/16\ndeny ads%d.example\n}\n", i, i, i)
	}
	return options + "policy last {\nclients 127.0.0.0/8\ndeny ads.example\n}\n"
}()

// BenchmarkForward measures a small GET over keep-alive connections, through async_proxy
// and through what it is compared with: Caddy's own response, Caddy's reverse_proxy, and a
// bare net/http forwarder. These log no requests, so async_proxy is measured without
// request logging too; its log lines, Caddy's access log and Caddy's metrics have rows of
// their own.
func BenchmarkForward(b *testing.B) {
	for _, size := range []int{128, 10 << 10, 1 << 20} {
		origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header()["Content-Length"] = []string{strconv.Itoa(size)}
			_, _ = w.Write(make([]byte, size))
		}))
		address := origin.Listener.Addr().String()
		rows := []struct{ name, site, log string }{
			{"async_proxy", "async_proxy burst 1000000000 refill 1000000", "discard"},
			{"async_proxy-logging", "async_proxy burst 1000000000 refill 1000000", "file"},
			{"async_proxy-access-log", accessLogged + "async_proxy burst 1000000000 refill 1000000", "discard"},
			{"async_proxy-metrics", "async_proxy burst 1000000000 refill 1000000", "metrics"},
			{"async_proxy-policies", "async_proxy {\n" + tenPolicies + "}", "discard"},
			{"respond", "respond 200", "discard"},
			{"reverse_proxy", "reverse_proxy " + address, "discard"},
			{"net-http", "", ""},
		}
		for _, row := range rows {
			b.Run(fmt.Sprintf("%d/%s", size, row.name), func(b *testing.B) {
				proxy := startBench(b, row.site, row.log)
				request := fmt.Sprintf("GET http://%s/ HTTP/1.1\r\nHost: %s\r\n\r\n", address, address)
				proxy.run(b, request, http.StatusOK)
			})
		}
		origin.Close()
	}
}

// BenchmarkPost measures an upload on one connection, in the same forms as BenchmarkForward.
func BenchmarkPost(b *testing.B) {
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "ok")
	}))
	defer origin.Close()
	address := origin.Listener.Addr().String()
	const limiter = "async_proxy burst 1000000000 refill 1000000"
	for _, size := range []int{1 << 10, 64 << 10} {
		for _, row := range []struct{ name, site, log string }{
			{"async_proxy", limiter, "discard"},
			{"async_proxy-logging", limiter, "file"},
			{"async_proxy-access-log", accessLogged + limiter, "discard"},
			{"async_proxy-metrics", limiter, "metrics"},
			{"reverse_proxy", "reverse_proxy " + address, "discard"},
			{"net-http", "", ""},
		} {
			b.Run(fmt.Sprintf("%d/%s", size, row.name), func(b *testing.B) {
				proxy := startBench(b, row.site, row.log)
				request := fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s", address, address, size, strings.Repeat("x", size))
				proxy.run(b, request, http.StatusOK)
			})
		}
	}
}

// BenchmarkForms measures a GET over keep-alive connections in each form, on the fast path and
// through Caddy's HTTP server.
func BenchmarkForms(b *testing.B) {
	for _, size := range []int{128, 1 << 20} {
		origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header()["Content-Length"] = []string{strconv.Itoa(size)}
			_, _ = w.Write(make([]byte, size))
		}))
		address := origin.Listener.Addr().String()
		for _, f := range forms {
			for _, fast := range []bool{true, false} {
				name := f.name
				if !fast {
					name += "-nethttp"
				}
				b.Run(fmt.Sprintf("%d/%s", size, name), func(b *testing.B) {
					proxy := startBenchOf(b, f, "servers {\n"+f.servers(fast)+"}", "async_proxy {\nburst 1000000000\nrefill 1000000\nclients all\nallow 127.0.0.0/8\n}", "discard")
					proxy.run(b, fmt.Sprintf("GET http://%s/ HTTP/1.1\r\nHost: %s\r\n\r\n", address, address), http.StatusOK)
				})
			}
		}
		origin.Close()
	}
}

// BenchmarkConnect measures a tunnel on its own connection that carries one byte each way
// and is closed by its client: on the fast path, also with logs and metrics, through Caddy's HTTP server, and through a
// bare net/http proxy that hijacks the connection.
func BenchmarkConnect(b *testing.B) {
	echo := echoTarget(b)
	const limiter = "async_proxy burst 1000000000 refill 1000000"
	for _, row := range []struct{ name, site, log string }{
		{"async_proxy", limiter, "discard"},
		{"async_proxy-logging", limiter, "file"},
		{"async_proxy-access-log", accessLogged + limiter, "discard"},
		{"async_proxy-metrics", limiter, "metrics"},
		{"async_proxy-nethttp", `route {
	` + limiter + `
}`, "discard"},
		{"net-http", "", ""},
	} {
		b.Run(row.name, func(b *testing.B) {
			proxy := startBench(b, row.site, row.log)
			request := fmt.Sprintf("CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", echo, echo)
			proxy.measure(b, func(more func() bool) error {
				r := bufio.NewReader(nil)
				for more() {
					if err := tunnelOnce(proxy.address, r, request); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
}

func tunnelOnce(proxy string, r *bufio.Reader, request string) error {
	conn, err := net.Dial("tcp4", proxy)
	if err != nil {
		return err
	}
	defer conn.Close()
	r.Reset(conn)
	if _, err := io.WriteString(conn, request); err != nil {
		return err
	}
	res, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", res.StatusCode)
	}
	if _, err := conn.Write([]byte{'x'}); err != nil {
		return err
	}
	_, err = r.ReadByte()
	return err
}

// BenchmarkReject measures a 429 over keep-alive connections, with and without logging to a
// file, next to Caddy's respond, the cheapest possible response.
func BenchmarkReject(b *testing.B) {
	for _, row := range []struct {
		name, site, log string
		status          int
	}{
		{"async_proxy", "async_proxy burst 1 refill 0.00001", "discard", http.StatusTooManyRequests},
		{"async_proxy-logging", "async_proxy burst 1 refill 0.00001", "file", http.StatusTooManyRequests},
		{"respond", "respond 429", "discard", http.StatusTooManyRequests},
	} {
		b.Run(row.name, func(b *testing.B) {
			proxy := startBench(b, row.site, row.log)
			// Use up the single token.
			through := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: proxy.address}), DisableKeepAlives: true}
			if res, err := (&http.Client{Transport: through}).Get("http://127.0.0.1:1/"); err == nil {
				res.Body.Close()
			}
			proxy.run(b, "GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n", row.status)
		})
	}
}

// accessLogged is a directive for an access log in a file.
const accessLogged = "log {\noutput file access.log\n}\n"

// benchProxy is a proxy in its own process.
type benchProxy struct {
	form
	address string
	process *os.Process
}

// startBench runs a Caddy with one site, whose log is discarded or goes to a file; or it is
// discarded and Caddy observes its metrics. Without a site it runs the bare forwarder.
func startBench(b *testing.B, site, log string) benchProxy {
	b.Helper()
	options := ""
	switch log {
	case "file":
		log = "file caddy.log"
	case "metrics":
		log, options = "discard", "metrics"
	}
	return startBenchOf(b, forms[0], options, site, log)
}

// startBenchOf is startBench for a form of connections, with global options.
func startBenchOf(b *testing.B, f form, options, site, log string) benchProxy {
	b.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()

	var cmd *exec.Cmd
	if site == "" {
		cmd = exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), forwarderEnv+"="+address)
	} else {
		dir := b.TempDir()
		config := filepath.Join(dir, "Caddyfile")
		_, port, _ := net.SplitHostPort(address)
		text := fmt.Sprintf(`{
	admin off
	persist_config off
	auto_https disable_redirects
	%s
	log {
		output %s
	}
}
%s`, options, log, f.site(b, fmt.Sprintf("http://:%s {\n\tbind 127.0.0.1\n\t%s\n}\n", port, site)))
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
		cmd = exec.Command(caddyBinary(b), "run", "--config", config, "--adapter", "caddyfile")
		cmd.Dir = dir
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("tcp4", address)
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(deadline) {
			b.Fatal(err)
		}
	}
	return benchProxy{f, address, cmd.Process}
}

// run sends b.N requests over benchClients connections.
func (p benchProxy) run(b *testing.B, request string, status int) {
	b.Helper()
	conns := make(chan net.Conn, benchClients)
	for range benchClients {
		conn := p.dial(b, p.address)
		defer conn.Close()
		_ = conn.SetDeadline(time.Time{})
		conns <- conn
	}
	p.measure(b, func(more func() bool) error {
		conn := <-conns
		r := bufio.NewReader(conn)
		for more() {
			if err := exchangeOnce(conn, r, request, status); err != nil {
				return err
			}
		}
		return nil
	})
}

// measure runs benchClients clients that together do something b.N times, as long as more
// returns true.
func (p benchProxy) measure(b *testing.B, client func(more func() bool) error) {
	b.Helper()
	var left atomic.Int64
	left.Store(int64(b.N))
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	b.ResetTimer()
	before := p.cpu(b)
	for range benchClients {
		wg.Go(func() {
			if err := client(func() bool { return left.Add(-1) >= 0 }); err != nil {
				failed.Store(&err)
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	if err := failed.Load(); err != nil {
		b.Fatal(*err)
	}
	b.ReportMetric(float64(p.cpu(b)-before)/float64(b.N)/1e3, "proxy-µs/op")
}

func exchangeOnce(w io.Writer, r *bufio.Reader, request string, status int) error {
	if _, err := io.WriteString(w, request); err != nil {
		return err
	}
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	if res.StatusCode != status {
		return fmt.Errorf("status %d, want %d", res.StatusCode, status)
	}
	_, err = io.Copy(io.Discard, res.Body)
	return err
}

// cpu returns the CPU time that the process has used, to within a clock tick of 10 ms.
func (p benchProxy) cpu(b *testing.B) time.Duration {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.process.Pid))
	if err != nil {
		b.Skip("there is no /proc here: ", err)
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')'):]))
	user, _ := strconv.Atoi(fields[12])
	system, _ := strconv.Atoi(fields[13])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// caddyBinary builds cmd/caddy once and returns its path.
func caddyBinary(tb testing.TB) string {
	tb.Helper()
	path, err := caddyPath()
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

var buildDir string

// caddyPath builds cmd/caddy once. Among the processes of a run, the first that needs it builds it, and
// the others wait.
var caddyPath = sync.OnceValues(func() (string, error) {
	if path := os.Getenv(caddyEnv); path != "" {
		for {
			if _, err := os.Stat(path); err == nil {
				return path, nil
			}
			if text, err := os.ReadFile(path + ".failed"); err == nil {
				return "", errors.New(string(text))
			}
			if building, err := os.OpenFile(path+".new", os.O_CREATE|os.O_EXCL, 0o700); err == nil {
				building.Close()
				if err := buildCaddy(path + ".new"); err != nil {
					_ = os.WriteFile(path+".failed", []byte(err.Error()), 0o600)
				} else {
					_ = os.Rename(path+".new", path)
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	var err error
	if buildDir, err = os.MkdirTemp("", "async-proxy-test"); err != nil {
		return "", err
	}
	path := filepath.Join(buildDir, "caddy")
	return path, buildCaddy(path)
})

// buildCaddy builds cmd/caddy without symbols, so that it is linked in less time.
func buildCaddy(path string) error {
	if out, err := exec.Command("go", "build", "-ldflags=-s -w", "-o", path, "./cmd/caddy").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// forwarderEnv makes this test binary a bare net/http forwarder on the address in its
// value.
const forwarderEnv = "ASYNC_PROXY_TEST_FORWARDER"

func bareTunnel(w http.ResponseWriter, r *http.Request) {
	far, err := net.Dial("tcp", r.Host)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	near, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		_ = far.Close()
		return
	}
	_, _ = io.WriteString(near, "HTTP/1.1 200 OK\r\n\r\n")
	relay := func(dst, src net.Conn) {
		_, _ = io.Copy(dst, src)
		_ = dst.(*net.TCPConn).CloseWrite()
	}
	var up sync.WaitGroup
	up.Go(func() { relay(far, near) })
	relay(near, far)
	up.Wait()
	_ = near.Close()
	_ = far.Close()
}

func TestMain(m *testing.M) {
	if address := os.Getenv(forwarderEnv); address != "" {
		transport := &http.Transport{MaxIdleConnsPerHost: benchClients, DisableCompression: true}
		err := http.ListenAndServe(address, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodConnect {
				bareTunnel(w, r)
				return
			}
			r.RequestURI = ""
			res, err := transport.RoundTrip(r)
			if err != nil {
				w.WriteHeader(http.StatusBadGateway)
				return
			}
			defer res.Body.Close()
			for name, values := range res.Header {
				w.Header()[name] = values
			}
			w.WriteHeader(res.StatusCode)
			_, _ = io.Copy(w, res.Body)
		}))
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	waitTogether()
	if inParts() {
		os.Exit(runParts())
	}
	if os.Getenv(partEnv) != "" {
		endWithMain()
	}
	code := m.Run()
	if buildDir != "" {
		_ = os.RemoveAll(buildDir)
	}
	os.Exit(code)
}

// waitTogether lets eight parallel tests run at once unless the command line says
// otherwise. By default there would be one per processor, but these tests mostly wait.
// Fuzzing is left alone: the same flag is then the number of its processes.
func waitTogether() {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) {
		given = given || f.Name == "test.parallel" || f.Name == "test.fuzz"
	})
	if !given {
		_ = flag.Set("test.parallel", strconv.Itoa(max(8, runtime.GOMAXPROCS(0))))
	}
}
