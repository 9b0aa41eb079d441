// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// requestContext is the context of a request on a clientConn. It prepares the expensive
// parts, which most requests do not need, on first use.
type requestContext struct {
	context.Context // of the connection, with the values that all requests share
	conn            *clientConn
	r               *http.Request
	start           time.Time
	placeholder     caddy.ReplacerFunc // the proxy's placeholders

	once     sync.Once
	prepared context.Context
}

// Done implements context.Context. The first call starts the watch for the client's
// disconnect.
func (c *requestContext) Done() <-chan struct{} {
	c.conn.startWatch()
	return c.Context.Done()
}

// Value implements context.Context. The first call for one of Caddy's keys prepares what
// Caddy prepares for each request, such as variables and placeholders.
func (c *requestContext) Value(key any) any {
	if value := c.Context.Value(key); value != nil {
		return value
	}
	if _, ok := key.(caddy.CtxKey); !ok {
		return nil
	}
	c.once.Do(func() {
		repl := caddy.NewReplacer()
		repl.Map(c.placeholder)
		c.prepared = caddyhttp.PrepareRequest(c.r.WithContext(c.Context), repl, c.conn.out, c.conn.listener.site).Context()
		caddyhttp.SetVar(c.prepared, "start_time", c.start) // Caddy measures durations from it
	})
	return c.prepared.Value(key)
}

// namesClient reports whether a request has a field that may name another client than the
// one that is connected. Caddy then decides who the client is.
func (c *requestContext) namesClient() bool {
	has := func(name string) bool { return len(c.r.Header.Values(name)) > 0 }
	return has("X-Forwarded-For") || slices.ContainsFunc(c.conn.listener.site.ClientIPHeaders, has)
}

// startWatch starts to watch for the client's disconnect while a request is served.
func (c *clientConn) startWatch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.serving || c.watchDone != nil {
		return
	}
	c.watchDone = make(chan struct{})
	c.readDeadline.Clear(c.TCPConn)
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

// stopWatch ends the watch, and returns when it no longer reads.
func (c *clientConn) stopWatch() {
	c.mu.Lock()
	c.serving = false
	watch := c.watchDone
	if watch != nil {
		c.readDeadline.Interrupt(c.TCPConn)
	}
	c.mu.Unlock()
	if watch != nil {
		<-watch
		c.watchDone = nil
	}
}
