// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// pipeSize is the requested size of each pipe. The kernel may give less to an unprivileged
// user with many pipes. Then moving the same bytes takes more calls.
const pipeSize = 1 << 20

// spliceFlags make splice(2) return at once when it cannot move anything. The netpoller does
// the waiting.
const spliceFlags = unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE

// Pipes holds unused, empty pipes. Pipes that do not fit into it are closed.
var Pipes = make(chan pipe, 32)

type pipe struct{ r, w int }

// NewPipe returns an empty pipe, an unused one if there is one.
func NewPipe() (pipe, error) {
	select {
	case p := <-Pipes:
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

// Release returns an empty pipe to pipes, and closes one that still holds bytes.
func (p pipe) Release(empty bool) {
	if empty {
		select {
		case Pipes <- p:
			return
		default:
		}
	}
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// ClosePipes closes the unused pipes, so that a process without tunnels holds no descriptors
// for them.
func ClosePipes() {
	for {
		select {
		case p := <-Pipes:
			p.Release(false)
		default:
			return
		}
	}
}

// splicer moves bytes from one socket to another inside the kernel.
type splicer struct {
	dst, src syscall.RawConn // dst is nil if it is not a socket
	pipe     pipe
	moved    int
	held     int // bytes in the pipe
	err      error
}

func newSplicer(dst io.Writer, src syscall.RawConn) *splicer {
	s := &splicer{src: src}
	if socket, ok := dst.(*net.TCPConn); ok {
		if conn, err := socket.SyscallConn(); err == nil {
			s.dst = conn
		}
	}
	return s
}

// burst moves bytes until the source has no more for now, and then releases the pipe. It
// returns no errors if the source goes on. It does nothing if bytes cannot be spliced, or no
// pipe is available.
func (s *splicer) burst(copied *Flow) (readErr, writeErr error) {
	if s.dst == nil {
		return nil, nil
	}
	var err error
	if s.pipe, err = NewPipe(); err != nil {
		return nil, nil
	}
	s.held = 0
	for {
		s.moved, s.err = 0, nil
		if err := s.src.Read(s.fillPipe); err != nil {
			readErr = err
			break
		}
		if s.err == unix.EAGAIN { // no more bytes, or EOF, which the next read finds
			break
		}
		if s.err == unix.EINVAL || s.err == unix.EPERM || s.err == unix.ENOSYS {
			s.dst = nil // not supported for this socket or in this sandbox
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
		if writeErr = s.drain(copied); writeErr != nil {
			break
		}
	}
	s.pipe.Release(s.held == 0)
	return readErr, writeErr
}

// drain empties the pipe into the destination.
func (s *splicer) drain(copied *Flow) error {
	copied.writing.Store(true)
	defer copied.writing.Store(false)
	for s.held > 0 {
		s.moved, s.err = 0, nil
		if err := s.dst.Write(s.emptyPipe); err != nil {
			return err
		}
		if s.err != nil {
			return s.err
		}
		s.held -= s.moved
		copied.Add(int64(s.moved))
	}
	return nil
}

// fillPipe never waits: a source without bytes ends the burst.
func (s *splicer) fillPipe(fd uintptr) bool {
	s.splice(int(fd), s.pipe.w, pipeSize)
	return true
}

// emptyPipe waits until the destination accepts bytes.
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
