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

// pipeSize is the requested size of each pipe. The kernel may give less to an unprivileged
// user with many pipes. Then moving the same bytes takes more calls.
const pipeSize = 1 << 20

// spliceFlags make splice(2) return at once when it cannot move anything. The netpoller does
// the waiting.
const spliceFlags = unix.SPLICE_F_NONBLOCK | unix.SPLICE_F_MOVE

// pipes holds unused, empty pipes. Pipes that do not fit into it are closed.
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

// release returns an empty pipe to pipes, and closes one that still holds bytes.
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

// closePipes closes the unused pipes, so that a process without tunnels holds no descriptors
// for them.
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
	s.pipe.release(s.held == 0)
	return readErr, writeErr
}

// drain empties the pipe into the destination.
func (s *splicer) drain(copied *flow) error {
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

// spliceFrom is the smallest body that is worth splicing.
const spliceFrom = 256 << 10

// splice copies the body of a response inside the kernel, if both connections are plain
// sockets and the body's length is known. done reports whether it has done so.
//
// Of the writers that Caddy puts between a handler and its connection, only the timeout for
// stalled writes can be bypassed, because it is applied here. Access logs and metrics need
// to see the bytes, and the operator's write timeouts and minimum rates need to be enforced.
func (b *originBody) splice(w http.ResponseWriter, count func(n int64)) (done bool, err error) {
	idle, ok := w.(*caddyhttp.IdleTimeoutWriter)
	socket, ok2 := b.conn.(*net.TCPConn)
	if !ok || !ok2 || b.IsChunked() || b.Remaining < spliceFrom || !restartsWithEachWrite(idle) {
		return false, nil
	}
	client, ok := innermost(w).(io.ReaderFrom)
	conn, err := socket.SyscallConn()
	if !ok || err != nil {
		return false, err
	}
	for b.Remaining > 0 {
		n, err := b.spliceSome(client, conn, socket, idle)
		count(n)
		if b.Remaining -= n; err != nil {
			return true, err
		}
	}
	b.Ended = true
	return true, nil
}

// spliceSome waits for bytes from the origin, and then moves what has arrived. It sets the
// client's write deadline, which a writeStallTimer extends.
func (b *originBody) spliceSome(client io.ReaderFrom, conn syscall.RawConn, socket *net.TCPConn, idle *caddyhttp.IdleTimeoutWriter) (int64, error) {
	if buffered := int64(b.R.Buffered()); buffered > 0 {
		n, err := io.CopyN(idle, b.R, min(buffered, b.Remaining))
		return n, asClientError(err)
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
		b.origin.clearDeadline() // the client may take as long as its own timeout allows
	}
	if err = errors.Join(err, errIoctl); err != nil {
		return 0, err
	}
	if available == 0 { // EOF, or an error that the next read returns
		var buf [1]byte
		n, err := socket.Read(buf[:])
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return int64(n), err
	}
	if err := idle.Ctrl.SetWriteDeadline(time.Now().Add(idle.Deadline.Timeout)); err != nil {
		return 0, asClientError(err)
	}
	// The bytes that have arrived can be read, so an error is the client's. Bytes are
	// counted once the client has taken them, so move at most a pipe's worth at a time.
	n, err := client.ReadFrom(io.LimitReader(socket, min(int64(available), b.Remaining, pipeSize)))
	return n, asClientError(err)
}
