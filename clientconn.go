// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// clientConn serves one client connection on one goroutine, bypassing net/http and Caddy's
// HTTP server (about 30 % less CPU). It handles only CONNECT and plain requests without
// content. On the first request that it does not handle, or that is malformed, it hands the
// connection to net/http with every byte of that request. After a config reload it hands the
// connection to the listener of the new config between two requests, which the client does
// not notice.
type clientConn struct {
	*net.TCPConn
	early    []byte // bytes that were read before the clientConn was created
	listener *clientListener
	remote   string

	r    *bufio.Reader
	w    responseWriter
	out  http.ResponseWriter // w, or w wrapped in Caddy's write-idle timeout
	ctx  context.Context     // canceled when the connection ends
	gone context.CancelFunc
	due  time.Time // current read deadline

	writeDue time.Time // current write deadline; zero: none
	isNew    bool      // no request has been read yet
	late     bool      // the request head timed out before it was complete
	state    atomic.Int32

	mu        sync.Mutex
	answering bool          // a request is being served
	watch     chan struct{} // closed when look returns; nil: look is not running
}

// States of a clientConn.
const (
	connIdle   = iota // waiting for a request head, or for the rest of one
	connBusy          // serving a request
	connClosed        // closed by shutdown while idle
	connMoves         // told by shutdown while idle to move to another listener
)

// headReaders holds readers for request heads. A request whose head does not fit is handed
// to net/http.
var headReaders = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 4<<10) }}

func newClientConn(l *clientListener, conn *readConn, isNew bool) *clientConn {
	c := &clientConn{TCPConn: conn.TCPConn, early: conn.early, listener: l, isNew: isNew}
	c.w.client = c
	return c
}

// start allocates what the connection needs to serve requests.
func (c *clientConn) start() {
	c.remote = c.RemoteAddr().String()
	c.r = headReaders.Get().(*bufio.Reader)
	if c.r.Reset(c.TCPConn); len(c.early) > 0 {
		c.r.Reset(&readConn{TCPConn: c.TCPConn, early: c.early})
		_, _ = c.r.Peek(len(c.early)) // early fits; buffer it, so that leave hands it on too
		c.early = nil
	}
	ctx := context.WithValue(context.Background(), http.LocalAddrContextKey, c.LocalAddr())
	ctx, c.gone = context.WithCancel(ctx)
	c.ctx, c.out = context.WithValue(ctx, caddyhttp.ServerCtxKey, c.listener.site), &c.w
}

// newRequest returns a request with the fields set that are the same for all requests of the
// connection.
func (c *clientConn) newRequest(method string) *http.Request {
	if method != http.MethodConnect && c.out == &c.w {
		c.limitWrites()
	}
	ctx := &requestContext{Context: c.ctx, conn: c}
	ctx.r = blankRequest.WithContext(ctx)
	ctx.r.Method, ctx.r.RemoteAddr = method, c.remote
	return ctx.r
}

var blankRequest = &http.Request{Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Body: http.NoBody}

// limitWrites wraps the writer in Caddy's write-idle timeout. CONNECT does not need it:
// tunnels have their own timeouts.
func (c *clientConn) limitWrites() {
	timeout := time.Duration(c.listener.site.WriteIdleTimeout)
	if timeout <= 0 {
		return
	}
	idle := &caddyhttp.IdleTimeoutWriter{
		ResponseWriterWrapper: &caddyhttp.ResponseWriterWrapper{ResponseWriter: &c.w},
		Ctrl:                  http.NewResponseController(&c.w),
		Deadline:              caddyhttp.IdleDeadline{Timeout: timeout},
		MaxChunk:              c.listener.site.MaxWriteChunk,
		Logger:                c.listener.handler.logger,
	}
	c.ctx, c.out = caddyhttp.ContextWithIdleTimeouts(c.ctx, nil, idle), idle
}

// run serves the connection, and then the tunnel that it may have become. The tunnel starts
// here, after serve has returned, so that it does not keep alive what only requests need.
func (c *clientConn) run() {
	growStack()
	if t := c.serve(); t != nil {
		t.run()
	}
}

