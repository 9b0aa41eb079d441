// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// clientConn serves one client connection on one goroutine. It refuses malformed requests. At a
// request that is for this server itself, it hands the connection to net/http, with every byte of
// that request. After a config reload, it hands the connection to the listener of the new config
// between two requests. The client notices neither.
type clientConn struct {
	net.Conn
	addresses *addresses // nil: those of Conn
	listener  *Listener
	server    *Server // of the listener
	remote    string
	tls       *tls.ConnectionState // nil: without TLS

	r      *bufio.Reader
	w      Writer
	ctx    context.Context // canceled when the connection ends
	cancel context.CancelFunc
	prefix []byte // bytes that were read before start

	readDeadline tcpconn.ReadDeadline
	isNew        bool // no request has been read yet
	state        atomic.Int32

	content *content // of the current request; nil: it has none

	mu          sync.Mutex
	serving     bool          // a request is being served
	reading     bool          // its content is still being read
	watchWanted bool          // watchDisconnect runs once the content has been read
	watchDone   chan struct{} // closed when watchDisconnect returns; nil: it is not running
}

// States of a clientConn. A new one that is idle is pristine.
const (
	connIdle    = iota // waiting for a request head, or for the rest of one
	connBusy           // serving a request
	connClosed         // closed by shutdown while idle
	connMoves          // told by shutdown while idle to hand itself off
	connOpening        // in the TLS handshake, or before the header of the PROXY protocol
)

func newClientConn(l *Listener, conn *readConn, isNew bool) *clientConn {
	c := &clientConn{Conn: conn.Conn, server: l.server, prefix: conn.in.Prefix, addresses: conn.addresses, listener: l, isNew: isNew}
	c.w.client = c
	if _, ok := c.Conn.(*net.TCPConn); !ok {
		c.state.Store(connOpening)
	}
	return c
}

// RemoteAddr implements net.Conn.
func (c *clientConn) RemoteAddr() net.Addr {
	if c.addresses != nil {
		return c.addresses.remote
	}
	return c.Conn.RemoteAddr()
}

// LocalAddr implements net.Conn.
func (c *clientConn) LocalAddr() net.Addr {
	if c.addresses != nil {
		return c.addresses.local
	}
	return c.Conn.LocalAddr()
}

// start allocates what the connection needs to serve requests.
func (c *clientConn) start() {
	c.remote = c.RemoteAddr().String()
	if conn, ok := c.Conn.(*tls.Conn); ok {
		state := conn.ConnectionState()
		c.tls = &state
	}
	c.r = takeReader(max(smallReader, len(c.prefix)))
	if c.r.Reset(c.Conn); len(c.prefix) > 0 {
		c.r.Reset(&tcpconn.Prefixed{Conn: c.Conn, Prefix: c.prefix})
		_, _ = c.r.Peek(len(c.prefix)) // buffers prefix, so that handOff hands it on too
		c.prefix = nil
	}
	ctx := context.WithValue(c.server.BaseContext, http.LocalAddrContextKey, c.LocalAddr())
	c.ctx, c.cancel = context.WithCancel(ctx)
}

// newRequest returns a request with the fields set that are the same for all requests of the
// connection.
func (c *clientConn) newRequest(line requestLine, header http.Header) *http.Request {
	ctx := requestPool.Get().(*requestContext)
	ctx.Context, ctx.conn, ctx.freesHeader = c.ctx, c, len(header) < h1.MaxFreedHeader
	r := &ctx.r
	*r = *blankRequest.WithContext(ctx)
	r.Method, r.Header, r.RemoteAddr, r.TLS = line.method, header, c.remote, c.tls
	if line.version != blankRequest.Proto {
		r.Proto, r.ProtoMinor = line.version, int(line.version[len("HTTP/1.")]-'0')
	}
	return r
}

var blankRequest = &http.Request{Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Body: http.NoBody}

// run serves the connection, and then calls the function that has taken it over, if any. It
// does so here, after serve has returned, so that the function does not keep alive what only
// requests need.
func (c *clientConn) run() {
	growStack()
	if takeover := c.serve(); takeover != nil {
		takeover()
	}
}

