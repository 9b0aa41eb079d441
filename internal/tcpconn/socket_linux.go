// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"net"

	"golang.org/x/sys/unix"
)

// BytesAcked returns how many bytes the other side has acknowledged in all, or 0 if that is
// unknown.
func BytesAcked(socket *net.TCPConn) uint64 {
	taken, _ := SendState(socket)
	return taken
}

// SendState returns how many bytes the other side has acknowledged in all, and whether the
// kernel holds more for it. For a closed socket it returns 0 and false.
func SendState(socket *net.TCPConn) (taken uint64, queued bool) {
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

// HasRoom reports whether the socket is writable.
func HasRoom(socket *net.TCPConn) bool {
	conn, err := socket.SyscallConn()
	if err != nil {
		return true
	}
	room := false
	_ = conn.Control(func(fd uintptr) { room = poll(fd, unix.POLLOUT) != 0 })
	return room
}

// WaitWritable waits until the socket is writable.
func WaitWritable(socket *net.TCPConn) error {
	conn, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	return conn.Write(func(fd uintptr) bool { return poll(fd, unix.POLLOUT) != 0 })
}

// poll returns which of the events fd is ready for, without waiting: 0 for none, and something else
// if it fails. The signals of Go's runtime interrupt even a call that does not wait.
func poll(fd uintptr, events int16) int16 {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		switch _, err := unix.Poll(fds, 0); err {
		case nil:
			return fds[0].Revents
		case unix.EINTR:
		default:
			return unix.POLLERR
		}
	}
}

// maxUnsent is how many unsent bytes the kernel holds before a socket stops being writable.
// It is writable again with half of that.
const maxUnsent = 512 << 10

// LimitUnsent limits how many unsent bytes the kernel holds for the socket. Without a limit,
// that is up to some MiB.
func LimitUnsent(socket *net.TCPConn) {
	if conn, err := socket.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, maxUnsent)
		})
	}
}
