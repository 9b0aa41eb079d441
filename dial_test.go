// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"net"
	"net/http"
	"sync"
	"testing"
)

// The tests here are of what happens while a tunnel's target is being dialled.

// What a reload does to tunnels it does to those, too, that were being dialled.
func TestReloadDuringADial(t *testing.T) {
	for _, tc := range []struct {
		name, before, after, reason string
	}{
		{"rules that forbid it", "", "recheck_tunnels", reasonForbidden},
		{"rules that still allow it", "", "recheck_tunnels\nallow 127.0.0.1", reasonClient},
		{"no check", "", "", reasonClient},
		{"closed at once", "stream_close_delay 0", "", reasonReload},
	} {
		t.Run(tc.name, func(t *testing.T) {
			asked, answer := make(chan struct{}), make(chan struct{})
			begin := sync.OnceFunc(func() { close(asked) })
			resolver := nameServer(t, func(string, int) []string {
				begin()
				<-answer
				return []string{"127.0.0.1"}
			})
			w := newTunnelWorld(t, tunnelSetup{options: "allow 127.0.0.0/8\nresolvers " + resolver + "\n" + tc.before})
			_, port, _ := net.SplitHostPort(echoTarget(t))
			c := w.dial()
			c.send("CONNECT slow.test:" + port + " HTTP/1.1\nHost: slow.test\nX-Forwarded-For: 8.8.8.8\n\n")
			<-asked
			w.reload(t, tunnelSetup{options: tc.after})
			close(answer)
			if tc.reason == reasonClient {
				c.response(http.MethodConnect)
				c.CloseWrite()
			}
			if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != tc.reason {
				t.Errorf("closing line %v, want the reason %q", line, tc.reason)
			}
		})
	}
}
