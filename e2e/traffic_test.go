// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"time"
)

// traffic generates traffic like that of an office for the given time: varying clients,
// active tunnels, and now and then a client that exceeds its limit.
func (w *world) traffic(span time.Duration) {
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(time.Duration(math.Exp(rand.NormFloat64()+2.5)) * time.Millisecond)
		_, _ = io.CopyN(w, zeros{}, int64(rand.ExpFloat64()*40_000))
	}))
	defer origin.Close()
	end := time.Now().Add(span)
	transport := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: w.proxy}), MaxIdleConnsPerHost: 100}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: patience}
	ask := func(from string) {
		target := origin.URL
		switch rand.IntN(60) {
		case 0:
			target = "http://169.254.169.254/latest/meta-data/" // closed to all clients
		case 1:
			target = "http://127.0.0.1:9/" // nothing listens there
		}
		req, err := http.NewRequest(http.MethodGet, target, nil)
		if err != nil {
			panic(err)
		}
		req.Header.Set("X-Forwarded-For", from)
		if res, err := client.Do(req); err == nil {
			_, _ = io.Copy(io.Discard, res.Body)
			res.Body.Close()
		}
	}
	tunnel := func(from string) {
		conn, err := net.Dial("tcp4", w.proxy)
		if err != nil {
			return
		}
		defer conn.Close()
		target := strings.TrimPrefix(origin.URL, "http://")
		fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\nX-Forwarded-For: %s\r\n\r\n", target, from)
		go func() { _, _ = io.Copy(io.Discard, conn) }()
		for life := time.Now().Add(time.Duration(rand.ExpFloat64() * float64(time.Minute))); time.Now().Before(life) && time.Now().Before(end); {
			time.Sleep(time.Duration(rand.ExpFloat64() * float64(3*time.Second)))
			fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", target)
		}
	}
	name := func(i int) string {
		if i%5 == 3 {
			return fmt.Sprintf("2001:db8:%x:%x::7", i, i*37)
		}
		return fmt.Sprintf("203.0.113.%d", 10+i)
	}
	for begun := time.Now(); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		at := time.Since(begun).Seconds()
		for range int((4 + 2.5*math.Sin(at/35)) * (0.5 + rand.Float64())) {
			go ask(name(int(math.Abs(rand.NormFloat64()) * 25)))
		}
		if rand.IntN(6) == 0 {
			go tunnel(name(int(math.Abs(rand.NormFloat64()) * 25)))
		}
		if math.Mod(at+40, 90) < 12 {
			for range 5 {
				go ask(name(2))
			}
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
