// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"io"
	"net/http/httputil"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// bodySender sends the body of a request on a goroutine of its own.
type bodySender struct {
	out    *Request
	conn   *pooledConn
	ended  chan struct{}
	wanted chan bool // receives whether to send the body

	complete bool // the whole body was sent; valid after ended
	reset    bool // the origin reset the connection; valid after ended
}

func newBodySender(conn *pooledConn, out *Request) *bodySender {
	if out.Body.Length < 0 || out.Body.Length > int64(len(tcpconn.Buffer{})) {
		if socket := tcpconn.Of(conn.Conn); socket != nil {
			tcpconn.LimitUnsent(socket) // the origin's response timeout starts when it has the request
		}
	}
	s := &bodySender{out: out, conn: conn, ended: make(chan struct{}), wanted: make(chan bool, 2)}
	go s.run()
	return s
}

// proceed tells the sender whether to send the body. Only the first call counts.
func (s *bodySender) proceed(wanted bool) {
	select {
	case s.wanted <- wanted:
	default:
	}
}

func (s *bodySender) run() {
	defer close(s.ended)
	defer s.conn.clock.setTurn(true)
	if !<-s.wanted {
		return
	}
	buf := tcpconn.GetBuffer()
	defer buf.Free()
	w := io.Writer(s.conn)
	if s.out.Body.Length < 0 {
		w = httputil.NewChunkedWriter(s.conn)
	}
	for {
		n, err := s.out.readBody(buf[:], &s.conn.clock)
		if n > 0 {
			// The origin may still respond although it reads no more. The
			// exchange finds out by reading.
			if _, err := w.Write(buf[:n]); err != nil {
				s.reset = tcpconn.IsReset(err)
				return
			}
		}
		if err == io.EOF {
			err := s.finishBody(w)
			s.complete, s.reset = err == nil, tcpconn.IsReset(err)
			return
		}
		if err != nil {
			_ = s.conn.Close() // the origin must not mistake a part for the whole body
			return
		}
	}
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
		for _, value := range s.out.Trailer[name] {
			b = h1.AppendField(b, name, value)
		}
	}
	_, err := s.conn.Write(append(b, "\r\n"...))
	return err
}

// stop stops the sender, and reports whether the whole body was sent. If it was not,
// the connection is closed.
func (s *bodySender) stop(conn *pooledConn) bool {
	s.proceed(false)
	if s.wait() {
		return s.complete
	}
	_ = conn.Close()
	s.out.StopBody()
	<-s.ended
	return false
}

// wasReset reports whether a write failed because the origin reset the connection. The
// kernel reports a reset only once, so the reader may see just EOF.
func (s *bodySender) wasReset() bool { return s.wait() && s.reset }

// wait waits up to senderGrace for the sender to end, and reports whether it has.
func (s *bodySender) wait() bool {
	select {
	case <-s.ended:
		return true
	case <-time.After(senderGrace):
		return false
	}
}

// senderGrace is how long wait waits for the sender: the origin has often responded
// before the sender's last write returns.
const senderGrace = 50 * time.Millisecond
