// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// Exchange sends one request to an origin and reads its response. With HTTP/1 it runs on
// the handler's goroutine, where http.Transport would park and wake two more. Only a
// request body is sent on a goroutine of its own, because the response may arrive
// before the body is complete.
type Exchange struct {
	Request  *Request
	Response *http.Response // once its head has arrived
	Body     *ResponseBody  // of the response; nil: there is none yet, or it is HTTP/2's

	client *Client
	limits *Limits
	ctx    context.Context // the request's: the exchange ends when the client disconnects
	wait   *headTimer      // of HTTP/2; nil: HTTP/1

	// The rest is HTTP/1's.
	pool    *connPool
	conn    *pooledConn // nil: none yet, or the exchange has ended
	binding binding

	stopWatch    func() bool // stops watching for client disconnect; nil: not watching yet
	sender       *bodySender // of the request body; nil: there is none
	answered     bool        // a response head, perhaps interim, has been read
	interims     interimLimit
	lastProgress int64     // when the origin last reported progress, since epoch; 0: never
	sendBodyAt   time.Time // when to send the body without a 100 (Continue); zero: already sending
}

// Request is a request as it is sent to an origin.
type Request struct {
	Method    string
	OverTLS   bool   // the origin is an https one
	Authority string // the host and port of the origin
	Target    string // the request target, as the client wrote it
	Host      string
	Header    http.Header

	Body          *RequestBody // nil: none
	NeedsContinue bool         // 100 (Continue) must be sent to the client before the body is read
	TrailerNames  []string     // names of the trailers that may follow a chunked body
	Trailer       http.Header  // their values, valid once the body has been read
	StopBody      func()       // aborts a read of the body that is waiting for the client

	// Interim passes an interim response on, which arrived over the given HTTP version. It is
	// not called concurrently.
	Interim func(status int, header http.Header, major, minor int)

	LimitKey   client.Key // who shares the client's limits
	ClientConn any        // identifies the client's connection; nil: unknown
	ClientAddr netip.Addr
	User       string // the client's authenticated user; "": none
}

// RequestBody reads the content of a request from the client.
type RequestBody struct {
	Reader  io.Reader
	Length  int64        // < 0: unknown, so the body is sent in chunks
	read    atomic.Int64 // bytes read so far
	Count   func(n int64)
	failure atomic.Pointer[RequestBodyError]
}

// RequestBodyError reports that the client sent its request body incompletely or malformed.
type RequestBodyError struct{ error }

func (e *RequestBodyError) Unwrap() error { return e.error }

// Read implements io.Reader. It checks that the body has the announced length, which
// the origin is told and which not every server checks itself.
func (b *RequestBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.Count(int64(n))
	switch read := b.read.Add(int64(n)); {
	case b.Length >= 0 && read > b.Length:
		n, err = 0, errors.New("the content is longer than its Content-Length")
	case err == io.EOF && b.Length >= 0 && read < b.Length:
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		failed := &RequestBodyError{err}
		b.failure.Store(failed)
		return n, failed
	}
	return n, err
}

// IsRead reports whether all of a body of known length has been read.
func (b *RequestBody) IsRead() bool { return b.Length >= 0 && b.read.Load() >= b.Length }

// failed returns the client's failure, if there was one.
func (b *RequestBody) failed() error {
	if b != nil {
		if failure := b.failure.Load(); failure != nil {
			return failure
		}
	}
	return nil
}

// Do sends the request and returns the final response when its head has arrived. The caller
// calls Close in any case, and Finish before that if it has passed the response on.
func (x *Exchange) Do() (*http.Response, error) {
	x.pool, x.binding = x.client.plain, newBinding(x.Request)
	if x.Request.OverTLS {
		x.pool = x.client.secure
	}
	if x.Request.OverTLS && x.mayUseHTTP2() {
		if res, err := x.doHTTP2(); !errors.Is(err, errNoHTTP2) {
			return res, err
		}
	}
	res, err := x.doHTTP1()
	if err != nil {
		return nil, x.explain(err)
	}
	x.binding.challenged(x.Request, res)
	return res, nil
}

