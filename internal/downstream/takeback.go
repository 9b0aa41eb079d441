// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// takeBack takes a connection back from net/http when a request for the proxy follows one that was
// net/http's. It can do so only while net/http waits for a request and has read nothing of it.
type takeBack struct {
	listener *Listener   // handed the connection off; nil: it cannot be taken back
	idle     atomic.Bool // net/http has responded and has read nothing since
	taken    atomic.Bool // net/http's Close does not close the connection
}

// WasTakenBack reports whether a connection that net/http has closed is served on. A ConnState hook
// may ask for it.
func WasTakenBack(conn net.Conn) bool {
	c := readConnOf(conn)
	return c != nil && c.back.taken.Load()
}

// readIdle reads for net/http, which waits for a request. If what it reads is the beginning of a
// request for the proxy, it takes the connection back, and net/http sees the end of it.
func (c *readConn) readIdle(p []byte) (n int, err error) {
	n, err = c.in.Read(p)
	if n == 0 || !c.back.idle.CompareAndSwap(true, false) || !isForProxy(p[:n]) {
		return n, err
	}
	c.back.taken.Store(true)
	_ = c.Conn.SetDeadline(time.Time{})
	c.back.listener.serveConn(newReadConn(c.Conn, bytes.Clone(p[:n])), false)
	return 0, io.EOF
}

// isForProxy reports whether input begins with a request line that net/http is not needed for.
func isForProxy(input []byte) bool {
	method, target, found := bytes.Cut(input, []byte(" "))
	return found && len(target) > 0 && (string(method) == http.MethodConnect || target[0] != '/' && target[0] != '*')
}

// Close implements net.Conn.
func (c *readConn) Close() error {
	if c.back.taken.Load() {
		return nil
	}
	return c.Conn.Close()
}
