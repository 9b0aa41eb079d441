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
	var first [1]byte
	for {
		switch _, _, err := unix.Recvfrom(fd, first[:], unix.MSG_PEEK); err {
		case unix.EAGAIN:
			return true
		case unix.EINTR:
		default: // something has arrived, the end, or an error
			return false
		}
	}
}
