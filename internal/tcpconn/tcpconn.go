// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package tcpconn adds to package net what a proxy needs of TCP connections. It finds the socket
// below a connection, reads what the kernel knows about the socket, sets its options and its read
// deadline, puts bytes that were read too early back in front, and moves bytes from one socket to
// another inside the kernel. It knows neither HTTP nor tunnels.
package tcpconn

import (
	"net"
	"reflect"
	"time"
)

// HalfCloser is a connection that can end the bytes it sends and still receive.
type HalfCloser interface{ CloseWrite() error }

// Of returns the socket below a connection, or nil if it is not known.
func Of(conn net.Conn) *net.TCPConn {
	socket, _ := Unwrap(conn)
	return socket
}

// Unwrap finds the socket below a connection and how to half-close the connection; nil
// means that it does not know or cannot. The connection may be a socket, TLS on a socket, or
// a listener's wrapper around either.
func Unwrap(conn net.Conn) (socket *net.TCPConn, half HalfCloser) {
	half, _ = conn.(HalfCloser)
	for lower := conn; ; {
		switch c := lower.(type) {
		case *net.TCPConn:
			return c, half
		case interface{ TCPConn() (*net.TCPConn, bool) }: // PROXY protocol, after its header
			if socket, _ = c.TCPConn(); half == nil && socket != nil {
				half = socket
			}
			return socket, half
		case interface{ NetConn() net.Conn }: // TLS
			lower = c.NetConn()
		default:
			if lower = Embedded(lower); lower == nil {
				return nil, half
			}
			if half == nil {
				half, _ = lower.(HalfCloser)
			}
		}
	}
}

// Embedded returns the net.Conn that a struct embeds, or nil. Caddy wraps the connections of
// HTTP/1-only servers, and TLS that is not a tls.Conn, in such structs, without a method that
// returns what is below.
func Embedded(conn net.Conn) net.Conn {
	v := reflect.Indirect(reflect.ValueOf(conn))
	if v.Kind() != reflect.Struct {
		return nil
	}
	if field := v.FieldByName("Conn"); field.IsValid() && field.CanInterface() {
		inner, _ := field.Interface().(net.Conn)
		return inner
	}
	return nil
}

// Ask writes p to a socket and waits until something arrives on it, or its read deadline has passed.
// It saves the read that would otherwise be tried right after the write, in vain.
//
// Bytes that have arrived before the call do not end the wait.
func Ask(socket *net.TCPConn, p []byte) (writeErr, waitErr error) {
	conn, err := socket.SyscallConn()
	if err != nil {
		return err, nil
	}
	asked := false
	waitErr = conn.Read(func(uintptr) (over bool) {
		if asked {
			return true
		}
		asked = true
		_, writeErr = socket.Write(p)
		return writeErr != nil
	})
	if !asked { // the deadline had passed already, or the socket is closed
		_, writeErr = socket.Write(p)
	}
	return writeErr, waitErr
}

// EnableKeepAlive makes the kernel detect a dead peer within two minutes. It costs four system
// calls, so it is not worth it for short-lived connections.
func EnableKeepAlive(conn *net.TCPConn) {
	_ = conn.SetKeepAliveConfig(KeepAliveConfig)
}

// KeepAliveConfig makes the kernel detect a dead peer within two minutes.
var KeepAliveConfig = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}
