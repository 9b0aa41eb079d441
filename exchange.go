// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httputil"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http/httpguts"
)

// exchange is one request to an HTTP/1 origin and its response, on the
// goroutine of the handler: http.Transport parks and wakes two more for each.
// Only the body of a request, which may take as long as it likes while the
// response is already there, has a goroutine of its own.
type exchange struct {
	origins *origins
	ctx     context.Context // the client's: when it leaves, the exchange ends
	conn    *originConn
	timeout time.Duration // for the head of the response
	interim func(status int, header http.Header)
	binding binding

	stopWatch func() bool // ends the watch for the client's leaving; nil: there is none yet
	sender    *sender     // of the body, if there is one
	answered  bool        // something of a response has come
	interims  interimLimit
	news      int64     // when the origin last told of progress, since epoch; 0: never
	sendBy    time.Time // when the body is sent though the origin has not asked for it; zero: it is being sent
}

// outgoing is a request to an origin, as it is sent.
type outgoing struct {
	method    string
	authority string // what to connect to, a host and a port
	target    string // the request target, as the client wrote it
	host      string
	header    http.Header

	body     *clientBody // nil: none
	invites  bool        // the client has to be told 100 (Continue) before the body is read
	trailers []string    // the names that may come behind a body in chunks
	trailer  http.Header // whose values are there when the body has ended
	stopBody func()      // ends a read of the body that waits for the client
}

// clientBody is the content of a request, as it comes from the client.
type clientBody struct {
	r       io.Reader
	length  int64        // < 0: not known, so that it is sent in chunks
	read    atomic.Int64 // how much has come
	count   func(n int64)
	failure atomic.Pointer[bodyError]
}

// bodyError is the client's failure to send a body, or to send it well.
type bodyError struct{ error }

func (e *bodyError) Unwrap() error { return e.error }

// Read implements io.Reader. Not every server that a body comes from compares
// its length with the one that was announced, which is what the origin is told.
func (b *clientBody) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.count(int64(n))
	switch read := b.read.Add(int64(n)); {
	case b.length >= 0 && read > b.length:
		n, err = 0, errors.New("the content is longer than its Content-Length")
	case err == io.EOF && b.length >= 0 && read < b.length:
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		failed := &bodyError{err}
		b.failure.Store(failed)
		return n, failed
	}
	return n, err
}

// failed returns the client's failure, if there was one.
func (b *clientBody) failed() error {
	if b != nil {
		if failure := b.failure.Load(); failure != nil {
			return failure
		}
	}
	return nil
}

// do sends a request and returns the head of its response, whose body is to be
// read to its end or not, and then finish called.
func (x *exchange) do(out *outgoing) (*http.Response, error) {
	res, err := x.try(out, false)
	if err == nil || !x.mayRetry(out, err) {
		return res, err
	}
	x.finish(false)
	return x.try(out, true)
}

// mayRetry reports whether a request that failed on a connection that was idle
// before may be sent once more (RFC 9110 §9.2.2): nothing has come back, so it is
// the idle connection that the origin was closing.
func (x *exchange) mayRetry(out *outgoing, err error) bool {
	if x.conn == nil || !x.conn.reused || !out.repeatable() || x.ctx.Err() != nil || x.answered || x.conn.r.Buffered() > 0 {
		return false
	}
	var wrong protocolError
	if errors.As(err, &wrong) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.ErrUnexpectedEOF) {
		return false
	}
	return true
}

// repeatable reports whether sending the request twice does no harm.
func (out *outgoing) repeatable() bool {
	switch out.method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return out.body == nil
	}
	return false
}

// connect returns a connection for the request: one that is bound to the client, if there
// is one, unless a fresh one is wanted.
func (x *exchange) connect(out *outgoing, fresh bool) (*originConn, error) {
	if x.binding.client != nil && !fresh {
		if conn, err := x.binding.reuse(x.ctx, x.origins); conn != nil || err != nil {
			return conn, err
		}
	}
	return x.origins.get(x.ctx, out.authority, fresh)
}

func (x *exchange) try(out *outgoing, fresh bool) (*http.Response, error) {
	conn, err := x.connect(out, fresh)
	if err != nil {
		return nil, err
	}
	x.conn = conn
	if out.body != nil {
		x.watch()
	}
	start := time.Now()
	if err := x.writeHead(out); err != nil {
		return nil, err
	}
	if out.body != nil {
		x.sender = newSender(conn, out)
		if httpguts.HeaderValuesContainsToken(out.header["Expect"], "100-continue") {
			x.sendBy = start.Add(continueTimeout)
		} else {
			x.sendBody(out)
		}
	}
	for {
		x.await(out, start)
		res, err := readResponse(conn.r, out.method)
		if x.sender != nil && err != nil && x.ctx.Err() != nil {
			x.sender.wait() // it may be the body that the client broke off
		}
		if failed := out.body.failed(); failed != nil {
			return nil, failed
		}
		if err != nil {
			return nil, err
		}
		x.answered = true
		if res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols {
			body := res.Body.(*originBody)
			body.conn, body.sender = conn.Conn, x.sender
			if body.left < 0 || body.left > int64(conn.r.Buffered()) || res.StatusCode == http.StatusSwitchingProtocols {
				x.watch()
				conn.expectNone() // a body takes what it takes
			}
			if x.sender != nil {
				x.sender.proceed(false)
			}
			return res, nil
		}
		if !x.interims.take() {
			return nil, errInterim
		}
		if isProgress(res.StatusCode) {
			x.news = sinceEpoch(time.Now())
		}
		if res.StatusCode != http.StatusContinue {
			x.interim(res.StatusCode, res.Header)
		} else if x.sender != nil {
			x.sendBody(out)
		}
		x.watch()
	}
}

