// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// writeStallTimer extends the write deadline of an HTTP/1 client that reads a response slowly.
// Caddy's timeout for stalled writes starts with each write and expires if the write cannot
// be made in time. But the kernel buffers up to some MiB for a socket, and once the buffer
// is full, accepts no more until a third of it is free. With a slow client that takes longer
// than the timeout, although the client reads all the time. So writeStallTimer restarts the
// timeout whenever the client has acknowledged bytes.
type writeStallTimer struct {
	socket  *net.TCPConn
	timeout time.Duration

	mu    sync.Mutex
	timer *time.Timer // nil: stopped
	acked uint64      // bytes acknowledged on the connection
}

// newWriteStallTimer returns nil if there is no timeout that can be restarted. Over HTTP/2 each
// stream has a timeout of its own, but acknowledgements are for the whole connection. There
// newWriteStallTimer only limits how much waits in the kernel.
func newWriteStallTimer(w http.ResponseWriter, r *http.Request) *writeStallTimer {
	_, idle := caddyhttp.IdleTimeoutsFromContext(r.Context())
	socket := tcpconn.Of(connOf(w, r))
	switch {
	case idle == nil || !restartsWithEachWrite(idle) || socket == nil:
		return nil
	case r.ProtoMajor > 1:
		tcpconn.LimitUnsent(socket)
		return nil
	}
	s := &writeStallTimer{socket: socket, timeout: idle.Deadline.Timeout}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer = time.AfterFunc(s.tickInterval(), s.tick)
	return s
}

// tick restarts the timeout if the client has acknowledged bytes since the last tick.
func (s *writeStallTimer) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer == nil {
		return
	}
	if taken := tcpconn.BytesAcked(s.socket); taken > s.acked {
		s.acked = taken
		_ = s.socket.SetWriteDeadline(time.Now().Add(s.timeout)) // if it fails, so does the write
	}
	s.timer.Reset(s.tickInterval())
}

// tickInterval returns the time between two ticks, which is how late progress may be noticed.
func (s *writeStallTimer) tickInterval() time.Duration { return max(s.timeout/4, time.Millisecond) }

// waitForEnd waits until the client has read enough for the end of a chunked response to be
// written without waiting: at that point, nothing restarts the timeout any longer.
func (s *writeStallTimer) waitForEnd() error {
	if s == nil {
		return nil
	}
	_ = s.socket.SetWriteDeadline(time.Now().Add(s.timeout)) // the last one may have passed
	return asClientError(tcpconn.WaitWritable(s.socket))
}

// stop stops the timer. When it returns, the deadline is no longer set.
func (s *writeStallTimer) stop() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer.Stop()
	s.timer = nil
}

// startWriteIdleTimeout sets Caddy's write_idle as the deadline for the response that begins now.
// Caddy's own timeout starts with the first content that is written, so a response without
// content would wait forever for a client that does not read. A clientConn sets a deadline
// for each write itself. Over HTTP/2, a deadline is a timer that ends the stream even when
// nothing is written, so it is not set.
func startWriteIdleTimeout(r *http.Request) {
	if r.ProtoMajor == 2 || downstream.Serves(r) {
		return
	}
	_, idle := caddyhttp.IdleTimeoutsFromContext(r.Context())
	if idle != nil && idle.Deadline.Timeout > 0 && idle.Deadline.HardDeadline.IsZero() {
		_ = idle.Ctrl.SetWriteDeadline(time.Now().Add(idle.Deadline.Timeout))
	}
}

// restartsWithEachWrite reports whether each write may restart Caddy's write timeout. It may not
// if the server has a fixed write deadline or a minimum rate.
func restartsWithEachWrite(idle *caddyhttp.IdleTimeoutWriter) bool {
	return idle.Deadline.MinRate <= 0 && idle.Deadline.HardDeadline.IsZero()
}

// withWriteIdleTimeout wraps the writer of a connection in Caddy's write-idle timeout. CONNECT
// does not need it: tunnels have their own timeouts.
func withWriteIdleTimeout(ctx context.Context, w http.ResponseWriter, server *caddyhttp.Server, logger *zap.Logger) (context.Context, http.ResponseWriter) {
	idle := &caddyhttp.IdleTimeoutWriter{
		ResponseWriterWrapper: &caddyhttp.ResponseWriterWrapper{ResponseWriter: w},
		Ctrl:                  http.NewResponseController(w),
		Deadline:              caddyhttp.IdleDeadline{Timeout: time.Duration(server.WriteIdleTimeout)},
		MaxChunk:              server.MaxWriteChunk,
		Logger:                logger,
	}
	return caddyhttp.ContextWithIdleTimeouts(ctx, nil, idle), idle
}
