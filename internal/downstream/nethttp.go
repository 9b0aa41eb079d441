// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"reflect"
	"sync/atomic"

	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// readConn is a client connection that net/http serves. Its first reads return the bytes
// that were read before. It detects requests that net/http refuses without calling a
// handler.
type readConn struct {
	net.Conn
	addresses   *addresses       // nil: those of Conn
	in          tcpconn.Prefixed // Conn, and what reads return before its bytes
	server      *Server          // nil: refusals are not detected
	isFirstRead bool             // the first byte must be checked when it arrives
	overTLS     bool             // the connection carries TLS
	hasLine     bool             // a whole line has been read
	back        takeBack

	// responded is set by the first write since the connection was last idle. From then on a
	// handler has seen the request, and any write is part of its response, whatever it looks
	// like.
	responded atomic.Bool
}

// tlsReadConn is a readConn on top of TLS. Caddy gives its requests the state of TLS.
type tlsReadConn struct {
	*readConn
	over *tls.Conn
}

// ConnectionState returns the state of TLS.
func (c *tlsReadConn) ConnectionState() tls.ConnectionState { return c.over.ConnectionState() }

// newReadConn returns a readConn whose first reads return prefix.
func newReadConn(conn net.Conn, prefix []byte) *readConn {
	return &readConn{Conn: conn, in: tcpconn.Prefixed{Conn: conn, Prefix: prefix}}
}

// ConnState is a ConnState hook for net/http's server. It tells a connection that net/http has
// responded to a request and waits for the next one.
func ConnState(conn net.Conn, state http.ConnState) {
	if state == http.StateIdle {
		if c := readConnOf(conn); c != nil {
			c.responded.Store(false)
			c.back.becameIdle()
		}
	}
}

// readConnOf returns the readConn that conn is, or that Caddy has wrapped in conn; nil if there is
// none.
func readConnOf(conn net.Conn) *readConn {
	for {
		switch c := conn.(type) {
		case *readConn:
			return c
		case *tlsReadConn:
			return c.readConn
		case *tls.Conn, *net.TCPConn, nil:
			return nil
		}
		conn = tcpconn.Embedded(conn)
	}
}

// UnwrapHijacked returns the connection below one that was hijacked from net/http, and the bytes
// that were read before net/http had it and that net/http has not read.
func UnwrapHijacked(conn net.Conn) (inner net.Conn, unread []byte) {
	if c := readConnOf(conn); c != nil {
		return c.Conn, c.in.Prefix
	}
	return conn, nil
}

// RemoteAddr implements net.Conn.
func (c *readConn) RemoteAddr() net.Addr {
	if c.addresses != nil {
		return c.addresses.remote
	}
	return c.Conn.RemoteAddr()
}

// LocalAddr implements net.Conn.
func (c *readConn) LocalAddr() net.Addr {
	if c.addresses != nil {
		return c.addresses.local
	}
	return c.Conn.LocalAddr()
}

// NetConn returns the connection below, as the method of tls.Conn does.
func (c *readConn) NetConn() net.Conn { return c.Conn }

func (c *readConn) Read(p []byte) (n int, err error) {
	if c.back.idle.Load() {
		return c.readIdle(p)
	}
	if n, err = c.in.Read(p); c.isFirstRead && n > 0 {
		c.isFirstRead = false
		n, err = c.checkFirst(p, n)
	}
	if !c.hasLine && !c.overTLS {
		c.hasLine = bytes.IndexByte(p[:n], '\n') >= 0
	}
	c.back.note(p[:n])
	return n, err
}

