// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// streamConn is a tunnel through the parent on an HTTP/2 stream.
//
// All methods are safe for concurrent use. The fields are guarded by the
// connection's mutex.
type streamConn struct {
	c        *muxConn
	id       uint32
	answered chan struct{} // closed when there is an answer or the stream has failed

	status  int         // of the answer; 0: there is none
	header  http.Header // of the answer
	interim int         // number of interim answers before it

	readable sync.Cond
	received blockQueue
	size     int64 // of the receive window
	room     int64 // how many bytes the parent may still send
	read     int64 // bytes read but not yet credited to the parent
	readErr  error // the error of reads once received is empty; nil: the parent may send more

	window       int64 // the current send window
	maxWindow    int64 // the largest value of window so far
	blockedSince int64 // since when a write has been blocked, since epoch; 0: none is
	writeErr     error // the error of writes; nil: writes are possible
	endSent      bool  // the parent has been sent END_STREAM or a reset, or need not be

	readBy, writeBy deadline
}

func newStreamConn(c *muxConn, id uint32) *streamConn {
	s := &streamConn{c: c, id: id, answered: make(chan struct{}), size: muxWindow, room: muxWindow, window: c.initial, maxWindow: c.initial}
	s.readable.L = &c.mu
	return s
}

// await waits for the answer, and stores it in status and header. If nothing arrives from
// the parent for quiet, it pings the parent, and gives up on the connection if nothing
// arrives within timeout after that.
func (s *streamConn) await(ctx context.Context, quiet, timeout time.Duration) error {
	start := monotime.Of(time.Now())
	timer := time.NewTimer(quiet)
	defer timer.Stop()
	for {
		select {
		case <-s.answered:
			s.c.mu.Lock()
			defer s.c.mu.Unlock()
			if s.status == 0 {
				return s.readErr
			}
			return nil
		case <-s.c.silent:
			_ = s.Abort()
			return errMuxSilent
		case <-ctx.Done():
			_ = s.Abort()
			return context.Cause(ctx)
		case <-timer.C:
			left := quiet - time.Duration(monotime.Of(time.Now())-max(start, s.c.lastRead.Load()))
			if left <= 0 {
				s.c.probe(timeout)
				left = quiet + timeout
			}
			timer.Reset(left)
		}
	}
}

// Read implements net.Conn.
func (s *streamConn) Read(b []byte) (int, error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	for s.received.size == 0 {
		switch {
		case s.readErr != nil:
			return 0, s.readErr
		case s.readBy.passed():
			return 0, os.ErrDeadlineExceeded
		case len(b) == 0:
			return 0, nil
		}
		s.readable.Wait()
	}
	n := s.received.take(b)
	if s.read += int64(n); s.read >= s.size/16 && s.readErr == nil {
		if s.received.size == 0 { // the client keeps up
			c.growLocked(s)
		}
		_ = c.framer.WriteWindowUpdate(s.id, uint32(s.read))
		c.pending.Signal()
		s.room += s.read
		s.read = 0
	}
	return n, nil
}

// Write implements net.Conn. It returns when all bytes are queued for the socket.
func (s *streamConn) Write(b []byte) (n int, err error) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() { s.blockedSince = 0 }()
	for n < len(b) {
		room := c.roomLocked(s)
		switch {
		case s.writeErr != nil:
			return n, s.writeErr
		case s.writeBy.passed():
			return n, os.ErrDeadlineExceeded
		case room <= 0:
			if s.blockedSince == 0 {
				s.blockedSince = monotime.Of(time.Now())
			}
			c.changed.Wait()
			continue
		}
		part := b[n:][:min(len(b)-n, int(min(room, muxFrame)))]
		_ = c.framer.WriteData(s.id, false, part)
		c.pending.Signal()
		c.window -= int64(len(part))
		s.window -= int64(len(part))
		n += len(part)
		s.blockedSince = 0
	}
	return n, nil
}

