// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"errors"
	"net"
	"os"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// proxied is a connection of the PROXY protocol's wrapper, which the program puts around a socket.
// Its first read reads the header, and so does the first call of RemoteAddr. Both wait for it.
type proxied interface {
	net.Conn
	TCPConn() (socket *net.TCPConn, ok bool)
}

// addresses are those that the header of the PROXY protocol has given a connection.
type addresses struct{ remote, local net.Addr }

// unwrapProxied reads the header, and returns the socket with the addresses from the header and with
// what the client has sent behind it. So the connection costs no more than another one from there on.
// It returns an error if the wrapper refuses the connection.
func unwrapProxied(conn proxied) (*readConn, error) {
	socket, _ := conn.TCPConn()
	read := newReadConn(socket, nil)
	read.addresses = &addresses{conn.RemoteAddr(), conn.LocalAddr()}
	tcpconn.Interrupt(conn.SetReadDeadline) // reads return what the wrapper has buffered, and no more
	var buf [512]byte
	for {
		n, err := conn.Read(buf[:])
		read.in.Prefix = append(read.in.Prefix, buf[:n]...)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return read, conn.SetReadDeadline(time.Time{})
		case err != nil:
			return nil, err
		}
	}
}
