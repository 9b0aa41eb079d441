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
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// streamPeer is a client whose tunnel is an HTTP/2 or HTTP/3 stream. Only the handler's
// return ends what is written to the stream, and it also ends what can be read from it. So
// there is no half-close towards the client: bytes that the client is still sending then are
// lost.
type streamPeer struct {
	ctx     context.Context // canceled when the client resets the stream or its connection ends
	w       http.ResponseWriter
	control *http.ResponseController
	body    io.ReadCloser
	state   atomic.Int32 // streamOpen, then streamEnded or streamAborted

	full      bool      // the last read returned bytes; only for Read
	delivered time.Time // when the bytes of the last read had been passed on; only for Read

	conn   net.Conn      // the connection of an HTTP/2 stream
	tcp    *net.TCPConn  // its socket, if known
	server *http3.Server // of an HTTP/3 stream, whose connection is not accessible
}

const (
	streamOpen    = iota
	streamEnded   // neither reads nor writes
	streamAborted // neither reads nor writes, and the handler resets the stream
)

// newStreamPeer takes over w and the body of r. It turns Caddy's idle timeouts off, because
// a tunnel may be silent as long as its own timeouts allow. Caddy's timeouts for whole
// requests remain in force.
func newStreamPeer(w http.ResponseWriter, r *http.Request) *streamPeer {
	p := &streamPeer{ctx: r.Context(), w: w, control: http.NewResponseController(w), body: r.Body}
	if p.conn = connOf(w, r); p.conn != nil {
		p.tcp = tcpconn.Of(p.conn)
	}
	p.server, _ = r.Context().Value(http3.ServerContextKey).(*http3.Server)
	p.dropIdleTimeouts(r)
	return p
}

// dropIdleTimeouts stops Caddy from setting a deadline before each read and write. Setting a
// very long timeout instead does not work: over HTTP/2 a deadline is a timer, and one that
// is set just after the client has reset the stream is never stopped. It would keep the
// stream in memory until it fires.
//
// HTTP/2 has separate deadlines for whole requests. HTTP/3 has only those that Caddy sets,
// so they are set here again.
func (p *streamPeer) dropIdleTimeouts(r *http.Request) {
	control := http.NewResponseController(innermost(p.w))
	none := http.NewResponseController(noDeadlines{p.w})
	reader, writer := caddyhttp.IdleTimeoutsFromContext(r.Context())
	if reader != nil {
		reader.Ctrl = none
		if deadline := reader.Deadline.HardDeadline; r.ProtoMajor > 2 && !deadline.IsZero() {
			_ = control.SetReadDeadline(deadline)
		}
	}
	if writer != nil {
		writer.Ctrl = none
		if deadline := writer.Deadline.HardDeadline; r.ProtoMajor > 2 && !deadline.IsZero() {
			_ = control.SetWriteDeadline(deadline)
		}
	}
}

// noDeadlines is a ResponseWriter that ignores deadlines.
type noDeadlines struct{ http.ResponseWriter }

func (noDeadlines) SetReadDeadline(time.Time) error  { return nil }
func (noDeadlines) SetWriteDeadline(time.Time) error { return nil }

// Context returns the context that is canceled when the client resets the stream or its
// connection ends.
func (p *streamPeer) Context() context.Context { return p.ctx }

// Server returns the server of an HTTP/3 stream, or nil.
func (p *streamPeer) Server() io.Closer {
	if p.server == nil {
		return nil
	}
	return p.server
}

// IsAborted reports whether Abort has been called.
func (p *streamPeer) IsAborted() bool { return p.state.Load() == streamAborted }

func (p *streamPeer) Reader() io.Reader { return p }
func (p *streamPeer) Writer() io.Writer { return p }

func (p *streamPeer) Read(b []byte) (int, error) {
	if p.full {
		p.delivered = time.Now()
	}
	n, err := p.body.Read(b)
	p.full = n > 0
	if state := p.state.Load(); err != nil && err != io.EOF && state != streamOpen {
		err = net.ErrClosed
		if state == streamEnded && time.Since(p.delivered) < cutShortWindow {
			err = errCutShort
		}
	}
	return n, err
}

