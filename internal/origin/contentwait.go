// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// contentWait limits how long a response waits for its origin to send more content. It
// enforces response_idle_timeout. A response that waits for long counts as a tunnel, so
// that the limits on tunnels apply to it, and so that it is closed when the process exits.
type contentWait struct {
	limits  *Limits
	client  client.Key
	counted bool
	stop    func() bool // stops watching for the exit; nil: not watching
}

// exitGrace is how long an origin may send nothing before the response is closed when the
// process exits.
const exitGrace = time.Second

var (
	errContentExit = errors.New("the proxy is shutting down and the origin sends nothing")
	errContentMany = errors.New("the origin sends nothing, and max_tunnels does not allow another waiting response")
)

func (w *contentWait) exiting() bool { return w.limits.Exit.Err() != nil }

// nextCheck returns how long to wait before overdue must be called; 0 means forever.
func (w *contentWait) nextCheck(waited time.Duration) time.Duration {
	step := time.Duration(0)
	if timeout := w.limits.ContentTimeout; timeout > 0 {
		step = max(timeout-waited, time.Millisecond)
	}
	grace := w.limits.ContentGrace
	if w.exiting() {
		grace = min(grace, exitGrace)
	}
	if left := grace - waited; left > 0 && (step == 0 || left < step) {
		step = left
	}
	return step
}

// overdue returns an error if the response has waited too long and must be closed. After
// the grace period it counts the response as a tunnel.
func (w *contentWait) overdue(waited time.Duration) error {
	switch timeout := w.limits.ContentTimeout; {
	case timeout > 0 && waited >= timeout:
		return fmt.Errorf("the origin sent nothing for %v (response_idle_timeout): %w", timeout, os.ErrDeadlineExceeded)
	case w.exiting() && waited >= exitGrace:
		return errContentExit
	case !w.counted && waited >= w.limits.ContentGrace:
		if !w.limits.Admit(w.client) {
			return errContentMany
		}
		w.counted = true
	}
	return nil
}

// endWait ends a wait, and stops counting the response as a tunnel: the origin has sent
// something, or the response has ended.
func (w *contentWait) endWait() {
	if w.counted {
		w.limits.Release(w.client)
		w.counted = false
	}
}

// end releases the resources of the wait once the response has ended.
func (w *contentWait) end() {
	w.endWait()
	if w.stop != nil {
		w.stop()
	}
}

// waitFor calls arrives, which blocks until c is readable or its deadline passes, until
// arrives returns something other than a timeout. It returns that, or the reason to close
// the response.
func (w *contentWait) waitFor(c *pooledConn, arrives func() error) error {
	if w.stop == nil {
		w.stop = context.AfterFunc(w.limits.Exit, func() { c.deadline.Interrupt(c.Conn) })
	}
	defer w.endWait()
	for start := time.Now(); ; {
		waited := time.Since(start)
		if step := w.nextCheck(waited); step > 0 {
			c.deadline.Within(c.Conn, step, step+step/8)
		} else {
			c.deadline.Clear(c.Conn)
		}
		if w.exiting() { // the exit may have interrupted before the deadline above was set
			c.deadline.Within(c.Conn, exitGrace, exitGrace)
		}
		if err := arrives(); !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err := w.overdue(time.Since(start)); err != nil {
			return err
		}
	}
}

// read is waitFor for an origin that speaks HTTP/2. It calls read, and calls cancel, which
// must make read return, if the response has waited too long.
func (w *contentWait) read(p []byte, read func([]byte) (int, error), cancel func()) (int, error) {
	var mu sync.Mutex
	var timer *time.Timer
	var failed error
	done, start := false, time.Now()
	step := func(waited time.Duration) time.Duration { // at most exitGrace, to notice the exit
		if step := w.nextCheck(waited); step > 0 {
			return min(step, exitGrace)
		}
		return exitGrace
	}
	onTimer := func() {
		mu.Lock()
		defer mu.Unlock()
		if done || failed != nil {
			return
		}
		waited := time.Since(start)
		if failed = w.overdue(waited); failed != nil {
			cancel()
		} else {
			timer.Reset(step(waited))
		}
	}
	mu.Lock()
	timer = time.AfterFunc(step(0), onTimer)
	mu.Unlock()
	n, err := read(p)
	mu.Lock()
	defer mu.Unlock()
	done = true
	timer.Stop()
	w.endWait()
	if n == 0 && err != nil && failed != nil {
		err = failed
	}
	return n, err
}

// AwaitContent waits until the next read returns without blocking. It loops because what
// precedes content, such as a chunk's size line, may arrive in several parts.
func (b *ResponseBody) AwaitContent() error {
	for !b.Ready() && !b.Ended && (b.IsChunked() || b.Remaining != 0) {
		var last error
		err := b.WaitFor(func() error {
			_, err := b.R.Peek(b.R.Buffered() + 1)
			if err == io.EOF || err == bufio.ErrBufferFull {
				last = err // the next read returns it too
				return nil
			}
			return err // the connection may report it only once: after a reset, reads return EOF
		})
		if err == nil && last == bufio.ErrBufferFull {
			b.setTrailerDeadline()
		}
		if err != nil || last != nil {
			return err
		}
	}
	return nil
}

// setTrailerDeadline sets the read deadline for trailers that are too long for the buffer.
func (b *ResponseBody) setTrailerDeadline() {
	if b.wait == nil {
		return
	}
	if timeout := b.limits.ContentTimeout; timeout > 0 {
		b.conn.deadline.Within(b.conn.Conn, timeout, timeout+timeout/8)
	} else {
		b.conn.deadline.Clear(b.conn.Conn)
	}
}

// WaitFor calls arrives, within the limits of a contentWait if there are limits. arrives
// blocks until the connection is readable or its deadline passes.
func (b *ResponseBody) WaitFor(arrives func() error) error {
	if b.limits == nil {
		return arrives()
	}
	if b.wait == nil {
		b.wait = &contentWait{limits: b.limits, client: b.client}
	}
	return b.wait.waitFor(b.conn, arrives)
}
