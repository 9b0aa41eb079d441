// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// TestLingeringIsBounded checks that a connection that is closed in stages always ends, and
// that a client can have only a limited number of them.
func TestLingeringIsBounded(t *testing.T) {
	client := netip.MustParseAddr("192.0.2.1")
	for name, tc := range map[string]struct {
		send func(conn net.Conn)
		want time.Duration
	}{
		"closes":         {func(conn net.Conn) { _ = conn.Close() }, 0},
		"silent":         {func(net.Conn) {}, lingerIdle},
		"sends and ends": {func(conn net.Conn) { _, _ = conn.Write(make([]byte, 1<<20)); time.Sleep(time.Second); _ = conn.Close() }, time.Second},
		"trickles": {func(conn net.Conn) {
			for _, err := conn.Write([]byte{0}); err == nil; _, err = conn.Write([]byte{0}) {
				time.Sleep(time.Second)
			}
		}, lingerTime},
		"floods": {func(conn net.Conn) {
			for p := make([]byte, 1<<20); ; {
				if _, err := conn.Write(p); err != nil {
					return
				}
			}
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var l Lingering
				near, far := net.Pipe()
				start := time.Now()
				sent := make(chan struct{})
				go func() { tc.send(far); close(sent) }()
				l.Close(near, client)
				if took := time.Since(start); took != tc.want {
					t.Errorf("closed after %v, want %v", took, tc.want)
				}
				if len(l.n) != 0 {
					t.Errorf("%v connections are left", l.n)
				}
				_ = far.Close()
				<-sent
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		var l Lingering
		start := time.Now()
		for range lingerPerClient {
			near, _ := net.Pipe()
			go l.Close(near, client)
		}
		synctest.Wait()
		near, _ := net.Pipe()
		l.Close(near, client)
		if took := time.Since(start); took != 0 {
			t.Errorf("one too many was closed after %v", took)
		}
		other, _ := net.Pipe()
		l.Close(other, netip.MustParseAddr("192.0.2.2"))
		if took := time.Since(start); took != lingerIdle {
			t.Errorf("another client's was closed after %v", took)
		}
	})
}

// countingBody is endless content that counts reads.
type countingBody struct{ reads int }

func (b *countingBody) Read([]byte) (int, error) { b.reads++; return 0, io.EOF }

// The content of refused requests is read for a limited number of a client's requests at a
// time.
func TestDroppedContentIsBounded(t *testing.T) {
	t.Parallel()
	var l Lingering
	client := netip.MustParseAddr("192.0.2.1")
	reads := func() int {
		body := new(countingBody)
		l.Drop(client, body, func(time.Time) error { return nil })
		return body.reads
	}
	if n := reads(); n != 1 || len(l.n) != 0 {
		t.Errorf("%d reads, and %v requests are left", n, l.n)
	}
	for range lingerPerClient {
		l.enter(client)
	}
	if n := reads(); n != 0 {
		t.Errorf("%d reads of one too many", n)
	}
}