// CloseWrite half-closes the stream: it tells the parent that no more will be written.
func (s *streamConn) CloseWrite() error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.closeWriteLocked()
	return nil
}

func (s *streamConn) closeWriteLocked() {
	if s.endSent {
		return
	}
	s.endSent = true
	_ = s.c.framer.WriteData(s.id, true, nil)
	s.c.pending.Signal()
	s.stopWritesLocked(net.ErrClosed)
	if s.readErr != nil {
		s.c.removeLocked(s)
	}
}

// stopWritesLocked makes writes fail with err, unless they already fail.
func (s *streamConn) stopWritesLocked(err error) {
	if s.writeErr == nil {
		s.writeErr = err
	}
	s.c.changed.Broadcast()
}

// Close closes both directions. As with a socket, what has been written before is delivered
// with an orderly end.
func (s *streamConn) Close() error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.closeWriteLocked()
	s.abortLocked()
	return nil
}

// Abort resets the stream, unless it has ended, so that the parent releases its buffers and
// window.
func (s *streamConn) Abort() error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.abortLocked()
	return nil
}

func (s *streamConn) abortLocked() {
	s.resetLocked(http2.ErrCodeCancel, net.ErrClosed)
	s.received.clear()
	s.readErr = net.ErrClosed
}

// resetLocked resets the stream if it has not ended in both directions, and makes reads and
// writes fail with err.
func (s *streamConn) resetLocked(code http2.ErrCode, err error) {
	if s.c.err == nil && s.c.streams[s.id] == s {
		_ = s.c.framer.WriteRSTStream(s.id, code)
		s.c.pending.Signal()
	}
	s.endSent = true
	s.failLocked(err)
	s.c.removeLocked(s)
}

// failLocked makes reads and writes fail with err, unless they already fail.
func (s *streamConn) failLocked(err error) {
	s.endReadsLocked(err)
	s.stopWritesLocked(err)
}

// endReadsLocked makes reads fail with err after the received bytes have been read, unless
// they already fail.
func (s *streamConn) endReadsLocked(err error) {
	if s.readErr == nil {
		s.readErr = err
	}
	select {
	case <-s.answered:
	default:
		close(s.answered)
	}
	s.readable.Broadcast()
}

// endLocked handles the parent's END_STREAM.
func (s *streamConn) endLocked() {
	s.endReadsLocked(io.EOF)
	if s.endSent {
		s.c.removeLocked(s)
	}
}

// handleHeadLocked processes an answer or trailers.
func (s *streamConn) handleHeadLocked(f *http2.MetaHeadersFrame) error {
	wrong := http2.StreamError{StreamID: s.id, Code: http2.ErrCodeProtocol}
	if s.readErr != nil {
		return http2.StreamError{StreamID: s.id, Code: http2.ErrCodeStreamClosed}
	}
	if s.status != 0 { // trailers
		if !f.StreamEnded() {
			return wrong
		}
		s.endLocked()
		return nil
	}
	status, err := strconv.ParseUint(f.PseudoValue("status"), 10, 16)
	switch {
	case f.Truncated:
		s.resetLocked(http2.ErrCodeEnhanceYourCalm, h1.ErrHeadTooLarge)
		return nil
	case err != nil || status < 100 || status > 999 || status == http.StatusSwitchingProtocols:
		return wrong
	case status < 200:
		if s.interim++; s.interim >= maxParentInterim || f.StreamEnded() {
			return wrong
		}
		return nil
	}
	s.header = make(http.Header)
	for _, field := range f.RegularFields() {
		s.header.Add(field.Name, field.Value)
	}
	s.status = int(status)
	close(s.answered)
	if f.StreamEnded() {
		s.endLocked()
	}
	return nil
}

