// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"errors"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

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

// repeatable reports whether the request is idempotent and has no body.
func (out *Request) repeatable() bool {
	switch out.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return out.Body == nil
	}
	return false
}

// readBody reads from the body. While it waits for the client, the origin's clock stands still.
func (out *Request) readBody(p []byte, clock *headClock) (int, error) {
	clock.setTurn(false)
	n, err := out.Body.Read(p)
	clock.setTurn(true)
	return n, err
}

// RequestBody reads the content of a request from the client.
type RequestBody struct {
	Reader  io.Reader
	Length  int64        // < 0: unknown, so the body is sent in chunks
	read    atomic.Int64 // bytes read so far
	ended   atomic.Bool  // its end has been read
	Count   func(n int64)
	failure atomic.Pointer[RequestBodyError]
}

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
	case err == io.EOF:
		b.ended.Store(true)
	}
	if err != nil && err != io.EOF {
		failed := &RequestBodyError{err}
		b.failure.Store(failed)
		return n, failed
	}
	return n, err
}

// appendTo appends all of a body of known length to p.
func (b *RequestBody) appendTo(p []byte) ([]byte, error) {
	start := len(p)
	p = slices.Grow(p, int(b.Length))[:start+int(b.Length)]
	_, err := io.ReadFull(b, p[start:])
	return p, err
}

// IsRead reports whether all of the body has been read. chunks says whether it may be true of a
// body of unknown length.
func (b *RequestBody) IsRead(chunks bool) bool {
	return b.Length >= 0 && b.read.Load() >= b.Length || chunks && b.ended.Load()
}

// hasArrived reports whether the whole body can be read without waiting for the client.
func (b *RequestBody) hasArrived() bool {
	content, ok := b.Reader.(interface{ Arrived() bool })
	return ok && content.Arrived()
}

// failed returns the client's failure, if there was one.
func (b *RequestBody) failed() error {
	if b != nil {
		if failure := b.failure.Load(); failure != nil {
			return failure
		}
	}
	return nil
}

// RequestBodyError reports that the client sent its request body incompletely or malformed.
type RequestBodyError struct{ error }

func (e *RequestBodyError) Unwrap() error { return e.error }
