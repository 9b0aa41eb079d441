// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build unix

package tcpconn

import (
	"net"

	"golang.org/x/sys/unix"
)

// IsQuiet reports whether a socket is open and has nothing to read.
func IsQuiet(socket *net.TCPConn) bool {
	conn, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	quiet := false
	err = conn.Control(func(fd uintptr) { quiet = poll(fd, unix.POLLIN) == 0 })
	return err == nil && quiet
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
