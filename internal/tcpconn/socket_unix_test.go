// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build unix

package tcpconn

import (
	"net"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A signal, such as those with which the runtime preempts goroutines, does not make a quiet
// connection look closed.
func TestQuietDespiteSignals(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := net.Dial("tcp4", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	done := make(chan struct{})
	var sender sync.WaitGroup
	sender.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				_ = unix.Kill(unix.Getpid(), unix.SIGURG)
			}
		}
	})
	lost := 0
	for range 100_000 {
		if !IsQuiet(conn.(*net.TCPConn)) {
			lost++
		}
	}
	close(done)
	sender.Wait()
	if lost > 0 {
		t.Errorf("%d of 100,000 checks found the connection closed", lost)
	}
}
