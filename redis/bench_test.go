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

// The benchmarks in this file measure what Redis adds to the CPU time of the proxy's
// process per request. Clients, origin and Redis run in other processes. A Caddy with Redis
// and one without take turns, so that other load on the machine affects both alike. Compare
// without-µs/op and with-µs/op; absolute figures depend on the machine.

const (
	benchClients = 64
	benchTurn    = 4000 // requests
)

// BenchmarkAdmitted measures a small GET, with and without asking Redis.
func BenchmarkAdmitted(b *testing.B) {
	compare(b, "burst 1000000000\n\t\trefill 1000000", startOrigin(b), http.StatusOK)
}

// BenchmarkRejected measures a 429 for a client that is out of tokens.
func BenchmarkRejected(b *testing.B) {
	compare(b, "burst 1\n\t\trefill 0.00001", "http://127.0.0.1:1", http.StatusTooManyRequests)
}

// compare sends b.N requests to a Caddy with a shared limiter, and as many to one without.
func compare(b *testing.B, options, origin string, status int) {
	e := startEngine(b, "redis-server")
	without := startBench(b, options, origin)
	with := startBench(b, options+"\n\t\tlimiter redis "+e.address, origin)
	e.do("CONFIG", "RESETSTAT")
	for _, p := range []*benchProxy{without, with} {
		p.run(b, benchTurn, status) // warm up
		p.before = p.cpu(b)
	}
	b.ResetTimer()
	for left := b.N; left > 0; left -= benchTurn {
		without.run(b, min(left, benchTurn), status)
		with.run(b, min(left, benchTurn), status)
	}
	b.StopTimer()
	each := func(p *benchProxy) float64 { return float64(p.cpu(b)-p.before) / float64(b.N) / 1e3 }
	b.ReportMetric(each(without), "without-µs/op")
	b.ReportMetric(each(with), "with-µs/op")
	b.ReportMetric(each(with)-each(without), "more-µs/op")
	b.ReportMetric(float64(e.commands())/float64(b.N+benchTurn), "questions/op")
}

// commands returns how often the script was run.
func (e *engine) commands() int {
	e.t.Helper()
	_, rest, _ := strings.Cut(e.do("INFO", "commandstats"), "cmdstat_evalsha:calls=")
	calls, _, _ := strings.Cut(rest, ",")
	n, _ := strconv.Atoi(calls)
	return n
}

// benchProxy is a Caddy in its own process, with connections to it.
type benchProxy struct {
	*process
	request string
	conns   []net.Conn
	readers []*bufio.Reader
	before  time.Duration // its CPU time before the measurement
}

func startBench(b *testing.B, options, origin string) *benchProxy {
	b.Helper()
	address := freeAddress(b)
	_, port, _ := net.SplitHostPort(address)
	config := filepath.Join(b.TempDir(), "Caddyfile")
	text := fmt.Sprintf("{\n\tadmin off\n\tpersist_config off\n\tlog {\n\t\toutput discard\n\t}\n}\nhttp://:%s {\n\tbind 127.0.0.1\n\tasync_proxy {\n\t\t%s\n\t}\n}\n", port, options)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	p := &benchProxy{
		process: start(b, exec.Command(caddyBinary(b), "run", "--config", config, "--adapter", "caddyfile")),
		request: fmt.Sprintf("GET %s/ HTTP/1.1\r\nHost: %s\r\n\r\n", origin, strings.TrimPrefix(origin, "http://")),
	}
	eventually(b, "Caddy to run", func() bool { return listens(address) })
	if _, err := get(address, origin); err != nil { // uses up the single token, if the config has only one
		b.Fatal(err)
	}
	for range benchClients {
		conn, err := net.Dial("tcp4", address)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		p.conns, p.readers = append(p.conns, conn), append(p.readers, bufio.NewReader(conn))
	}
	return p
}

// run sends n requests over all connections concurrently.
func (p *benchProxy) run(b *testing.B, n, status int) {
	b.Helper()
	var left atomic.Int64
	left.Store(int64(n))
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for i, conn := range p.conns {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if err := exchange(conn, p.readers[i], p.request, status); err != nil {
					failed.Store(&err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		b.Fatal(*err)
	}
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

// cpu returns the CPU time that the process has used, to within a clock tick of 10 ms.
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
