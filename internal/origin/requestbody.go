// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// RequestBody reads the content of a request from the client.
type RequestBody struct {
	Reader  io.Reader
	Length  int64        // < 0: unknown, so the body is sent in chunks
	read    atomic.Int64 // bytes read so far
	ended   atomic.Bool  // its end has been read
	Count   func(n int64)
	failure atomic.Pointer[RequestBodyError]
}

// Read implements io.Reader.
func (b *RequestBody) Read(p []byte) (int, error) { return b.account(b.Reader.Read(p)) }

// account counts what was read. It checks that the body has the announced length: the origin relies
// on it, and not every server of the client's request checks it.
func (b *RequestBody) account(n int, err error) (int, error) {
	b.Count(int64(n))
	switch read := b.read.Add(int64(n)); {
	case b.Length >= 0 && read > b.Length:
		n, err = 0, errors.New("the content is longer than its Content-Length")
	case err == io.EOF && b.Length >= 0 && read < b.Length:
		err = io.ErrUnexpectedEOF
	case err == io.EOF:
		b.ended.Store(true)
	}
	if err != nil && err != io.EOF && !errors.Is(err, errors.ErrUnsupported) {
		failed := &RequestBodyError{err}
		b.failure.Store(failed)
		return n, failed
	}
	return n, err
}

// socket returns the socket that carries the rest of the body as it is; nil: the body must be read.
func (b *RequestBody) socket() *net.TCPConn {
	if m, ok := b.Reader.(tcpconn.Mover); ok && b.Length-b.read.Load() >= spliceFrom {
		return m.Socket()
	}
	return nil
}

// spliceFrom is the smallest rest of a body that is worth splicing.
const spliceFrom = 32 << 10

// appendTo appends the next n bytes of the body to p.
func (b *RequestBody) appendTo(p []byte, n int) ([]byte, error) {
	start := len(p)
	p = slices.Grow(p, n)[:start+n]
	_, err := io.ReadFull(b, p[start:])
	return p, err
}

// IsRead reports whether all of the body has been read. If chunks is false, it returns false for
// every body of unknown length.
func (b *RequestBody) IsRead(chunks bool) bool {
	return b.Length >= 0 && b.read.Load() >= b.Length || chunks && b.ended.Load()
}

// arrived returns how many bytes of a body of known length can be read without waiting for the
// client.
func (b *RequestBody) arrived() int {
	if content, ok := b.Reader.(interface{ Arrived() int }); ok && b.Length >= 0 {
		return content.Arrived()
	}
	return 0
}

// RequestBodyError reports that the client sent its request body incompletely or malformed.
type RequestBodyError struct{ error }

func (e *RequestBodyError) Unwrap() error { return e.error }

// bodyReader reads the body of a request for its sender: a bodySender over HTTP/1, and
// http2.Transport over HTTP/2. The senders differ only in how they write the body, and in where
// the origin's 100 (Continue) arrives: in the exchange over HTTP/1, in the transport over HTTP/2.
type bodyReader struct {
	out          *Request
	clock        *headClock  // stands still while a read waits for the client
	sendContinue func()      // sends 100 (Continue) to the client
	trailer      http.Header // the announced trailers; the values are set at the end of the body

	begun atomic.Bool

	mu      sync.Mutex    // guards the following
	reading bool          // a read is in progress
	err     error         // why there is nothing more to read; nil: there is
	ended   chan struct{} // closed when there is nothing more to read, and no read in progress
}

// errBodyStopped is the error of reads after stop.
var errBodyStopped = errors.New("the exchange has ended")

func newBodyReader(out *Request, clock *headClock, sendContinue func()) *bodyReader {
	b := &bodyReader{out: out, clock: clock, sendContinue: sendContinue, ended: make(chan struct{})}
	for _, name := range out.TrailerNames {
		if b.trailer == nil {
			b.trailer = make(http.Header, len(out.TrailerNames))
		}
		b.trailer[name] = nil
	}
	return b
}

// begin sends the 100 (Continue) that the client waits for, unless it has been sent.
func (b *bodyReader) begin() {
	if b.out.NeedsContinue {
		b.out.NeedsContinue = false
		b.sendContinue()
	}
}

// Read implements io.Reader.
func (b *bodyReader) Read(p []byte) (int, error) {
	return b.read(func() (int, error) { return b.out.Body.Read(p) })
}

// move is Read with tcpconn.Mover: fill takes the bytes from the client's socket. After the error
// errors.ErrUnsupported, the rest must be read.
func (b *bodyReader) move(fill func(most int64) (int, error)) (int, error) {
	return b.read(func() (int, error) { return b.out.Body.account(b.out.Body.Reader.(tcpconn.Mover).Move(fill)) })
}

func (b *bodyReader) read(next func() (int, error)) (int, error) {
	if err := b.beginRead(); err != nil {
		return 0, err
	}
	b.clock.setTurn(false)
	b.begin()
	n, err := next()
	b.clock.setTurn(true)
	if err == io.EOF {
		for name := range b.trailer {
			b.trailer[name] = b.out.Trailer[name]
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.reading = false
	if b.err == nil && !errors.Is(err, errors.ErrUnsupported) {
		b.err = err
	}
	if b.err != nil {
		close(b.ended)
	}
	return n, err
}

// beginRead returns an error if there is nothing more to read.
func (b *bodyReader) beginRead() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.begun.Store(true)
		b.reading = true
	}
	return b.err
}

// stop ends the reading, and aborts a read that is waiting for the client. It must not be called
// while the response is being passed on: net/http takes an aborted read for a disconnect of
// the client.
func (b *bodyReader) stop() {
	b.mu.Lock()
	unread := b.err == nil
	if unread {
		b.err = errBodyStopped
		if !b.reading {
			close(b.ended)
		}
	}
	b.mu.Unlock()
	if unread && b.begun.Load() {
		b.out.StopBody()
	}
	<-b.ended
}

// failure returns the client's failure, if there is one. gone says that the client has
// disconnected. If that has cut off the body, failure waits until the reader notices.
func (b *bodyReader) failure(gone bool) error {
	if b == nil {
		return nil
	}
	if gone && b.begun.Load() {
		waitFor(b.ended)
	}
	if failed := b.out.Body.failure.Load(); failed != nil {
		return failed
	}
	return nil
}

// waitFor waits up to senderGrace for the end of a sender or its reader, and reports whether
// it has ended.
func waitFor(ended <-chan struct{}) bool {
	select {
	case <-ended: // the usual case needs no timer
		return true
	default:
	}
	select {
	case <-ended:
		return true
	case <-time.After(senderGrace):
		return false
	}
}

// senderGrace is how long waitFor waits: the origin has often responded before the sender's
// last write returns.
const senderGrace = 50 * time.Millisecond
