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
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// Exchange sends one request to an origin and reads its response. With HTTP/1 it runs on
// the caller's goroutine, where http.Transport would park and wake two more. Only a
// request body is sent on a goroutine of its own, because the response may arrive
// before the body is complete.
type Exchange struct {
	Request  *Request
	Response *http.Response // nil until its head has arrived
	Body     *ResponseBody  // of the response; nil until its head has arrived, and over HTTP/2

	client *Client
	limits *Limits
	ctx    context.Context // the request's: the exchange ends when the client disconnects
	wait   *headTimer      // of HTTP/2; nil: HTTP/1

	content  *bodyReader // the body of the request; nil: it has none, or none is being sent
	heldHead int         // the size that HoldHead has counted

	// The rest is for HTTP/1 only.
	pool    *connPool
	conn    *pooledConn // nil: none yet, or the exchange has ended
	binding binding

	stopWatch  func() bool // stops watching for client disconnect; nil: not watching yet
	sender     *bodySender // of content; nil: there is none
	answered   bool        // a response head, perhaps interim, has been read
	interims   interimLimit
	sendBodyAt time.Time // when to send the body without a 100 (Continue); zero: already sending
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

// explain applies Config.Explain, if there is one, to the error of an HTTP/1 exchange.
func (x *Exchange) explain(err error) error {
	if x.client.explain == nil || x.conn == nil || errors.As(err, new(*RequestBodyError)) || errors.As(err, new(*DialError)) {
		return err
	}
	return x.client.explain(err, x.conn.r)
}

// doHTTP1 sends the request over HTTP/1, and once more if its connection was stale.
func (x *Exchange) doHTTP1() (*http.Response, error) {
	res, err := x.try(false)
	if err == nil || x.conn == nil || !x.mayRetry(err, x.conn.reused, x.begun(err)) {
		return res, err
	}
	x.end(false)
	return x.try(true)
}

// begun reports whether something of a response has arrived before the failure err.
func (x *Exchange) begun(err error) bool {
	return x.answered || x.conn.r.Buffered() > 0 || errors.Is(err, io.ErrUnexpectedEOF)
}

// mayRetry reports whether a request that failed may be sent once more (RFC 9110 §9.2.2). It
// may if its connection was stale and it is repeatable, unless something of a response has
// arrived or the client has gone.
//
// An HTTP/2 connection is always being read, so it is stale only for a request that is sent while
// the connection ends. Nothing reads an idle HTTP/1 connection, so the pool also checks that it is
// quiet before each use.
func (x *Exchange) mayRetry(err error, reused, begun bool) bool {
	return egress.IsStale(err, reused) && !begun && x.Request.repeatable() && x.ctx.Err() == nil
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

// try sends the request on a connection and returns the final response.
func (x *Exchange) try(fresh bool) (*http.Response, error) {
	if err := x.sendRequest(fresh); err != nil {
		return nil, err
	}
	body := &ResponseBody{conn: x.conn, sender: x.sender, limits: x.limits, client: x.Request.LimitKey}
	for {
		x.awaitResponse()
		res := &body.response
		err := h1.ReadResponse(x.conn.r, x.Request.Method, res, &body.Body)
		if failed := x.content.failure(err != nil && x.ctx.Err() != nil); failed != nil {
			return nil, failed
		}
		if err != nil {
			return nil, err
		}
		x.answered = true
		if res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols {
			x.accept(res, body)
			return res, nil
		}
		if err := x.handleInterim(res); err != nil {
			return nil, err
		}
	}
}

// sendRequest sends the head of the request, and starts to send its body. The part of the body that
// has been read already is sent with the head. If the rest has arrived as well, no goroutine is needed.
func (x *Exchange) sendRequest(fresh bool) (err error) {
	if x.conn, err = x.connect(fresh); err != nil {
		return err
	}
	waits := httpguts.HeaderValuesContainsToken(x.Request.Header["Expect"], "100-continue")
	body, arrived := x.Request.Body, 0
	if body != nil && !waits {
		arrived = body.arrived()
	}
	isWhole := body == nil || int64(arrived) == body.Length
	start := time.Now()
	if err := x.writeHead(arrived, isWhole); err != nil {
		return err
	}
	if isWhole {
		x.conn.clock.reset(start)
		return nil
	}
	x.conn.clock.reset(time.Time{})
	out := x.Request // a closure that captured x would move x to the heap
	x.content = newBodyReader(out, &x.conn.clock, func() { out.Interim(http.StatusContinue, nil, 1, 1) })
	x.sender = newBodySender(x.conn, x.content)
	if !waits && x.sender.spliceArrived() {
		return nil
	}
	go x.sender.run()
	if waits {
		x.sendBodyAt = start.Add(continueTimeout)
	} else {
		x.sendBody()
	}
	return nil
}

// accept prepares a final response, whose body is about to be read.
func (x *Exchange) accept(res *http.Response, body *ResponseBody) {
	res.Body, x.Response, x.Body = body, res, body
	if body.Remaining < 0 || body.Remaining > int64(x.conn.r.Buffered()) || res.StatusCode == http.StatusSwitchingProtocols {
		x.watchDisconnect()
		x.conn.deadline.Clear(x.conn.Conn) // the timeout is for the head, not for the body
	}
	if x.sender != nil {
		x.sender.proceed(false)
	}
}

// handleInterim passes an interim response on. If the origin asks for the body with it,
// handleInterim starts to send that.
func (x *Exchange) handleInterim(res *http.Response) error {
	if err := x.interims.check(res.StatusCode, res.Header, &x.conn.clock); err != nil {
		return err
	}
	if res.StatusCode != http.StatusContinue {
		x.Request.Interim(res.StatusCode, res.Header, 1, 1)
	} else if x.sender != nil {
		x.sendBody()
	}
	x.watchDisconnect()
	return nil
}

// smallHead is the size of a request head that fits into any socket's send buffer.
const smallHead = 8 << 10

// send writes the head of a request. Writing a large one can block if the origin does
// not read it, so that gets a deadline. After a whole request, send may begin to wait for the response.
func (x *Exchange) send(head []byte, isWhole bool) error {
	if socket, ok := x.conn.Conn.(*net.TCPConn); ok && isWhole && x.conn.reused && len(head) <= smallHead {
		x.conn.deadline.Within(socket, watchDelay/4, watchDelay)
		writeErr, waitErr := tcpconn.Ask(socket, head) // the pool has found that nothing has arrived
		if errors.Is(waitErr, os.ErrDeadlineExceeded) {
			x.watchDisconnect()
		}
		return writeErr
	}
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

// sendBody starts sending the body, unless it has started already. The 100 (Continue) for the
// client is sent from here, because the sender's goroutine must not write to the client.
func (x *Exchange) sendBody() {
	x.content.begin()
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

// awaitResponse blocks until response bytes arrive or the response timeout expires. If the
// origin does not send 100 (Continue) in time, the body is sent without it.
func (x *Exchange) awaitResponse() {
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
		left := x.conn.clock.left(x.limits.HeaderTimeout)
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
	x.releaseHead()
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
	sent := x.sender == nil || x.sender.finish(x.conn)
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
	if x.sender != nil && !x.sender.finish(conn) {
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

// writeHead sends the head of a request in one write, with the first bytes of its body, which must
// have arrived.
func (x *Exchange) writeHead(arrived int, isWhole bool) error {
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
	var err error
	if arrived > 0 {
		b, err = out.Body.appendTo(b, arrived)
	}
	if err == nil {
		err = x.send(b, isWhole)
	}
	if cap(b) <= 64<<10 {
		*pooled = b
		requestHeadPool.Put(pooled)
	}
	return err
}

// continueTimeout is how long to wait for an origin's 100 (Continue) before sending
// the body anyway (RFC 9110 §10.1.1).
const continueTimeout = time.Second