// mayUseHTTP2 reports whether HTTP/2 may be tried with an https origin. Upgrades and logins
// that are bound to a connection need HTTP/1. So does an origin with an idle HTTP/1
// connection in the pool, which evidently does not speak HTTP/2.
func (x *Exchange) mayUseHTTP2() bool {
	return len(x.Request.Header["Upgrade"]) == 0 && !x.pool.has(x.Request.Authority) && !x.binding.login && !x.binding.has(x.pool)
}

// explain returns what a failure of HTTP/1 is to be reported as.
func (x *Exchange) explain(err error) error {
	if x.client.explain == nil || x.conn == nil || errors.As(err, new(*RequestBodyError)) || errors.As(err, new(*DialError)) {
		return err
	}
	return x.client.explain(err, x.conn.r)
}

func (x *Exchange) doHTTP1() (*http.Response, error) {
	res, err := x.try(false)
	if err == nil || !x.mayRetry(err) {
		return res, err
	}
	x.end(false)
	return x.try(true)
}

// mayRetry reports whether a request that failed on a reused connection may be sent
// once more (RFC 9110 §9.2.2). It may if nothing of a response has arrived: then the
// origin was most likely closing the idle connection.
func (x *Exchange) mayRetry(err error) bool {
	if x.conn == nil || !x.conn.reused || !x.Request.repeatable() || x.ctx.Err() != nil || x.answered || x.conn.r.Buffered() > 0 {
		return false
	}
	var wrong h1.ProtocolError
	if errors.As(err, &wrong) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.ErrUnexpectedEOF) {
		return false
	}
	return true
}

// repeatable reports whether the request is idempotent and has no body.
func (out *Request) repeatable() bool {
	switch out.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return out.Body == nil
	}
	return false
}

// connect returns a connection for the request. Unless fresh is set, it prefers a
// connection that is bound to the client.
func (x *Exchange) connect(fresh bool) (*pooledConn, error) {
	if x.binding.client != nil && !fresh {
		if conn, err := x.binding.reuse(x.ctx, x.pool); conn != nil || err != nil {
			return conn, err
		}
	}
	return x.pool.get(x.ctx, x.Request.Authority, fresh)
}

