// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// TestAllocations bounds the heap allocations of a request on the fast path. Client and
// origin run in this process, but allocate nothing, except for the connections of CONNECT.
func TestAllocations(t *testing.T) {
	if *byNetHTTP || conntest.Race {
		t.Skip("only a build without the race detector, and the fast path, allocate this little")
	}
	response := []byte("HTTP/1.1 200 OK\r\nDate: Mon, 30 Nov 2026 10:00:00 GMT\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello")
	origin := listen(t, func(c *net.TCPConn) {
		request := make([]byte, 4<<10)
		for {
			if n, err := c.Read(request); err != nil || !bytes.HasSuffix(request[:n], []byte("\r\n\r\n")) {
				return
			}
			if _, err := c.Write(response); err != nil {
				return
			}
		}
	})
	for _, row := range []struct {
		name, options, method string
		status                int
		deployed              bool // with the proxy's log lines, the access log and metrics
		most                  float64
	}{
		{"GET", "", http.MethodGet, http.StatusOK, false, 15},
		{"GET deployed", "", http.MethodGet, http.StatusOK, true, 19},
		{"POST", "", http.MethodPost, http.StatusOK, false, 25},
		{"POST deployed", "", http.MethodPost, http.StatusOK, true, 29},
		{"CONNECT", "", http.MethodConnect, http.StatusOK, false, 106},
		{"CONNECT deployed", "", http.MethodConnect, http.StatusOK, true, 117},
		{"GET with ten policies", tenPolicies, http.MethodGet, http.StatusOK, false, 15},
		{"GET deployed with ten policies", tenPolicies, http.MethodGet, http.StatusOK, true, 19},
		{"CONNECT with ten policies", tenPolicies, http.MethodConnect, http.StatusOK, false, 109}, // the tunnels of a policy are counted
		{"429", "burst 1\nrefill 0.00001", http.MethodGet, http.StatusTooManyRequests, false, 10},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := newWorld(t, row.options, nil)
			globals, site := "log {\nlevel ERROR\n}", w.site(row.options)
			if row.deployed {
				globals = "metrics\nlog {\noutput file " + filepath.Join(t.TempDir(), "own") + "\n}"
				site = strings.Replace(site, "{\n", "{\nlog {\noutput file "+filepath.Join(t.TempDir(), "access")+"\n}\n", 1)
			}
			loadCaddyfile(t, "{\nadmin off\npersist_config off\n"+globals+"\n}\n"+site)
			request := []byte(fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: test\r\n\r\n", row.method, map[bool]string{true: origin, false: "http://" + origin + "/"}[row.method == http.MethodConnect], origin))
			if row.method == http.MethodPost { // the origin waits for this end
				request = bytes.Replace(request, []byte("\r\n\r\n"), []byte("\r\nContent-Length: 6\r\n\r\nok\r\n\r\n"), 1)
			}
			answer := make([]byte, 4<<10)
			var c net.Conn
			ask := func() {
				if c == nil {
					var err error
					if c, err = net.Dial("tcp4", w.proxy); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := c.Write(request); err != nil {
					t.Fatal(err)
				}
				if n, err := c.Read(answer); err != nil || !strings.HasPrefix(string(answer[:n]), fmt.Sprintf("HTTP/1.1 %d ", row.status)) {
					t.Fatalf("%v: %q", err, answer[:n])
				}
				if row.method == http.MethodConnect {
					c.Close()
					c = nil
				}
			}
			if row.status == http.StatusTooManyRequests {
				_, _ = w.dial().Write(request)
			}
			n := testing.AllocsPerRun(300, ask)
			if t.Logf("%v allocations", n); n > row.most {
				t.Errorf("%v allocations, want at most %v", n, row.most)
			}
		})
	}
}
