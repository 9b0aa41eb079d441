// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"context"
	"net/http/httptrace"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// headTimer cancels a request over HTTP/2 whose response head is overdue by its clock. All
// connections on which the request is tried share it.
type headTimer struct {
	headClock
	ctx     context.Context
	cancel  context.CancelCauseFunc
	timeout time.Duration
	reused  atomic.Bool // the connection had served an earlier request

	mu        sync.Mutex
	timer     *time.Timer // nil: the wait is over
	conn      *http2Conn  // the connection of the latest attempt; nil: none so far
	stopWatch func()      // stops the watch on conn
}

// headTimerKey is the context key under which the connection pool finds a request's
// headTimer.
type headTimerKey struct{}

// newHeadTimer returns a headTimer whose clock starts when there is a connection. A timeout
// <= 0 means none.
func newHeadTimer(ctx context.Context, timeout time.Duration) *headTimer {
	w := &headTimer{timeout: timeout}
	w.ctx, w.cancel = context.WithCancelCause(context.WithValue(ctx, headTimerKey{}, w))
	if timeout > 0 {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.timer = time.AfterFunc(timeout, w.onTimer)
	}
	return w
}

func (w *headTimer) connected(info httptrace.GotConnInfo) {
	w.reused.Store(info.Reused)
	w.turnBegan.CompareAndSwap(0, monotime.Of(time.Now()))
}

// watch starts watching a connection on which the request is about to be sent, and stops
// watching the previous one.
func (w *headTimer) watch(conn *http2Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endWatch()
	w.closeSingle()
	w.conn, w.stopWatch = conn, conn.watch()
}

// closeSingle closes the connection if it is for this request only. The caller holds mu.
func (w *headTimer) closeSingle() {
	if w.conn != nil && w.conn.single {
		_ = w.conn.Close()
	}
}

// endWatch stops the watch on the connection, if there is one. The caller holds mu.
func (w *headTimer) endWatch() {
	if w.stopWatch != nil {
		w.stopWatch()
		w.stopWatch = nil
	}
}

// lost reports whether the connection was closed because the origin had silently died.
func (w *headTimer) lost() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.conn != nil && w.conn.lost.Load()
}

func (w *headTimer) onTimer() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer == nil {
		return
	}
	left := w.left(w.timeout)
	if left <= 0 {
		w.cancel(os.ErrDeadlineExceeded)
		return
	}
	w.timer.Reset(left)
}

// expired reports whether the timeout has expired.
func (w *headTimer) expired() bool { return context.Cause(w.ctx) == os.ErrDeadlineExceeded }

// stop ends the wait, but not the request.
func (w *headTimer) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
}

// end ends the wait and the request.
func (w *headTimer) end() {
	w.stop()
	w.cancel(nil)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endWatch() // only now: a connection can also die in the middle of a response
	w.closeSingle()
}
