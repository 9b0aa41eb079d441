// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"errors"
	"io"
	"net"
	"net/http/httputil"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// bodySender sends the body of a request over HTTP/1, on a goroutine of its own. It needs no
// goroutine if the kernel can move the whole body at once (see spliceArrived).
type bodySender struct {
	*bodyReader
	conn    *pooledConn
	splicer *tcpconn.Splicer // nil: none yet, or the body must be copied
	sent    chan struct{}    // closed when the sender has ended
	wanted  chan bool        // receives whether to send the body

	complete bool // the whole body was sent; valid after sent
	reset    bool // the origin reset the connection; valid after sent
}

func newBodySender(conn *pooledConn, body *bodyReader) *bodySender {
	if length := body.out.Body.Length; length < 0 || length > int64(len(tcpconn.Buffer{})) {
		conn.limitUnsent()
	}
	return &bodySender{bodyReader: body, conn: conn, sent: make(chan struct{}), wanted: make(chan bool, 2)}
}

// proceed tells the sender whether to send the body. Only the first call counts.
func (s *bodySender) proceed(wanted bool) {
	select {
	case s.wanted <- wanted:
	default:
	}
}

func (s *bodySender) run() {
	defer close(s.sent)
	defer s.clock.setTurn(true)
	if !<-s.wanted || s.splice() {
		return
	}
	buf := tcpconn.GetBuffer()
	defer buf.Free()
	w := io.Writer(s.conn)
	if s.out.Body.Length < 0 {
		w = httputil.NewChunkedWriter(s.conn)
	}
	write := func(p []byte) error {
		_, err := w.Write(p)
		return err
	}
	readErr, err := tcpconn.Copy(buf[:], s.Read, write, tcpconn.Always)
	switch {
	case err != nil: // the origin may still respond, which the exchange finds out by reading
	case readErr == io.EOF:
		err = s.finishBody(w)
		s.complete = err == nil
	default:
		_ = s.conn.Close() // the origin must not mistake a part for the whole body
	}
	s.reset = tcpconn.IsReset(err)
}

// spliceArrived makes the kernel move the part of the body that has arrived, without waiting for the
// client or the origin. It reports whether that was all of the body. If not, run must send the rest.
func (s *bodySender) spliceArrived() (done bool) {
	if !s.canSplice() {
		return false
	}
	_, err := s.move(s.splicer.TryFill)
	empty, writeErr := s.splicer.TryDrain(func(int) {})
	if s.reset = tcpconn.IsReset(writeErr); !empty || err != io.EOF {
		return false // the sender meets each error again
	}
	s.splicer.Close()
	s.complete = true
	close(s.sent)
	return true
}

// splice makes the kernel move the body from the client's socket to the origin's. It returns false if
// the rest must be copied, because the kernel cannot splice this body or one of the connections.
func (s *bodySender) splice() (done bool) {
	if s.splicer == nil && !s.canSplice() {
		return false
	}
	defer s.splicer.Close()
	for {
		if err := s.splicer.Drain(func(int) {}); err != nil {
			s.reset = s.reset || tcpconn.IsReset(err)
			return true
		}
		n, err := s.move(s.splicer.Fill)
		switch {
		case n > 0: // the next call returns err
		case err == io.EOF:
			s.complete = true
			return true
		case errors.Is(err, errors.ErrUnsupported):
			return false
		case err != nil:
			_ = s.conn.Close() // the origin must not mistake a part for the whole body
			return true
		}
	}
}

// canSplice reports whether the kernel can move the body, and prepares for that.
func (s *bodySender) canSplice() bool {
	to, ok := s.conn.Conn.(*net.TCPConn)
	from := s.out.Body.socket()
	if !ok || from == nil {
		return false
	}
	s.splicer = tcpconn.NewSplicer(to, from)
	return true
}

// finishBody writes the last chunk and the trailers of a chunked body.
func (s *bodySender) finishBody(w io.Writer) error {
	chunks, ok := w.(io.WriteCloser)
	if s.out.Body.Length >= 0 || !ok {
		return nil
	}
	if err := chunks.Close(); err != nil {
		return err
	}
	var b []byte
	for _, name := range s.out.TrailerNames {
		for _, value := range s.trailer[name] {
			b = h1.AppendField(b, name, value)
		}
	}
	_, err := s.conn.Write(append(b, "\r\n"...))
	return err
}

// finish stops the sender, and reports whether the whole body was sent. If it was not, the
// connection is closed.
func (s *bodySender) finish(conn *pooledConn) bool {
	s.proceed(false)
	if waitFor(s.sent) {
		return s.complete
	}
	_ = conn.Close()
	s.stop()
	<-s.sent
	return false
}

// wasReset reports whether a write failed because the origin reset the connection. The
// kernel reports a reset only once, so the reader may see just EOF.
func (s *bodySender) wasReset() bool { return waitFor(s.sent) && s.reset }