func (x *Exchange) try(fresh bool) (*http.Response, error) {
	out := x.Request
	conn, err := x.connect(fresh)
	if err != nil {
		return nil, err
	}
	x.conn = conn
	if out.Body != nil {
		x.watchDisconnect()
	}
	start := time.Now()
	if err := x.writeHead(); err != nil {
		return nil, err
	}
	if out.Body != nil {
		x.sender = newBodySender(conn, out)
		if httpguts.HeaderValuesContainsToken(out.Header["Expect"], "100-continue") {
			x.sendBodyAt = start.Add(continueTimeout)
		} else {
			x.sendBody()
		}
	}
	body := &ResponseBody{conn: conn, sender: x.sender, limits: x.limits, client: out.LimitKey}
	for {
		x.awaitResponse(start)
		res, err := h1.ReadResponse(conn.r, out.Method, &body.Body)
		if x.sender != nil && err != nil && x.ctx.Err() != nil {
			x.sender.wait() // the client may have cut off its body
		}
		if failed := out.Body.failed(); failed != nil {
			return nil, failed
		}
		if err != nil {
			return nil, err
		}
		x.answered = true
		if res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols {
			res.Body, x.Response, x.Body = body, res, body
			if body.Remaining < 0 || body.Remaining > int64(conn.r.Buffered()) || res.StatusCode == http.StatusSwitchingProtocols {
				x.watchDisconnect()
				conn.deadline.Clear(conn.Conn) // the timeout is for the head, not for the body
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
			x.lastProgress = monotime.Of(time.Now())
		}
		if res.StatusCode != http.StatusContinue {
			out.Interim(res.StatusCode, res.Header, 1, 1)
		} else if x.sender != nil {
			x.sendBody()
		}
		x.watchDisconnect()
	}
}

// smallHead is the size of a request head that fits into any socket's send buffer.
const smallHead = 8 << 10

// send writes the head of a request. Writing a large one can block if the origin does
// not read it, so that gets a deadline.
func (x *Exchange) send(head []byte) error {
	if len(head) > smallHead {
		x.watchDisconnect()
		if timeout := x.limits.HeaderTimeout; timeout > 0 {
			_ = x.conn.SetWriteDeadline(time.Now().Add(timeout))
			defer func() { _ = x.conn.SetWriteDeadline(time.Time{}) }()
		}
	}
	_, err := x.conn.Write(head)
	return err
}

// sendBody starts sending the body, unless it has started already. If the client waits
// for 100 (Continue), it gets it now.
func (x *Exchange) sendBody() {
	if out := x.Request; out.NeedsContinue {
		out.Interim(http.StatusContinue, nil, 1, 1)
		out.NeedsContinue = false
	}
	x.sendBodyAt = time.Time{}
	x.sender.proceed(true)
}

// watchDelay is how long an exchange runs before it watches for client disconnect. Most
// finish sooner, and the watch costs about 4 % of an exchange.
const watchDelay = 20 * time.Millisecond

// watchDisconnect closes the connection to the origin as soon as the client disconnects.
func (x *Exchange) watchDisconnect() {
	if x.stopWatch == nil {
		conn := x.conn
		x.stopWatch = context.AfterFunc(x.ctx, func() { _ = conn.Close() })
	}
}

// awaitResponse blocks until response bytes arrive or the response timeout expires. The clock
// runs from start, when the request was sent, or with a body while the origin has all
// of the body or is not reading it. It stops while the client's body is awaited. If the
// origin does not send 100 (Continue) in time, the body is sent without it.
func (x *Exchange) awaitResponse(start time.Time) {
	if x.stopWatch == nil {
		x.conn.deadline.Within(x.conn.Conn, watchDelay/4, watchDelay)
		_, err := x.conn.r.Peek(1)
		head, _ := x.conn.r.Peek(x.conn.r.Buffered())
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) || bytes.Contains(head, h1.HeadEnd) {
			return
		}
		x.watchDisconnect() // the head has not arrived, or not completely
	}
	if !x.sendBodyAt.IsZero() {
		wait := max(time.Until(x.sendBodyAt), time.Millisecond)
		x.conn.deadline.Within(x.conn.Conn, wait, wait)
		if _, err := x.conn.r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		x.sendBody()
	}
	for {
		turn := monotime.Of(start)
		if x.sender != nil {
			turn = x.sender.turnBegan.Load()
		}
		left := timeLeft(x.limits.HeaderTimeout, turn, x.lastProgress)
		switch {
		case x.limits.HeaderTimeout <= 0:
			x.conn.deadline.Clear(x.conn.Conn)
		case left <= 0:
			return
		default:
			x.conn.deadline.Within(x.conn.Conn, left, left+left/8)
		}
		if _, err := x.conn.r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
	}
}

// Finish ends an exchange whose response has been passed on. It keeps the connection for
// other exchanges, if it can serve any.
func (x *Exchange) Finish() { x.end(x.Body != nil && x.Body.Ended && !x.Response.Close) }

// Close ends the exchange, and closes its connection or stream unless Finish has been called.
func (x *Exchange) Close() { x.end(false) }

