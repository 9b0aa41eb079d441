// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The tests in this file run several Caddys in their own processes. This process is their
// single client and spreads its requests over them.

// machine is a Caddy in its own process.
type machine struct {
	*process
	t                          testing.TB
	proxy, admin, config, logs string
}

// startMachine runs a Caddy with options of async_proxy until the test ends.
func startMachine(t testing.TB, options string) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t: t, proxy: freeAddress(t), admin: freeAddress(t), config: filepath.Join(dir, "Caddyfile"), logs: filepath.Join(dir, "caddy.log")}
	m.write(options)
	m.run()
	return m
}

func (m *machine) write(options string) {
	m.t.Helper()
	if err := os.WriteFile(m.config, []byte(siteConfig(m.proxy, m.logs, m.admin, options)), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) run() {
	m.t.Helper()
	cmd := exec.Command(caddyBinary(m.t), "run", "--config", m.config, "--adapter", "caddyfile")
	dir := filepath.Dir(m.config)
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	m.process = start(m.t, cmd)
	eventually(m.t, "Caddy to run", func() bool { return listens(m.admin) && listens(m.proxy) })
}

// stop makes Caddy exit in order.
func (m *machine) stop() {
	m.t.Helper()
	m.signal(m.t, syscall.SIGTERM)
	<-m.exited
}

// reload replaces the config through the admin endpoint.
func (m *machine) reload(options string) {
	m.t.Helper()
	m.write(options)
	text, err := os.ReadFile(m.config)
	if err != nil {
		m.t.Fatal(err)
	}
	m.ask(http.MethodPost, "/load", string(text), http.StatusOK)
	eventually(m.t, "the old socket to be closed", func() bool {
		sockets, err := os.ReadFile("/proc/net/tcp")
		_, port, _ := net.SplitHostPort(m.proxy)
		number, _ := strconv.Atoi(port)
		return err != nil || strings.Count(string(sockets), fmt.Sprintf(" 0100007F:%04X 00000000:0000 0A ", number)) < 2
	})
}

// ask calls the admin endpoint, with a Caddyfile if content is not empty, checks the status
// and returns the response.
func (m *machine) ask(method, path, content string, want int) string {
	m.t.Helper()
	req, err := http.NewRequest(method, "http://"+m.admin+path, strings.NewReader(content))
	if err != nil {
		m.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "text/caddyfile")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		m.t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != want {
		m.t.Fatalf("%s %s: status %d, want %d: %s, %v", method, path, res.StatusCode, want, body, err)
	}
	return string(body)
}

// startFleet runs n Caddys that count their clients in e.
func startFleet(t testing.TB, n int, e *engine, options string) (machines []*machine, proxies []string) {
	t.Helper()
	for range n {
		m := startMachine(t, fleetOptions(e, options))
		machines, proxies = append(machines, m), append(proxies, m.proxy)
	}
	return machines, proxies
}

// fleetOptions returns options of async_proxy with a limiter whose timeout is long enough
// that Redis does not count as gone on a busy machine.
func fleetOptions(e *engine, options string) string {
	return fmt.Sprintf("%s\nlimiter redis %s {\ntimeout 5s\n}", options, e.address)
}

func TestExactlyBurstIsAdmittedByAFleet(t *testing.T) {
	const burst = 100
	for _, command := range engines(t) {
		for _, n := range []int{2, 4} {
			t.Run(fmt.Sprintf("%d with %s", n, command), func(t *testing.T) {
				e := startEngine(t, command)
				_, proxies := startFleet(t, n, e, fmt.Sprintf("burst %d\nrefill 0.0001", burst))
				origin := startOrigin(t)
				statuses, _ := rush(t, 4*burst, origin, proxies...)
				if statuses[200] != burst || statuses[429] != 3*burst {
					t.Errorf("statuses %v, want 200 %d times and 429 for the others", statuses, burst)
				}
				for _, proxy := range proxies {
					res, err := get(proxy, origin)
					if err != nil || res.StatusCode != 429 {
						t.Fatalf("then %v, %v; want 429", res, err)
					}
					if wait, _ := strconv.Atoi(res.Header.Get("Retry-After")); wait > 10000 || wait < 9900 {
						t.Errorf("Retry-After: %d, want 10000 less the time since the first request", wait)
					}
				}
			})
		}
	}
}

// In the long run, a client gets refill requests per second from all machines together,
// however many it sends.
func TestLongRunRateOfAFleet(t *testing.T) {
	const (
		burst  = 400 // enough that a pause of two seconds loses no token
		refill = 200
		tokens = 1400 // seven seconds' worth
	)
	for _, n := range []int{2, 4} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			e := startEngine(t, "redis-server")
			_, proxies := startFleet(t, n, e, fmt.Sprintf("burst %d\nrefill %d", burst, refill))
			origin := startOrigin(t)
			var mu sync.Mutex
			refused := make(map[string]bool) // the proxies that have refused a request
			var admitted []time.Time         // since all of them have: the burst is used up, and each request waits for its token
			deadline := time.Now().Add(time.Minute)
			var wg sync.WaitGroup
			for i := range 2 * n {
				proxy := proxies[i%n]
				c := client(t, proxy)
				wg.Go(func() {
					for {
						res, err := c.Get(origin)
						if err != nil {
							t.Error(err)
							return
						}
						_, _ = io.Copy(io.Discard, res.Body)
						res.Body.Close()
						mu.Lock()
						if res.StatusCode != http.StatusOK {
							refused[proxy] = true
						} else if len(refused) == n {
							admitted = append(admitted, time.Now())
						}
						done := len(admitted) >= tokens
						mu.Unlock()
						if done || time.Now().After(deadline) {
							return
						}
						time.Sleep(time.Millisecond)
					}
				})
			}
			wg.Wait()
			if len(admitted) < tokens {
				t.Fatalf("%d requests in a minute; %d of %d proxies have refused some", len(admitted), len(refused), n)
			}
			rate := (tokens - 1) / admitted[tokens-1].Sub(admitted[0]).Seconds()
			t.Logf("%.2f requests a second", rate)
			if rate < refill*0.99 || rate > refill*1.01 {
				t.Errorf("%.2f requests a second, want %d within 1 %%", rate, refill)
			}
		})
	}
}

