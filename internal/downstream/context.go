// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"sync"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// requestContext is the context of a request on a clientConn. It prepares the expensive
// parts, which most requests do not need, on first use.
type requestContext struct {
	context.Context // of the connection, with the values that all requests share
	conn            *clientConn
	r               http.Request
	attached        any
	kept            bool // Keep was called
	freesHeader     bool // r.Header may be given back

	once     sync.Once
	prepared context.Context
}

// requestPool is a pool of contexts: each request needs one.
var requestPool = sync.Pool{New: func() any { return new(requestContext) }}

// Keep prevents the request with this context from being reused for another request. It must be
// called before code outside this module gets the request or its context, because that code may use
// them for longer than the request takes.
func Keep(ctx context.Context) {
	if c, ok := ctx.(*requestContext); ok {
		c.kept = true
	}
}

// freeRequest makes a request, its context and its header available to other requests, unless code
// outside this module may have seen them. Nothing may be watching the context, because a watch can
// outlive the request.
func freeRequest(r *http.Request) {
	c := r.Context().(*requestContext)
	if c.kept || c.prepared != nil {
		return
	}
	if c.freesHeader {
		h1.FreeHeader(r.Header)
	}
	if c.attached != nil {
		c.conn.server.FreeAttached(c.attached)
	}
	*r = http.Request{}
	c.Context, c.conn, c.attached, c.freesHeader = nil, nil, nil, false
	requestPool.Put(c)
}

// Serves reports whether r is a request that this package serves.
func Serves(r *http.Request) bool {
	_, ok := r.Context().(*requestContext)
	return ok
}

// Attach attaches value to a request for Server.Prepare. It does nothing and returns false if this
// package does not serve the request.
func Attach(r *http.Request, value any) bool {
	c, ok := r.Context().(*requestContext)
	if ok {
		c.attached = value
	}
	return ok
}

// Attached returns the value that Attach has attached to r, or nil.
func Attached(r *http.Request) any {
	if c, ok := r.Context().(*requestContext); ok {
		return c.attached
	}
	return nil
}

// Done implements context.Context. The first call starts the watch for the client's
// disconnect.
func (c *requestContext) Done() <-chan struct{} {
	c.conn.startWatch()
	return c.Context.Done()
}

// Value implements context.Context. The first call for a key of Server.Prepare's context
// prepares it.
func (c *requestContext) Value(key any) any {
	if value := c.Context.Value(key); value != nil {
		return value
	}
	if !c.conn.server.Prepares(key) {
		return nil
	}
	c.once.Do(func() {
		c.prepared = c.conn.server.Prepare(c.r.WithContext(c.Context), &c.conn.w, c.attached)
	})
	return c.prepared.Value(key)
}

// startWatch starts to watch for the client's disconnect while a request is served, once its content
// has been read.
func (c *clientConn) startWatch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.serving || c.watchDone != nil {
		return
	}
	if c.watchWanted = c.reading; c.reading {
		return // the content's reads notice a disconnect
	}
	c.watchDone = make(chan struct{})
	c.readDeadline.Clear(c.Conn)
	go c.watchDisconnect(c.watchDone)
}

// watchDisconnect reads ahead until the connection ends, the buffer is full, or stopWatch is called.
// EOF after pipelined requests is a half-close: the client still waits for its responses.
// EOF with nothing buffered counts as a disconnect, as in net/http.
func (c *clientConn) watchDisconnect(done chan<- struct{}) {
	defer close(done)
	for {
		_, err := c.r.Peek(c.r.Buffered() + 1)
		if err == nil {
			continue
		}
		c.mu.Lock()
		if c.serving && err != bufio.ErrBufferFull && (err != io.EOF || c.r.Buffered() == 0) {
			c.cancel()
		}
		c.mu.Unlock()
		return
	}
}

// stopWatch ends the watch, and returns when the watch no longer reads. It reports whether anything
// had asked for the watch.
func (c *clientConn) stopWatch() (wanted bool) {
	c.mu.Lock()
	c.serving = false
	watch := c.watchDone
	if watch != nil {
		c.readDeadline.Interrupt(c.Conn)
	}
	c.mu.Unlock()
	if watch != nil {
		<-watch
		c.watchDone = nil
	}
	return watch != nil || c.watchWanted
}
