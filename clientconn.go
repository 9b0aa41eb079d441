// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"bytes"
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

// clientConn is a client's connection that is served here from its first byte, on
// one goroutine, at 0.7 of the cost that there is with net/http's server and Caddy's
// on top of it. It is for CONNECT and for plain requests without content; with the
// first request that is anything else, or odd, the connection goes to net/http as if
// nothing of that request had been read. At a reload it goes to the listener of the
// new config, between two requests, and the client does not notice.
type clientConn struct {
	*net.TCPConn
	early    []byte // what was read from it before
	listener *clientListener
	remote   string

	r    *bufio.Reader
	w    responseWriter
	out  http.ResponseWriter // w, or Caddy's timeout for stalled writes on top of it
	ctx  context.Context     // of the connection
	gone context.CancelFunc
	due  time.Time // the deadline that is set for reading

	writeDue time.Time // the deadline that is set for writing; zero: none
	isNew    bool      // there was no request yet
	late     bool      // the time for the head that has begun is over
	state    atomic.Int32

	mu        sync.Mutex
	answering bool          // a request
	watch     chan struct{} // closed when the watch for the client's leaving ends; nil: there is none
}

// What a clientConn is doing.
const (
	connIdle   = iota // it waits for a request, or for the rest of its head
	connBusy          // it answers one
	connClosed        // it was told to end, while it was idle
	connMoves         // it was told to go to another listener, while it was idle
)

// headReaders are for the requests of clients. What does not fit is not ordinary.
var headReaders = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 4<<10) }}

func newClientConn(l *clientListener, conn *readConn, isNew bool) *clientConn {
	c := &clientConn{TCPConn: conn.TCPConn, early: conn.early, listener: l, isNew: isNew}
	c.w.client = c
	return c
}

// start makes what the connection needs for its requests.
func (c *clientConn) start() {
	c.remote = c.RemoteAddr().String()
	c.r = headReaders.Get().(*bufio.Reader)
	if c.r.Reset(c.TCPConn); len(c.early) > 0 {
		c.r.Reset(&readConn{TCPConn: c.TCPConn, early: c.early})
		_, _ = c.r.Peek(len(c.early)) // fits, and is there for leave, too
		c.early = nil
	}
	ctx := context.WithValue(context.Background(), http.LocalAddrContextKey, c.LocalAddr())
	ctx, c.gone = context.WithCancel(ctx)
	c.ctx, c.out = context.WithValue(ctx, caddyhttp.ServerCtxKey, c.listener.site), &c.w
}

// newRequest returns a request with all that is the same for each one.
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

// limitWrites has Caddy's timeout for stalled writes hold, which a CONNECT needs
// not.
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

// run serves the connection, and whatever that becomes. A tunnel does not keep
// what only requests need.
func (c *clientConn) run() {
	growStack()
	if t := c.serve(); t != nil {
		t.run()
	}
}

