// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// TestRefusalsOfEagerClients checks that a client that sends a large request whole before
// it reads still gets the response, on every serving path.
func TestRefusalsOfEagerClients(t *testing.T) {
	early := listen(t, func(conn *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			_, _ = io.WriteString(conn, "HTTP/1.1 413 Content Too Large\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge")
			_ = conn.CloseWrite()
			_, _ = io.Copy(io.Discard, conn)
		}
	})
	closed := freeAddress(t)
	content := strings.Repeat("a", 8<<20)
	requests := map[string]string{
		"POST":       "POST http://TARGET/ HTTP/1.1\r\nHost: x\r\nContent-Length: " + fmt.Sprint(len(content)) + "\r\n\r\n" + content,
		"chunks":     "POST http://TARGET/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("100000\r\n"+content[:1<<20]+"\r\n", 8) + "0\r\n\r\n",
		"CONNECT":    "CONNECT TARGET HTTP/1.1\r\nHost: x\r\n\r\n" + content[:4<<20],
		"no content": "CONNECT TARGET HTTP/1.1\r\nHost: x\r\n\r\n",
	}
	for _, way := range []string{"fast", "ordinary", "TLS", "error routes", "error routes over TLS"} {
		t.Run(way, func(t *testing.T) {
			w := newWorld(t, "", nil)
			for _, tc := range []struct {
				options, target, skip string
				status                int
			}{
				{authUsers, "127.0.0.1:9", "", http.StatusProxyAuthRequired},
				{"", "169.254.1.1:80", "", http.StatusForbidden},
				{"burst 1\nrefill 0.00001", "127.0.0.1:9", "", http.StatusTooManyRequests},
				{"", closed, "", http.StatusBadGateway},
				{"", early, "CONNECT no content", http.StatusRequestEntityTooLarge},
			} {
				site := w.site(tc.options)
				switch way {
				case "ordinary":
					site = inRoute(site)
				}
				if strings.HasSuffix(way, "TLS") {
					site = strings.Replace(site, "http://", "https://", 1)
					site = strings.Replace(site, "\tasync_proxy", "\ttls internal {\n\t\ton_demand\n\t}\n\tasync_proxy", 1)
				}
				if strings.HasPrefix(way, "error routes") {
					site = strings.TrimSuffix(site, "}\n") + "\thandle_errors {\n\t\trespond \"sorry\"\n\t}\n}\n"
				}
				w.load(site)
				for name, request := range requests {
					if strings.Contains(tc.skip, name) {
						continue
					}
					for tc.status == http.StatusTooManyRequests {
						if status := sendThenRead(t, w, way, strings.ReplaceAll(requests["no content"], "TARGET", closed)); status == tc.status {
							break
						}
					}
					if status := sendThenRead(t, w, way, strings.ReplaceAll(request, "TARGET", tc.target)); status != tc.status {
						t.Errorf("%s: status %d, want %d", name, status, tc.status)
					}
				}
			}
		})
	}
}

// A connection that error routes keep open after a refused CONNECT can still be used on the fast
// path. Where net/http serves the client, the connection was hijacked, and closes all the same.
func TestRefusalThatKeepsTheConnection(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(strings.TrimSuffix(w.site("ports 1-65535\nconnect_ports 1-65535"), "}\n") + "\thandle_errors {\n\t\theader -Connection\n\t\trespond \"sorry\"\n\t}\n}\n")
	echo := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	c := w.dial()
	for range 2 {
		c.send("CONNECT 169.254.1.1:80 HTTP/1.1\nHost: x\n\n")
		if res, body := c.response(http.MethodConnect); res.StatusCode != http.StatusForbidden || body != "sorry" {
			t.Fatalf("%s %q", res.Status, body)
		}
		if *byNetHTTP {
			if _, err := c.r.ReadByte(); err != io.EOF {
				t.Errorf("after the response: %v", err)
			}
			return
		}
	}
	c.send("CONNECT " + echo + " HTTP/1.1\nHost: x\n\n")
	if res, body := c.response(http.MethodConnect); res.StatusCode != http.StatusOK {
		t.Fatalf("%s %q", res.Status, body)
	}
	c.send("12345678\n")
	if _, err := io.ReadFull(c.r, make([]byte, 10)); err != nil {
		t.Error(err)
	}
}

// sendThenRead sends a whole request before it reads the response.
func sendThenRead(t *testing.T, w *world, way, request string) (status int) {
	t.Helper()
	var conn net.Conn = w.dial().TCPConn
	if strings.HasSuffix(way, "TLS") {
		conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: "proxy.localhost", NextProtos: []string{"http/1.1"}})
	}
	if _, err := io.WriteString(conn, request); err != nil {
		t.Errorf("sending: %v", err)
		return 0
	}
	all, err := io.ReadAll(conn)
	if err != nil {
		t.Errorf("reading to the end: %v", err)
	}
	method, _, _ := strings.Cut(request, " ")
	res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(all)), &http.Request{Method: method})
	if err != nil {
		t.Errorf("reading the response: %v", err)
		return 0
	}
	if _, err := io.ReadAll(res.Body); err != nil {
		t.Errorf("reading the content: %v", err)
	}
	_ = conn.Close()
	return res.StatusCode
}

