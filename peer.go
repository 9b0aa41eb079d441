// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"reflect"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/http2"
)

// peer is one end of a tunnel.
type peer interface {
	io.Writer

	// reader and writer are what to relay from and to: the bare socket if there
	// is nothing between it and the bytes.
	reader() io.Reader
	writer() io.Writer

	// CloseWrite says that nothing more will be written. The other side reads an
	// end, and may still write where the protocol lets it.
	CloseWrite() error

	// sendState returns how much the other side has acknowledged of what was
	// written, or last if that is not known; and whether the kernel holds more.
	sendState(last uint64) (acked uint64, queued bool)

	// Close and Abort end both directions; the other side sees an end, or an
	// error. All three may be called at any time, by anyone, more than once.
	Close() error
	Abort() error
}

type closeWriter interface{ CloseWrite() error }

// connPeer is a peer on a connection of its own.
type connPeer struct {
	net.Conn
	half closeWriter  // nil: the connection has no half-close
	tcp  *net.TCPConn // the socket below, if it is known
}

// newConnPeer finds out what conn can do: it may be a socket, TLS on one, or a
// listener's wrapper around one.
func newConnPeer(conn net.Conn) *connPeer {
	p := &connPeer{Conn: conn}
	p.half, _ = conn.(closeWriter)
	for lower := conn; p.tcp == nil; {
		switch c := lower.(type) {
		case *net.TCPConn:
			p.tcp = c
		case *readConn:
			p.tcp = c.TCPConn
		case interface{ TCPConn() (*net.TCPConn, bool) }: // PROXY protocol: nothing between after its header
			p.tcp, _ = c.TCPConn()
			if p.half == nil && p.tcp != nil {
				p.half = p.tcp
			}
			return p
		case interface{ NetConn() net.Conn }: // TLS
			lower = c.NetConn()
		default:
			if lower = embeddedConn(lower); lower == nil {
				return p
			}
			if p.half == nil {
				p.half, _ = lower.(closeWriter)
			}
		}
	}
	return p
}

// embeddedConn returns the net.Conn in a struct around it. Caddy wraps the
// connections of servers that speak HTTP/1 alone, and shows no way to the
// socket, which a reset needs.
func embeddedConn(conn net.Conn) net.Conn {
	v := reflect.Indirect(reflect.ValueOf(conn))
	if v.Kind() != reflect.Struct {
		return nil
	}
	if field := v.FieldByName("Conn"); field.IsValid() && field.CanInterface() {
		inner, _ := field.Interface().(net.Conn)
		return inner
	}
	return nil
}

func (p *connPeer) reader() io.Reader { return p.Conn }
func (p *connPeer) writer() io.Writer { return p.Conn }

func (p *connPeer) CloseWrite() error {
	if p.half == nil {
		return p.Close()
	}
	return p.half.CloseWrite()
}

func (p *connPeer) sendState(last uint64) (acked uint64, queued bool) {
	if p.tcp == nil {
		return last, false
	}
	return sendState(p.tcp)
}

func (p *connPeer) Abort() error {
	if p.tcp != nil {
		_ = p.tcp.SetLinger(0) // makes closing a reset
		return p.tcp.Close()
	}
	if stream, ok := p.Conn.(*streamConn); ok {
		return stream.Abort()
	}
	return p.Close()
}

// streamPeer is a client whose tunnel is a stream of HTTP/2 or HTTP/3. What is
// written to it ends with the handler's return and in no other way, and then
// nothing can be read from it any more: there is no half-close towards the
// client. What it was sending then is cut short.
type streamPeer struct {
	ctx     context.Context // ends when the client has reset the stream, or its connection has ended
	w       http.ResponseWriter
	control *http.ResponseController
	body    io.ReadCloser
	state   atomic.Int32 // streamOpen and then one of the others

	full      bool      // the last read had something; Read's own
	delivered time.Time // when what was read last had been passed on; Read's own

	conn   net.Conn      // below a stream of HTTP/2
	tcp    *net.TCPConn  // the socket below that, if it is known
	server *http3.Server // of a stream of HTTP/3, whose connection nobody is shown
}

