// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// relaySocket reads when the socket is readable. Bulk data for another socket moves inside
// the kernel by splice(2).
func relaySocket(dst io.Writer, src *net.TCPConn, copied *flow) (readErr, writeErr error) {
	conn, err := src.SyscallConn()
	if err != nil {
		return err, nil
	}
	r := newSocketReader(conn)
	var splice *splicer // created for the first bulk data
	for {
		buf, n, err := r.read()
		if n > 0 {
			writeErr = writeCounted(dst, buf[:n], copied)
		}
		if buf != nil {
			smallBuffers.Put(buf)
		}
		if err != nil || writeErr != nil {
			return err, writeErr
		}
		if n == smallBuffer {
			if splice == nil {
				splice = newSplicer(dst, conn)
			}
			if readErr, writeErr = splice.burst(copied); readErr != nil || writeErr != nil {
				return readErr, writeErr
			}
		}
	}
}

// socketReader reads from a socket, and takes a pooled buffer only when there are bytes to
// read.
type socketReader struct {
	conn syscall.RawConn
	wait func(fd uintptr) bool // the method value ready, allocated once
	buf  *[smallBuffer]byte
	n    int
	err  error
}

func newSocketReader(conn syscall.RawConn) *socketReader {
	r := &socketReader{conn: conn}
	r.wait = r.ready
	return r
}

// read returns a buffer and how many of its bytes are filled, or an error. The caller puts
// the buffer, if any, back into smallBuffers.
func (r *socketReader) read() (*[smallBuffer]byte, int, error) {
	r.buf, r.n, r.err = nil, 0, nil
	err := r.conn.Read(r.wait)
	if err == nil {
		err = r.err
	}
	if err == nil && r.n == 0 {
		err = io.EOF
	}
	return r.buf, r.n, err
}

// ready tries to read, and reports whether the socket was readable.
func (r *socketReader) ready(fd uintptr) bool {
	r.buf = smallBuffers.Get().(*[smallBuffer]byte)
	for {
		r.n, r.err = syscall.Read(int(fd), r.buf[:])
		if r.err != syscall.EINTR {
			break
		}
	}
	if r.err == syscall.EAGAIN {
		smallBuffers.Put(r.buf)
		r.buf = nil
		return false
	}
	if r.err != nil {
		r.n = 0
	}
	return true
}

// bytesAcked returns how many bytes the other side has acknowledged in all, or 0 if that is
// unknown.
func bytesAcked(socket *net.TCPConn) uint64 {
	taken, _ := sendState(socket)
	return taken
}

// sendState returns how many bytes the other side has acknowledged in all, and whether the
// kernel holds more for it. For a closed socket it returns 0 and false.
func sendState(socket *net.TCPConn) (taken uint64, queued bool) {
	conn, err := socket.SyscallConn()
	if err != nil {
		return 0, false
	}
	_ = conn.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			taken, queued = info.Bytes_acked, info.Unacked > 0 || info.Notsent_bytes > 0
		}
	})
	return taken, queued
}

// hasRoom reports whether the socket is writable.
func hasRoom(socket *net.TCPConn) bool {
	conn, err := socket.SyscallConn()
	if err != nil {
		return true
	}
	events := 0
	_ = conn.Control(func(fd uintptr) {
		events, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 0)
	})
	return events != 0
}

// waitWritable waits until the socket is writable.
func waitWritable(socket *net.TCPConn) error {
	conn, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Write(func(fd uintptr) bool {
		events, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 0)
		return events > 0 || err != nil && err != unix.EINTR
	})
}

// maxUnsent is how many unsent bytes the kernel holds before a socket stops being writable.
// It is writable again with half of that.
const maxUnsent = 512 << 10

// limitUnsent limits how many unsent bytes the kernel holds for the socket. Without a limit,
// that is up to some MiB.
func limitUnsent(socket *net.TCPConn) {
	if conn, err := socket.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, maxUnsent)
		})
	}
}
