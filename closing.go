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

// lingering counts, by client, the connections that are being closed in stages. Its methods
// are safe for concurrent use.
type lingering struct {
	mu   sync.Mutex
	n    map[netip.Addr]int
	held sync.Map // the heldSocket of a net.Conn
}

// heldSocket is a second descriptor of a client's socket, which keeps it open when net/http
// closes the first.
type heldSocket struct {
	conn   net.Conn
	client netip.Addr
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

// close closes a client's connection in stages.
func (l *lingering) close(conn net.Conn, client netip.Addr) {
	if l.enter(client) {
		if _, half := tcpconn.Unwrap(conn); half != nil {
			_ = conn.SetWriteDeadline(time.Now().Add(lingerIdle)) // TLS writes a close_notify
			_ = half.CloseWrite()
		}
		drop(conn, conn.SetReadDeadline)
		l.leave(client)
	}
	_ = conn.Close()
}

// drop reads from r until EOF or one of the limits, and reports whether it has seen EOF.
func drop(r io.Reader, setDeadline func(time.Time) error) bool {
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

// closeInStages closes the connection after the proxy's own response to r has been written,
// if it is HTTP/1 and the client may still be sending.
func (h *Handler) closeInStages(w http.ResponseWriter, r *http.Request, client netip.Addr) {
	if r.ProtoMajor != 1 || !stillSending(r) {
		return
	}
	if fast, ok := innermost(w).(*responseWriter); ok {
		fast.lingers, fast.sender = true, client // clientConn.serve closes it after the response
		return
	}
	// net/http would close the connection without reading what is left. Hijack it in the
	// middle of the response, which is possible when that has a Content-Length.
	if w.Header().Get("Content-Length") == "" || http.NewResponseController(w).Flush() != nil {
		return
	}
	if conn, _, err := hijack(w); err == nil {
		go h.process.lingering.close(conn, client)
	}
}

// stillSending reports whether the client of r may still be sending bytes that the proxy
// will not read.
func stillSending(r *http.Request) bool {
	return r.Method == http.MethodConnect || r.ContentLength != 0 && !expectsContinue(r)
}

// expectsContinue reports whether the client waits for 100 (Continue) before it sends
// content.
func expectsContinue(r *http.Request) bool {
	return httpguts.HeaderValuesContainsToken(r.Header["Expect"], "100-continue")
}

// dropContent reads and drops the content of a request before error routes answer it. Once
// they have, the connection can no longer be read. As with lingering connections, the number
// of such requests per client is limited.
func (l *lingering) dropContent(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor != 1 || r.ContentLength == 0 || r.Method == http.MethodConnect || expectsContinue(r) {
		return
	}
	if client := identifyClient(r).addr; l.enter(client) {
		defer l.leave(client)
		drop(r.Body, http.NewResponseController(w).SetReadDeadline)
	}
}

// hold has the connection of a refused CONNECT closed in stages when error routes have
// answered it. They answer after the handler has returned, so it cannot hijack the connection,
// and what the client sends after the CONNECT has no end that could be awaited. net/http will
// close the connection itself, and then release closes what hold has kept open.
func (l *lingering) hold(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor != 1 || r.Method != http.MethodConnect {
		return
	}
	conn := connOf(w, r)
	if conn == nil {
		return
	}
	socket := tcpconn.Of(conn)
	if socket == nil {
		return
	}
	if held, err := tcpconn.Dup(socket); err == nil { // Windows cannot do this
		l.held.Store(conn, heldSocket{held, identifyClient(r).addr})
	}
}

// release ends what hold has begun, when the state of a connection changes. A connection that
// net/http has closed is closed in stages. Another one is still in use, because error routes
// have deleted the field Connection.
func (l *lingering) release(conn net.Conn, state http.ConnState) {
	if state == http.StateNew || state == http.StateActive {
		return
	}
	value, ok := l.held.LoadAndDelete(conn)
	if !ok {
		return
	}
	if held := value.(heldSocket); state == http.StateClosed {
		go l.close(held.conn, held.client)
	} else {
		_ = held.conn.Close()
	}
}

// hasErrorRoutes reports whether the site has error routes (handle_errors).
func hasErrorRoutes(r *http.Request) bool {
	server, _ := r.Context().Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	return server != nil && server.Errors != nil && len(server.Errors.Routes) > 0
}
