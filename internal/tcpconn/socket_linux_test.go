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
	// The kernel then does not enlarge the buffer while nothing is read.
	_ = socket.SetWriteBuffer(64 << 10)
	fill(t, socket)
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

// fill writes until the socket stays full. The deadline of a write also passes while the machine is
// busy with something else, so it alone says nothing of the buffer.
func fill(t *testing.T, socket *net.TCPConn) {
	t.Helper()
	for {
		_ = socket.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := io.Copy(struct{ io.Writer }{socket}, conntest.Bulk(1, 64<<20))
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the socket accepted 64 MiB: %v", err)
		}
		if n == 0 && !HasRoom(socket) {
			return
		}
	}
}