// serve serves requests until the connection ends, becomes a tunnel, or is handed off.
func (c *clientConn) serve() (t *tunnel) {
	handedOff := false
	defer func() {
		if err := recover(); err != nil && err != http.ErrAbortHandler {
			c.listener.handler.logger.Error("panic serving a client", zap.String("client", c.remote), zap.Any("panic", err), zap.ByteString("stack", debug.Stack()))
		}
		c.stopWatch() // look reads from c.r
		c.gone()
		if !handedOff {
			releaseClient(c.TCPConn)
		}
		if !handedOff && !c.w.hijacked && !c.w.lingers {
			_ = c.Close()
		}
		c.decide()
		c.listener.conns.remove(c)
		c.r.Reset(nil)
		headReaders.Put(c.r)
		if c.w.lingers {
			c.listener.handler.tunnels.lingering.close(c.TCPConn, c.w.sender)
		}
	}()
	c.start()
	for {
		r, handOff := c.next()
		if r == nil {
			if handedOff = handOff; handOff {
				c.leave()
			}
			return nil
		}
		c.decide()
		if !c.answer(r) {
			return c.w.tunnel
		}
	}
}

// growStack grows the goroutine's stack once to the size that a request needs, while there
// is hardly anything on it to copy.
func growStack() {
	var frame [5 << 10]byte
	runtime.KeepAlive(&frame)
}

// decide marks the connection as no longer new.
func (c *clientConn) decide() {
	if c.isNew {
		c.isNew = false
		c.listener.conns.undecided.Done()
	}
}

// answer serves a request and reports whether the connection can serve another one.
func (c *clientConn) answer(r *http.Request) bool {
	c.mu.Lock()
	c.answering = true
	c.mu.Unlock()
	c.w.begin(r.Method == http.MethodHead, r.Close)
	c.w.header["Server"] = []string{"Caddy"}
	err := c.listener.handler.ServeHTTP(c.out, r, nil)
	if c.w.hijacked {
		return false
	}
	if err != nil {
		c.w.WriteHeader(cmp.Or(caddyStatus(err), http.StatusInternalServerError))
	}
	c.stopWatch()
	err = c.w.end()
	return err == nil && !c.w.closes && c.ctx.Err() == nil
}

// next returns the next request. If r is nil, either the connection has ended, or handOff
// says to hand it off.
func (c *clientConn) next() (r *http.Request, handOff bool) {
	if !c.becomesIdle() {
		return nil, true
	}
	if !c.isNew && c.r.Buffered() < 4 {
		c.expect(c.listener.site.IdleTimeout)
		if _, err := c.r.Peek(4); err != nil { // net/http closes silently, too
			return nil, c.state.Load() == connMoves
		}
	}
	length, err := c.readHead()
	if !c.state.CompareAndSwap(connIdle, connBusy) {
		return nil, c.state.Load() == connMoves
	}
	c.late = errors.Is(err, os.ErrDeadlineExceeded) && c.r.Buffered() > 0
	if err != nil && !c.late {
		return nil, false
	}
	if length < 0 && c.isNew && c.refuseFirstByte() {
		return nil, false
	}
	if length < 0 || c.listener.replaced() {
		return nil, true
	}
	head, _ := c.r.Peek(length)
	if r = c.parse(string(head)); r == nil {
		return nil, true
	}
	_, _ = c.r.Discard(length + len(headEnd)) // never fails: it is buffered
	return r, false
}

// becomesIdle marks the connection idle, which lets shutdown close or move it. It returns
// false if shutdown has already begun.
func (c *clientConn) becomesIdle() bool {
	c.state.Store(connIdle)
	return !c.listener.conns.over.Load() || !c.state.CompareAndSwap(connIdle, connMoves)
}

// expect sets the read deadline to limit from now. It keeps a deadline that is at most a
// sixteenth of limit too early, because each change costs a change of a timer.
func (c *clientConn) expect(limit caddy.Duration) {
	var due time.Time
	if limit > 0 {
		due = time.Now().Add(time.Duration(limit))
		if diff := c.due.Sub(due); diff <= 0 && diff >= -time.Duration(limit)/16 {
			return
		}
	} else if c.due.IsZero() {
		return
	}
	c.due = due
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Load() != connMoves { // keep the deadline in the past that shutdown has set
		_ = c.SetReadDeadline(due)
	}
}

// limitWrite sets Caddy's write_idle as the deadline for the next write, for clients that do
// not read. It is called before each write of a response, also of one without content.
func (c *clientConn) limitWrite() {
	if timeout := time.Duration(c.listener.site.WriteIdleTimeout); timeout > 0 {
		c.setWriteDeadline(time.Now().Add(timeout), timeout/16)
	}
}

// setWriteDeadline sets the write deadline, unless the current one is at most slack earlier:
// each change costs a change of a timer. The deadline stays set between responses, when
// nothing is written.
func (c *clientConn) setWriteDeadline(due time.Time, slack time.Duration) {
	if diff := due.Sub(c.writeDue); diff < 0 || diff > slack {
		c.writeDue = due
		_ = c.TCPConn.SetWriteDeadline(due)
	}
}

