// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
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
	dst, src syscall.RawConn // dst is nil if it is no socket
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

// burst moves bytes until the source has nothing more to read just now, and
// gives the pipe back. It returns no errors if the source goes on, and does
// nothing if bytes cannot be moved or there is no pipe to be had.
func (s *splicer) burst(copied *flow) (readErr, writeErr error) {
	if s.dst == nil {
		return nil, nil
	}
	var err error
	if s.pipe, err = newPipe(); err != nil {
		return nil, nil
	}
	s.held = 0
	for {
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
		if writeErr = s.drain(copied); writeErr != nil {
			break
		}
	}
	s.pipe.release(s.held == 0)
	return readErr, writeErr
}

// drain empties the pipe into the target.
func (s *splicer) drain(copied *flow) error {
	copied.waiting.Store(true)
	defer copied.waiting.Store(false)
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

// fillPipe never waits: a source that is dry ends the burst.
func (s *splicer) fillPipe(fd uintptr) bool {
	s.splice(int(fd), s.pipe.w, pipeSize)
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

// splice passes the body of a response on inside the kernel, where both
// connections are plain sockets and its length is known. It reports whether it
// has.
//
// Of what Caddy puts between a handler and its connection only the timeout for
// stalled writes may be passed by, whose work is done here: an access log or
// metrics want to see the bytes, and a write timeout or a least rate that the
// operator has set want to be kept.
func (b *originBody) splice(w http.ResponseWriter, count func(n int64)) (done bool, err error) {
	idle, ok := w.(*caddyhttp.IdleTimeoutWriter)
	socket, ok2 := b.conn.(*net.TCPConn)
	if !ok || !ok2 || b.chunks != nil || b.left < spliceFrom || !restartable(idle) {
		return false, nil
	}
	client, ok := innermost(w).(io.ReaderFrom)
	conn, err := socket.SyscallConn()
	if !ok || err != nil {
		return false, err
	}
	for b.left > 0 {
		n, err := b.spliceSome(client, conn, socket, idle)
		count(n)
		if b.left -= n; err != nil {
			return true, err
		}
	}
	b.ended = true
	return true, nil
}

// spliceSome waits for the origin, as long as that takes, and then moves what
// has come, in the time that the client has to take some of it: a slowReader gives
// it more.
func (b *originBody) spliceSome(client io.ReaderFrom, conn syscall.RawConn, socket *net.TCPConn, idle *caddyhttp.IdleTimeoutWriter) (int64, error) {
	if buffered := int64(b.r.Buffered()); buffered > 0 {
		n, err := io.CopyN(idle, b.r, min(buffered, b.left))
		return n, toClient(err)
	}
	available := 0
	var errIoctl error
	err := b.waitFor(func() error {
		return conn.Read(func(fd uintptr) bool {
			var peek [1]byte
			if _, _, err := unix.Recvfrom(int(fd), peek[:], unix.MSG_PEEK|unix.MSG_DONTWAIT); err == unix.EAGAIN {
				return false
			}
			available, errIoctl = unix.IoctlGetInt(int(fd), unix.SIOCINQ)
			return true
		})
	})
	if b.origin != nil {
		b.origin.expectNone() // the client takes the time that it takes
	}
	if err = errors.Join(err, errIoctl); err != nil {
		return 0, err
	}
	if available == 0 { // the end, or a failure that the next read tells
		var one [1]byte
		n, err := socket.Read(one[:])
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return int64(n), err
	}
	if err := idle.Ctrl.SetWriteDeadline(time.Now().Add(idle.Deadline.Timeout)); err != nil {
		return 0, toClient(err)
	}
	// What has come can be read: a failure is the client's. It counts when the client has
	// taken it, so that it is no more at once than a pipe holds.
	n, err := client.ReadFrom(io.LimitReader(socket, min(int64(available), b.left, pipeSize)))
	return n, toClient(err)
}