// serve answers requests until the connection ends, becomes a tunnel, or goes
// elsewhere.
func (c *clientConn) serve() (t *tunnel) {
	kept := false // by somebody else
	defer func() {
		if err := recover(); err != nil && err != http.ErrAbortHandler {
			c.listener.handler.logger.Error("panic serving a client", zap.String("client", c.remote), zap.Any("panic", err), zap.ByteString("stack", debug.Stack()))
		}
		c.stopWatch() // reads from c.r
		c.gone()
		if !kept {
			releaseClient(c.TCPConn)
		}
		if !kept && !c.w.hijacked && !c.w.lingers {
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
		r, other := c.next()
		if r == nil {
			if kept = other; other {
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

// growStack has the goroutine's stack grow once to what a request takes, while
// there is nothing on it to be copied.
//
//go:noinline
func growStack() {
	var frame [5 << 10]byte
	runtime.KeepAlive(&frame)
}

// decide notes that the connection is not new any more.
func (c *clientConn) decide() {
	if c.isNew {
		c.isNew = false
		c.listener.conns.undecided.Done()
	}
}

// answer answers a request and reports whether the connection can serve more.
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
		status := http.StatusInternalServerError
		var failed caddyhttp.HandlerError
		if errors.As(err, &failed) && failed.StatusCode > 0 {
			status = failed.StatusCode
		}
		c.w.WriteHeader(status)
	}
	c.stopWatch()
	err = c.w.end()
	return err == nil && !c.w.closes && c.ctx.Err() == nil
}

// next returns the next request; none, if the connection has ended; or that it is to
// go elsewhere.
func (c *clientConn) next() (r *http.Request, elsewhere bool) {
	if !c.becomesIdle() {
		return nil, true
	}
	if !c.isNew && c.r.Buffered() < 4 {
		c.expect(c.listener.site.IdleTimeout)
		if _, err := c.r.Peek(4); err != nil { // to less net/http does not answer
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
	_, _ = c.r.Discard(length + len(headEnd)) // is buffered
	return r, false
}

// becomesIdle has the connection be told when the server shuts down, unless it does
// already.
func (c *clientConn) becomesIdle() bool {
	c.state.Store(connIdle)
	return !c.listener.conns.over.Load() || !c.state.CompareAndSwap(connIdle, connMoves)
}

// expect limits how long reading may take from now. A limit that is about right
// is left, as each costs a change of a timer.
func (c *clientConn) expect(limit caddy.Duration) {
	var due time.Time
	if limit > 0 {
		due = time.Now().Add(time.Duration(limit))
		if late := c.due.Sub(due); late <= 0 && late >= -time.Duration(limit)/16 {
			return
		}
	} else if c.due.IsZero() {
		return
	}
	c.due = due
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Load() != connMoves { // which is not to wait
		_ = c.SetReadDeadline(due)
	}
}

// limitWrite gives a client that does not read Caddy's write_idle for the write
// that follows. It comes before each write of a response, also of one without
// content.
func (c *clientConn) limitWrite() {
	if timeout := time.Duration(c.listener.site.WriteIdleTimeout); timeout > 0 {
		c.setWriteDeadline(time.Now().Add(timeout), timeout/16)
	}
}

// setWriteDeadline moves the deadline for writing, unless the one that is set is
// at most slack earlier: each change is one of a timer. It stays set between
// responses, where nothing is written.
func (c *clientConn) setWriteDeadline(due time.Time, slack time.Duration) {
	if early := due.Sub(c.writeDue); early < 0 || early > slack {
		c.writeDue = due
		_ = c.TCPConn.SetWriteDeadline(due)
	}
}

// clearWriteDeadline removes the deadline for writing, for somebody who takes the
// connection over.
func (c *clientConn) clearWriteDeadline() {
	if !c.writeDue.IsZero() {
		c.writeDue = time.Time{}
		_ = c.TCPConn.SetWriteDeadline(time.Time{})
	}
}

// leave lets somebody else serve the connection, with what was read and not taken.
func (c *clientConn) leave() {
	unread, _ := c.r.Peek(c.r.Buffered())
	c.clearWriteDeadline()
	c.mu.Lock() // shutdown may be at it
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
	case bytes.HasPrefix(unread, []byte(http2Preface)): // net/http would speak HTTP/2, as to a new client
		releaseClient(c.TCPConn)
		c.refuse("HTTP/2 cannot begin behind other requests.")
	case len(unread) < len(http2Preface): // net/http would wait for the rest of that
		releaseClient(c.TCPConn)
		c.refuse("This is not a well-formed HTTP request.")
	default:
		c.listener.handOn(conn)
	}
}

const http2Preface = "PRI * HTTP/2.0"

// refuse answers what is no request.
func (c *clientConn) refuse(text string) {
	c.listener.handler.answerInvalid(c.TCPConn, invalidMalformed, "400 Bad Request", text)
	c.w.lingers, c.w.sender = true, addrPort(c.RemoteAddr()).Addr()
}

// refuseFirstByte refuses a client that does not speak HTTP.
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

// ends reports whether the server is shutting down, and there is no other one for
// the connection.
func (c *clientConn) ends() bool {
	return c.listener.conns.over.Load() && c.listener.successor() == nil
}

// shutdown has the connection end or go elsewhere if it is idle. Otherwise it does
// so behind its answer.
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

// clientConns are those of a listener.
type clientConns struct {
	mu        sync.Mutex
	conns     map[*clientConn]struct{}
	undecided sync.WaitGroup // those without a request yet
	over      atomic.Bool    // the listener is closed
}

// clientConnCount is how many there are, of listeners of earlier configs too, whose last answers a process that exits waits for.
var clientConnCount atomic.Int64

// add notes a connection, unless the listener is closed.
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

// shutdown has all of them end soon: exits tells that there will be no other config.
func (p *clientConns) shutdown(exits bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over.Store(true)
	for c := range p.conns {
		c.shutdown(exits)
	}
}

// waitForAnswers waits until the last answers are over, after all shutdowns.
func waitForAnswers(ctx context.Context) {
	waitUntil(ctx, func() bool { return clientConnCount.Load() == 0 })
}
