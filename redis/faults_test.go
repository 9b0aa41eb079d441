// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	dto "github.com/prometheus/client_model/go"
)

// bridge is a TCP proxy in front of Redis that injects faults.
type bridge struct {
	address, target string
	delay           atomic.Int64 // added to what the server sends
	setup           atomic.Int64 // time before a new connection passes anything on
	silent          atomic.Bool  // drops what the client sends
	resets          atomic.Bool  // resets a connection when the client sends something

	mu    sync.Mutex
	conns []net.Conn
}

func startBridge(t testing.TB, target string) *bridge {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &bridge{address: ln.Addr().String(), target: target}
	t.Cleanup(func() {
		ln.Close()
		b.closeAll()
	})
	go func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp4", b.target)
			if err != nil {
				client.Close()
				continue
			}
			b.mu.Lock()
			b.conns = append(b.conns, client, server)
			b.mu.Unlock()
			go b.up(client.(*net.TCPConn), server)
			go b.down(client, server)
		}
	}()
	return b
}

func (b *bridge) closeAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, conn := range b.conns {
		conn.Close()
	}
}

func (b *bridge) up(client *net.TCPConn, server net.Conn) {
	defer server.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := client.Read(buf)
		if err != nil {
			return
		}
		if b.resets.Load() {
			_ = client.SetLinger(0)
			client.Close()
			return
		}
		if b.silent.Load() {
			continue
		}
		if _, err := server.Write(buf[:n]); err != nil {
			return
		}
	}
}

func (b *bridge) down(client, server net.Conn) {
	defer client.Close()
	buf := make([]byte, 64<<10)
	time.Sleep(time.Duration(b.setup.Load()))
	for {
		n, err := server.Read(buf)
		if err != nil {
			return
		}
		time.Sleep(time.Duration(b.delay.Load()))
		if _, err := client.Write(buf[:n]); err != nil {
			return
		}
	}
}

// questions returns how many requests this process has made to Redis.
func questions(t testing.TB) uint64 {
	t.Helper()
	var m dto.Metric
	if err := metrics.duration.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetHistogram().GetSampleCount()
}

func counter(t testing.TB, c interface{ Write(*dto.Metric) error }) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

const (
	// faultTimeout is the limiter's timeout in these tests.
	faultTimeout = 200 * time.Millisecond

	// tooLong separates requests that wait for the timeout, which take less, from those
	// that wait for anything else.
	tooLong = 900 * time.Millisecond
)

