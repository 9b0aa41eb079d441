// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// startRecordingOrigin starts an HTTP/1 origin that sends the head of each request, without the
// request line, to a channel and always responds with the same bytes.
func startRecordingOrigin(t testing.TB, answer string) (address string, heads chan string) {
	heads = make(chan string, 100)
	return listen(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		for {
			var head strings.Builder
			for {
				line, err := r.ReadString('\n')
				if err != nil {
					return
				}
				if line == "\r\n" {
					break
				}
				head.WriteString(line)
			}
			_, lines, _ := strings.Cut(head.String(), "\r\n")
			heads <- lines
			if _, err := io.WriteString(c, strings.ReplaceAll(answer, "\n", "\r\n")); err != nil {
				return
			}
		}
	}), heads
}

// A client gets no upgrade to a protocol that it has not asked for, and never to h2c. Logs
// show only the protocol's name.
func TestUpgradeOnlyAsRequested(t *testing.T) {
	for _, row := range []struct {
		asked, sent string // by the client, to the origin
		answer      string // the origin's Upgrade; -: none
		proto       string // the tunnel's protocol; "": no tunnel
	}{
		{"websocket", "websocket", "websocket", "websocket"},
		{"websocket", "websocket", "WebSocket", "WebSocket"},
		{"IRC/6.9, websocket", "IRC/6.9, websocket", "websocket", "websocket"},
		{"IRC/6.9, websocket", "IRC/6.9, websocket", "IRC/6.9", "IRC/6.9"},
		{"h2c, websocket", "websocket", "websocket", "websocket"},
		{"h2c, websocket", "websocket", "h2c", ""},
		{"websocket", "websocket", "other", ""},
		{"websocket", "websocket", "websocket, other", ""},
		{"websocket", "websocket", "-", ""},
		{"websocket", "websocket", "\x1b]0;owned\a\x1b[2J", ""},
		{"websocket", "websocket", strings.Repeat("x", 100_000), ""},
		{"a b", "", "a b", ""},
		{"h2c", "", "h2c", ""},
		{"H2C", "", "H2C", ""},
	} {
		answer := "HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: " + row.answer + "\n\n"
		if row.answer == "-" {
			answer = "HTTP/1.1 101 Switching Protocols\n\n"
		}
		origin, heads := startRecordingOrigin(t, answer)
		onBothPaths(t, "", func(t *testing.T, w *world) {
			c := w.dial()
			c.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\nConnection: Upgrade, HTTP2-Settings\nUpgrade: " + row.asked + "\nHTTP2-Settings: AAMAAABk\n\n")
			res, err := http.ReadResponse(c.r, nil)
			if err != nil {
				t.Fatal(err)
			}
			head := <-heads
			if strings.Contains(strings.ToLower(head), "http2-settings") {
				t.Errorf("%q: the origin got %q", row.asked, head)
			}
			if want := "Upgrade: " + row.sent + "\r\n"; strings.Contains(head, "Upgrade") != (row.sent != "") || row.sent != "" && !strings.Contains(head, want) {
				t.Errorf("%q: the origin got %q, want Upgrade %q", row.asked, head, row.sent)
			}
			if row.proto == "" {
				if res.StatusCode != http.StatusBadGateway || !strings.Contains(res.Header.Get("Proxy-Status"), "http_protocol_error") {
					t.Errorf("%q, answered with %.100q: %s", row.asked, row.answer, res.Status)
				}
				return
			}
			if got := res.Header["Upgrade"]; res.StatusCode != http.StatusSwitchingProtocols || !slices.Equal(got, []string{row.proto}) {
				t.Fatalf("%q, answered with %q: %s, Upgrade %q", row.asked, row.answer, res.Status, got)
			}
			if proto := w.waitLog("CONNECT tunnel", 1)[0]["proto"]; proto != row.proto {
				t.Errorf("the log has %q", proto)
			}
		})
	}
}

// A 426 lists the protocols wanted.
func TestUpgradeRequired(t *testing.T) {
	origin := startFixedOrigin(t, "HTTP/1.1 426 Upgrade Required\nUpgrade: websocket, h2c\nConnection: Upgrade\nSec-WebSocket-Version: 13\nContent-Length: 0\n\n")
	onBothPaths(t, "", func(t *testing.T, w *world) {
		c := w.dial()
		for range 2 {
			c.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\n\n")
			res, _ := c.response(http.MethodGet)
			if res.StatusCode != http.StatusUpgradeRequired || !slices.Equal(res.Header["Upgrade"], []string{"websocket"}) || !slices.Equal(res.Header["Connection"], []string{"Upgrade"}) {
				t.Errorf("%s %v", res.Status, res.Header)
			}
		}
		c.send("GET http://" + origin + "/ HTTP/1.0\nHost: x\n\n")
		if res, _ := c.response(http.MethodGet); len(res.Header["Upgrade"]) > 0 {
			t.Errorf("to HTTP/1.0: %v", res.Header)
		}
	})
}

// A WebSocket handshake's field names are spelled as in RFC 6455, towards the origin and
// the client, and its Connection options are on one line.
func TestWebSocketNames(t *testing.T) {
	for _, status := range []string{"101 Switching Protocols", "426 Upgrade Required"} {
		origin, heads := startRecordingOrigin(t, "HTTP/1.1 "+status+"\nConnection: Upgrade\nUpgrade: websocket\nsec-websocket-accept: a\nSec-Websocket-Version: 13\nContent-Length: 0\n\n")
		onBothPaths(t, "", func(t *testing.T, w *world) {
			c := w.dial()
			c.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\nConnection: Upgrade, TE\nTE: trailers\nUpgrade: websocket\nsec-websocket-key: a\nSec-Websocket-Protocol: chat\n\n")
			if head := <-heads; !strings.Contains(head, "Sec-WebSocket-Key: a\r\n") || !strings.Contains(head, "Sec-WebSocket-Protocol: chat\r\n") || !strings.Contains(head, "Connection: Upgrade, TE\r\n") {
				t.Errorf("the origin got %q", head)
			}
			if head := c.readUntil("\r\n\r\n"); !strings.Contains(head, "Sec-WebSocket-Accept: a\r\n") || !strings.Contains(head, "Sec-WebSocket-Version: 13\r\n") {
				t.Errorf("the client got %q", head)
			}
		})
	}
}
