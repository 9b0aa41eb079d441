// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"net"
	"sync"
	"time"
)

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// Interrupt makes pending and later reads or writes fail at once, whichever of them setDeadline is
// for.
func Interrupt(setDeadline func(time.Time) error) { _ = setDeadline(longAgo) }

// ReadDeadline is the read deadline of a connection, and the only place that sets it. It
// remembers the time that is set, because each change costs a change of a timer. Its methods
// are safe for concurrent use.
type ReadDeadline struct {
	mu sync.Mutex
	at time.Time // zero: none
}

// Within sets a deadline that is most from now, unless the one that is set is between least
// and most from now.
func (d *ReadDeadline) Within(conn net.Conn, least, most time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	if left := d.at.Sub(now); left < least || left > most {
		d.at = now.Add(most)
		_ = conn.SetReadDeadline(d.at)
	}
}

// Clear removes the deadline.
func (d *ReadDeadline) Clear(conn net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.at.IsZero() {
		d.at = time.Time{}
		_ = conn.SetReadDeadline(d.at)
	}
}

// Interrupt makes pending and later reads fail at once, until another method is called.
func (d *ReadDeadline) Interrupt(conn net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at = longAgo
	_ = conn.SetReadDeadline(d.at)
}