// clearWriteDeadline removes the write deadline before the connection is handed off or
// hijacked.
func (c *clientConn) clearWriteDeadline() {
	if !c.writeDue.IsZero() {
		c.writeDue = time.Time{}
		_ = c.TCPConn.SetWriteDeadline(time.Time{})
	}
}

// leave hands the connection off, with every byte that was read but not consumed: to the
// listener of the new config if there is one, else to net/http.
func (c *clientConn) leave() {
	unread, _ := c.r.Peek(c.r.Buffered())
	c.clearWriteDeadline()
	c.mu.Lock() // shutdown sets the deadline concurrently
	_ = c.SetReadDeadline(time.Time{})
	c.mu.Unlock()
	conn := &readConn{TCPConn: c.TCPConn, early: bytes.Clone(unread), late: c.late, handler: c.listener.handler}
	var successor *clientListener
	if c.listener.conns.over.Load() || c.listener.replaced() {
		successor = c.listener.successor()
	}
	switch {
	case successor != nil:
		successor.take(conn, c.isNew)
	case c.isNew:
		c.listener.handOn(conn)
	case c.state.Load() == connMoves:
		releaseClient(c.TCPConn)
		_ = c.Close()
	case bytes.HasPrefix(unread, []byte(http2Preface)): // net/http would switch to HTTP/2
		releaseClient(c.TCPConn)
		c.refuse("HTTP/2 cannot start after HTTP/1 requests on the same connection.")
	case len(unread) < len(http2Preface): // net/http would wait for the rest of the preface
		releaseClient(c.TCPConn)
		c.refuse("This is not a well-formed HTTP request.")
	default:
		c.listener.handOn(conn)
	}
}

const http2Preface = "PRI * HTTP/2.0"

// refuse responds 400 to input that is not a request that can be served.
func (c *clientConn) refuse(text string) {
	c.listener.handler.answerInvalid(c.TCPConn, invalidMalformed, "400 Bad Request", text)
	c.w.lingers, c.w.sender = true, addrPort(c.RemoteAddr()).Addr()
}

// refuseFirstByte refuses a client whose first byte is not HTTP, and reports whether it has
// done so.
func (c *clientConn) refuseFirstByte() bool {
	first, _ := c.r.Peek(min(1, c.r.Buffered()))
	if len(first) == 0 || c.listener.handler == nil {
		return false
	}
	reason, found := firstByteOf(first[0], false)
	if found {
		c.listener.handler.answerFirstByte(c.TCPConn, reason)
		c.w.lingers, c.w.sender = true, addrPort(c.RemoteAddr()).Addr()
	}
	return found
}

// ends reports whether the server is shutting down and no other listener can serve the
// connection.
func (c *clientConn) ends() bool {
	return c.listener.conns.over.Load() && c.listener.successor() == nil
}

// shutdown closes or moves the connection if it is idle. A busy connection does so after its
// response.
func (c *clientConn) shutdown(exits bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case exits && c.state.CompareAndSwap(connIdle, connClosed):
		_ = c.Close()
	case c.state.CompareAndSwap(connIdle, connMoves):
		_ = c.SetReadDeadline(time.Unix(1, 0))
	}
}

// clientConns is the set of the connections of one listener.
type clientConns struct {
	mu        sync.Mutex
	conns     map[*clientConn]struct{}
	undecided sync.WaitGroup // new connections, which have not sent a request yet
	over      atomic.Bool    // the listener is closed
}

// clientConnCount counts open client connections across all listeners, including those of
// replaced configs. On exit the process waits for it to reach zero.
var clientConnCount atomic.Int64

// add adds a connection, unless the listener is closed.
func (p *clientConns) add(c *clientConn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over.Load() {
		return false
	}
	p.conns[c] = struct{}{}
	if c.isNew {
		p.undecided.Add(1)
	}
	clientConnCount.Add(1)
	return true
}

func (p *clientConns) remove(c *clientConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	clientConnCount.Add(-1)
}

// shutdown closes or moves the idle connections at once, and the others after their
// response. If exits is set, no other config follows.
func (p *clientConns) shutdown(exits bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over.Store(true)
	for c := range p.conns {
		c.shutdown(exits)
	}
}

// waitForAnswers waits until the last responses have been sent. It must be called after all
// shutdowns.
func waitForAnswers(ctx context.Context) {
	waitUntil(ctx, func() bool { return clientConnCount.Load() == 0 })
}