// cutShortWindow is how long a client must have been silent to count as done when the target ends
// the stream. A client that sent bytes more recently may have more in flight, which are
// lost.
const cutShortWindow = time.Second

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

// closeBody unblocks a pending read. Over HTTP/3 it does not close the body, because that
// would tell the client that its request was cancelled; how the stream ends is more exact.
func (p *streamPeer) closeBody() error {
	if p.server == nil {
		return p.body.Close()
	}
	p.StopReading()
	return nil
}

// StopReading unblocks a pending read over HTTP/3. Over HTTP/2, the read has ended by itself
// once the stream's context is canceled.
func (p *streamPeer) StopReading() {
	if p.server != nil {
		tcpconn.Interrupt(http.NewResponseController(innermost(p.w)).SetReadDeadline)
	}
}

// SendState only knows the connection as a whole. Its acknowledgements say nothing about
// this stream while the socket has room, and are reported only while the socket is full.
func (p *streamPeer) SendState(last uint64) (acked uint64, queued bool) {
	if p.tcp == nil || tcpconn.HasRoom(p.tcp) {
		return last, false
	}
	acked, _ = tcpconn.SendState(p.tcp)
	return acked, false
}

// WasCanceled reports whether err means that the client has cancelled a stream that it no
// longer needs.
func (p *streamPeer) WasCanceled(err error) bool {
	if reset := (http2.StreamError{}); errors.As(err, &reset) {
		return reset.Code == http2.ErrCodeCancel || reset.Code == http2.ErrCodeNo
	}
	if ended := (*http3.Error)(nil); errors.As(err, &ended) {
		return ended.ErrorCode == http3.ErrCodeRequestCanceled || ended.ErrorCode == http3.ErrCodeNoError
	}
	// The client has stopped reading, and had not half-closed before.
	return p.ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded)
}

// reset resets the stream. Over HTTP/2 it returns the error that makes net/http do so when
// the handler returns it; the error code cannot be chosen. Over HTTP/3 it resets the stream
// itself, with the code that RFC 9114 §4.4 requires.
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

// Close is Abort. Only the handler's return ends a stream in order, and a stream that was cut
// short must not look complete.
func (p *streamPeer) Close() error { return p.Abort() }

// Abort also unblocks a pending write, by a deadline on the innermost writer: Caddy's own
// writers are not safe for a second goroutine. The handler may return before the deadline is
// set, but it sees the abort and panics, so that the writer is not reused.
func (p *streamPeer) Abort() error {
	if !p.state.CompareAndSwap(streamOpen, streamAborted) {
		return nil
	}
	tcpconn.Interrupt(http.NewResponseController(innermost(p.w)).SetWriteDeadline)
	return p.closeBody()
}

// CloseConnection closes the connection of an HTTP/2 stream, and with it all other streams.
// A client that grants large windows and then does not read keeps everything stuck in its
// connection, even the stream's reset.
func (p *streamPeer) CloseConnection() {
	if p.conn != nil {
		_ = p.conn.Close()
	}
}

// connKey is the context key of a request's connection.
type connKey struct{}

// withConn adds a connection to its context.
func withConn(ctx context.Context, conn net.Conn) context.Context {
	if ctx.Value(connKey{}) != nil { // added by another handler of the server
		return ctx
	}
	return context.WithValue(ctx, connKey{}, conn)
}

// connOf returns the TCP connection of a request, or nil if it has none.
func connOf(w http.ResponseWriter, r *http.Request) net.Conn {
	if fast := downstream.WriterOf(w); fast != nil {
		return fast.Conn()
	}
	conn, _ := r.Context().Value(connKey{}).(net.Conn)
	return conn
}

// innermost returns the writer that net/http or quic-go gave to Caddy. Access logs, metrics
// and other handlers wrap it.
func innermost(w http.ResponseWriter) http.ResponseWriter {
	for {
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return w
		}
		w = u.Unwrap()
	}
}