const (
	streamOpen    = iota
	streamEnded   // nothing more is read or written
	streamAborted // neither, and the handler is to reset the stream
)

// newStreamPeer takes over w and the body of r. Caddy's timeouts for stalled
// requests do not apply to a tunnel, which may be silent for as long as it likes.
// Its timeouts for whole requests do.
func newStreamPeer(w http.ResponseWriter, r *http.Request) *streamPeer {
	p := &streamPeer{ctx: r.Context(), w: w, control: http.NewResponseController(w), body: r.Body}
	if p.conn = connOf(w, r); p.conn != nil {
		p.tcp = newConnPeer(p.conn).tcp
	}
	p.server, _ = r.Context().Value(http3.ServerContextKey).(*http3.Server)
	p.dropIdleTimeouts(r)
	return p
}

// dropIdleTimeouts stops Caddy from setting a deadline before each read and write.
// A long timeout in their place would not do: on a stream of HTTP/2 a deadline is a
// timer, and one that is set when the client has just reset the stream is never
// stopped, so that it would keep the stream in memory until it fires.
//
// HTTP/2 has deadlines for whole requests of its own. Over HTTP/3 Caddy's are the
// only ones, so they are set here.
func (p *streamPeer) dropIdleTimeouts(r *http.Request) {
	control := http.NewResponseController(innermost(p.w))
	none := http.NewResponseController(noDeadlines{p.w})
	reader, writer := caddyhttp.IdleTimeoutsFromContext(r.Context())
	if reader != nil {
		reader.Ctrl = none
		if due := reader.Deadline.HardDeadline; r.ProtoMajor > 2 && !due.IsZero() {
			_ = control.SetReadDeadline(due)
		}
	}
	if writer != nil {
		writer.Ctrl = none
		if due := writer.Deadline.HardDeadline; r.ProtoMajor > 2 && !due.IsZero() {
			_ = control.SetWriteDeadline(due)
		}
	}
}

// noDeadlines is a ResponseWriter that takes deadlines and ignores them.
type noDeadlines struct{ http.ResponseWriter }

func (noDeadlines) SetReadDeadline(time.Time) error  { return nil }
func (noDeadlines) SetWriteDeadline(time.Time) error { return nil }

func (p *streamPeer) reader() io.Reader { return p }
func (p *streamPeer) writer() io.Writer { return p }

func (p *streamPeer) Read(b []byte) (int, error) {
	if p.full {
		p.delivered = time.Now()
	}
	n, err := p.body.Read(b)
	p.full = n > 0
	if state := p.state.Load(); err != nil && err != io.EOF && state != streamOpen {
		err = net.ErrClosed
		if state == streamEnded && time.Since(p.delivered) < quietTime {
			err = errCutShort
		}
	}
	return n, err
}

// quietTime is how long a client has been silent that is taken to have been done
// when its stream ends with the target. One that was not may have more on its
// way, which nobody will read.
const quietTime = time.Second

var errCutShort = errors.New("the stream ended while the client was sending")

func (p *streamPeer) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	if err == nil {
		err = p.control.Flush()
	}
	return n, err
}

func (p *streamPeer) CloseWrite() error {
	if !p.state.CompareAndSwap(streamOpen, streamEnded) {
		return nil
	}
	return p.closeBody()
}

// closeBody ends a read that waits for the client. Over HTTP/3, closing the body would
// tell the client that its request was cancelled; how the stream ends says more.
func (p *streamPeer) closeBody() error {
	if p.server == nil {
		return p.body.Close()
	}
	p.stopReading()
	return nil
}

