// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// targetOf returns what is counted for a target.
func targetOf(t *testing.T, target string) (requests, bytes int64) {
	t.Helper()
	for _, sort := range []string{"requests", "bytes"} {
		list, err := program.status.Targets(url.Values{"sort": {sort}, "q": {target}})
		if err != nil {
			t.Fatal(err)
		}
		for _, each := range list.Targets {
			if each.Requests != nil {
				requests = *each.Requests
			}
			if each.Bytes != nil {
				bytes = *each.Bytes
			}
		}
	}
	return requests, bytes
}

// TestTopTargets checks what counts for a target, on both serving paths and across a reload:
// responses, tunnels, and the bytes of both, as they go. Refused and failed requests do not.
func TestTopTargets(t *testing.T) {
	for way, change := range waysOfServing {
		t.Run(way, func(t *testing.T) {
			w := newWorld(t, "", nil)
			origin := listen(t, func(conn *net.TCPConn) {
				for r := bufio.NewReader(conn); ; {
					req, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					_, _ = io.Copy(io.Discard, req.Body)
					_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"+strings.Repeat("x", 1000))
				}
			})
			echo := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
			closed := freeAddress(t)
			check := func(what, target string, requests, bytes int64) {
				t.Helper()
				var n, size int64
				eventually(t, what, func() bool {
					n, size = targetOf(t, target)
					return n == requests && size == bytes
				})
			}
			w.load(change(w.site("deny 10.0.0.0/8")))
			for range 3 {
				policyRequest(t, w.proxy, http.MethodGet, origin, "")
			}
			check("three responses", origin, 3, 3000)
			c := dialRaw(t, w.proxy)
			c.send(fmt.Sprintf("POST http://%s/ HTTP/1.1\nHost: x\nContent-Length: 500\n\n", origin) + strings.Repeat("y", 500))
			c.response(http.MethodPost)
			check("an upload", origin, 4, 4500)

			policyRequest(t, w.proxy, http.MethodGet, closed, "")
			policyRequest(t, w.proxy, http.MethodConnect, "10.0.0.1:443", "")
			for _, target := range []string{closed, "10.0.0.1:443"} {
				if n, size := targetOf(t, target); n+size != 0 {
					t.Errorf("%s has %d requests and %d bytes", target, n, size)
				}
			}

			c = dialRaw(t, w.proxy)
			c.connect(echo)
			check("a tunnel", echo, 1, 0)
			talk := func() {
				c.send("12345678\n")
				if _, err := io.ReadFull(c.r, make([]byte, 10)); err != nil {
					t.Fatal(err)
				}
			}
			talk()
			check("the bytes of the open tunnel", echo, 1, 20)
			w.load(change(w.site("deny 10.0.0.0/8\nburst 999")))
			talk()
			check("the bytes after a reload", echo, 1, 40)
			c.Close()
			policyRequest(t, w.proxy, http.MethodGet, origin, "")
			check("a response after a reload", origin, 5, 5500)
			check("the closed tunnel", echo, 1, 40)
		})
	}
}

// TestRefusalsSurviveAReload checks that the groups go on with another config, on both serving paths.
func TestRefusalsSurviveAReload(t *testing.T) {
	for way, change := range waysOfServing {
		t.Run(way, func(t *testing.T) {
			w := newWorld(t, "", nil)
			target := "reload-" + way + ".example:443"
			var groups []status.Refusal
			for n := range 2 {
				w.load(change(w.site(fmt.Sprintf("deny %s\nburst %d", target, 100+n))))
				for range 2 {
					policyRequest(t, w.proxy, http.MethodConnect, target, "")
				}
				groups = lastRefusals(t, "target="+target)
			}
			if len(groups) != 1 || groups[0].Count != 4 || !groups[0].First.Before(groups[0].Last) || groups[0].Rule != "deny "+target {
				t.Errorf("%+v", groups)
			}
		})
	}
}