// end ends the exchange. reusable says that the response was read to its end and that the
// HTTP/1 connection can serve another exchange.
func (x *Exchange) end(reusable bool) {
	if x.wait != nil {
		x.endHTTP2()
	}
	if x.Body != nil {
		_ = x.Body.Close()
	}
	if x.conn == nil {
		return
	}
	disconnected := x.stopWatch != nil && !x.stopWatch()
	sent := x.sender == nil || x.sender.stop(x.conn)
	switch {
	case !reusable || !sent || disconnected:
		x.conn.discard()
	case x.binding.login || x.conn.bound != nil:
		x.binding.keep(x.ctx, x.pool, x.conn)
	default:
		x.pool.put(x.conn)
	}
	x.conn, x.sender, x.stopWatch = nil, nil, nil
}

// Detach detaches the connection from the exchange and returns it with the bytes that
// were read beyond the response head.
func (x *Exchange) Detach() (socket net.Conn, early []byte, err error) {
	conn := x.conn
	if x.watchDisconnect(); !x.stopWatch() {
		return nil, nil, context.Cause(x.ctx)
	}
	if x.sender != nil && !x.sender.stop(conn) {
		return nil, nil, h1.ProtocolError("the protocol was switched before the request was complete")
	}
	conn.deadline.Clear(conn.Conn)
	if n := conn.r.Buffered(); n > 0 {
		peeked, _ := conn.r.Peek(n)
		early = bytes.Clone(peeked)
	}
	conn.releaseReader()
	x.conn = nil
	return conn.Conn, early, nil
}

// DialError is an error that occurred before there was a connection.
type DialError struct{ error }

func (e *DialError) Unwrap() error { return e.error }

// requestHeadPool is a pool of buffers for request heads.
var requestHeadPool = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}

// writeHead sends the head of a request in one write.
func (x *Exchange) writeHead() error {
	out := x.Request
	pooled := requestHeadPool.Get().(*[]byte)
	b := (*pooled)[:0]
	b = append(b, out.Method...)
	b = append(b, ' ')
	b = append(b, out.Target...)
	b = append(b, " HTTP/1.1\r\nHost: "...)
	b = append(b, out.Host...)
	b = append(b, "\r\n"...)
	for name, values := range out.Header {
		if name == "Content-Length" || name == "Transfer-Encoding" || name == "Host" {
			continue // written separately
		}
		name = h1.WireName(name)
		for _, value := range values {
			b = h1.AppendField(b, name, value)
		}
	}
	switch {
	case out.Body == nil && len(out.Header["Content-Length"]) > 0:
		b = append(b, "Content-Length: 0\r\n"...)
	case out.Body == nil:
	case out.Body.Length >= 0:
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, out.Body.Length, 10)
		b = append(b, "\r\n"...)
	default:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
		if len(out.TrailerNames) > 0 {
			b = h1.AppendField(b, "Trailer", strings.Join(out.TrailerNames, ", "))
		}
	}
	b = append(b, "\r\n"...)
	err := x.send(b)
	if cap(b) <= 64<<10 {
		*pooled = b
		requestHeadPool.Put(pooled)
	}
	return err
}

// continueTimeout is how long to wait for an origin's 100 (Continue) before sending
// the body anyway (RFC 9110 §10.1.1).
const continueTimeout = time.Second

// bodySender sends the body of a request on a goroutine of its own.
type bodySender struct {
	out    *Request
	conn   *pooledConn
	ended  chan struct{}
	wanted chan bool // receives whether to send the body

	turnBegan atomic.Int64 // when the origin's turn began, since epoch; 0: waiting for the client
	complete  bool         // the whole body was sent; valid after ended
	reset     bool         // the origin reset the connection; valid after ended
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
	defer s.setTurn(true)
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
		s.setTurn(false)
		n, err := s.out.Body.Read(buf[:])
		s.setTurn(true)
		if n > 0 {
			// The origin may still respond although it reads no more. The
			// handler finds out by reading.
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

// setTurn records whether the exchange waits for the origin or for the client. Only the
// origin's turn counts towards the response timeout.
func (s *bodySender) setTurn(origin bool) {
	if origin {
		s.turnBegan.Store(monotime.Of(time.Now()))
	} else {
		s.turnBegan.Store(0)
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