// stopReading ends a read that waits for the client. Over HTTP/2 that has happened
// when the stream's context has ended.
func (p *streamPeer) stopReading() {
	if p.server != nil {
		_ = http.NewResponseController(innermost(p.w)).SetReadDeadline(time.Unix(1, 0))
	}
}

// sendState knows of what goes over the connection as a whole. That other streams get
// on says nothing about this one, unless it waits for room in their common socket.
func (p *streamPeer) sendState(last uint64) (acked uint64, queued bool) {
	if p.tcp == nil || hasRoom(p.tcp) {
		return last, false
	}
	acked, _ = sendState(p.tcp)
	return acked, false
}

// hasLeft reports whether p is a stream that the client has reset, or whose connection
// has ended.
func hasLeft(p peer) bool {
	stream, ok := p.(*streamPeer)
	return ok && stream.ctx.Err() != nil
}

// wasGivenUp reports whether err is how a client ends a stream that it needs no more.
func (p *streamPeer) wasGivenUp(err error) bool {
	if reset := (http2.StreamError{}); errors.As(err, &reset) {
		return reset.Code == http2.ErrCodeCancel || reset.Code == http2.ErrCodeNo
	}
	if ended := (*http3.Error)(nil); errors.As(err, &ended) {
		return ended.ErrorCode == http3.ErrCodeRequestCanceled || ended.ErrorCode == http3.ErrCodeNoError
	}
	// The client wants no more of the target, and its own side was not ended yet.
	return p.ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded)
}

// reset has the stream reset when its handler returns err. Over HTTP/3 it is reset
// here, with the code that RFC 9114 §4.4 wants. net/http has no way to choose that of
// HTTP/2.
func (p *streamPeer) reset() (err error) {
	streamer, ok := innermost(p.w).(http3.HTTPStreamer)
	if !ok {
		return http.ErrAbortHandler
	}
	stream := streamer.HTTPStream()
	stream.CancelRead(quic.StreamErrorCode(http3.ErrCodeConnectError))
	stream.CancelWrite(quic.StreamErrorCode(http3.ErrCodeConnectError))
	return nil
}

// Close is Abort: there is no other end to a stream than its handler's return,
// and one that is cut short is to be seen as such.
func (p *streamPeer) Close() error { return p.Abort() }

// Abort also ends a write that waits for the client, by a deadline set below
// Caddy's own writers, which are not made for a second goroutine. The handler may
// return before the deadline is set, but not as one that is done with its
// writer: it sees the abort, and panics.
func (p *streamPeer) Abort() error {
	if !p.state.CompareAndSwap(streamOpen, streamAborted) {
		return nil
	}
	_ = http.NewResponseController(innermost(p.w)).SetWriteDeadline(time.Unix(1, 0))
	return p.closeBody()
}

// closeConnection closes what is below a stream of HTTP/2, and with it all its
// other streams. A client that grants large windows and then reads nothing keeps
// everything in its connection, the reset of a stream too.
func (p *streamPeer) closeConnection() {
	if p.conn != nil {
		_ = p.conn.Close()
	}
}

// connKey is for the context of a connection, in which its requests find it.
type connKey struct{}

// withConn puts a connection into its context.
func withConn(ctx context.Context, conn net.Conn) context.Context {
	if ctx.Value(connKey{}) != nil { // by another handler of the server
		return ctx
	}
	return context.WithValue(ctx, connKey{}, conn)
}

// connOf returns the connection that a request has come on; nil if that is none of
// TCP.
func connOf(w http.ResponseWriter, r *http.Request) net.Conn {
	if own, ok := innermost(w).(*responseWriter); ok {
		return own.client.TCPConn
	}
	conn, _ := r.Context().Value(connKey{}).(net.Conn)
	return conn
}

// innermost returns the writer that net/http or quic-go gave to Caddy, below
// those of access logs, metrics and other handlers.
func innermost(w http.ResponseWriter) http.ResponseWriter {
	for {
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return w
		}
		w = u.Unwrap()
	}
}
