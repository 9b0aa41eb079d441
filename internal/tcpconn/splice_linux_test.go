// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"errors"
	"io"
	"math"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// spliceRig is a Splicer between two connections: the bytes that are written to in come out of
// out.
type spliceRig struct {
	*Splicer
	in, out  net.Conn
	src, dst *net.TCPConn
	moved    int64          // as Drain has reported
	running  sync.WaitGroup // goroutines that use the Splicer
}

func newSpliceRig(t *testing.T) *spliceRig {
	t.Helper()
	r := &spliceRig{}
	t.Cleanup(func() { // after the connections are closed
		r.running.Wait()
		r.Close()
	})
	from, in := conntest.Pair(t)
	to, out := conntest.Pair(t)
	r.in, r.out, r.src, r.dst = in, out, from.(*net.TCPConn), to.(*net.TCPConn)
	r.Splicer = NewSplicer(r.dst, r.src)
	return r
}

func (r *spliceRig) drain() error { return r.Drain(func(n int) { r.moved += int64(n) }) }

// run moves n bytes.
func (r *spliceRig) run(n int64) (readErr, writeErr error) {
	for end := r.moved + n; r.moved < end; {
		if _, err := r.Fill(end - r.moved); err != nil {
			return err, nil
		}
		if err := r.drain(); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// It moves as many bytes as asked for, and leaves the ones that follow.
func TestSplicerMovesExactly(t *testing.T) {
	for _, size := range []int64{1, 4096, 65537, pipeSize, pipeSize + 1, 16 << 20} {
		r := newSpliceRig(t)
		go func() {
			conntest.SendBulk(t, "the source", r.in, 1, size)
			_, _ = r.in.Write([]byte("rest"))
		}()
		r.running.Go(func() {
			defer r.dst.CloseWrite()
			if readErr, writeErr := r.run(size); readErr != nil || writeErr != nil {
				t.Errorf("moving %d bytes: %v, %v", size, readErr, writeErr)
			}
		})
		conntest.ReceiveBulk(t, "the destination", r.out, 1, size)
		rest := make([]byte, 4)
		if _, err := io.ReadFull(r.src, rest); err != nil || string(rest) != "rest" {
			t.Errorf("after %d bytes, %q follow, %v", size, rest, err)
		}
	}
}

// The end of the source is io.EOF, after all its bytes.
func TestSplicerSourceEnds(t *testing.T) {
	const size = 100_000
	r := newSpliceRig(t)
	go func() {
		conntest.SendBulk(t, "the source", r.in, 1, size)
		_ = r.in.(*net.TCPConn).CloseWrite()
	}()
	if readErr, writeErr := r.run(math.MaxInt64); readErr != io.EOF || writeErr != nil || r.moved != size {
		t.Errorf("%v, %v after %d bytes; want EOF after %d", readErr, writeErr, r.moved, size)
	}
	_ = r.dst.CloseWrite()
	conntest.ReceiveBulk(t, "the destination", r.out, 1, size)
}

// A source that is reset is an error of Fill.
func TestSplicerSourceFails(t *testing.T) {
	r := newSpliceRig(t)
	_ = r.in.(*net.TCPConn).SetLinger(0)
	_ = r.in.Close()
	if readErr, writeErr := r.run(1); !IsReset(readErr) || writeErr != nil {
		t.Errorf("%v, %v; want a reset", readErr, writeErr)
	}
}

// A wait for the source keeps to its deadline and holds no pipe. Afterwards the transfer can go
// on.
func TestSplicerWaitsForTheSource(t *testing.T) {
	ClosePipes()
	r := newSpliceRig(t)
	for range 2 { // before the first bytes and between bytes
		_ = r.src.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if n, err := r.Fill(1 << 20); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("with a silent source: %d bytes, %v", n, err)
		}
		if len(Pipes) != 1 {
			t.Errorf("%d pipes are unused while the source is silent, want 1", len(Pipes))
		}
		_ = r.src.SetReadDeadline(time.Time{})
		go conntest.SendBulk(t, "the source", r.in, 1, 100_000)
		if readErr, writeErr := r.run(100_000); readErr != nil || writeErr != nil {
			t.Fatalf("after the wait: %v, %v", readErr, writeErr)
		}
		conntest.ReceiveBulk(t, "the destination", io.LimitReader(r.out, 100_000), 1, 100_000)
	}
}

// A destination that does not read for a while delays the transfer until the deadline. Nothing
// is lost if the caller then goes on.
func TestSplicerWaitsForTheDestination(t *testing.T) {
	const size = 64 << 20
	r := newSpliceRig(t)
	go conntest.SendBulk(t, "the source", r.in, 1, size)
	var err error
	for err == nil {
		if _, err := r.Fill(size - r.moved); err != nil {
			t.Fatal(err)
		}
		_ = r.dst.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		err = r.drain()
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) || r.moved >= size {
		t.Fatalf("%v after %d bytes; want the deadline", err, r.moved)
	}
	_ = r.dst.SetWriteDeadline(time.Time{})
	r.running.Go(func() {
		defer r.dst.CloseWrite()
		if err := r.drain(); err != nil {
			t.Error(err)
		}
		if readErr, writeErr := r.run(size - r.moved); readErr != nil || writeErr != nil {
			t.Errorf("after the wait: %v, %v", readErr, writeErr)
		}
	})
	conntest.ReceiveBulk(t, "the destination", r.out, 1, size)
}

// Unused pipes are closed after a while, also without ClosePipes.
func TestUnusedPipesAreClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ClosePipes()
		pipesClose.Store(false) // a timer of another test has it
		for range 2 {
			p, err := NewPipe()
			if err != nil {
				t.Fatal(err)
			}
			p.Release(true)
			if time.Sleep(pipesKept - 1); len(Pipes) != 1 {
				t.Errorf("%d pipes are kept, want 1", len(Pipes))
			}
			time.Sleep(time.Nanosecond)
			synctest.Wait()
			if len(Pipes) != 0 {
				t.Errorf("%d pipes are left, want none", len(Pipes))
			}
		}
	})
}

