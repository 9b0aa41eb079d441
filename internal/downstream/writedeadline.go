// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// startDeadline sets the deadline for the next write, for clients that do not read. It is called
// before each write of a response, also of one without content.
func (w *Writer) startDeadline() {
	if timeout := w.client.server.WriteIdleTimeout; timeout > 0 {
		w.setDeadline(time.Now().Add(timeout), timeout/16)
	}
}

// startStallTimer extends the deadline from now on, until the response ends, whenever the client
// has acknowledged bytes.
func (w *Writer) startStallTimer() {
	if timeout := w.client.server.WriteIdleTimeout; timeout > 0 && w.stallTimer == nil {
		w.stallTimer = tcpconn.NewStallTimer(tcpconn.Of(w.client.Conn), timeout)
	}
}

// WaitWritable waits until the client has read enough for the end of the response to be written
// without waiting. The deadline is that of a write.
func (w *Writer) WaitWritable() error { return w.stallTimer.WaitWritable() }

// setDeadline sets the write deadline, unless the current one is at most slack earlier: each change
// costs a change of a timer. The deadline stays set between responses, when nothing is written.
func (w *Writer) setDeadline(due time.Time, slack time.Duration) {
	if diff := due.Sub(w.deadline); diff < 0 || diff > slack {
		w.deadline = due
		_ = w.client.SetWriteDeadline(due)
	}
}

// clearDeadline removes the write deadline before the connection is handed off or hijacked.
func (w *Writer) clearDeadline() {
	if !w.deadline.IsZero() {
		w.deadline = time.Time{}
		_ = w.client.SetWriteDeadline(w.deadline)
	}
}

// SetWriteDeadline implements the method that http.ResponseController calls. It ignores the
// zero time: every write sets its own deadline, so that none has to be removed.
func (w *Writer) SetWriteDeadline(t time.Time) error {
	if !t.IsZero() {
		w.setDeadline(t, time.Until(t)/16)
	}
	return nil
}
