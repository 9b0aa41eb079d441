// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build unix

package tcpconn

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"
)

// Reads of a socket keep to their deadlines while it gets more descriptors.
func TestDupKeepsDeadlines(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	far, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	near, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	stop := make(chan struct{})
	dups := make(chan error)
	go func() {
		for {
			select {
			case <-stop:
				close(dups)
				return
			default:
			}
			second, err := Dup(near.(*net.TCPConn))
			if err != nil {
				dups <- err
				return
			}
			_ = second.Close()
		}
	}()
	unblock := time.AfterFunc(5*time.Second, func() { _ = far.Close() })
	defer unblock.Stop()
	for range 2000 {
		_ = near.SetReadDeadline(time.Now().Add(50 * time.Microsecond))
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("reading: %v", err)
			break
		}
	}
	close(stop)
	if err := <-dups; err != nil {
		t.Error(err)
	}
}