// promptHead is the size of a head for which each socket has room.
const promptHead = 8 << 10

// send writes the head of a request. The origin may read nothing of a large one.
func (x *exchange) send(head []byte) error {
	if len(head) > promptHead {
		x.watch()
		if x.timeout > 0 {
			_ = x.conn.SetWriteDeadline(time.Now().Add(x.timeout))
			defer func() { _ = x.conn.SetWriteDeadline(time.Time{}) }()
		}
	}
	_, err := x.conn.Write(head)
	return err
}

// sendBody begins to send the body, unless that has begun. Until then the client has
// not been asked for it.
func (x *exchange) sendBody(out *outgoing) {
	if out.invites {
		x.interim(http.StatusContinue, nil)
		out.invites = false
	}
	x.sendBy = time.Time{}
	x.sender.proceed(true)
}

// promptly is how long an exchange may go unwatched: most are over before that,
// and a watch would make each of them some 4 % dearer.
const promptly = 20 * time.Millisecond

// watch ends the exchange as soon as the client leaves.
func (x *exchange) watch() {
	if x.stopWatch == nil {
		conn := x.conn
		x.stopWatch = context.AfterFunc(x.ctx, func() { _ = conn.Close() })
	}
}

// await returns when there is something to read, or the time for it is over:
// that in which the origin has had all of the request, which it began to get at
// start, or would not take more. A body that the origin has not asked for in time is
// sent meanwhile.
func (x *exchange) await(out *outgoing, start time.Time) {
	if x.stopWatch == nil {
		x.conn.expectBy(promptly/4, promptly)
		_, err := x.conn.r.Peek(1)
		head, _ := x.conn.r.Peek(x.conn.r.Buffered())
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) || bytes.Contains(head, headEnd) {
			return
		}
		x.watch() // nothing has come yet, or not all of a head
	}
	if !x.sendBy.IsZero() {
		wait := max(time.Until(x.sendBy), time.Millisecond)
		x.conn.expectBy(wait, wait)
		if _, err := x.conn.r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		x.sendBody(out)
	}
	for {
		turn := sinceEpoch(start)
		if x.sender != nil {
			turn = x.sender.due.Load()
		}
		left := timeLeft(x.timeout, turn, x.news)
		switch {
		case x.timeout <= 0:
			x.conn.expectNone()
		case left <= 0:
			return
		default:
			x.conn.expectBy(left, left+left/8)
		}
		if _, err := x.conn.r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
	}
}

// finish ends the exchange. With reusable, the response was read to its end and
// the connection can serve another exchange.
func (x *exchange) finish(reusable bool) {
	if x.conn == nil {
		return
	}
	left := x.stopWatch != nil && !x.stopWatch() // the client
	sent := x.sender == nil || x.sender.stop(x.conn)
	switch {
	case !reusable || !sent || left:
		x.conn.discard()
	case x.binding.login || x.conn.bound != nil:
		x.binding.keep(x.ctx, x.origins, x.conn)
	default:
		x.origins.put(x.conn)
	}
	x.conn, x.sender, x.stopWatch = nil, nil, nil
}

// take hands the connection over to the caller, with what was read from it
// beyond the response.
func (x *exchange) take() (conn *originConn, early []byte, err error) {
	conn = x.conn
	if x.watch(); !x.stopWatch() {
		return nil, nil, context.Cause(x.ctx)
	}
	if x.sender != nil && !x.sender.stop(conn) {
		return nil, nil, protocolError("the protocol was switched before the request was complete")
	}
	conn.expectNone()
	if n := conn.r.Buffered(); n > 0 {
		peeked, _ := conn.r.Peek(n)
		early = bytes.Clone(peeked)
	}
	conn.releaseReader()
	x.conn = nil
	return conn, early, nil
}

// dialError is an error before there was a connection.
type dialError struct{ error }

func (e *dialError) Unwrap() error { return e.error }

// heads are buffers for the heads of requests.
var heads = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

