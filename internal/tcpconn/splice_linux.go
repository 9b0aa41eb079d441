// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

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

// Release returns an empty pipe to Pipes, and closes one that still holds bytes.
func (p pipe) Release(empty bool) {
	if empty {
		select {
		case Pipes <- p:
			closePipesLater()
			return
		default:
		}
	}
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// pipesKept is how long unused pipes are kept after the first of them has been released.
const pipesKept = 30 * time.Second

var pipesClose atomic.Bool // closePipesLater has been called, and ClosePipes not yet

// closePipesLater makes a timer close the unused pipes after pipesKept, so that a process at rest
// holds no descriptors for them.
func closePipesLater() {
	if !pipesClose.Swap(true) {
		time.AfterFunc(pipesKept, func() {
			pipesClose.Store(false)
			ClosePipes()
		})
	}
}

// ClosePipes closes the unused pipes at once. It is called when the last tunnel ends.
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

// Splicer moves bytes from one socket to another inside the kernel, through a pipe. It holds a
// pipe only while it has bytes to move: a wait for the source costs no descriptors.
//
// The caller fills and drains in turns, and sets a deadline before each if it wants one:
//
//	s := tcpconn.NewSplicer(dst, src)
//	defer s.Close()
//	for left > 0 {
//		n, err := s.Fill(left) // waits for src, and keeps to its read deadline
//		if err == errors.ErrUnsupported {
//			return copyRest(left)
//		}
//		...
//		err = s.Drain(count) // waits for dst, and keeps to its write deadline
//		...
//		left -= int64(n)
//	}
//
// If bytes of src are in a buffer already, the caller writes them to dst before the first Fill.
// Unused pipes are kept for a while, up to a limit.
type Splicer struct {
	dst, src    syscall.RawConn
	fill, drain func(fd uintptr) bool // the method values fillPipe and drainPipe, allocated once
	pipe        pipe
	hasPipe     bool
	most        int         // how many bytes fillPipe may move
	held        int         // bytes in the pipe
	waits       bool        // fillPipe and drainPipe wait for their sockets
	moved       func(n int) // of Drain
	err         error       // of fillPipe or drainPipe
}

// NewSplicer returns a Splicer that moves bytes from src to dst. The caller calls Close when
// done.
func NewSplicer(dst, src *net.TCPConn) *Splicer {
	s := &Splicer{}
	s.dst, _ = dst.SyscallConn() // it fails only for a connection that is nil
	s.src, _ = src.SyscallConn()
	s.fill, s.drain = s.fillPipe, s.drainPipe
	return s
}

// Fill waits until src has bytes, and moves what has arrived into the pipe, but not more than
// most. It returns how many bytes Drain must then move to dst, always more than 0 without an
// error. The error is src's, or io.EOF if src has ended. It is errors.ErrUnsupported if the
// kernel does not splice from this socket, or gives no pipe. Then the caller must copy. No error
// loses bytes: after a deadline, Fill may be called again.
func (s *Splicer) Fill(most int64) (int, error) {
	s.waits = true
	return s.readSource(most)
}

// TryFill is Fill without the wait: it returns 0 if nothing has arrived.
func (s *Splicer) TryFill(most int64) (int, error) {
	s.waits = false
	return s.readSource(most)
}

func (s *Splicer) readSource(most int64) (int, error) {
	s.most, s.err = int(min(most, pipeSize)), nil
	if err := s.src.Read(s.fill); err != nil {
		return 0, err
	}
	switch s.err {
	case nil:
	case unix.EAGAIN:
		return 0, nil
	case unix.EINVAL, unix.EPERM, unix.ENOSYS: // not for this socket, or not in this sandbox
		return 0, errors.ErrUnsupported
	default:
		return 0, s.err
	}
	if s.held == 0 {
		return 0, io.EOF
	}
	return s.held, nil
}

// fillPipe reports whether the wait for the source is over. It takes a pipe for each attempt,
// and releases it before another wait.
func (s *Splicer) fillPipe(fd uintptr) bool {
	if !s.hasPipe {
		var err error
		if s.pipe, err = NewPipe(); err != nil {
			s.err = errors.ErrUnsupported
			return true
		}
		s.hasPipe = true
	}
	s.held, s.err = splice(int(fd), s.pipe.w, s.most)
	if s.err == unix.EAGAIN { // the pipe is empty, so the source has no bytes
		s.Close()
		return !s.waits
	}
	return true
}

// Drain moves the bytes in the pipe to dst, and calls moved whenever dst has accepted some. The
// error is dst's. After a deadline, Drain may be called again to go on.
func (s *Splicer) Drain(moved func(n int)) error {
	s.waits = true
	return s.writeDestination(moved)
}

// TryDrain is Drain without the wait. It reports whether the pipe is empty. If it is not, Drain goes
// on.
func (s *Splicer) TryDrain(moved func(n int)) (empty bool, err error) {
	s.waits = false
	if err = s.writeDestination(moved); err == unix.EAGAIN {
		err = nil
	}
	return s.held == 0, err
}

func (s *Splicer) writeDestination(moved func(n int)) error {
	s.moved, s.err = moved, nil
	if err := s.dst.Write(s.drain); err != nil {
		return err
	}
	return s.err
}

// drainPipe reports whether it has emptied the pipe or failed.
func (s *Splicer) drainPipe(fd uintptr) bool {
	for s.held > 0 {
		n, err := splice(s.pipe.r, int(fd), s.held)
		if err != nil {
			s.err = err
			return err != unix.EAGAIN || !s.waits
		}
		s.held -= n
		s.moved(n)
	}
	s.err = nil
	return true
}

// Close releases the pipe and drops the bytes in it. Fill may be called again.
func (s *Splicer) Close() {
	if s.hasPipe {
		s.pipe.Release(s.held == 0)
		s.hasPipe, s.held = false, 0
	}
}

func splice(from, to, most int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, most, spliceFlags)
		if err != unix.EINTR {
			return max(0, int(n)), err
		}
	}
}