// Drain fails if the destination is gone. The bytes that are left in the pipe are dropped, and do
// not reach the next destination.
func TestSplicerDestinationFails(t *testing.T) {
	ClosePipes()
	r := newSpliceRig(t)
	go func() { _, _ = io.Copy(struct{ io.Writer }{r.in}, conntest.Bulk(9, 64<<20)) }()
	ended := make(chan error)
	go func() {
		_, writeErr := r.run(math.MaxInt64)
		r.Close()
		ended <- writeErr
	}()
	if _, err := io.CopyN(io.Discard, r.out, 1<<20); err != nil {
		t.Fatal(err)
	}
	_ = r.out.(*net.TCPConn).SetLinger(0)
	_ = r.out.Close()
	if err := <-ended; err == nil {
		t.Error("moving bytes to a destination that has left did not fail")
	}
	_ = r.in.Close()
	next := newSpliceRig(t)
	go func() {
		conntest.SendBulk(t, "the source", next.in, 1, 1<<20)
		_ = next.in.(*net.TCPConn).CloseWrite()
	}()
	next.running.Go(func() {
		_, _ = next.run(math.MaxInt64)
		_ = next.dst.CloseWrite()
	})
	conntest.ReceiveBulk(t, "the next destination", next.out, 1, 1<<20)
}

// Where the kernel refuses, nothing is moved, so that the caller can copy everything.
func TestSplicerUnsupported(t *testing.T) {
	for name, errno := range map[string]unix.Errno{
		"forbidden": unix.EPERM, "not there": unix.ENOSYS, "not for this socket": unix.EINVAL,
	} {
		t.Run(name, func(t *testing.T) {
			r := newSpliceRig(t)
			go func() {
				conntest.SendBulk(t, "the source", r.in, 1, 1000)
				_ = r.in.(*net.TCPConn).CloseWrite()
			}()
			refused := make(chan error)
			go func() {
				if err := conntest.RefuseSplice(errno); err != nil {
					t.Error(err)
				}
				_, err := r.Fill(1000)
				refused <- err
			}()
			if err := <-refused; err != errors.ErrUnsupported {
				t.Errorf("got %v, want %v", err, errors.ErrUnsupported)
			}
			conntest.ReceiveBulk(t, "the caller", r.src, 1, 1000)
		})
	}
}

// TryFill and TryDrain wait for neither side. What they have not moved, the waiting methods move.
func TestSplicerTries(t *testing.T) {
	const size = 4 << 20
	r := newSpliceRig(t)
	count := func(n int) { r.moved += int64(n) }
	if n, err := r.TryFill(size); n != 0 || err != nil {
		t.Fatalf("from a silent source: %d bytes, %v", n, err)
	}
	go func() {
		conntest.SendBulk(t, "the source", r.in, 1, size)
		_ = r.in.(*net.TCPConn).CloseWrite()
	}()
	_ = r.dst.SetWriteBuffer(4 << 10)
	filled := int64(0)
	for empty := true; empty; {
		n, err := r.TryFill(size - filled)
		if err != nil {
			t.Fatal(err)
		}
		filled += int64(n)
		if empty, err = r.TryDrain(count); err != nil {
			t.Fatal(err)
		}
	}
	if r.moved >= filled {
		t.Errorf("a full pipe and a destination that does not read, but %d of %d bytes are moved", r.moved, filled)
	}
	r.running.Go(func() {
		defer r.dst.CloseWrite()
		if err := r.drain(); err != nil {
			t.Error(err)
		}
		if readErr, writeErr := r.run(size - r.moved); readErr != nil || writeErr != nil {
			t.Errorf("after the tries: %v, %v", readErr, writeErr)
		}
		if n, err := r.TryFill(1); n != 0 || err != io.EOF {
			t.Errorf("at the end: %d bytes, %v", n, err)
		}
	})
	conntest.ReceiveBulk(t, "the destination", r.out, 1, size)
}
