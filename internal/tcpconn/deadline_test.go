// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// settings counts how often the read deadline of a connection is set.
type settings struct {
	net.Conn
	n int
}

func (c *settings) SetReadDeadline(t time.Time) error {
	c.n++
	return c.Conn.SetReadDeadline(t)
}

// A read deadline that is about right stays. An interruption lasts until a deadline is set or
// cleared.
func TestReadDeadline(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	conn := &settings{Conn: near}
	var d ReadDeadline
	set := func(want int, what string) {
		t.Helper()
		if conn.n != want {
			t.Errorf("%s: the deadline was set %d times, want %d", what, conn.n, want)
		}
		conn.n = 0
	}
	d.Clear(conn)
	set(0, "Clear of none")
	d.Within(conn, time.Minute, time.Hour)
	set(1, "Within")
	d.Within(conn, time.Minute, time.Hour)
	d.Within(conn, time.Second, 2*time.Hour)
	set(0, "Within the same range and a larger one")
	d.Within(conn, time.Minute, time.Minute)
	set(1, "Within a shorter range")
	d.Interrupt(conn)
	set(1, "Interrupt")
	for range 2 {
		if _, err := near.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("reading after Interrupt: %v", err)
		}
	}
	d.Within(conn, 0, time.Minute)
	set(1, "Within after Interrupt")
	go func() { _, _ = io.WriteString(far, "x") }()
	if _, err := near.Read(make([]byte, 1)); err != nil {
		t.Errorf("reading within the new deadline: %v", err)
	}
	d.Clear(conn)
	set(1, "Clear")
	d.Within(conn, time.Millisecond, time.Millisecond)
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("reading until the deadline: %v", err)
	}
}

// Reads of a prefixed connection return the prefix and then what arrives. It half-closes what
// can be half-closed, and closes anything else.
func TestPrefixed(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	conn := &Prefixed{Conn: near, Prefix: []byte("abc")}
	go func() { _, _ = io.WriteString(far, "def") }()
	buf := make([]byte, 2)
	for _, want := range []string{"ab", "c", "de", "f"} {
		if n, err := conn.Read(buf); err != nil || string(buf[:n]) != want {
			t.Errorf("read %q, %v, want %q", buf[:n], err, want)
		}
	}
	if err := conn.CloseWrite(); err != nil {
		t.Error(err)
	}
	if _, err := conn.Read(buf); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("reading after the end of a connection without a half-close: %v", err)
	}
}
