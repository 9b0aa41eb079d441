// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// newStallTimer returns a timer that extends the write deadline of a slow client of net/http. It
// returns nil on the fast path, where downstream.Writer has its own timer, and if the server has no
// write timeout that may be restarted. It also returns nil over HTTP/2, where each stream has its own
// timeout but only the connection as a whole has acknowledgements. It then only limits how many
// unsent bytes the kernel holds.
func newStallTimer(w http.ResponseWriter, r *http.Request) *tcpconn.StallTimer {
	if downstream.Serves(r) {
		return nil
	}
	_, idle := caddyhttp.IdleTimeoutsFromContext(r.Context())
	socket := tcpconn.Of(connOf(w, r))
	switch {
	case idle == nil || !restartsWithEachWrite(idle) || socket == nil:
		return nil
	case r.ProtoMajor > 1:
		tcpconn.LimitUnsent(socket)
		return nil
	}
	return tcpconn.NewStallTimer(socket, idle.Deadline.Timeout)
}

// waitForEnd waits until the client has read enough for the end of a chunked response to be written
// without blocking. stall may be nil. While that end is being written, nothing restarts the write
// timeout, so a client that reads slowly could not be told from one that has stopped.
func waitForEnd(w http.ResponseWriter, stall *tcpconn.StallTimer) error {
	if fast := downstream.WriterOf(w); fast != nil {
		return asClientError(fast.WaitWritable())
	}
	return asClientError(stall.WaitWritable())
}

// startWriteIdleTimeout sets Caddy's write_idle as the deadline for the response that begins now.
// Caddy's own timeout starts with the first content that is written, so a response without
// content would wait forever for a client that does not read. On the fast path, downstream.Writer
// sets a deadline for each write itself. Over HTTP/2, a deadline is a timer that ends the stream
// even when nothing is written, so it is not set.
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