// Whatever happens to Redis, requests succeed. One line is logged when it is gone and one
// when it is back; it is not asked in between, and counts again afterwards.
func TestFaults(t *testing.T) {
	for _, row := range []struct {
		name, kind string
		says       string // the error in the log
		harm, heal func(*engine, *bridge)
	}{
		{"stopped", "timeout", "context deadline exceeded",
			func(e *engine, _ *bridge) { e.signal(e.t, syscall.SIGSTOP) },
			func(e *engine, _ *bridge) { e.signal(e.t, syscall.SIGCONT) }},
		{"killed", "connection", "EOF",
			func(e *engine, _ *bridge) { e.kill() },
			func(e *engine, _ *bridge) { e.run() }},
		{"connections are reset", "connection", "connection reset by peer",
			func(_ *engine, b *bridge) { b.resets.Store(true) },
			func(_ *engine, b *bridge) { b.resets.Store(false) }},
		{"nothing arrives", "timeout", "context deadline exceeded",
			func(_ *engine, b *bridge) { b.silent.Store(true) },
			func(_ *engine, b *bridge) { b.silent.Store(false) }},
		{"connections are closed, and new ones silent", "", "deadline exceeded",
			func(_ *engine, b *bridge) {
				b.silent.Store(true)
				b.closeAll()
				time.Sleep(2500 * time.Millisecond) // the library notices, and the next request must connect
			},
			func(_ *engine, b *bridge) { b.silent.Store(false) }},
		{"answers take longer", "timeout", "context deadline exceeded",
			func(_ *engine, b *bridge) { b.delay.Store(int64(2 * faultTimeout)) },
			func(_ *engine, b *bridge) { b.delay.Store(0) }},
		{"READONLY", "answer", "READONLY",
			func(e *engine, _ *bridge) { e.do("REPLICAOF", "127.0.0.1", "1") },
			func(e *engine, _ *bridge) { e.do("REPLICAOF", "NO", "ONE") }},
		{"OOM", "answer", "OOM",
			func(e *engine, _ *bridge) { e.do("CONFIG", "SET", "maxmemory", "1") },
			func(e *engine, _ *bridge) { e.do("CONFIG", "SET", "maxmemory", "0") }},
		{"NOPERM", "answer", "script",
			func(e *engine, _ *bridge) { e.do("ACL", "SETUSER", "default", "-get") },
			func(e *engine, _ *bridge) { e.do("ACL", "SETUSER", "default", "+get") }},
		{"LOADING", "", "LOADING",
			func(e *engine, _ *bridge) {
				for i := range 2000 {
					e.do("SET", fmt.Sprint("filler", i), strings.Repeat("x", 1500))
				}
				e.do("SAVE")
				e.kill()
				e.args = []string{"--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024", "--rdbcompression", "no"}
				e.run()
				if info := e.do("INFO", "persistence"); !strings.Contains(info, "loading:1") {
					e.t.Errorf("Redis is not loading: %s", info)
				}
			},
			func(e *engine, _ *bridge) { e.do("CONFIG", "SET", "key-load-delay", "0") }},
		{"wrong password", "connection", "WRONGPASS",
			func(e *engine, _ *bridge) {
				e.do("CONFIG", "SET", "requirepass", "another")
				e.do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
			},
			func(e *engine, _ *bridge) { e.do("CONFIG", "SET", "requirepass", "") }},
	} {
		t.Run(row.name, func(t *testing.T) {
			e := startEngine(t, "redis-server", "--rdbcompression", "no")
			b := startBridge(t, e.address)
			w := newWorld(t, fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout %v\npassword secret\n}", b.address, faultTimeout))
			w.untilCounted(e)
			var errors float64
			if row.kind != "" {
				errors = counter(t, metrics.errors.WithLabelValues(row.kind))
			}
			fallbacks := counter(t, metrics.fallbacks.WithLabelValues("local"))

			row.harm(e, b)
			statuses, longest := rush(t, 20, w.origin, w.proxy)
			if statuses[200] != 20 || longest > tooLong {
				t.Errorf("statuses %v, the last one after %v", statuses, longest)
			}
			if failed, _ := w.states(); failed != 1 {
				t.Fatalf("%d lines say that Redis is gone, want 1", failed)
			}
			asked := questions(t)
			for range 3 { // while reconnecting fails
				time.Sleep(probeInterval / 2)
				if statuses, longest = rush(t, 20, w.origin, w.proxy); statuses[200] != 20 || longest > tooLong {
					t.Errorf("statuses %v, the last one after %v", statuses, longest)
				}
			}
			if n := questions(t) - asked; n != 0 {
				t.Errorf("%d questions while Redis is gone", n)
			}
			if n := counter(t, metrics.fallbacks.WithLabelValues("local")) - fallbacks; n != 80 {
				t.Errorf("%v fallbacks, want 80", n)
			}
			if row.kind != "" && counter(t, metrics.errors.WithLabelValues(row.kind)) == errors {
				t.Errorf("no error of kind %s", row.kind)
			}

			var said []string // at the levels that people log
			for _, line := range append(logLines(t, w.logs, failedLine), logLines(t, w.logs, stillLine)...) {
				if line["level"] != "debug" {
					said = append(said, fmt.Sprint(line["error"]))
				}
			}
			if !strings.Contains(strings.Join(said, "\n"), row.says) || len(said) > 3 {
				t.Errorf("log lines %q; want %s, and at most one of each kind", said, row.says)
			}

			row.heal(e, b)
			eventually(t, "Redis to be back", func() bool { _, back := w.states(); return back > 0 })
			before := e.bucket()
			w.gets(200)
			if e.bucket() == before {
				t.Error("Redis does not count again")
			}
			if failed, back := w.states(); failed != 1 || back != 1 {
				t.Errorf("%d lines say that Redis is gone, %d that it is back; want one each", failed, back)
			}
		})
	}
}