func TestFleetForgetsNothing(t *testing.T) {
	const options = "burst 6\nrefill 0.0001"
	e := startEngine(t, "redis-server")
	origin := startOrigin(t)
	machines, proxies := startFleet(t, 2, e, options)
	want := func(what string, admitted, refused int) {
		t.Helper()
		if statuses, _ := rush(t, admitted+refused, origin, proxies...); statuses[200] != admitted || statuses[429] != refused {
			t.Errorf("%s: statuses %v, want 200 %d times and 429 %d times", what, statuses, admitted, refused)
		}
	}
	want("at first", 2, 0)
	machines[0].reload(fleetOptions(e, options) + "\nvia fred")
	want("after a reload", 1, 0)
	machines[1].stop()
	machines[1].run()
	want("after a restart", 3, 7)
	machines[0].stop()
	machines[0].run()
	machines[1].kill()
	machines[1].run()
	want("after both restarted", 0, 4)

	// Redis forgets, but only once, and not what the Caddys have learned since.
	e.kill()
	e.run()
	var back int
	eventually(t, "both to be back", func() bool {
		back = 0
		for _, m := range machines {
			rush(t, 1, origin, m.proxy)
			failed, healed := len(logLines(t, m.logs, failedLine)), len(logLines(t, m.logs, backLine))
			if failed == healed {
				back++
			}
		}
		return back == 2
	})
	machines[0].stop()
	machines[0].run()
	statuses, _ := rush(t, 40, origin, proxies...)
	if statuses[200] == 0 || statuses[200] > 6 {
		t.Errorf("after a restart of Redis: statuses %v, want one burst more at most", statuses)
	}
	want("after that", 0, 10)
}

// An operator's refill applies in Redis, too, also from a machine that has not seen the
// client.
func TestRefill(t *testing.T) {
	e := startEngine(t, "redis-server")
	machines, proxies := startFleet(t, 2, e, "burst 3\nrefill 0.0001")
	origin := startOrigin(t)
	want := func(proxy string, admitted int) {
		t.Helper()
		if statuses, _ := rush(t, 5, origin, proxy); statuses[200] != admitted {
			t.Errorf("statuses %v, want 200 %d times", statuses, admitted)
		}
	}
	want(proxies[0], 3)
	for i, m := range slices.Backward(machines) {
		m.ask(http.MethodDelete, "/async_proxy/clients/127.0.0.1", "", http.StatusNoContent)
		want(proxies[i], 3)
	}
	machines[0].ask(http.MethodDelete, "/async_proxy/clients/192.0.2.1", "", http.StatusNotFound)
	e.kill()
	machines[0].ask(http.MethodDelete, "/async_proxy/clients/127.0.0.1", "", http.StatusNoContent)
	if lines := logLines(t, machines[0].logs, "failed to refill a shared bucket"); len(lines) != 1 || lines[0]["client"] != "127.0.0.1" {
		t.Errorf("log lines: %v", lines)
	}
}

// caddyBinary builds cmd/caddy once and returns its path.
func caddyBinary(tb testing.TB) string {
	tb.Helper()
	path, err := buildCaddy()
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

var buildDir string

var buildCaddy = sync.OnceValues(func() (string, error) {
	var err error
	if buildDir, err = os.MkdirTemp("", "async-proxy-test"); err != nil {
		return "", err
	}
	path := filepath.Join(buildDir, "caddy")
	if out, err := exec.Command("go", "build", "-o", path, "./cmd/caddy").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if buildDir != "" {
		_ = os.RemoveAll(buildDir)
	}
	os.Exit(code)
}
