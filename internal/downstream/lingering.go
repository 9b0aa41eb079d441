// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// A client may still be sending when its request has been answered: the content of a refused
// request, or bytes after a CONNECT. If its connection were closed with unread bytes, the
// kernel would send a reset, and the client's kernel might discard the response before the
// client reads it. So such a connection is closed in stages (RFC 9112 §9.6): first for
// writing, and then for reading, when the client has closed its side or a limit is reached.
const (
	lingerBytes     = 64 << 20         // read and dropped at most
	lingerTime      = 30 * time.Second // closes the connection in any case
	lingerIdle      = 5 * time.Second  // closes it if the client sends nothing
	lingerPerClient = 16               // connections of a client; others are closed at once
)

// Lingering closes connections in stages, a limited number of each client's at a time. The zero
// value is ready for use. Its methods are safe for concurrent use.
type Lingering struct {
	mu sync.Mutex
	n  map[netip.Addr]int
}

func (l *Lingering) enter(client netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n == nil {
		l.n = make(map[netip.Addr]int)
	}
	if l.n[client] >= lingerPerClient {
		return false
	}
	l.n[client]++
	return true
}

func (l *Lingering) leave(client netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n[client]--; l.n[client] == 0 {
		delete(l.n, client)
	}
}

// Close closes a client's connection in stages.
func (l *Lingering) Close(conn net.Conn, client netip.Addr) {
	if l.enter(client) {
		if _, half := tcpconn.Unwrap(conn); half != nil {
			_ = conn.SetWriteDeadline(time.Now().Add(lingerIdle)) // TLS writes a close_notify
			_ = half.CloseWrite()
		}
		readToEnd(conn, conn.SetReadDeadline)
		l.leave(client)
	}
	_ = conn.Close()
}

// Wait waits until no connection is being closed in stages, or ctx ends. At exit, what clients have not received yet
// would be lost.
func (l *Lingering) Wait(ctx context.Context) {
	isEmpty := func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.n) == 0
	}
	for !isEmpty() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Drop reads a request's content to its end or one of the limits, before a response is sent after
// which the connection can no longer be read. As with lingering connections, the number of such
// requests per client is limited.
func (l *Lingering) Drop(client netip.Addr, content io.Reader, setDeadline func(time.Time) error) {
	if l.enter(client) {
		defer l.leave(client)
		readToEnd(content, setDeadline)
	}
}

// readToEnd reads from r until EOF or one of the limits, and reports whether it has seen EOF.
func readToEnd(r io.Reader, setDeadline func(time.Time) error) bool {
	buf := tcpconn.GetBuffer()
	defer buf.Free()
	end := time.Now().Add(lingerTime)
	for dropped := 0; dropped < lingerBytes; {
		deadline := time.Now().Add(lingerIdle)
		if deadline.After(end) {
			deadline = end
		}
		if err := setDeadline(deadline); err != nil {
			return false
		}
		n, err := r.Read(buf[:])
		if err != nil {
			return errors.Is(err, io.EOF)
		}
		dropped += n
	}
	return false
}