// A Redis that answers within the timeout, but too late for some requests, does not count
// as back: it would be gone again at once.
func TestAlmostTooSlow(t *testing.T) {
	e := startEngine(t, "redis-server")
	b := startBridge(t, e.address)
	w := newWorld(t, fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout %v\n}", b.address, faultTimeout))
	w.untilCounted(e)
	b.delay.Store(int64(2 * faultTimeout))
	w.gets(200)
	b.delay.Store(int64(faultTimeout * 7 / 8))
	tried := func() int { return len(logLines(t, w.logs, stillLine)) }
	before := tried()
	eventually(t, "some attempts in vain", func() bool {
		if _, back := w.states(); back > 0 {
			t.Fatal("Redis counts as back")
		}
		return tried() >= before+4 // the first of them may have begun before Redis became faster
	})
	b.delay.Store(0)
	eventually(t, "Redis to be back", func() bool { _, back := w.states(); return back > 0 })
	w.gets(200)
	if failed, back := w.states(); failed != 1 || back != 1 {
		t.Errorf("%d lines say that Redis is gone, %d that it is back; want one each", failed, back)
	}
}

// A key of the wrong type is replaced: it does not make Redis count as gone.
func TestWrongTypeUnderTheKey(t *testing.T) {
	e := startEngine(t, "redis-server")
	w := newWorld(t, fleetOptions(e, "burst 10\nrefill 0.001"))
	w.gets(200)
	key := e.bucketKeys()[0]
	e.do("DEL", key)
	e.do("RPUSH", key, "a")
	w.gets(200)
	if got := e.do("TYPE", key); got != "string" {
		t.Errorf("the type is %s", got)
	}
	if failed, _ := w.states(); failed != 0 {
		t.Errorf("%d lines say that Redis is gone", failed)
	}
}

// checkTrouble checks what operators are told about the only server in use.
func checkTrouble(t *testing.T, onError, want string) {
	t.Helper()
	servers.Range(func(_, s any) bool {
		if got := (&Limiter{OnError: onError, server: s.(*server)}).Trouble(); got != want {
			t.Errorf("the trouble is %q, want %q", got, want)
		}
		return true
	})
}

func TestOnError(t *testing.T) {
	for onError, want := range map[string][]int{
		"local": {200, 200, 200, 429, 429},
		"allow": {200, 200, 200, 200, 200},
		"deny":  {503, 503, 503, 503, 503},
	} {
		t.Run(onError, func(t *testing.T) {
			e := startEngine(t, "redis-server")
			options := fmt.Sprintf("burst 3\nrefill 0.001\nlimiter redis %s {\ntimeout %v\non_error %s\n}", e.address, faultTimeout, onError)
			w := newWorld(t, options)
			fallbacks := counter(t, metrics.fallbacks.WithLabelValues(onError))
			checkTrouble(t, onError, "")
			e.kill()
			w.gets(want...)
			checkTrouble(t, onError, "redis does not answer, and "+map[string]string{
				"local": "each machine limits its clients alone", "allow": "clients are not limited", "deny": "every request gets status 503",
			}[onError]+" until it does; check the server and the network, the log has the error")
			refused := 0.0 // by the local bucket, which is no fallback
			if onError == "local" {
				refused = 2
			}
			if n := counter(t, metrics.fallbacks.WithLabelValues(onError)) - fallbacks; n != 5-refused {
				t.Errorf("%v fallbacks, want %v", n, 5-refused)
			}
			e.run()
			eventually(t, "Redis to be back", func() bool { _, back := w.states(); return back > 0 })
			checkTrouble(t, onError, "")
			if onError != "local" {
				w.gets(200)
			}
			if onError == "deny" { // no token was taken in the meantime
				w.gets(200, 200, 429)
			}
			// A config that starts while Redis is down.
			e.kill()
			w.load(options + "\nzone other")
			w.gets(want...)
		})
	}
}

