// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bufio"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// Each line of a request is scanned once, however its bytes arrive.
func TestRequestLinesAreReadOnce(t *testing.T) {
	near, _ := tcpPair(t)
	head := "GET http://a.example/ HTTP/1.1\r\n" + strings.Repeat("a:\r\n", 900) + "\r\n"
	c := newClientConn(unitListener(nil), newReadConn(near, nil), false)
	c.r = bufio.NewReaderSize(iotest.OneByteReader(strings.NewReader(head)), 4<<10)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	n, reason, err := c.readHead()
	runtime.ReadMemStats(&after)
	if n != len(head)-len(h1.HeadEnd) || reason != nil || err != nil {
		t.Errorf("a head of %d bytes, %v, %v", n, reason, err)
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > 2<<20 {
		t.Errorf("a head of %d bytes allocates %d bytes", len(head), took)
	}
}

// FuzzParseURL checks that a target that net/http accepts is parsed alike here, and that
// any other accepted target differs from a valid one only in its use of %.
func FuzzParseURL(f *testing.F) {
	for _, target := range []string{"http://a/50%", "http://a%/", "http://a/%zz?%", "http://a?%", "http://a/%41%", "http://[::1%25lo]/%", "http://u:%@a/", "http://", "http:///?\x05", "http://a/%?\x05", "http://a/%\x7f", "?", "a", "http:/", "://", "https://a/%", "x:y/%"} {
		f.Add(target)
	}
	f.Fuzz(func(t *testing.T, target string) {
		want, err := url.ParseRequestURI(target)
		got, err2 := parseURL(target)
		switch {
		case err == nil && (err2 != nil || *got != *want && got.User == nil):
			t.Errorf("%q: %v, %v, want %v", target, got, err2, want)
		case err2 == nil && strings.ContainsFunc(target, isControl):
			t.Errorf("%q is accepted: it has a control character", target)
		case err != nil && err2 == nil:
			_, rest, _ := strings.Cut(target, "://")
			if _, rest, _ = strings.Cut(rest, "/"); !strings.Contains(rest, "%") {
				t.Errorf("%q is accepted: %v", target, got)
			}
		}
	})
}
