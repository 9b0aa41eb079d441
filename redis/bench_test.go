// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The benchmarks here measure what Redis adds to the CPU time of the proxy's
// process for a request, with the clients, the origin and Redis in others.
// Compare the metric proxy-µs/op of the rows of one run; absolute figures are
// the machine's.

const benchClients = 64

// BenchmarkAdmitted is a small GET that Redis, or nobody, is asked about.
func BenchmarkAdmitted(b *testing.B) {
	e := startEngine(b, "redis-server")
	origin := startOrigin(b)
	for _, limiter := range []string{"none", "redis"} {
		b.Run(limiter, func(b *testing.B) {
			options := "burst 1000000000\n\t\trefill 1000000"
			if limiter == "redis" {
				options += "\n\t\tlimiter redis " + e.address
			}
			benchmark(b, options, origin, http.StatusOK)
			if limiter == "redis" {
				b.ReportMetric(float64(e.commands())/float64(b.N), "questions/op")
				e.do("CONFIG", "RESETSTAT")
			}
		})
	}
}

// BenchmarkRejected is a 429 for a client that has used up its tokens.
func BenchmarkRejected(b *testing.B) {
	e := startEngine(b, "redis-server")
	for _, limiter := range []string{"none", "redis"} {
		b.Run(limiter, func(b *testing.B) {
			options := "burst 1\n\t\trefill 0.00001"
			if limiter == "redis" {
				options += "\n\t\tlimiter redis " + e.address
			}
			benchmark(b, options, "http://127.0.0.1:1", http.StatusTooManyRequests)
			if limiter == "redis" {
				b.ReportMetric(float64(e.commands())/float64(b.N), "questions/op")
				e.do("CONFIG", "RESETSTAT")
			}
		})
	}
}

// commands is how often the script was run.
func (e *engine) commands() int {
	e.t.Helper()
	_, rest, _ := strings.Cut(e.do("INFO", "commandstats"), "cmdstat_evalsha:calls=")
	calls, _, _ := strings.Cut(rest, ",")
	n, _ := strconv.Atoi(calls)
	return n
}

// benchmark sends b.N requests over benchClients connections to a Caddy in a
// process of its own.
func benchmark(b *testing.B, options, origin string, status int) {
	b.Helper()
	proxy := freeAddress(b)
	_, port, _ := net.SplitHostPort(proxy)
	config := filepath.Join(b.TempDir(), "Caddyfile")
	text := fmt.Sprintf("{\n\tadmin off\n\tpersist_config off\n\tlog {\n\t\toutput discard\n\t}\n}\nhttp://:%s {\n\tbind 127.0.0.1\n\tasync_proxy {\n\t\t%s\n\t}\n}\n", port, options)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	p := start(b, exec.Command(caddyBinary(b), "run", "--config", config, "--adapter", "caddyfile"))
	defer p.kill()
	eventually(b, "Caddy to run", func() bool { return listens(proxy) })
	if res, err := get(proxy, origin); err != nil {
		b.Fatal(res, err)
	}

	request := fmt.Sprintf("GET %s/ HTTP/1.1\r\nHost: %s\r\n\r\n", origin, strings.TrimPrefix(origin, "http://"))
	conns := make([]net.Conn, benchClients)
	for i := range conns {
		conn, err := net.Dial("tcp4", proxy)
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		conns[i] = conn
	}
	var left atomic.Int64
	left.Store(int64(b.N))
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	b.ResetTimer()
	before := p.cpu(b)
	for _, conn := range conns {
		wg.Go(func() {
			r := bufio.NewReader(conn)
			for left.Add(-1) >= 0 {
				if err := exchange(conn, r, request, status); err != nil {
					failed.Store(&err)
					return
				}
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

func exchange(w io.Writer, r *bufio.Reader, request string, status int) error {
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

// cpu is the time that the process has spent on a processor, exact to a tick of
// 10 ms.
func (p *process) cpu(b *testing.B) time.Duration {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		b.Skip("there is no /proc here: ", err)
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')'):]))
	user, _ := strconv.Atoi(fields[12])
	system, _ := strconv.Atoi(fields[13])
	return time.Duration(user+system) * 10 * time.Millisecond
}
