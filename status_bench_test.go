// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkStatusViewers measures a small GET with 50,000 clients tracked and 1,000 tunnels
// open, alternately without viewers of the status page and with five. The ratio is what
// matters. With -benchtime 600000x a turn lasts some seconds, and so includes some
// snapshots.
func BenchmarkStatusViewers(b *testing.B) {
	const clients, tunnels, viewers, turns = 50_000, 1000, 5, 10
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Length"] = []string{"128"}
		_, _ = w.Write(make([]byte, 128))
	}))
	defer origin.Close()
	target := origin.Listener.Addr().String()
	proxy := startBench(b, "async_proxy burst 1000000000 refill 1000\n\tasync_proxy_status /status*", "discard")
	request := fmt.Sprintf("GET http://%s/ HTTP/1.1\r\nHost: %[1]s\r\n\r\n", target)

	// Each client has its own loopback address.
	from := func(i int) net.Conn {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1+byte(i>>16), byte(i>>8), byte(i))}}
		conn, err := dialer.Dial("tcp4", proxy.address)
		if err != nil {
			b.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(time.Hour))
		return conn
	}
	for i := range clients {
		conn := from(i)
		if err := exchangeOnce(conn, bufio.NewReader(conn), request, http.StatusOK); err != nil {
			b.Fatal(err)
		}
		conn.Close()
	}
	for i := range tunnels {
		conn := from(i)
		defer conn.Close()
		fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", target)
		if res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: http.MethodConnect}); err != nil || res.StatusCode != http.StatusOK {
			b.Fatal(res, err)
		}
	}
	look := func() (leave func()) {
		var bodies []io.Closer
		for range viewers {
			res, err := http.Get("http://" + proxy.address + "/status/events")
			if err != nil || res.StatusCode != http.StatusOK {
				b.Fatal(res, err)
			}
			go func() { _, _ = io.Copy(io.Discard, res.Body) }()
			bodies = append(bodies, res.Body)
		}
		return func() {
			for _, body := range bodies {
				body.Close()
			}
		}
	}

	var conns []net.Conn
	for i := range benchClients {
		conn := from(i)
		defer conn.Close()
		conns = append(conns, conn)
	}
	var cost [2]time.Duration
	var sent [2]int
	turn := func(looked, n int) {
		if looked > 0 {
			defer look()()
		}
		before := proxy.cpu(b)
		var left atomic.Int64
		left.Store(int64(n))
		var wg sync.WaitGroup
		for _, conn := range conns {
			wg.Go(func() {
				r := bufio.NewReader(conn)
				for left.Add(-1) >= 0 {
					if err := exchangeOnce(conn, r, request, http.StatusOK); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		cost[looked] += proxy.cpu(b) - before
		sent[looked] += n
	}
	b.ResetTimer()
	for i := range turns {
		turn(i%2, max(1, b.N/turns))
	}
	b.StopTimer()
	each := func(looked int) float64 { return float64(cost[looked]) / float64(sent[looked]) / 1e3 }
	b.ReportMetric(each(0), "proxy-µs/op")
	b.ReportMetric(each(1), "viewed-µs/op")
	if cost[0] > 0 {
		b.ReportMetric(each(1)/each(0), "ratio")
	}
}
