// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"io"
	"net"
	"os"
	"reflect"
	"sync/atomic"
)

// readConn is a client's connection that net/http serves. It begins with what was read
// from it before, and notices what net/http refuses without asking a handler.
type readConn struct {
	*net.TCPConn
	early   []byte
	late    bool     // the time for more is over
	handler *Handler // nil: nothing is to be noticed
	first   bool     // nothing was read yet, and what comes first is to be looked at
	overTLS bool     // what comes is TLS
	hasLine bool     // a line has ended

	// answered says that something was written since the connection was last idle.
	// Then a handler has seen the request, and what is written is its response,
	// whatever that looks like.
	answered atomic.Bool
}

func (c *readConn) Read(p []byte) (n int, err error) {
	switch {
	case len(c.early) > 0:
		n = copy(p, c.early)
		c.early = c.early[n:]
	case c.late:
		return 0, os.ErrDeadlineExceeded
	default:
		c.early = nil
		if n, err = c.TCPConn.Read(p); c.first && n > 0 {
			c.first = false
			n, err = c.checkFirst(p, n)
		}
	}
	if !c.hasLine && !c.overTLS {
		c.hasLine = bytes.IndexByte(p[:n], '\n') >= 0
	}
	return n, err
}

// checkFirst refuses a client that does not speak the protocol of the port, and drops
// empty lines before the first request (RFC 9112 §2.2). n bytes of p were read.
func (c *readConn) checkFirst(p []byte, n int) (int, error) {
	if reason, found := firstByteOf(p[0], c.overTLS); found {
		c.handler.answerFirstByte(c.TCPConn, reason)
		c.handler.tunnels.lingering.close(c.TCPConn, addrPort(c.RemoteAddr()).Addr())
		return 0, io.EOF
	}
	for !c.overTLS && n > 0 && p[0] == '\r' && len(p) > 1 {
		if n == 1 {
			more, err := c.TCPConn.Read(p[1:])
			if n += more; err != nil {
				return n, err
			}
		}
		if p[1] != '\n' {
			break
		}
		if n = copy(p, p[2:n]); n == 0 {
			var err error
			if n, err = c.TCPConn.Read(p); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

// Write implements io.Writer. It replaces net/http's answers to requests that no
// handler has seen.
func (c *readConn) Write(p []byte) (int, error) {
	if c.handler != nil && !c.overTLS && !c.answered.Swap(true) {
		if answer := c.handler.replaceRefusal(c, p, !c.hasLine); answer != nil {
			_, err := c.TCPConn.Write(answer)
			return len(p), err
		}
	}
	return c.TCPConn.Write(p)
}

// readListener accepts connections for net/http.
type readListener struct {
	net.Listener
	handler *Handler
	overTLS bool
}

// Accept implements net.Listener.
func (l *readListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if tcp, ok := conn.(*net.TCPConn); ok && err == nil {
		return &readConn{TCPConn: tcp, handler: l.handler, first: true, overTLS: l.overTLS}, nil
	}
	return conn, err
}

// watchFirstBytes returns ln with connections that refuse clients of other protocols,
// for h.
func watchFirstBytes(ln net.Listener, h *Handler, overTLS bool) net.Listener {
	if h == nil {
		return ln
	}
	if below := listenerBelowTLS(ln); below.IsValid() {
		inner := below.Interface().(net.Listener)
		if _, ok := inner.(*readListener); !ok {
			below.Set(reflect.ValueOf(&readListener{inner, h, true}))
		}
		return ln
	}
	return &readListener{ln, h, overTLS}
}

// listenerBelowTLS returns the field of a listener of crypto/tls that holds the
// listener below it, which nobody has used yet. By default Caddy puts listener wrappers
// on top of TLS, where the first bytes cannot be seen. The value is not valid if ln is
// something else.
func listenerBelowTLS(ln net.Listener) reflect.Value {
	v := reflect.ValueOf(ln)
	if v.Type().String() != "*tls.listener" || v.Elem().Kind() != reflect.Struct {
		return reflect.Value{}
	}
	field := v.Elem().FieldByName("Listener")
	if !field.IsValid() || !field.CanSet() || field.Type() != reflect.TypeFor[net.Listener]() {
		return reflect.Value{}
	}
	return field
}
