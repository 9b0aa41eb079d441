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

// requestContext is the context of a request on a clientConn. What costs is there
// when somebody asks for it, which for most requests nobody does.
type requestContext struct {
	context.Context // of the connection, with what holds for all requests
	conn            *clientConn
	r               *http.Request
	start           time.Time
	placeholder     caddy.ReplacerFunc // of the proxy's own

	once     sync.Once
	prepared context.Context
}

// Done implements context.Context: the client's leaving is looked out for from
// now on.
func (c *requestContext) Done() <-chan struct{} {
	c.conn.startWatch()
	return c.Context.Done()
}

// Value implements context.Context. What Caddy prepares for each request, such as
// variables and placeholders, is prepared with the first thing that is asked for.
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
		caddyhttp.SetVar(c.prepared, "start_time", c.start) // which Caddy counts the duration from
	})
	return c.prepared.Value(key)
}

// namesClient reports whether a request may speak for another client than the one
// whose connection this is. That is Caddy's to say.
func (c *requestContext) namesClient() bool {
	has := func(name string) bool { return len(c.r.Header.Values(name)) > 0 }
	return has("X-Forwarded-For") || slices.ContainsFunc(c.conn.listener.site.ClientIPHeaders, has)
}

func (c *clientConn) startWatch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.answering || c.watch != nil {
		return
	}
	c.watch = make(chan struct{})
	c.due = time.Time{}
	_ = c.SetReadDeadline(c.due)
	go c.look(c.watch)
}

// look reads ahead until the connection has ended, or stopWatch is called, or
// there is no room for more. A client that has sent further requests and then
// says that it is done still waits for this answer; that it waits for the last one,
// net/http does not believe either.
func (c *clientConn) look(done chan<- struct{}) {
	defer close(done)
	for {
		_, err := c.r.Peek(c.r.Buffered() + 1)
		if err == nil {
			continue
		}
		c.mu.Lock()
		if c.answering && err != bufio.ErrBufferFull && (err != io.EOF || c.r.Buffered() == 0) {
			c.gone()
		}
		c.mu.Unlock()
		return
	}
}

func (c *clientConn) stopWatch() {
	c.mu.Lock()
	c.answering = false
	watch := c.watch
	if watch != nil {
		c.due = time.Unix(1, 0)
		_ = c.SetReadDeadline(c.due)
	}
	c.mu.Unlock()
	if watch != nil {
		<-watch
		c.watch = nil
	}
}
