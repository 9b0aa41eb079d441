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

// proxyProtocolConn is the wrapper that a listener for the PROXY protocol puts around a socket. Its
// first Read and its first RemoteAddr wait for the header and read it.
type proxyProtocolConn interface {
	net.Conn
	TCPConn() (socket *net.TCPConn, ok bool)
}

// addresses are those that the header of the PROXY protocol has given a connection.
type addresses struct{ remote, local net.Addr }

// unwrapProxyProtocol reads the header, and returns the socket with the addresses from the header and
// with the bytes that have arrived behind it. From then on, the connection costs no more than others.
// It returns an error if the wrapper refuses the connection.
func unwrapProxyProtocol(conn proxyProtocolConn) (*readConn, error) {
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