// A request counts as one fallback, even if it charges a user instead of its client.
func TestFallbacksOfUsers(t *testing.T) {
	for onError, want := range map[string]int{"local": 200, "allow": 200, "deny": 503} {
		t.Run(onError, func(t *testing.T) {
			e := startEngine(t, "redis-server")
			w := newWorld(t, fmt.Sprintf("limit_by user\nbasic_auth {\nalice %s\n}\nlimiter redis %s {\ntimeout 5s\non_error %s\n}", secretHash, e.address, onError))
			fallbacks := counter(t, metrics.fallbacks.WithLabelValues(onError))
			c := client(t, w.proxy)
			get := func(want int) {
				t.Helper()
				req, err := http.NewRequest(http.MethodGet, w.origin, nil)
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Proxy-Authorization", "Basic YWxpY2U6c2VjcmV0") // alice:secret
				res, err := c.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				res.Body.Close()
				if res.StatusCode != want {
					t.Errorf("status %d, want %d", res.StatusCode, want)
				}
			}
			get(200)
			e.kill()
			for range 3 {
				get(want)
			}
			if n := counter(t, metrics.fallbacks.WithLabelValues(onError)) - fallbacks; n != 3 {
				t.Errorf("%v fallbacks, want 3", n)
			}
		})
	}
}

// secretHash is a cheap bcrypt hash of the password "secret".
const secretHash = "$2a$04$Qygo7lFPW76iK/UX8fhfkuttDQgKfbTsOK8PodbD0NQzppfmPuHZy"

// Redis may lose the script at any time.
func TestScriptIsForgotten(t *testing.T) {
	e := startEngine(t, "redis-server")
	w := newWorld(t, fleetOptions(e, "burst 100000\nrefill 0.001"))
	w.untilCounted(e)
	fallbacks, asked := counter(t, metrics.fallbacks.WithLabelValues("local")), questions(t)
	flushed := make(chan int)
	stop := make(chan struct{})
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				flushed <- n
				return
			default:
				_ = e.ask.Do(t.Context(), e.ask.B().ScriptFlush().Build()).Error()
			}
		}
	}()
	for range 10 {
		if statuses, _ := rush(t, 50, w.origin, w.proxy); statuses[200] != 50 {
			t.Errorf("statuses %v", statuses)
		}
	}
	close(stop)
	t.Logf("the scripts were flushed %d times", <-flushed)
	if n := counter(t, metrics.fallbacks.WithLabelValues("local")) - fallbacks; n != 0 || questions(t) != asked+500 {
		t.Errorf("%v fallbacks of %d questions", n, questions(t)-asked)
	}
}

// If Redis falls silent under load, neither requests nor goroutines pile up.
func TestNothingPilesUp(t *testing.T) {
	e := startEngine(t, "redis-server")
	w := newWorld(t, fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout %v\n}", e.address, faultTimeout))
	rush(t, 100, w.origin, w.proxy)
	e.signal(t, syscall.SIGSTOP)
	for range 4 {
		// More than maxWaiting at a time.
		if statuses, _ := rush(t, 2*maxWaiting, w.origin, w.proxy); statuses[200] != 2*maxWaiting {
			t.Errorf("statuses %v", statuses)
		}
		eventually(t, "goroutines to end", func() bool { return stacksWith("rueidis.") < 20 })
	}
	if failed, _ := w.states(); failed != 1 {
		t.Errorf("%d lines say that Redis is gone, want 1", failed)
	}
	e.signal(t, syscall.SIGCONT)
	eventually(t, "Redis to be back", func() bool { _, back := w.states(); return back > 0 })
	w.gets(200)
}