// serve serves requests until the connection ends, is taken over, or is handed off.
func (c *clientConn) serve() (takeover func()) {
	handedOff := false
	defer func() {
		if v := recover(); v != nil && v != http.ErrAbortHandler {
			c.server.OnPanic(c.remote, v, debug.Stack())
		}
		c.stopWatch() // watchDisconnect reads from c.r
		c.w.stallTimer.Stop()
		c.cancel()
		if !handedOff {
			c.server.OnEnd(c.Conn)
		}
		if socket := tcpconn.Of(c.Conn); c.w.resets && socket != nil {
			_ = socket.SetLinger(0)
			_ = socket.Close() // TLS would end in order
		}
		if !handedOff && !c.w.hijacked && !c.w.lingers {
			_ = c.Close()
		}
		putReader(c.r)
		if !c.w.lingers {
			c.leave()
			return
		}
		c.markUsed()
		// Caddy waits at its exit until the client has the response, because exiting would reset the connection.
		if c.isShuttingDown() {
			defer c.leave()
		} else {
			c.leave()
		}
		c.server.Lingering.Close(c.Conn, c.w.sender)
	}()
	c.start()
	for {
		r, handOff := c.nextRequest()
		if r == nil {
			if handedOff = handOff; handOff {
				c.handOff()
			}
			return nil
		}
		c.markUsed()
		if !c.serveRequest(r) {
			return c.w.takeover
		}
	}
}

// growStack grows the goroutine's stack once to the size that a request needs, while there
// is hardly anything on it to copy. It must not be inlined: its frame would become part of the
// frame of run, and so of the stack of each idle tunnel.
//
//go:noinline
func growStack() {
	var frame [5 << 10]byte
	runtime.KeepAlive(&frame)
}

// markUsed marks the connection as no longer new.
func (c *clientConn) markUsed() {
	if c.isNew {
		c.isNew = false
		c.listener.conns.pristine.Done()
	}
}

// leave removes the connection from the listener. The connection has ended, or belongs to something
// else from now on.
func (c *clientConn) leave() {
	c.markUsed()
	c.listener.conns.remove(c)
}

// serveRequest serves a request and reports whether the connection can serve another one.
func (c *clientConn) serveRequest(r *http.Request) bool {
	c.mu.Lock()
	c.serving, c.reading, c.watchWanted = true, c.content != nil, false
	c.mu.Unlock()
	c.w.reset(r)
	c.server.Handle(&c.w, r)
	if c.w.hijacked {
		return false
	}
	isUsed := c.stopWatch() || c.content != nil
	isUnread := c.content != nil && !c.content.body.Ended
	c.w.closes = c.w.closes || isUnread // what is left of the content is not a request
	c.content = nil
	err := c.w.finish()
	// A client that has not asked for the end may have sent its next request already. Closing with that
	// unread would reset the connection, and the client could lose the response (RFC 9112 §9.6).
	if (isUnread || c.w.closes && !r.Close) && !c.w.lingers && !c.w.resets {
		c.w.CloseInStages(hostport.AddrPortOf(c.RemoteAddr()).Addr())
	}
	if !isUsed {
		freeRequest(r)
	}
	// Let other clients have their turn. This goroutine never blocks if the client's next request
	// has always arrived, and would be preempted only after 10 ms.
	runtime.Gosched()
	return err == nil && !c.w.closes && c.ctx.Err() == nil
}