// checkFirst refuses a client that does not speak the protocol of the port, and drops empty
// lines before the first request (RFC 9112 §2.2). n is the number of bytes read into p.
func (c *readConn) checkFirst(p []byte, n int) (int, error) {
	if kind, found := foreignProtocol(p[:n], c.overTLS); found {
		return c.refuse(Invalid{Kind: kind})
	}
	if c.server.HTTP1Only && !c.overTLS && bytes.HasPrefix(p[:n], []byte(http2Preface)) {
		return c.refuse(Invalid{Kind: PriorHTTP2})
	}
	for !c.overTLS && n > 0 && p[0] == '\r' && len(p) > 1 {
		if n == 1 {
			more, err := c.Conn.Read(p[1:])
			if n += more; err != nil {
				return n, err
			}
		}
		if p[1] != '\n' {
			break
		}
		if n = copy(p, p[2:n]); n == 0 {
			var err error
			if n, err = c.Conn.Read(p); err != nil {
				return n, err
			}
		}
	}
	if !c.overTLS && n > 0 && !httpguts.IsTokenRune(rune(p[0])) && p[0] != '\r' && p[0] != '\n' {
		return c.refuse(*badRequest("the request line does not begin with a method")) // net/http would wait for the end of the line
	}
	return n, nil
}

// refuse responds to input that net/http need not see, and closes the connection. Its result tells
// net/http that the connection has ended.
func (c *readConn) refuse(what Invalid) (int, error) {
	c.server.answerInvalid(c.Conn, what)
	c.server.Lingering.Close(c.Conn, hostport.AddrPortOf(c.RemoteAddr()).Addr())
	return 0, io.EOF
}

// Write implements io.Writer. It replaces net/http's responses to requests that no handler
// has seen.
func (c *readConn) Write(p []byte) (int, error) {
	if c.server != nil && !c.overTLS && !c.responded.Swap(true) {
		if status, detail, ok := isNetHTTPRefusal(p); ok {
			answer := c.server.OnInvalid(c, Invalid{Status: status, Detail: detail, NoLine: !c.hasLine})
			_, err := c.Conn.Write(answer)
			return len(p), err
		}
	}
	return c.Conn.Write(p)
}

// ReadFrom implements io.ReaderFrom. Between two sockets, the kernel copies.
func (c *readConn) ReadFrom(r io.Reader) (copied int64, err error) {
	if to, ok := c.Conn.(io.ReaderFrom); ok {
		return to.ReadFrom(r)
	}
	buf := tcpconn.GetBuffer()
	defer buf.Free()
	write := func(p []byte) error {
		n, err := c.Conn.Write(p)
		copied += int64(n)
		return err
	}
	readErr, writeErr := tcpconn.Copy(buf[:], r.Read, write, tcpconn.Always)
	if readErr == io.EOF {
		readErr = nil
	}
	return copied, cmp.Or(writeErr, readErr)
}

// CloseWrite half-closes the connection.
func (c *readConn) CloseWrite() error { return c.in.CloseWrite() }

// readListener accepts connections for net/http as readConns.
type readListener struct {
	net.Listener
	server  *Server
	overTLS bool
}

// Accept implements net.Listener.
func (l *readListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil && isServable(conn) {
		read := newReadConn(conn, nil)
		read.server, read.isFirstRead, read.overTLS = l.server, true, l.overTLS
		return read, nil
	}
	return conn, err
}

// Watch wraps ln, or the listener below it if ln is TLS, to refuse clients that speak another
// protocol. It serves no client itself, so s needs only HTTP1Only, Lingering and OnInvalid.
func Watch(ln net.Listener, s *Server, overTLS bool) net.Listener {
	if isOurs(ln) {
		return ln
	}
	if below := listenerBelowTLS(ln); below.IsValid() {
		inner := below.Interface().(net.Listener)
		if _, ok := inner.(*readListener); !ok {
			below.Set(reflect.ValueOf(&readListener{inner, s, true}))
		}
		return ln
	}
	return &readListener{ln, s, overTLS}
}

// IsTLS reports whether the connections of ln are those of crypto/tls.
func IsTLS(ln net.Listener) bool { return listenerBelowTLS(ln).IsValid() }

// listenerBelowTLS returns the field of a crypto/tls listener that holds the underlying
// listener, which has not been used yet. By default, Caddy puts listener wrappers on top of
// TLS, where they cannot see the first bytes. The result is invalid if ln is not a
// crypto/tls listener.
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
