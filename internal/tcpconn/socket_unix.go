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
	events := -1
	err = conn.Control(func(fd uintptr) {
		events, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	})
	return err == nil && events == 0
}
