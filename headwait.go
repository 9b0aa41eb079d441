// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"io"
	"math"
	"net/http/httptrace"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// headWait ends a request over HTTP/2 whose response does not come in time: that in
// which the origin has had all of the request, or would not take more, on whichever
// connections it was tried.
type headWait struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc
	timeout time.Duration
	due     atomic.Int64 // since when it is the origin's turn, since epoch; 0: it is not
	news    atomic.Int64 // when the origin last told of progress, since epoch; 0: never
	reused  atomic.Bool  // the connection had served a request before

	mu        sync.Mutex
	timer     *time.Timer // nil: the wait is over
	conn      *http2Conn  // that the request was sent on last; nil: none so far
	stopWatch func()      // ends the watch over conn
}

// headWaitKey is for the context of a request, in which the pool of connections finds
// its headWait.
type headWaitKey struct{}

// newHeadWait begins to wait when there is a connection. A timeout <= 0 is none.
func newHeadWait(ctx context.Context, timeout time.Duration) *headWait {
	w := &headWait{timeout: timeout}
	w.ctx, w.cancel = context.WithCancelCause(context.WithValue(ctx, headWaitKey{}, w))
	if timeout > 0 {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.timer = time.AfterFunc(timeout, w.look)
	}
	return w
}

func (w *headWait) connected(info httptrace.GotConnInfo) {
	w.reused.Store(info.Reused)
	w.due.CompareAndSwap(0, sinceEpoch(time.Now()))
}

// watch has a connection watched over, on which the request is about to be sent.
func (w *headWait) watch(conn *http2Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endWatch()
	w.closeSingle()
	w.conn, w.stopWatch = conn, conn.watch()
}

// closeSingle closes a connection that is for this request alone. The caller holds mu.
func (w *headWait) closeSingle() {
	if w.conn != nil && w.conn.single {
		_ = w.conn.Close()
	}
}

// endWatch ends the watch over the connection, if there is one. The caller holds mu.
func (w *headWait) endWatch() {
	if w.stopWatch != nil {
		w.stopWatch()
		w.stopWatch = nil
	}
}

// lost reports whether the origin has died without a word, so that the connection was
// closed.
func (w *headWait) lost() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.conn != nil && w.conn.lost.Load()
}

// turn notes whose turn it is.
func (w *headWait) turn(origin bool) {
	if origin {
		w.due.Store(sinceEpoch(time.Now()))
	} else {
		w.due.Store(0)
	}
}

// heard notes that the origin has told of progress.
func (w *headWait) heard() { w.news.Store(sinceEpoch(time.Now())) }

// maxWaits is how many times its timeout a response may take if the origin tells of
// progress meanwhile.
const maxWaits = 10

// timeLeft returns how much time an origin has left for a response, whose turn it has
// been since turn and which last told of progress at news, both since epoch. It has all
// of its time while it is the client's turn.
func timeLeft(timeout time.Duration, turn, news int64) time.Duration {
	if turn == 0 {
		return timeout
	}
	now, last := sinceEpoch(time.Now()), turn
	if news != 0 {
		last = max(turn, news)
	}
	inAll := maxWaits * min(timeout, math.MaxInt64/maxWaits)
	return min(timeout-time.Duration(now-last), inAll-time.Duration(now-turn))
}

func (w *headWait) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer == nil {
		return
	}
	left := timeLeft(w.timeout, w.due.Load(), w.news.Load())
	if left <= 0 {
		w.cancel(os.ErrDeadlineExceeded)
		return
	}
	w.timer.Reset(left)
}

// over reports whether the response has not come in time.
func (w *headWait) over() bool { return context.Cause(w.ctx) == os.ErrDeadlineExceeded }

// stale reports whether an error is that of a connection that the origin was closing
// while it was idle, or on which it did not answer any more.
func (w *headWait) stale(err error) bool {
	if w.lost() {
		return w.ctx.Err() == nil
	}
	lost := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
	return lost && w.reused.Load() && w.ctx.Err() == nil
}

// stop ends the wait, and not the request.
func (w *headWait) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.timer != nil {
		w.timer.Stop()
		w.timer = nil
	}
}

// end ends the request, too.
func (w *headWait) end() {
	w.stop()
	w.cancel(nil)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endWatch() // a connection can die in the middle of a response, too
	w.closeSingle()
}