// TestLastResponseIsWhole checks that a client gets the whole of a response after which the proxy closes
// the connection, though the client has sent its next request already (RFC 9112 §9.6).
func TestLastResponseIsWhole(t *testing.T) {
	const length = 3_000_000
	head := fmt.Sprintf("HTTP/1.1 413 Content Too Large\r\nContent-Length: %d\r\n\r\n", length)
	content := strings.Repeat("r", length)
	early := listen(t, func(conn *net.TCPConn) { // responds before it has read the request
		r := bufio.NewReader(conn)
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		_, _ = io.WriteString(conn, head+content[:1000])
		_, _ = io.Copy(io.Discard, req.Body)
		_, _ = io.WriteString(conn, content[1000:])
		_, _ = io.Copy(io.Discard, r)
	})
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(length))
		w.WriteHeader(http.StatusOK) // after an error, http2.Transport would not send the rest of the request
		_, _ = io.WriteString(w, content[:1000])
		_ = http.NewResponseController(w).Flush()
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, content[1000:])
	}))
	secure.EnableHTTP2 = true
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{tlsCertificate}}
	secure.StartTLS()
	t.Cleanup(secure.Close)
	asked, begin := make(chan struct{}), make(chan struct{})
	slow := listen(t, func(conn *net.TCPConn) {
		r := bufio.NewReader(conn)
		if _, err := http.ReadRequest(r); err != nil {
			return
		}
		asked <- struct{}{}
		<-begin
		_, _ = io.WriteString(conn, head+content)
		_, _ = io.Copy(io.Discard, r)
	})
	next := "PUT http://" + early + "/next HTTP/1.1\r\nHost: x\r\nContent-Length: 20000\r\n\r\n" + strings.Repeat("n", 20_000)
	upload := fmt.Sprintf("POST http://%s/ HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", early, length, content)
	overHTTP2 := strings.Replace(upload, "http://"+early, secure.URL, 1)
	for _, tc := range []struct {
		name, request string
		site          func(string) string
		meanwhile     func(proxy string) // while the response is awaited
	}{
		{"early response", upload, func(site string) string { return site }, nil},
		{"early response, ordinary", upload, inRoute, nil},
		{"early response over HTTP/2", overHTTP2, func(site string) string { return site }, nil},
		{"early response over HTTP/2, ordinary", overHTTP2, inRoute, nil},
		{"shutdown", "GET http://" + slow + "/ HTTP/1.1\r\nHost: x\r\n\r\n", func(site string) string { return site }, func(proxy string) {
			<-asked
			stopped := make(chan struct{})
			go func() {
				_ = caddy.Stop()
				close(stopped)
			}()
			eventually(t, "the listener to close", func() bool {
				conn, err := net.Dial("tcp", proxy)
				if err == nil {
					_ = conn.Close()
				}
				return err != nil
			})
			close(begin)
			<-stopped
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if *byNetHTTP && tc.meanwhile != nil {
				t.Skip("Caddy's HTTP server resets connections on which it has not read everything")
			}
			w := newWorld(t, "", nil)
			w.load(tc.site(w.site("")))
			conn := w.dial()
			_ = conn.SetReadBuffer(32 << 10) // so that much of the response is still to be sent when the proxy closes
			first, head := len(tc.request), ""
			if tc.meanwhile == nil {
				first -= length / 2
			}
			if _, err := io.WriteString(conn, tc.request[:first]); err != nil {
				t.Fatal(err)
			}
			if tc.meanwhile == nil {
				head = conn.readUntil("\r\n\r\n") // the response begins before the upload ends
			}
			sent := make(chan error, 1)
			go func() {
				_, err := io.WriteString(conn, tc.request[first:]+next)
				sent <- err
			}()
			if tc.meanwhile != nil {
				go tc.meanwhile(w.proxy)
			}
			time.Sleep(200 * time.Millisecond) // begins to read late, too
			all, err := io.ReadAll(conn.r)
			all = append([]byte(head), all...)
			if err != nil {
				t.Errorf("after %d bytes: %v", len(all), err)
			}
			if err := <-sent; err != nil {
				t.Errorf("sending: %v", err)
			}
			if _, body, _ := bytes.Cut(all, []byte("\r\n\r\n")); string(body) != content {
				t.Errorf("%d bytes of content, want %d and no other response", len(body), length)
			}
			if !bytes.Contains(all, []byte("\r\nConnection: close\r\n")) {
				t.Error("the response does not say that it is the last")
			}
		})
	}
}