// handleDataLocked processes data from the parent.
func (s *streamConn) handleDataLocked(f *http2.DataFrame) error {
	size := int64(f.Length)
	switch {
	case s.readErr != nil:
		return http2.StreamError{StreamID: s.id, Code: http2.ErrCodeStreamClosed}
	case s.status == 0:
		return http2.StreamError{StreamID: s.id, Code: http2.ErrCodeProtocol}
	case size > s.room:
		return http2.StreamError{StreamID: s.id, Code: http2.ErrCodeFlowControl}
	}
	s.room -= size
	s.received.put(f.Data())
	s.read += size - int64(len(f.Data())) // padding counts as read
	if f.StreamEnded() {
		s.endLocked()
	}
	s.readable.Broadcast()
	return nil
}

// handleResetLocked processes a reset. After a complete answer, NO_ERROR only means that the
// parent reads no more, and reads still succeed (RFC 9113 §8.1).
func (s *streamConn) handleResetLocked(code http2.ErrCode) {
	s.endSent = true
	var err error = streamError{code}
	if code == http2.ErrCodeRefusedStream && s.status == 0 {
		err = errUnprocessed
	}
	s.failLocked(err)
	s.c.removeLocked(s)
}

// streamAddr is the address of a stream's connection.
type streamAddr string

func (streamAddr) Network() string  { return "tcp" }
func (a streamAddr) String() string { return string(a) }

// LocalAddr implements net.Conn.
func (s *streamConn) LocalAddr() net.Addr { return streamAddr("") }

// RemoteAddr implements net.Conn. It returns the parent's address.
func (s *streamConn) RemoteAddr() net.Addr { return streamAddr(s.c.conn.RemoteAddr().String()) }

// SetDeadline implements net.Conn.
func (s *streamConn) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (s *streamConn) SetReadDeadline(t time.Time) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.c.streams[s.id] == s { // an ended stream never blocks
		s.readBy.set(t, &s.readable)
	}
	return nil
}

// SetWriteDeadline implements net.Conn.
func (s *streamConn) SetWriteDeadline(t time.Time) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if s.c.streams[s.id] == s {
		s.writeBy.set(t, &s.c.changed)
	}
	return nil
}

// deadline wakes the goroutines that wait for a condition when it passes.
type deadline struct {
	at    time.Time // zero: none
	timer *time.Timer
}

// set sets the deadline. The caller holds the lock of the condition.
func (d *deadline) set(at time.Time, condition *sync.Cond) {
	d.stop()
	if d.at = at; at.IsZero() {
		return
	}
	if left := time.Until(at); left > 0 {
		d.timer = time.AfterFunc(left, func() {
			condition.L.Lock()
			defer condition.L.Unlock()
			condition.Broadcast()
		})
	}
	condition.Broadcast()
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// blockQueue is a queue of bytes in blocks from a shared pool. An empty queue holds no
// blocks.
type blockQueue struct {
	blocks     []*[muxFrame]byte
	start, end int // of the bytes, in the first block and in the last
	size       int
}

var muxBlocks = sync.Pool{New: func() any { return new([muxFrame]byte) }}

func (q *blockQueue) put(b []byte) {
	q.size += len(b)
	for len(b) > 0 {
		if len(q.blocks) == 0 || q.end == muxFrame {
			q.blocks = append(q.blocks, muxBlocks.Get().(*[muxFrame]byte))
			q.end = 0
		}
		n := copy(q.blocks[len(q.blocks)-1][q.end:], b)
		q.end += n
		b = b[n:]
	}
}

func (q *blockQueue) take(b []byte) (n int) {
	for n < len(b) && q.size > 0 {
		end := muxFrame
		if len(q.blocks) == 1 {
			end = q.end
		}
		part := copy(b[n:], q.blocks[0][q.start:end])
		n, q.start, q.size = n+part, q.start+part, q.size-part
		if q.start == end {
			muxBlocks.Put(q.blocks[0])
			q.blocks[0] = nil
			q.blocks, q.start = q.blocks[1:], 0
		}
	}
	if q.size == 0 {
		q.blocks = nil
	}
	return n
}

func (q *blockQueue) clear() {
	for _, block := range q.blocks {
		muxBlocks.Put(block)
	}
	*q = blockQueue{}
}
