// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// TestHistory checks what the admin API says about the last hour: all that was counted is in it
// once, also after a reload.
func TestHistory(t *testing.T) {
	c := binaryStart(t, binaryOptions{site: "burst 6\nrefill 0.00001\nallow 127.0.0.0/8"})
	origin := listen(t, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 1000))
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\nConnection: close\r\n\r\n"+strings.Repeat("x", 100))
	})
	get := func(want int) {
		t.Helper()
		if res, body := policyRequest(t, c.proxy, http.MethodGet, origin, ""); res.StatusCode != want {
			t.Errorf("%s %q, want %d", res.Status, body, want)
		}
	}
	sum := func(counts status.Counts) (n int64) {
		for _, each := range counts {
			n += max(0, each) // Unread is negative
		}
		return n
	}
	durations := func(list status.Durations) (n int64) {
		for _, counts := range list {
			for _, each := range counts {
				n += int64(each)
			}
		}
		return n
	}
	var h status.History
	expect := func(when string, tunnels, forwarded, limited, down int64) {
		t.Helper()
		eventually(t, "the end of a step", func() bool {
			h = status.History{}
			c.api("GET", "history", 200, &h)
			return sum(h.Requests["forwarded"]) >= forwarded && sum(h.Requests["rate_limited"]) >= limited && sum(h.BytesDown) >= down &&
				len(h.Tunnels) > 0 && h.Tunnels[len(h.Tunnels)-1] == tunnels
		})
		if sum(h.Requests["forwarded"]) != forwarded || sum(h.Requests["rate_limited"]) != limited || sum(h.BytesDown) != down || sum(h.Requests["tunnels"]) != 1 ||
			h.Clients[len(h.Clients)-1] != 1 || sum(h.Evicted) != 0 || durations(h.Dials) != forwarded+1 || durations(h.FirstBytes) != forwarded {
			t.Errorf("%s: %+v", when, h)
		}
		for i, counts := range []status.Counts{h.Requests["auth_required"], h.BytesUp, h.Evicted} {
			if len(counts) != len(h.Tunnels) {
				t.Errorf("%s: list %d has %d steps, and the tunnels have %d", when, i, len(counts), len(h.Tunnels))
			}
		}
	}

	get(200)
	get(200)
	echo := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	conn := dialRaw(t, c.proxy)
	conn.send("CONNECT " + echo + " HTTP/1.1\nHost: x\n\n")
	if res, body := conn.response(http.MethodConnect); res.StatusCode != 200 {
		t.Fatalf("%s %s", res.Status, body)
	}
	conn.send("12345678\n")
	if _, err := io.ReadFull(conn.r, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	expect("at first", 1, 2, 0, 210)
	if h.StepSeconds != 5 || h.Start.Unix()%5 != 0 || h.Start.Nanosecond() != 0 {
		t.Errorf("steps of %d s from %v", h.StepSeconds, h.Start)
	}
	start := h.Start

	// A tunnel transfers bytes without a request.
	conn.send("1234567890\n")
	if _, err := io.ReadFull(conn.r, make([]byte, 12)); err != nil {
		t.Fatal(err)
	}
	c.reload(c.options.site)
	for range 3 {
		get(200)
	}
	get(429)
	conn.Close()
	expect("after a reload", 0, 5, 1, 522)
	if !h.Start.Equal(start) {
		t.Errorf("after a reload the history starts at %v, want %v", h.Start, start)
	}
	if counts := h.Requests["forwarded"]; slices.Max(counts) == 5 {
		t.Errorf("both configs count in one step: %v", counts)
	}
	before := len(h.Tunnels)
	eventually(t, "a step in which nothing happens", func() bool {
		c.api("GET", "history", 200, &h)
		return len(h.Tunnels) > before && sum(h.Requests["forwarded"]) == 5
	})
	if text := c.api("POST", "history", 405, nil); !strings.Contains(text, "expected GET") {
		t.Errorf("POST: %s", text)
	}
	c.api("GET", "history/more", 404, nil)
}
