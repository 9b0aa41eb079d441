// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http/httpguts"
)

// A client may still be sending when its request has been answered: the content
// of a request that is refused, or what it has sent behind a CONNECT. If its
// connection were closed with something unread, the kernel would send a reset,
// and the client's own kernel might throw the response away before the client
// reads it. So such a connection is closed in stages (RFC 9112 §9.6): first only
// for writing, and then, when the client has closed it or a limit is reached, for
// reading.
const (
	lingerBytes     = 64 << 20         // that are read and dropped
	lingerTime      = 30 * time.Second // until the connection is closed in any case
	lingerIdle      = 5 * time.Second  // without a byte from the client
	lingerPerClient = 16               // connections of one client at a time; further ones are closed at once
)

// lingering counts the connections that are being closed in stages, by client. Its
// methods are safe for concurrent use.
type lingering struct {
	mu sync.Mutex
	n  map[netip.Addr]int
}

func (l *lingering) enter(client netip.Addr) bool {
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

func (l *lingering) leave(client netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n[client]--; l.n[client] == 0 {
		delete(l.n, client)
	}
}

// close closes the connection of a client in stages.
func (l *lingering) close(conn net.Conn, client netip.Addr) {
	if l.enter(client) {
		if peer := newConnPeer(conn); peer.half != nil {
			_ = conn.SetWriteDeadline(time.Now().Add(lingerIdle)) // for TLS, which writes a last record
			_ = peer.CloseWrite()
		}
		drop(conn, conn.SetReadDeadline)
		l.leave(client)
	}
	_ = conn.Close()
}

// drop reads from r until its end or one of the limits, and reports whether it has
// seen the end.
func drop(r io.Reader, setDeadline func(time.Time) error) bool {
	buf := copyBuffers.Get().(*[copyBuffer]byte)
	defer copyBuffers.Put(buf)
	end := time.Now().Add(lingerTime)
	for dropped := 0; dropped < lingerBytes; {
		due := time.Now().Add(lingerIdle)
		if due.After(end) {
			due = end
		}
		if err := setDeadline(due); err != nil {
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

// closeInStages closes the connection on which an answer of the proxy's own to r
// has just been written, if that is HTTP/1 and the client may still be sending.
func (h *Handler) closeInStages(w http.ResponseWriter, r *http.Request, client netip.Addr) {
	if r.ProtoMajor != 1 || !stillSending(r) {
		return
	}
	if own, ok := innermost(w).(*responseWriter); ok {
		own.lingers, own.sender = true, client // the connection's goroutine does it behind the answer
		return
	}
	// net/http would close it without reading what is left. It hands the connection
	// out in the middle of a response that has its length.
	if w.Header().Get("Content-Length") == "" || http.NewResponseController(w).Flush() != nil {
		return
	}
	if conn, _, err := hijack(w); err == nil {
		go h.tunnels.lingering.close(conn, client)
	}
}

// stillSending reports whether the client that sent r may still be sending bytes
// that the proxy will not use.
func stillSending(r *http.Request) bool {
	return r.Method == http.MethodConnect || r.ContentLength != 0 && !expectsContinue(r)
}

// expectsContinue reports whether a client waits for 100 (Continue) before it
// sends content.
func expectsContinue(r *http.Request) bool {
	return httpguts.HeaderValuesContainsToken(r.Header["Expect"], "100-continue")
}

// dropContent reads and drops the content of a request that error routes are about
// to answer. Once they have answered, the connection can no longer be read. As with
// lingering, the number of such requests per client is limited.
func (l *lingering) dropContent(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor != 1 || r.ContentLength == 0 || r.Method == http.MethodConnect || expectsContinue(r) {
		return
	}
	if client := callerOf(r).addr; l.enter(client) {
		defer l.leave(client)
		drop(r.Body, http.NewResponseController(w).SetReadDeadline)
	}
}

// hasErrorRoutes reports whether the site answers errors by routes of its own.
func hasErrorRoutes(r *http.Request) bool {
	server, _ := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	return server != nil && server.Errors != nil && len(server.Errors.Routes) > 0
}