// writeHead sends the head of a request in one write.
func (x *exchange) writeHead(out *outgoing) error {
	pooled := heads.Get().(*[]byte)
	b := (*pooled)[:0]
	b = append(b, out.method...)
	b = append(b, ' ')
	b = append(b, out.target...)
	b = append(b, " HTTP/1.1\r\nHost: "...)
	b = append(b, out.host...)
	b = append(b, "\r\n"...)
	for name, values := range out.header {
		if name == "Content-Length" || name == "Transfer-Encoding" || name == "Host" {
			continue // said otherwise
		}
		name = wireName(name)
		for _, value := range values {
			b = appendField(b, name, value)
		}
	}
	switch {
	case out.body == nil && len(out.header["Content-Length"]) > 0:
		b = append(b, "Content-Length: 0\r\n"...)
	case out.body == nil:
	case out.body.length >= 0:
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, out.body.length, 10)
		b = append(b, "\r\n"...)
	default:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
		if len(out.trailers) > 0 {
			b = appendField(b, "Trailer", strings.Join(out.trailers, ", "))
		}
	}
	b = append(b, "\r\n"...)
	err := x.send(b)
	if cap(b) <= 64<<10 {
		*pooled = b
		heads.Put(pooled)
	}
	return err
}

// appendField appends a field line. What the server accepts from clients is
// valid; a field that the config has made invalid is left out, as it could end
// the head.
func appendField(b []byte, name, value string) []byte {
	if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
		return b
	}
	return appendLine(b, name, value)
}

// continueTimeout is how long an origin may take to ask for a body with 100
// before it gets it unasked (RFC 9110 §10.1.1).
const continueTimeout = time.Second

// sender sends the body of a request on a goroutine of its own.
type sender struct {
	out   *outgoing
	conn  *originConn
	ended chan struct{}
	asked chan bool // tells whether the body is wanted

	due      atomic.Int64 // since when it is the origin's turn, since epoch; 0: it is the client's
	complete bool         // after ended: all of it was sent
	reset    bool         // after ended: the origin reset the connection
}

func newSender(conn *originConn, out *outgoing) *sender {
	if out.body.length < 0 || out.body.length > copyBuffer {
		if socket := newConnPeer(conn.Conn).tcp; socket != nil {
			limitUnsent(socket) // its time for an answer begins when it has the request
		}
	}
	s := &sender{out: out, conn: conn, ended: make(chan struct{}), asked: make(chan bool, 2)}
	go s.run()
	return s
}

// proceed tells what the origin thinks of the body, once it has said so.
func (s *sender) proceed(wanted bool) {
	select {
	case s.asked <- wanted:
	default:
	}
}

func (s *sender) run() {
	defer close(s.ended)
	defer s.turn(true)
	if !<-s.asked {
		return
	}
	buf := copyBuffers.Get().(*[copyBuffer]byte)
	defer copyBuffers.Put(buf)
	w := io.Writer(s.conn)
	if s.out.body.length < 0 {
		w = httputil.NewChunkedWriter(s.conn)
	}
	for {
		s.turn(false)
		n, err := s.out.body.Read(buf[:])
		s.turn(true)
		if n > 0 {
			// An origin that takes no more may still answer: that is the
			// handler's to find out.
			if _, err := w.Write(buf[:n]); err != nil {
				s.reset = errors.Is(err, syscall.ECONNRESET)
				return
			}
		}
		if err == io.EOF {
			err := s.finishBody(w)
			s.complete, s.reset = err == nil, errors.Is(err, syscall.ECONNRESET)
			return
		}
		if err != nil {
			_ = s.conn.Close() // the origin must not take it for the whole
			return
		}
	}
}

// turn notes whose turn it is.
func (s *sender) turn(origin bool) {
	if origin {
		s.due.Store(sinceEpoch(time.Now()))
	} else {
		s.due.Store(0)
	}
}

// finishBody ends a body that was sent in chunks, with its trailers.
func (s *sender) finishBody(w io.Writer) error {
	chunks, ok := w.(io.WriteCloser)
	if s.out.body.length >= 0 || !ok {
		return nil
	}
	if err := chunks.Close(); err != nil {
		return err
	}
	var b []byte
	for _, name := range s.out.trailers {
		for _, value := range s.out.trailer[name] {
			b = appendField(b, name, value)
		}
	}
	_, err := s.conn.Write(append(b, "\r\n"...))
	return err
}

// stop ends the sender, and reports whether the body was sent completely.
func (s *sender) stop(conn *originConn) bool {
	s.proceed(false)
	if s.wait() {
		return s.complete
	}
	_ = conn.Close()
	s.out.stopBody()
	<-s.ended
	return false
}

// wasReset reports whether a write has learned that the origin reset the connection. The
// system tells that once: the reader may see nothing but an end.
func (s *sender) wasReset() bool { return s.wait() && s.reset }

// wait waits for the end for a moment, and reports whether it has come.
func (s *sender) wait() bool {
	select {
	case <-s.ended:
		return true
	case <-time.After(lastWrite):
		return false
	}
}

// lastWrite is how long a sender may take to notice that it is done: the origin
// has often answered before the last write returns.
const lastWrite = 50 * time.Millisecond
