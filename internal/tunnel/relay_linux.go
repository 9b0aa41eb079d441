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
func relaySocket(dst io.Writer, src *net.TCPConn, copied *Flow) (readErr, writeErr error) {
	conn, err := src.SyscallConn()
	if err != nil {
		return err, nil
	}
	r := newSocketReader(conn)
	to, canSplice := dst.(*net.TCPConn)
	var splice *tcpconn.Splicer // created for the first bulk data
	for {
		buf, n, err := r.read()
		if n > 0 {
			writeErr = writeCounted(dst, buf[:n], copied)
		}
		if buf != nil {
			smallBuffers.Put(buf)
		}
		switch {
		case err != nil || writeErr != nil:
			return err, writeErr
		case n < smallBuffer:
			continue
		case !canSplice:
			readErr, writeErr = relayBurst(dst, r, copied)
		default:
			if splice == nil {
				splice = tcpconn.NewSplicer(to, src)
			}
			readErr, writeErr = spliceBulk(splice, copied)
			if readErr == errors.ErrUnsupported {
				readErr, canSplice = nil, false
			}
		}
		if readErr != nil || writeErr != nil {
			return readErr, writeErr
		}
	}
}

// spliceBulk moves bytes until fewer arrive than a small buffer holds. It returns no errors if
// the source goes on.
//
// Bulk data often arrives in bursts, so spliceBulk waits for the next one itself. If the first
// bytes of each burst were read and written, that would cost three more system calls, and
// wake the other side for a few bytes.
func spliceBulk(s *tcpconn.Splicer, copied *Flow) (readErr, writeErr error) {
	defer s.Close()
	count := func(n int) { copied.Add(int64(n)) }
	for n := smallBuffer; n >= smallBuffer; {
		if n, readErr = s.Fill(math.MaxInt64); readErr != nil {
			return readErr, nil
		}
		copied.writing.Store(true)
		writeErr = s.Drain(count)
		copied.writing.Store(false)
		if writeErr != nil {
			return nil, writeErr
		}
	}
	return nil, nil
}

// socketReader reads from a socket, and takes a pooled buffer only when there are bytes to
// read.
type socketReader struct {
	conn syscall.RawConn
	wait func(fd uintptr) bool // the method value ready, allocated once
	buf  *[smallBuffer]byte
	n    int
	err  error
}

func newSocketReader(conn syscall.RawConn) *socketReader {
	r := &socketReader{conn: conn}
	r.wait = r.ready
	return r
}

// read returns a buffer and how many of its bytes are filled, or an error. The caller puts
// the buffer, if any, back into smallBuffers.
func (r *socketReader) read() (*[smallBuffer]byte, int, error) {
	r.buf, r.n, r.err = nil, 0, nil
	err := r.conn.Read(r.wait)
	if err == nil {
		err = r.err
	}
	if err == nil && r.n == 0 {
		err = io.EOF
	}
	return r.buf, r.n, err
}

// Read implements io.Reader for relayBurst. It never waits, because relayBurst holds a buffer:
// if the socket has no bytes, it returns 0 and no error.
func (r *socketReader) Read(p []byte) (int, error) {
	err := r.conn.Read(func(fd uintptr) bool {
		r.n, r.err = readFrom(fd, p)
		return true
	})
	switch {
	case err != nil:
		return 0, err
	case r.err == syscall.EAGAIN:
		return 0, nil
	case r.err == nil && r.n == 0:
		return 0, io.EOF
	}
	return r.n, r.err
}

// ready tries to read, and reports whether the socket was readable.
func (r *socketReader) ready(fd uintptr) bool {
	r.buf = smallBuffers.Get().(*[smallBuffer]byte)
	if r.n, r.err = readFrom(fd, r.buf[:]); r.err == syscall.EAGAIN {
		smallBuffers.Put(r.buf)
		r.buf = nil
		return false
	}
	return true
}

// readFrom reads from a socket. After an error, n is 0.
func readFrom(fd uintptr, p []byte) (n int, err error) {
	for {
		if n, err = syscall.Read(int(fd), p); err != syscall.EINTR {
			return max(n, 0), err
		}
	}
}
