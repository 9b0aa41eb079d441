// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"io"
	"net"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// End is one end of a tunnel: a connection or a stream.
type End interface {
	io.Writer

	// Reader and Writer return what to relay from and to: the bare socket, if nothing lies
	// between it and the bytes.
	Reader() io.Reader
	Writer() io.Writer

	// CloseWrite half-closes: the other side reads EOF, and may still write if the protocol
	// allows it.
	CloseWrite() error

	// SendState returns how many of the written bytes the other side has acknowledged, or
	// last if that is unknown, and whether the kernel holds more for it.
	SendState(last uint64) (acked uint64, queued bool)

	// Close and Abort end both directions. The other side sees EOF after Close, and an error
	// after Abort. These two and CloseWrite may be called at any time, concurrently, and
	// more than once.
	Close() error
	Abort() error
}

// streamEnd is a client's end that is a stream, one of several on a connection. Only the
// return of Tunnel.Run ends a stream in order, and that ends both of its directions.
type streamEnd interface {
	End

	// Context returns the context that is canceled when the client resets the stream or its
	// connection ends.
	Context() context.Context

	// StopReading unblocks a pending read once Context has ended.
	StopReading()

	// WasCanceled reports whether an error means that the client has canceled a stream that
	// it no longer needs.
	WasCanceled(error) bool

	// IsAborted reports whether Abort has been called.
	IsAborted() bool

	// CloseConnection closes the connection below, and with it all other streams, if it can
	// be closed alone.
	CloseConnection()

	// Server returns the server whose connections can only be closed together, or nil.
	Server() io.Closer
}

// ConnEnd is an end with a connection of its own.
type ConnEnd struct {
	net.Conn
	half   tcpconn.HalfCloser // nil: the connection cannot half-close
	socket *net.TCPConn       // below the connection, if known
}

// NewConnEnd returns the end that conn is, which may be a socket, TLS on a socket, or a
// listener's wrapper around either.
func NewConnEnd(conn net.Conn) *ConnEnd {
	p := &ConnEnd{Conn: conn}
	p.socket, p.half = tcpconn.Unwrap(conn)
	return p
}

// Reader implements End.
func (p *ConnEnd) Reader() io.Reader { return p.Conn }

// Writer implements End.
func (p *ConnEnd) Writer() io.Writer { return p.Conn }

// CloseWrite implements End. A connection that cannot half-close is closed.
func (p *ConnEnd) CloseWrite() error {
	if p.half == nil {
		return p.Close()
	}
	return p.half.CloseWrite()
}

// SendState implements End.
func (p *ConnEnd) SendState(last uint64) (acked uint64, queued bool) {
	if p.socket == nil {
		return last, false
	}
	return tcpconn.SendState(p.socket)
}

// aborter is a connection that is not a socket and can be aborted, such as a stream to a
// parent proxy.
type aborter interface{ Abort() error }

// Abort implements End. It resets the connection if there is a socket.
func (p *ConnEnd) Abort() error {
	if p.socket != nil {
		_ = p.socket.SetLinger(0) // Close sends RST
		return p.socket.Close()
	}
	if stream, ok := p.Conn.(aborter); ok {
		return stream.Abort()
	}
	return p.Close()
}
