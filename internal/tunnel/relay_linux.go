// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"io"
	"math"
	"net"
	"syscall"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// relaySocket reads when the socket is readable. Bulk data for another socket moves inside
// the kernel by splice(2). Where that is not possible, a large buffer carries it.
func relaySocket(dst io.Writer, src *net.TCPConn, copied *flow) (readErr, writeErr error) {
	conn, err := src.SyscallConn()
	if err != nil {
		return err, nil
	}
	r := &socketRelay{dst: dst, src: src, conn: conn, copied: copied}
	r.wait = r.ready
	_, r.canSplice = dst.(*net.TCPConn)
	return r.run()
}

// socketRelay copies from a socket. Its state is not on the stack, since each idle relay has a
// stack.
type socketRelay struct {
	dst    io.Writer
	src    *net.TCPConn
	conn   syscall.RawConn // of src
	copied *flow

	canSplice bool
	splicer   *tcpconn.Splicer // created for the first bulk data

	wait func(fd uintptr) bool // the method value ready, allocated once
	buf  *[smallBuffer]byte    // from smallBuffers, while there are bytes in it
	n    int
	err  error
}

// run copies until src ends or dst fails. Bulk data begins when a small buffer is full, and ends
// when less than that has arrived.
//
// Bulk data often arrives in bursts, so the splicer waits for the next one. If the first bytes of
// each burst were read and written, that would cost three more system calls, and wake the
// other side for a few bytes.
func (r *socketRelay) run() (readErr, writeErr error) {
	for n := 0; readErr == nil && writeErr == nil; {
		switch {
		case n < smallBuffer:
			n, readErr, writeErr = r.copySmall()
		case r.canSplice:
			if n, readErr = r.splicer.Fill(math.MaxInt64); readErr == nil {
				writeErr = r.drain()
			}
			if readErr == errors.ErrUnsupported {
				n, readErr, r.canSplice = smallBuffer, nil, false
			}
			if n < smallBuffer || writeErr != nil {
				r.splicer.Close()
			}
		default:
			readErr, writeErr = relayBurst(r.dst, r, r.copied)
			if n = 0; readErr == syscall.EAGAIN {
				readErr = nil
			}
		}
	}
	return readErr, writeErr
}

// drain moves to dst what the splicer holds.
func (r *socketRelay) drain() error {
	r.copied.writing.Store(true)
	defer r.copied.writing.Store(false)
	return r.splicer.Drain(func(n int) { r.copied.Add(int64(n)) })
}

// copySmall waits for bytes and copies what a small buffer holds. It returns how many bytes
// have arrived.
func (r *socketRelay) copySmall() (n int, readErr, writeErr error) {
	if err := r.conn.Read(r.wait); err != nil {
		return 0, err, nil
	}
	if r.n > 0 {
		writeErr = writeCounted(r.dst, r.buf[:r.n], r.copied)
	}
	smallBuffers.Put(r.buf)
	r.buf = nil
	if r.n == smallBuffer && r.canSplice && r.splicer == nil {
		r.splicer = tcpconn.NewSplicer(r.dst.(*net.TCPConn), r.src)
	}
	if r.n == 0 && r.err == nil {
		return 0, io.EOF, nil
	}
	return r.n, r.err, writeErr
}

// ready tries to read into a small buffer, and reports whether the socket was readable.
func (r *socketRelay) ready(fd uintptr) bool {
	r.buf = smallBuffers.Get().(*[smallBuffer]byte)
	if r.n, r.err = readFrom(fd, r.buf[:]); r.err == syscall.EAGAIN {
		smallBuffers.Put(r.buf)
		r.buf = nil
		return false
	}
	return true
}

// Read implements io.Reader for relayBurst. It never waits, because relayBurst holds a buffer:
// if the socket has no bytes, the error is EAGAIN.
func (r *socketRelay) Read(p []byte) (int, error) {
	err := r.conn.Read(func(fd uintptr) bool {
		r.n, r.err = readFrom(fd, p)
		return true
	})
	switch {
	case err != nil:
		return 0, err
	case r.err == nil && r.n == 0:
		return 0, io.EOF
	}
	return r.n, r.err
}

// readFrom reads from a socket. After an error, n is 0.
func readFrom(fd uintptr, p []byte) (n int, err error) {
	for {
		if n, err = syscall.Read(int(fd), p); err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}