// nextRequest returns the next request. If there is none, handOff reports whether the connection must
// be handed off. Otherwise it has ended.
func (c *clientConn) nextRequest() (r *http.Request, handOff bool) {
	if !c.enterIdle() {
		return nil, true
	}
	if c.r.Size() > smallReader && c.r.Buffered() == 0 {
		c.resizeReader(smallReader)
	}
	if !c.isNew && c.r.Buffered() < 4 {
		limit := c.server.IdleTimeout
		c.limitRead(limit-limit/16, limit)
		if _, err := c.r.Peek(4); err != nil { // net/http closes silently, too
			return nil, c.state.Load() == connMoves
		}
	}
	length, reason, err := c.readHead()
	if !c.state.CompareAndSwap(connIdle, connBusy) {
		return nil, c.state.Load() == connMoves
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && c.r.Buffered() > 0 {
		reason = &Invalid{Kind: Refused, Status: "408 Request Timeout", Detail: "its head has not arrived in time"}
	} else if err != nil {
		return nil, false
	}
	if reason == nil && c.listener.replaced() {
		return nil, true
	}
	if reason == nil {
		head, _ := c.r.Peek(length)
		r, reason = c.parse(string(head))
	}
	if reason != nil {
		c.refuse(*reason)
		return nil, false
	}
	if r != nil {
		_, _ = c.r.Discard(length + len(h1.HeadEnd)) // never fails: it is buffered
	}
	return r, r == nil
}

// enterIdle marks the connection idle, which lets shutdown close or move it. It returns
// false if shutdown has already begun.
func (c *clientConn) enterIdle() bool {
	c.state.Store(connIdle)
	return !c.listener.conns.closed.Load() || !c.state.CompareAndSwap(connIdle, connMoves)
}

// limitRead sets a read deadline between least and most from now, and none if most is not
// positive.
func (c *clientConn) limitRead(least, most time.Duration) {
	if most > 0 {
		c.readDeadline.Within(c.Conn, least, most)
	} else {
		c.readDeadline.Clear(c.Conn)
	}
	if s := c.state.Load(); s == connMoves || s == connClosed { // shutdown may have interrupted before the call above
		c.readDeadline.Interrupt(c.Conn)
	}
}

// handOff hands the connection off, with every byte that was read but not consumed: to the
// listener of the new config if there is one, else to net/http.
func (c *clientConn) handOff() {
	unread, _ := c.r.Peek(c.r.Buffered())
	c.w.clearDeadline()
	c.mu.Lock() // shutdown may be about to interrupt
	c.readDeadline.Clear(c.Conn)
	c.mu.Unlock()
	conn := newReadConn(c.Conn, bytes.Clone(unread))
	conn.server, conn.addresses = c.server, c.addresses
	successor := c.listener.heir()
	startsHTTP2 := bytes.HasPrefix(unread, []byte(http2Preface)) // net/http would switch to HTTP/2
	switch {
	case successor != nil:
		successor.serveConn(conn, c.isNew)
	case c.isNew && c.tls != nil && startsHTTP2: // without having negotiated it
		c.server.OnEnd(c.Conn)
		c.refuse(*badRequest("HTTP/2 has not been negotiated"))
	case c.isNew && c.server.HTTP1Only && startsHTTP2:
		c.server.OnEnd(c.Conn)
		c.refuse(Invalid{Kind: PriorHTTP2})
	case c.isNew:
		c.listener.handToNetHTTP(conn)
	case c.state.Load() == connMoves:
		c.server.OnEnd(c.Conn)
		_ = c.Close()
	case startsHTTP2:
		c.server.OnEnd(c.Conn)
		c.refuse(Invalid{Kind: LateHTTP2})
	default:
		c.listener.handToNetHTTP(conn)
	}
}

// http2Preface begins a connection that speaks HTTP/2 without having negotiated it (RFC 9113 §3.4).
const http2Preface = "PRI * HTTP/2.0"

// refuse responds to input that is not a request that can be served. The first bytes of a
// connection may tell that the client speaks another protocol.
func (c *clientConn) refuse(what Invalid) {
	if first, _ := c.r.Peek(c.r.Buffered()); c.isNew && len(first) > 0 {
		if kind, found := foreignProtocol(first, false); found {
			what = Invalid{Kind: kind}
		}
	}
	c.server.answerInvalid(c, what)
	c.w.CloseInStages(hostport.AddrPortOf(c.RemoteAddr()).Addr())
}

// isShuttingDown reports whether the server is shutting down and no other listener can serve the
// connection.
func (c *clientConn) isShuttingDown() bool {
	return c.listener.conns.closed.Load() && c.listener.successor() == nil
}

// shutdown closes or moves the connection if it is idle. A busy connection does so after its
// response.
func (c *clientConn) shutdown(exits bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case exits && c.state.CompareAndSwap(connOpening, connClosed):
		_ = c.Close()
	case exits && c.state.CompareAndSwap(connIdle, connClosed):
		c.readDeadline.Interrupt(c.Conn) // its own goroutine closes it, because that may block with TLS
	case c.state.CompareAndSwap(connIdle, connMoves):
		c.readDeadline.Interrupt(c.Conn)
	}
}

// clientConns is the set of the connections of one listener.
type clientConns struct {
	mu       sync.Mutex
	conns    map[*clientConn]struct{}
	pristine sync.WaitGroup // new connections, which have not sent a request yet
	closed   atomic.Bool    // the listener is closed
}

// add adds a connection, unless the listener is closed.
func (p *clientConns) add(c *clientConn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed.Load() {
		return false
	}
	p.conns[c] = struct{}{}
	if c.isNew {
		p.pristine.Add(1)
	}
	c.server.Listeners.open.Add(1)
	return true
}

func (p *clientConns) remove(c *clientConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	c.server.Listeners.open.Add(-1)
}

// shutdown closes or moves the idle connections at once, and the others after their
// response. If exits is set, no other config follows.
func (p *clientConns) shutdown(exits bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed.Store(true)
	for c := range p.conns {
		c.shutdown(exits)
	}
}
