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
// net/http's. It can do so only while net/http waits for a request and has read nothing of it, which
// is certain only if it has read as many empty lines as it has responded to requests, and nothing
// behind the last one. Content may have further ones; then the connection stays.
type takeBack struct {
	listener *Listener   // handed the connection off; nil: it cannot be taken back
	read     int         // bytes that net/http has read
	preface  int         // of these, how many are the beginning of http2Preface
	heads    int         // empty lines that net/http has read, less the requests it has responded to
	line     int         // bytes of the current line, without CRs
	atEnd    bool        // the last byte that net/http has read ends an empty line
	idle     atomic.Bool // net/http has responded and has read nothing since
	taken    atomic.Bool // net/http's Close does not close the connection
}

// maxNoted limits how much net/http may read from a connection before it keeps it for good. Each
// byte is looked at.
const maxNoted = 64 << 10

// note records what net/http has read. It gives up a connection that speaks HTTP/2, whose frames
// net/http reads on a goroutine of their own: from then on neither note nor becameIdle writes.
func (b *takeBack) note(p []byte) {
	if b.listener == nil {
		return
	}
	if b.preface == b.read {
		for _, char := range p[:min(len(p), len(http2Preface)-b.preface)] {
			if char != http2Preface[b.preface] {
				break
			}
			b.preface++
		}
	}
	if b.read += len(p); b.read > maxNoted || b.preface == len(http2Preface) {
		b.listener = nil
		return
	}
	for _, char := range p {
		b.atEnd = char == '\n' && b.line == 0
		switch {
		case b.atEnd:
			b.heads++
		case char == '\n':
			b.line = 0
		case char != '\r':
			b.line++
		}
	}
}

// becameIdle records that net/http has responded to a request and waits for another one.
func (b *takeBack) becameIdle() {
	if b.listener == nil {
		return
	}
	b.heads--
	b.idle.Store(b.heads == 0 && b.atEnd)
}

// WasTakenBack reports whether a connection that net/http has closed is still served here. A
// ConnState hook may call it.
func WasTakenBack(conn net.Conn) bool {
	c := readConnOf(conn)
	return c != nil && c.back.taken.Load()
}

// readIdle reads for net/http, which waits for a request. If what it reads is the beginning of a
// request for the proxy, it takes the connection back, and net/http sees the end of it.
func (c *readConn) readIdle(p []byte) (n int, err error) {
	n, err = c.in.Read(p)
	if c.back.listener == nil || n == 0 || !c.back.idle.CompareAndSwap(true, false) || !isForProxy(p[:n]) {
		c.back.note(p[:n])
		return n, err
	}
	c.back.taken.Store(true)
	_ = c.Conn.SetDeadline(time.Time{})
	read := newReadConn(c.Conn, bytes.Clone(p[:n]))
	read.addresses = c.addresses
	c.back.listener.serveConn(read, false)
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
