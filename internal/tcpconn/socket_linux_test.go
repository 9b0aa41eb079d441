// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// WaitWritable returns when the socket accepts data again, or at its deadline.
func TestWaitWritable(t *testing.T) {
	near, far := conntest.Pair(t)
	socket := near.(*net.TCPConn)
	if err := WaitWritable(socket); err != nil {
		t.Errorf("with room in the buffer: %v", err)
	}
	_ = socket.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := io.Copy(near, conntest.Bulk(1, 64<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the socket accepted 64 MiB: %v", err)
	}
	_ = socket.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if err := WaitWritable(socket); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("with a full buffer: %v", err)
	}
	_ = socket.SetWriteDeadline(time.Now().Add(20 * time.Second))
	go func() { _, _ = io.Copy(io.Discard, far) }()
	if err := WaitWritable(socket); err != nil {
		t.Errorf("with room again: %v", err)
	}
}
