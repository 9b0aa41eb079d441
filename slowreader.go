// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// slowReader gives a client of HTTP/1 that takes a response slowly the time it needs.
// Caddy's timeout for stalled writes begins with each write, and ends it when that has
// not been possible: but the kernel has up to some MiB of room for a socket, and once
// that is full takes no more until a third of it is free. From a slow client that takes
// longer than the timeout, though it takes something all the time. So the timeout begins
// anew here whenever the client has acknowledged something.
type slowReader struct {
	socket  *net.TCPConn
	timeout time.Duration

	mu    sync.Mutex
	timer *time.Timer // nil: it is over
	taken uint64      // of the connection
}

// newSlowReader returns nil if there is no timeout that may begin anew. Over HTTP/2 each
// stream has one alone, and acknowledgements are of all of them: less waits in the
// kernel there.
func newSlowReader(w http.ResponseWriter, r *http.Request) *slowReader {
	_, idle := caddyhttp.IdleTimeoutsFromContext(r.Context())
	socket := newConnPeer(connOf(w, r)).tcp
	switch {
	case idle == nil || !restartable(idle) || socket == nil:
		return nil
	case r.ProtoMajor > 1:
		limitUnsent(socket)
		return nil
	}
	s := &slowReader{socket: socket, timeout: idle.Deadline.Timeout}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer = time.AfterFunc(s.pause(), s.look)
	return s
}

func (s *slowReader) look() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer == nil {
		return
	}
	if taken := bytesTaken(s.socket); taken > s.taken {
		s.taken = taken
		_ = s.socket.SetWriteDeadline(time.Now().Add(s.timeout)) // a failure is that of the write, too
	}
	s.timer.Reset(s.pause())
}

// pause is how long a client may have taken something before that is noticed.
func (s *slowReader) pause() time.Duration { return max(s.timeout/4, time.Millisecond) }

// waitForEnd waits until the client has taken so much that the end of a response in
// chunks, which is written when nobody gives it time any more, does not wait.
func (s *slowReader) waitForEnd() error {
	if s == nil {
		return nil
	}
	_ = s.socket.SetWriteDeadline(time.Now().Add(s.timeout)) // that of the last write may be over
	return toClient(waitWritable(s.socket))
}

// stop returns when the deadline is set no more.
func (s *slowReader) stop() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.timer.Stop()
	s.timer = nil
}

// limitWrite gives a client that does not read Caddy's write_idle for the response
// that begins now. Caddy's own timeout begins with content that is written, so that
// a response without content would wait for such a client for ever. A connection
// that this package serves itself has a deadline for each write. Over HTTP/2 a
// deadline is a timer that ends the stream even when nothing is written.
func limitWrite(r *http.Request) {
	if r.ProtoMajor == 2 {
		return
	}
	if _, own := r.Context().(*requestContext); own {
		return
	}
	_, idle := caddyhttp.IdleTimeoutsFromContext(r.Context())
	if idle != nil && idle.Deadline.Timeout > 0 && idle.Deadline.HardDeadline.IsZero() {
		_ = idle.Ctrl.SetWriteDeadline(time.Now().Add(idle.Deadline.Timeout))
	}
}
