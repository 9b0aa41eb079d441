// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build unix

package tcpconn

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Dup returns a second descriptor of a socket. TCPConn.File is not used, because net.FileConn
// makes such a file's socket blocking for a moment, and reads of the first descriptor in that
// moment ignore their deadline.
func Dup(socket *net.TCPConn) (net.Conn, error) {
	conn, err := socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	if err := conn.Control(func(s uintptr) { fd, dupErr = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, dupErr
	}
	file := os.NewFile(uintptr(fd), "")
	defer file.Close()
	return net.FileConn(file)
}