// The library's queue blocks when it is full: requests queue in front of it, for at most
// the timeout.
func TestWaitingIsBounded(t *testing.T) {
	e := startEngine(t, "redis-server")
	b := startBridge(t, e.address)
	w := newWorld(t, fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout %v\n}", b.address, faultTimeout))
	rush(t, 100, w.origin, w.proxy)
	s := w.server()
	b.silent.Store(true)
	var wg sync.WaitGroup
	for range 3 * maxWaiting {
		wg.Go(func() {
			start := time.Now()
			if _, err := s.take("a", "a:b", probeArgs); err == nil {
				t.Error("got an answer though nothing arrives")
			}
			if took := time.Since(start); took > tooLong {
				t.Errorf("took %v", took)
			}
		})
	}
	wg.Wait()
}

// While a connection exists, no request waits for a new one, which may take longer than its
// timeout.
func TestSlowToConnect(t *testing.T) {
	e := startEngine(t, "redis-server")
	b := startBridge(t, e.address)
	b.setup.Store(int64(700 * time.Millisecond))
	w := newWorld(t, fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout 500ms\n}", b.address))
	w.untilCounted(e)
	asked := questions(t)
	for range 3 {
		rush(t, 10, w.origin, w.proxy)
	}
	if failed, _ := w.states(); failed != 0 || questions(t) != asked+30 {
		t.Errorf("%d questions; log lines %v", questions(t)-asked, logLines(t, w.logs, failedLine))
	}
}

// server returns the only server.
func (w *world) server() *server {
	w.t.Helper()
	var found *server
	servers.Range(func(_, value any) bool {
		found = value.(*server)
		return true
	})
	if found == nil {
		w.t.Fatal("found no server")
	}
	return found
}

// A reload keeps the state of Redis, and the end of the config leaves nothing behind.
func TestReload(t *testing.T) {
	e := startEngine(t, "redis-server")
	options := fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout %v\n}", e.address, faultTimeout)
	w := newWorld(t, options)
	w.gets(200)
	before := w.server()
	w.load(options + "\nvia fred")
	w.gets(200)
	if w.server() != before {
		t.Error("the server did not survive the reload")
	}
	e.kill()
	w.gets(200)
	w.load(options)
	w.gets(200)
	if failed, back := w.states(); failed != 1 || back != 0 {
		t.Errorf("%d lines say that Redis is gone, %d that it is back; want the one from before the reload", failed, back)
	}

	// Lines go to the newest config's log.
	w.logs = filepath.Join(t.TempDir(), "other.log")
	w.load(options)
	e.run()
	eventually(t, "Redis to be back", func() bool { _, back := w.states(); return back > 0 })
	e.kill()
	w.gets(200)
	w.load("burst 5") // no limiter, while reconnecting fails
	eventually(t, "the goroutines of the limiter to end", func() bool { return stacksWith("redis.(*server)") == 0 })
}

// A rejected config does not change where lines are logged.
func TestRejectedReload(t *testing.T) {
	e := startEngine(t, "redis-server")
	options := fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout 5s\n}", e.address)
	w := newWorld(t, options)
	w.gets(200)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	text := siteConfig(w.proxy, filepath.Join(t.TempDir(), "rejected.log"), "off", options) + "http://" + ln.Addr().String() + " {\n\trespond ok\n}\n"
	config, _, err := adapt(text, "Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	if err = caddy.Load(config, true); err == nil {
		t.Fatal("a config was loaded though its port is in use")
	}
	e.kill()
	w.gets(200)
	if failed, _ := w.states(); failed != 1 {
		t.Errorf("%d lines say that Redis is gone, want 1", failed)
	}
}

// stacksWith returns the number of goroutines whose stack contains the named function.
func stacksWith(name string) int {
	stacks := make([]byte, 16<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	n := 0
	for stack := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(stack, name) {
			n++
		}
	}
	return n
}
