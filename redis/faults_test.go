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

// bridge is a TCP proxy before a Redis, which can do it harm.
type bridge struct {
	address, target string
	delay           atomic.Int64 // of what the server says
	setup           atomic.Int64 // what a connection takes before it says anything
	silent          atomic.Bool  // what the client says is lost
	resets          atomic.Bool  // a connection is reset when the client says something

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

// questions is how many were put to Redis by this process.
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
	// faultTimeout is the limiter's in these tests.
	faultTimeout = 200 * time.Millisecond

	// tooLong is what no request takes that waits for the timeout, and each
	// that waits for anything else.
	tooLong = 900 * time.Millisecond
)

// Whatever becomes of Redis, requests go on, there is one line when it goes and
// one when it is back, nobody asks in between, and then it counts again.
func TestFaults(t *testing.T) {
	for _, row := range []struct {
		name, kind string
		says       string // what the log says is wrong
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
				time.Sleep(2500 * time.Millisecond) // until the library knows, so that a request has to connect
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
					e.t.Errorf("Redis does not load: %s", info)
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
			for range 3 { // while it is tried in vain
				time.Sleep(probeInterval / 2)
				if statuses, longest = rush(t, 20, w.origin, w.proxy); statuses[200] != 20 || longest > tooLong {
					t.Errorf("statuses %v, the last one after %v", statuses, longest)
				}
			}
			if n := questions(t) - asked; n != 0 {
				t.Errorf("%d questions to a Redis that is gone", n)
			}
			if n := counter(t, metrics.fallbacks.WithLabelValues("local")) - fallbacks; n != 80 {
				t.Errorf("%v fallbacks, want 80", n)
			}
			if row.kind != "" && counter(t, metrics.errors.WithLabelValues(row.kind)) == errors {
				t.Errorf("no error of kind %s", row.kind)
			}

			said := fmt.Sprint(append(logLines(t, w.logs, failedLine), logLines(t, w.logs, stillLine)...))
			if !strings.Contains(said, row.says) {
				t.Errorf("the log says %s; want %s", said, row.says)
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

// A Redis that answers in the timeout, but later than some requests wait, is not
// back: it would be gone again at once.
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
			t.Fatal("it is back")
		}
		return tried() >= before+4 // the first may have begun before it became faster
	})
	b.delay.Store(0)
	eventually(t, "Redis to be back", func() bool { _, back := w.states(); return back > 0 })
	w.gets(200)
	if failed, back := w.states(); failed != 1 || back != 1 {
		t.Errorf("%d lines say that Redis is gone, %d that it is back; want one each", failed, back)
	}
}

// A wrong type under the key is replaced: it is nobody's fault but the key's.
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
			e.kill()
			w.gets(want...)
			refused := 0.0 // by the own bucket, which is no fallback
			if onError == "local" {
				refused = 2
			}
			if n := counter(t, metrics.fallbacks.WithLabelValues(onError)) - fallbacks; n != 5-refused {
				t.Errorf("%v fallbacks, want %v", n, 5-refused)
			}
			e.run()
			eventually(t, "Redis to be back", func() bool { _, back := w.states(); return back > 0 })
			if onError != "local" {
				w.gets(200)
			}
			if onError == "deny" { // no token was taken meanwhile
				w.gets(200, 200, 429)
			}
			// A config that starts without Redis.
			e.kill()
			w.load(options + "\nzone other")
			w.gets(want...)
		})
	}
}

// A request is one fallback, also if it is the user who is to be counted.
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

// secretHash is that of the password "secret", by a bcrypt that is cheap.
const secretHash = "$2a$04$Qygo7lFPW76iK/UX8fhfkuttDQgKfbTsOK8PodbD0NQzppfmPuHZy"

// Redis may forget the script at any time.
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

// A Redis that falls silent under load has neither requests nor goroutines pile
// up.
func TestNothingPilesUp(t *testing.T) {
	e := startEngine(t, "redis-server")
	w := newWorld(t, fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout %v\n}", e.address, faultTimeout))
	rush(t, 100, w.origin, w.proxy)
	e.signal(t, syscall.SIGSTOP)
	for range 4 {
		// More than may wait at a time.
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

// The library's queue blocks when it is full: requests wait for their turn
// before it, and no longer than for an answer.
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
				t.Error("an answer though nothing arrives")
			}
			if took := time.Since(start); took > tooLong {
				t.Errorf("took %v", took)
			}
		})
	}
	wg.Wait()
}

// No request connects, which may take longer than it can wait, while there is a
// connection.
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
		t.Errorf("%d questions; the log says %v", questions(t)-asked, logLines(t, w.logs, failedLine))
	}
}

// server is the only one.
func (w *world) server() *server {
	w.t.Helper()
	var found *server
	servers.Range(func(_, value any) bool {
		found = value.(*server)
		return true
	})
	if found == nil {
		w.t.Fatal("there is no server")
	}
	return found
}

// A reload keeps what is known of Redis, and its end leaves nothing behind.
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

	// The lines are where the newest config wants them.
	w.logs = filepath.Join(t.TempDir(), "other.log")
	w.load(options)
	e.run()
	eventually(t, "Redis to be back", func() bool { _, back := w.states(); return back > 0 })
	e.kill()
	w.gets(200)
	w.load("burst 5") // without a limiter, while it is tried in vain
	eventually(t, "the goroutines of the limiter to end", func() bool { return stacksWith("redis.(*server)") == 0 })
}

// A config that is rejected has no say in where the lines go.
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
		t.Fatal("a config is loaded though its port is taken")
	}
	e.kill()
	w.gets(200)
	if failed, _ := w.states(); failed != 1 {
		t.Errorf("%d lines say that Redis is gone, want 1", failed)
	}
}

// stacksWith is how many goroutines there are with a function of that name.
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
