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
	err = conn.Control(func(fd uintptr) { quiet = hasNothing(int(fd)) })
	return err == nil && quiet
}

// hasNothing reports whether a read would have to wait. The signals of Go's runtime interrupt even a
// call that does not wait.
func hasNothing(fd int) bool {
	ask := [...]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		switch n, err := unix.Poll(ask[:], 0); err {
		case nil:
			return n == 0 // otherwise something has arrived, the end, or an error
		case unix.EINTR:
		default:
			return false
		}
	}
}
