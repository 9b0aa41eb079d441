// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"time"
)

// contentWait bounds how long a response waits for its origin to send more of its
// content: by response_idle_timeout, and, as long as it waits, by the limits on tunnels,
// which it is one of then. When Caddy exits, such responses are broken off, as tunnels
// are.
type contentWait struct {
	handler *Handler
	client  netip.Addr
	timeout time.Duration // <= 0: none
	grace   time.Duration // how long a wait may take before it counts
	counted bool
	stop    func() bool // ends the look-out for Caddy's exit; nil: there is none
}

// contentGrace is how long content may be silent before the response counts as a tunnel,
// exitGrace the same before it is broken off when Caddy exits.
const (
	contentGrace = 10 * time.Second
	exitGrace    = time.Second
)

var (
	errContentExit = errors.New("the proxy is shutting down and the origin sends nothing")
	errContentMany = errors.New("the origin sends nothing, and max_tunnels does not allow another waiting response")
)

func (h *Handler) newContentWait(client netip.Addr) *contentWait {
	return &contentWait{handler: h, client: client, timeout: time.Duration(h.ResponseIdleTimeout), grace: h.contentGrace}
}

func (w *contentWait) exiting() bool { return w.handler.tunnels.open.Err() != nil }

// step returns how long to wait from now until overdue has something to say; 0: for ever.
func (w *contentWait) step(waited time.Duration) time.Duration {
	step := time.Duration(0)
	if w.timeout > 0 {
		step = max(w.timeout-waited, time.Millisecond)
	}
	grace := w.grace
	if w.exiting() {
		grace = min(grace, exitGrace)
	}
	if left := grace - waited; left > 0 && (step == 0 || left < step) {
		step = left
	}
	return step
}

// overdue returns an error if the response has waited too long and must be broken off.
// It counts a response that has waited for the grace period as a tunnel.
func (w *contentWait) overdue(waited time.Duration) error {
	switch {
	case w.timeout > 0 && waited >= w.timeout:
		return fmt.Errorf("the origin sent nothing for %v (response_idle_timeout): %w", w.timeout, os.ErrDeadlineExceeded)
	case w.exiting() && waited >= exitGrace:
		return errContentExit
	case !w.counted && waited >= w.grace:
		if w.handler.tunnels.admit(w.client, w.handler.MaxTunnels, w.handler.MaxTunnelsPerClient) != nil {
			return errContentMany
		}
		w.counted = true
	}
	return nil
}

// over notes that the origin has sent something, or that the response has ended.
func (w *contentWait) over() {
	if w.counted {
		w.handler.tunnels.leave(w.client)
		w.counted = false
	}
}

// end releases what the wait holds, once the response has ended.
func (w *contentWait) end() {
	w.over()
	if w.stop != nil {
		w.stop()
	}
}

// waitFor calls arrives, which blocks until c can be read or its deadline passes. It
// returns the error of arrives, or the reason to break off the response.
func (w *contentWait) waitFor(c *originConn, arrives func() error) error {
	if w.stop == nil {
		w.stop = context.AfterFunc(w.handler.tunnels.open, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	}
	defer w.over()
	for start := time.Now(); ; {
		waited := time.Since(start)
		if step := w.step(waited); step > 0 {
			c.expectBy(step, step+step/8)
		} else {
			c.expectNone()
		}
		if w.exiting() { // the deadline may have been set before the one above
			c.deadline = time.Now().Add(exitGrace)
			_ = c.SetReadDeadline(c.deadline)
		}
		if err := arrives(); !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		c.deadline = time.Unix(1, 0)
		if err := w.overdue(time.Since(start)); err != nil {
			return err
		}
	}
}

// read calls read, which returns when something has come from an origin that speaks
// HTTP/2, or the stream is cancelled.
func (w *contentWait) read(p []byte, read func([]byte) (int, error), cancel func()) (int, error) {
	var mu sync.Mutex
	var timer *time.Timer
	var failed error
	done, start := false, time.Now()
	step := func(waited time.Duration) time.Duration { // not longer than Caddy's exit may go unnoticed
		if step := w.step(waited); step > 0 {
			return min(step, exitGrace)
		}
		return exitGrace
	}
	look := func() {
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
	timer = time.AfterFunc(step(0), look)
	mu.Unlock()
	n, err := read(p)
	mu.Lock()
	defer mu.Unlock()
	done = true
	timer.Stop()
	w.over()
	if n == 0 && err != nil && failed != nil {
		err = failed
	}
	return n, err
}

// awaitContent waits until the next read waits for nothing. What comes before content,
// such as the size of a chunk, may come in several parts.
func (b *originBody) awaitContent() error {
	for !b.more() && !b.ended && (b.chunks != nil || b.left != 0) {
		var last error
		err := b.waitFor(func() error {
			_, err := b.r.Peek(b.r.Buffered() + 1)
			if err == io.EOF || err == bufio.ErrBufferFull {
				last = err // the next read tells
				return nil
			}
			return err // which the connection may not tell again: after a reset it reads as ended
		})
		if err == nil && last == bufio.ErrBufferFull {
			b.expectRest()
		}
		if err != nil || last != nil {
			return err
		}
	}
	return nil
}

// expectRest gives long trailers, which do not fit into the buffer, their time.
func (b *originBody) expectRest() {
	switch {
	case b.wait == nil:
	case b.wait.timeout > 0:
		b.origin.expectBy(b.wait.timeout, b.wait.timeout+b.wait.timeout/8)
	default:
		b.origin.expectNone()
	}
}

// waitFor calls arrives as a contentWait does.
func (b *originBody) waitFor(arrives func() error) error {
	if b.handler == nil {
		return arrives()
	}
	if b.wait == nil {
		b.wait = b.handler.newContentWait(b.client)
	}
	return b.wait.waitFor(b.origin, arrives)
}
