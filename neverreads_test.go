// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestClientsThatNeverRead checks that a client that sends requests and reads no responses
// is disconnected after write_idle, whatever the responses are, on both serving paths.
func TestClientsThatNeverRead(t *testing.T) {
	pad := strings.Repeat("p", 4000)
	origin := listen(t, func(conn *net.TCPConn) {
		for r := bufio.NewReader(conn); ; {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			head := "HTTP/1.1 " + map[string]string{
				"/empty": "200 OK\r\nContent-Length: 0", "/204": "204 No Content", "/304": "304 Not Modified", "/content": "200 OK\r\nContent-Length: 3",
				"/103":  "103 Early Hints\r\nX-Pad: " + pad + "\r\n\r\nHTTP/1.1 204 No Content",
				"/103s": strings.Repeat("103 Early Hints\r\nX-Pad: "+strings.Repeat(pad, 15)+"\r\n\r\nHTTP/1.1 ", 90) + "204 No Content",
			}[req.URL.Path] + "\r\nX-Pad: " + pad + "\r\n\r\n"
			if req.URL.Path == "/content" && req.Method == http.MethodGet {
				head += "abc"
			}
			if _, err := conn.Write([]byte(head)); err != nil {
				return
			}
		}
	})
	w := newWorld(t, "", nil)
	limited := freeAddress(t)
	sites := fmt.Sprintf(`http://%s {
	async_proxy {
		burst 1000000
		refill 1000000
	}
	respond /own 204
}
http://%s {
	async_proxy {
		burst 1
		refill 0.001
		zone limited
	}
}
`, w.proxy[strings.LastIndexByte(w.proxy, ':'):], limited[strings.LastIndexByte(limited, ':'):])
	for _, ordinary := range []bool{false, true} {
		wrapper, log := "\t\tlistener_wrappers {\n\t\t\tasync_proxy\n\t\t}\n", ""
		if ordinary {
			wrapper, log = "", "\tlog\n"
		}
		loadCaddyfile(t, fmt.Sprintf("{\n\tadmin off\n\tpersist_config off\n\tdefault_bind 127.0.0.1\n\tservers {\n\t\ttimeouts {\n\t\t\twrite_idle 300ms\n\t\t}\n%s\t}\n\tlog {\n\t\toutput discard\n\t}\n}\n%s",
			wrapper, strings.ReplaceAll(sites, " {\n\tasync_proxy", " {\n"+log+"\tasync_proxy")))
		limitSendBuffers(t, w.proxy)
		limitSendBuffers(t, limited)
		t.Run(fmt.Sprintf("ordinary %v", ordinary), func(t *testing.T) {
			for name, tc := range map[string]struct{ proxy, request string }{
				"HEAD":                {w.proxy, "HEAD http://" + origin + "/content"},
				"GET":                 {w.proxy, "GET http://" + origin + "/content"},
				"204":                 {w.proxy, "GET http://" + origin + "/204"},
				"304":                 {w.proxy, "GET http://" + origin + "/304"},
				"103":                 {w.proxy, "GET http://" + origin + "/103"},
				"many 103s":           {w.proxy, "GET http://" + origin + "/103s"},
				"empty":               {w.proxy, "GET http://" + origin + "/empty"},
				"refused":             {w.proxy, "HEAD http://169.254.1.1/"},
				"limited":             {limited, "GET http://" + origin + "/204"},
				"limited HEAD":        {limited, "HEAD http://" + origin + "/204"},
				"this server":         {w.proxy, "GET /own"},
				"no handler responds": {w.proxy, "HEAD /nothing"},
				"OPTIONS":             {w.proxy, "OPTIONS http://" + origin + "/"},
			} {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					request := tc.request + " HTTP/1.1\r\nHost: x\r\nX-Pad: " + pad[:200]
					if name == "OPTIONS" {
						request += "\r\nMax-Forwards: 0"
					}
					sendUntilDisconnected(t, tc.proxy, request+"\r\n\r\n")
				})
			}
		})
	}
}

// sendUntilDisconnected repeats a request without reading, and fails unless the peer closes
// the connection.
func sendUntilDisconnected(t *testing.T, address, request string) {
	t.Helper()
	// A small buffer, set before connecting, keeps the TCP window small.
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		_ = c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 2048) })
		return err
	}}
	conn, err := dialer.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	many := []byte(strings.Repeat(request, 100))
	for sent := 0; sent < 64<<20; sent += len(many) {
		_ = conn.SetWriteDeadline(time.Now().Add(patience))
		if _, err := conn.Write(many); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the connection is still open %v after the client stopped reading", patience)
		} else if err != nil {
			return
		}
	}
	t.Fatal("the proxy read all requests though no response was read")
}

// limitSendBuffers makes the sockets that a listener of this process accepts hold few unsent
// bytes, so that writes block sooner.
func limitSendBuffers(t *testing.T, address string) {
	t.Helper()
	descriptors, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, entry := range descriptors {
		fd, _ := strconv.Atoi(entry.Name())
		if accepts, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || accepts == 0 {
			continue
		}
		name, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		if at, ok := name.(*unix.SockaddrInet4); ok && strings.HasSuffix(address, fmt.Sprintf(":%d", at.Port)) {
			found = true
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<10); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !found {
		t.Fatalf("nothing listens at %s", address)
	}
}
