// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build unix

package asyncproxy

import (
	"net"

	"golang.org/x/sys/unix"
)

// socketQuiet reports whether a socket is open and has nothing to read.
func socketQuiet(socket *net.TCPConn) bool {
	conn, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	var errRead error
	err = conn.Control(func(fd uintptr) {
		var b [1]byte
		_, _, errRead = unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	})
	return err == nil && errRead == unix.EAGAIN
}
