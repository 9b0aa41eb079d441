// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// TestPrintedTextsAreBounded checks that log lines, the snapshot and the status command stay small and
// printable, however long and odd the texts that clients and origins choose.
func TestPrintedTextsAreBounded(t *testing.T) {
	protocol := "x\x1b]0;owned\a\x1b[2J" + strings.Repeat("y", 10_000)
	upgraded := listen(t, func(conn *net.TCPConn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", protocol)
			_, _ = io.Copy(io.Discard, conn)
		}
	})
	w := newWorld(t, "", nil)
	long := strings.Repeat("a", 10_000)
	for _, head := range []string{
		"GET http://" + w.origin.Listener.Addr().String() + "/" + long + "%1b%5b2J HTTP/1.1\nHost: x\n",
		"GET ftp://" + long + "/ HTTP/1.1\nHost: " + long + "\n",
		"CONNECT " + long + ":443 HTTP/1.1\nHost: x\n",
		long + " http://" + w.origin.Listener.Addr().String() + "/ HTTP/1.1\nHost: x\nVia: 1.1 tester\n",
		"GET http://" + upgraded + "/ HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: x\n",
		"GET http://" + upgraded + "/ HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: " + strings.Repeat("y", 10_000) + "\n",
	} {
		conn := w.dial()
		conn.send(head + "\n")
		if _, err := conn.r.ReadString('\n'); err != nil { // an error response may quote the text, and be too long
			t.Fatal(err)
		}
	}
	check := func(where string, value any) {
		t.Helper()
		text, ok := value.(string)
		if !ok {
			return
		}
		if len(text) > printable.MaxError || strings.ContainsFunc(text, func(c rune) bool { return !unicode.IsPrint(c) && c != utf8.RuneError }) {
			t.Errorf("%s: %d bytes, %.60q", where, len(text), text)
		}
	}
	n := 0
	for _, message := range []string{"request", "CONNECT tunnel"} {
		for _, line := range w.logLines(message) {
			n++
			for name, value := range line {
				check(message+" "+name, value)
			}
		}
	}
	if n < 4 {
		t.Errorf("got %d log lines", n)
	}
	now := time.Now()
	data, err := json.Marshal(program.status.Snapshot(now))
	if err != nil || len(data) > 64<<10 {
		t.Errorf("the snapshot has %d bytes: %v", len(data), err)
	}
	odd := &statusReport{
		Clients: status.ClientList{Clients: []status.Client{{Client: "user \x1b[2J" + long, Zone: "\a"}}},
		Tunnels: status.TunnelList{Tunnels: []status.Tunnel{{Client: "\x1b[2J", User: "\u202e", Target: long + "\x1b", Proto: protocol}}},
	}
	var out strings.Builder
	odd.print(&out)
	for line := range strings.Lines(out.String()) {
		check("the status command", strings.TrimSuffix(line, "\n"))
	}
}
