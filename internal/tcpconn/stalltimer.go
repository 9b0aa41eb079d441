// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"net"
	"sync"
	"time"
)

// StallTimer extends the write deadline of a client that reads a response slowly. The deadline is
// set before each write and expires if the write cannot be made in time. But the kernel buffers up
// to some MiB for a socket, and once the buffer is full, accepts no more until a third of it is
// free. With a slow client that takes longer than the timeout, although the client reads all the
// time. So StallTimer restarts the timeout whenever the client has acknowledged bytes.
type StallTimer struct {
	socket  *net.TCPConn
	timeout time.Duration

	mu    sync.Mutex
	timer *time.Timer // nil: stopped
	acked uint64      // bytes acknowledged on the connection
}

// NewStallTimer returns a timer that runs until Stop is called. It returns nil, on which all methods
// do nothing, if socket is nil.
func NewStallTimer(socket *net.TCPConn, timeout time.Duration) *StallTimer {
	if socket == nil {
		return nil
	}
	s := &StallTimer{socket: socket, timeout: timeout}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer = time.AfterFunc(s.tickInterval(), s.tick)
	return s
}

// tick restarts the timeout if the client has acknowledged bytes since the last tick.
func (s *StallTimer) tick() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer == nil {
		return
	}
	if acked := BytesAcked(s.socket); acked > s.acked {
		s.acked = acked
		_ = s.socket.SetWriteDeadline(time.Now().Add(s.timeout)) // if it fails, so does the write
	}
	s.timer.Reset(s.tickInterval())
}

// tickInterval returns the time between two ticks, which is how late progress may be noticed.
func (s *StallTimer) tickInterval() time.Duration { return max(s.timeout/4, time.Millisecond) }

// WaitWritable waits until the client has read enough for the next small write to be made without
// waiting.
func (s *StallTimer) WaitWritable() error {
	if s == nil {
		return nil
	}
	_ = s.socket.SetWriteDeadline(time.Now().Add(s.timeout)) // the last one may have passed
	return WaitWritable(s.socket)
}

// Stop stops the timer. When it returns, the deadline is no longer set.
func (s *StallTimer) Stop() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer.Stop()
	s.timer = nil
}
