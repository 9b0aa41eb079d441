// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"

	"golang.org/x/sys/unix"
)

// pipeSize is asked for each pipe. The kernel may give less to an unprivileged
// user with many pipes; then more calls move the same bytes.
const pipeSize = 1 << 20

// spliceFlags make splice(2) return at once when it can move nothing. Waiting
// is the netpoller's.
const spliceFlags = unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE

// pipes holds pipes that nobody uses now, all empty. What is more is closed.
var pipes = make(chan pipe, 32)

type pipe struct{ r, w int }

func newPipe() (pipe, error) {
	select {
	case p := <-pipes:
		return p, nil
	default:
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return pipe{}, err
	}
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
	return pipe{fds[0], fds[1]}, nil
}

// release gives an empty pipe back, or closes one that still holds bytes.
func (p pipe) release(empty bool) {
	if empty {
		select {
		case pipes <- p:
			return
		default:
		}
	}
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// closePipes closes the pipes that nobody uses, so that a process without
// tunnels holds no descriptor for them.
func closePipes() {
	for {
		select {
		case p := <-pipes:
			p.release(false)
		default:
			return
		}
	}
}

// splicer moves bytes from a socket to a socket inside the kernel.
type splicer struct {
	dst, src syscall.RawConn // dst is nil if bytes cannot be moved to it
	pipe     pipe
	left     int64 // how much may still be moved
	moved    int
	held     int // bytes in the pipe
	err      error
	taken    func(n int) // by dst
}

// newSplicer makes a splicer that tells what dst has taken. A dst of nil is no
// socket.
func newSplicer(dst *net.TCPConn, src syscall.RawConn, taken func(n int)) *splicer {
	s := &splicer{src: src, taken: taken}
	if dst != nil {
		if conn, err := dst.SyscallConn(); err == nil {
			s.dst = conn
		}
	}
	return s
}

// burst moves up to limit bytes, until the source has nothing more to read just
// now, and gives the pipe back. It returns no errors if the source goes on, and
// does nothing if bytes cannot be moved or there is no pipe to be had.
func (s *splicer) burst(limit int64) (readErr, writeErr error) {
	if s.dst == nil {
		return nil, nil
	}
	var err error
	if s.pipe, err = newPipe(); err != nil {
		return nil, nil
	}
	s.held, s.left = 0, limit
	for s.left > 0 {
		s.moved, s.err = 0, nil
		if err := s.src.Read(s.fillPipe); err != nil {
			readErr = err
			break
		}
		if s.err == unix.EAGAIN { // dry, or the end, which the next read tells
			break
		}
		if s.err == unix.EINVAL || s.err == unix.EPERM || s.err == unix.ENOSYS {
			s.dst = nil // not from this kind of socket, or not in this sandbox
			break
		}
		if s.err != nil {
			readErr = s.err
			break
		}
		if s.moved == 0 {
			readErr = io.EOF
			break
		}
		s.held = s.moved
		s.left -= int64(s.moved)
		if writeErr = s.drain(); writeErr != nil {
			break
		}
	}
	s.pipe.release(s.held == 0)
	return readErr, writeErr
}

// drain empties the pipe into the target.
func (s *splicer) drain() error {
	for s.held > 0 {
		s.moved, s.err = 0, nil
		if err := s.dst.Write(s.emptyPipe); err != nil {
			return err
		}
		if s.err != nil {
			return s.err
		}
		s.held -= s.moved
		s.taken(s.moved)
	}
	return nil
}

// fillPipe never waits: a source that is dry ends the burst.
func (s *splicer) fillPipe(fd uintptr) bool {
	s.splice(int(fd), s.pipe.w, int(min(pipeSize, s.left)))
	return true
}

// emptyPipe waits until the target takes more.
func (s *splicer) emptyPipe(fd uintptr) bool {
	s.splice(s.pipe.r, int(fd), s.held)
	return s.err != unix.EAGAIN
}

func (s *splicer) splice(from, to, size int) {
	for {
		n, err := unix.Splice(from, nil, to, nil, size, spliceFlags)
		if err == unix.EINTR {
			continue
		}
		s.moved, s.err = max(0, int(n)), err
		return
	}
}

// spliceFrom is the least that is worth moving inside the kernel.
const spliceFrom = 256 << 10

// splice passes the body of a response on inside the kernel, where both connections
// are plain sockets, its length is known, and the proxy serves the client itself:
// net/http's writer and Caddy's on top of it have no way to give a client more time
// when it has taken something. What is left afterwards has to be copied.
func (b *originBody) splice(w http.ResponseWriter, count func(n int64)) error {
	client, ok := innermost(w).(*responseWriter)
	origin, ok2 := b.conn.(*net.TCPConn)
	if !ok || !ok2 || b.chunks != nil || b.left < spliceFrom || client.length != b.left {
		return nil
	}
	src, err := origin.SyscallConn()
	if err != nil {
		return err
	}
	start, _ := b.r.Peek(b.r.Buffered()) // less than is left; the head goes with it
	n, err := w.Write(start)
	_, _ = b.r.Discard(n)
	b.left -= int64(n)
	count(int64(n))
	if err == nil {
		err = http.NewResponseController(w).Flush()
	}
	if err != nil {
		return toClient(err)
	}
	s := newSplicer(client.client.TCPConn, src, func(n int) {
		b.left -= int64(n)
		client.written += int64(n)
		client.renew()
		count(int64(n))
	})
	for b.left > 0 && s.dst != nil {
		before := b.left
		if err := waitReadable(src); err != nil {
			return err
		}
		client.renew()
		readErr, writeErr := s.burst(b.left)
		switch {
		case readErr == io.EOF:
			return io.ErrUnexpectedEOF
		case readErr != nil:
			return readErr
		case writeErr != nil:
			return toClient(writeErr)
		case b.left == before: // no pipe, or an error that the next read tells
			return nil
		}
	}
	b.ended = b.left == 0
	return nil
}

// waitReadable waits until there is something to read, or the end.
func waitReadable(conn syscall.RawConn) error {
	var failed error
	err := conn.Read(func(fd uintptr) bool {
		var one [1]byte
		_, _, failed = unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return failed != unix.EAGAIN
	})
	return errors.Join(err, failed)
}
