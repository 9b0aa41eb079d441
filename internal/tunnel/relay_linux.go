// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"io"
	"net"
	"syscall"
)

// relaySocket reads when the socket is readable. Bulk data for another socket moves inside
// the kernel by splice(2).
func relaySocket(dst io.Writer, src *net.TCPConn, copied *Flow) (readErr, writeErr error) {
	conn, err := src.SyscallConn()
	if err != nil {
		return err, nil
	}
	r := newSocketReader(conn)
	var splice *splicer // created for the first bulk data
	for {
		buf, n, err := r.read()
		if n > 0 {
			writeErr = writeCounted(dst, buf[:n], copied)
		}
		if buf != nil {
			smallBuffers.Put(buf)
		}
		if err != nil || writeErr != nil {
			return err, writeErr
		}
		if n == smallBuffer {
			if splice == nil {
				splice = newSplicer(dst, conn)
			}
			if readErr, writeErr = splice.burst(copied); readErr != nil || writeErr != nil {
				return readErr, writeErr
			}
		}
	}
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

// ready tries to read, and reports whether the socket was readable.
func (r *socketReader) ready(fd uintptr) bool {
	r.buf = smallBuffers.Get().(*[smallBuffer]byte)
	for {
		r.n, r.err = syscall.Read(int(fd), r.buf[:])
		if r.err != syscall.EINTR {
			break
		}
	}
	if r.err == syscall.EAGAIN {
		smallBuffers.Put(r.buf)
		r.buf = nil
		return false
	}
	if r.err != nil {
		r.n = 0
	}
	return true
}
