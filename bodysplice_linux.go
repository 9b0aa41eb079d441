// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
)

// spliceFrom is the smallest body that is worth splicing.
const spliceFrom = 256 << 10

// spliceAtMost is how much of a body is moved, and then counted, at a time.
const spliceAtMost = 1 << 20

// spliceBody copies the body of a response inside the kernel, if both connections are plain
// sockets and the body's length is known. done reports whether it has done so.
//
// Of the writers that Caddy puts between a handler and its connection, only the timeout for
// stalled writes can be bypassed, because it is applied here. Off the fast path, access logs and
// metrics need to see the bytes, and the operator's write timeouts and minimum rates need to be
// enforced.
func spliceBody(w http.ResponseWriter, b *origin.ResponseBody, count func(n int64)) (done bool, err error) {
	idle, ok := w.(*caddyhttp.IdleTimeoutWriter)
	socket := b.Socket()
	if !ok || socket == nil || b.IsChunked() || b.Remaining < spliceFrom || !restartsWithEachWrite(idle) {
		return false, nil
	}
	client, ok := innermost(w).(io.ReaderFrom)
	conn, err := socket.SyscallConn()
	if !ok || err != nil {
		return false, err
	}
	for b.Remaining > 0 {
		n, err := spliceSome(b, client, conn, socket, idle)
		count(n)
		if b.Remaining -= n; err != nil {
			return true, err
		}
	}
	b.Ended = true
	return true, nil
}

// spliceSome waits for bytes from the origin, and then moves what has arrived. It sets the
// client's write deadline, which a writeStallTimer extends.
func spliceSome(b *origin.ResponseBody, client io.ReaderFrom, conn syscall.RawConn, socket *net.TCPConn, idle *caddyhttp.IdleTimeoutWriter) (int64, error) {
	if buffered := int64(b.R.Buffered()); buffered > 0 {
		n, err := io.CopyN(idle, b.R, min(buffered, b.Remaining))
		return n, asClientError(err)
	}
	available := 0
	var errIoctl error
	err := b.WaitFor(func() error {
		return conn.Read(func(fd uintptr) bool {
			var peek [1]byte
			if _, _, err := unix.Recvfrom(int(fd), peek[:], unix.MSG_PEEK|unix.MSG_DONTWAIT); err == unix.EAGAIN {
				return false
			}
			available, errIoctl = unix.IoctlGetInt(int(fd), unix.SIOCINQ)
			return true
		})
	})
	b.ClearDeadline() // the client may take as long as its own timeout allows
	if err = errors.Join(err, errIoctl); err != nil {
		return 0, err
	}
	if available == 0 { // EOF, or an error that the next read returns
		var buf [1]byte
		n, err := socket.Read(buf[:])
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return int64(n), err
	}
	if err := idle.Ctrl.SetWriteDeadline(time.Now().Add(idle.Deadline.Timeout)); err != nil {
		return 0, asClientError(err)
	}
	// The bytes that have arrived can be read, so an error is the client's. Bytes are
	// counted once the client has taken them, so move only so many at a time.
	n, err := client.ReadFrom(io.LimitReader(socket, min(int64(available), b.Remaining, spliceAtMost)))
	return n, asClientError(err)
}
