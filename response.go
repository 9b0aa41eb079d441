// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"maps"
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// passResponse sends the origin's response to the client. If the origin's response is cut
// off, so is the client's: the client must not mistake a part for the whole (RFC 9112 §8).
func (p *proxy) passResponse(w http.ResponseWriter, r *http.Request, x *origin.Exchange, from clientIdentity) error {
	res := x.Response
	if x.Body != nil {
		if err := x.Body.CheckStart(); err != nil {
			return forwardRefusal(r, err)
		}
	}
	if err := x.HoldHead(); err != nil {
		return forwardRefusal(r, err)
	}
	connection, upgrade := res.Header["Connection"], res.Header["Upgrade"]
	announced := trailingNames(res.Trailer, connection)
	header := from.policy.setResponseFields(w, r, res)
	if isLastOnConnection(r, x.Request) {
		header["Connection"] = []string{"close"}
	}
	keepUpgrade(r, header, res.StatusCode, upgrade)
	if len(announced) > 0 {
		header["Trailer"] = []string{strings.Join(announced, ", ")}
		if r.ProtoMajor == 1 {
			delete(header, "Content-Length") // HTTP/1 has trailers only behind chunks
		}
	}
	startWriteIdleTimeout(r)
	w.WriteHeader(res.StatusCode)
	if r.ProtoMajor == 3 && !hasContent(r.Method, res.StatusCode) { // otherwise quic-go sends Content-Length: 0
		_ = http.NewResponseController(w).Flush()
	}
	if err := p.passContent(w, r, x, from); err != nil {
		var gone *clientError
		if errors.As(err, &gone) || r.Context().Err() != nil {
			return clientDisconnected(err)
		}
		_ = http.NewResponseController(w).Flush() // send what arrived before the failure
		return cutOffError{err}
	}
	if res.ContentLength < 0 && r.ProtoMajor == 1 {
		startWriteIdleTimeout(r) // for the final chunk, which net/http writes after this handler
	}
	_ = res.Body.Close() // fills in the trailers
	return passTrailers(w, res, announced, connection)
}

// setResponseFields turns the header of res into the header of the response to the client, and
// returns that. Nothing may use res.Header afterwards.
func (y *policy) setResponseFields(w http.ResponseWriter, r *http.Request, res *http.Response) http.Header {
	isSmall := len(res.Header) < h1.MaxFreedHeader // before fields are removed, because the map keeps their memory
	removeHopByHop(res.Header)
	y.proxy.via.add(res.Header, res.ProtoMajor, res.ProtoMinor)
	y.applyDown(res, r)
	header := w.Header()
	// Caddy's Server field does not describe the origin. A nil Content-Type keeps
	// net/http from guessing one.
	delete(header, "Server")
	header["Content-Type"] = nil
	if fast := downstream.WriterOf(w); fast != nil && isSmall && res.ProtoMajor == 1 {
		fast.TakeHeader(res.Header)
		return res.Header
	}
	for name, values := range res.Header {
		header[h1.WireName(name)] = values
	}
	return header
}

// applyDown applies header_down to the response's header fields.
func (y *policy) applyDown(res *http.Response, r *http.Request) {
	if y.options.Headers == nil || y.options.Headers.Response == nil {
		return
	}
	ops := y.options.Headers.Response
	if ops.Require != nil && !ops.Require.Match(res.StatusCode, res.Header) {
		return
	}
	ops.ApplyTo(res.Header, r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer))
}

// isLastOnConnection reports whether the HTTP/1 connection must close after the response
// to r. It must close if
//   - the client speaks HTTP/1.0, because a proxy keeps no HTTP/1.0 connection (RFC 9112 §9.3),
//   - the request body was not read to its end, because net/http would look for the next
//     request in the rest of the body,
//   - the body was chunked and net/http has read the head, because net/http does not say whether
//     there was a Content-Length as well, which would require closing (RFC 9112 §6.1).
func isLastOnConnection(r *http.Request, out *origin.Request) bool {
	switch {
	case r.ProtoMajor > 1:
		return false
	case r.ProtoMinor == 0:
		return true
	}
	return out.Body != nil && !out.Body.IsRead(downstream.Serves(r))
}

// wasLast reports whether a response with this header has told an HTTP/1 client that the connection ends.
func wasLast(header http.Header) bool {
	connection := header["Connection"]
	return len(connection) > 0 && connection[0] == "close"
}

// cutOffError reports that a response was cut off after its head had been sent. It is
// an http.ErrAbortHandler, so that the server aborts the client's response too.
type cutOffError struct{ error }

func (e cutOffError) Error() string        { return "the response was cut off: " + e.error.Error() }
func (e cutOffError) Unwrap() error        { return e.error }
func (e cutOffError) Is(target error) bool { return target == http.ErrAbortHandler }

// clientError is a failure to write the response to the client.
type clientError struct{ error }

func (e *clientError) Unwrap() error { return e.error }

// asClientError wraps err, if there is one, as a clientError.
func asClientError(err error) error {
	if err != nil {
		err = &clientError{err}
	}
	return err
}

// hasContent reports whether a response with the given status to the given method may
// have content.
func hasContent(method string, status int) bool {
	return method != http.MethodHead && status != http.StatusNoContent && status != http.StatusNotModified
}

// passContent passes the content of a response on and counts it.
func (p *proxy) passContent(w http.ResponseWriter, r *http.Request, x *origin.Exchange, from clientIdentity) error {
	target := x.Request.Authority // a closure that captured x would move x to the heap
	if x.Body != nil {
		if rest, ok := x.Body.Buffered(); ok {
			if len(rest) == 0 { // some statuses do not allow even an empty write
				return nil
			}
			n, err := w.Write(rest)
			p.countForwarded(target, from, 0, int64(n))
			return asClientError(err)
		}
	}
	client := from // the closure moves what it captures to the heap, which most responses do not need
	return copyBody(w, r, x, func(n int64) { p.countForwarded(target, client, 0, n) })
}

// copyBody copies a response body to the client and calls count for each part. It
// flushes whenever the next read could block.
func copyBody(w http.ResponseWriter, r *http.Request, x *origin.Exchange, count func(n int64)) error {
	res, body := x.Response, x.Body
	isHTTP1 := body != nil
	if !hasContent(r.Method, res.StatusCode) {
		return nil
	}
	if isHTTP1 {
		if err := spliceBody(w, body, count); !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	stall := newStallTimer(w, r)
	defer stall.Stop()
	control, left, unflushed := http.NewResponseController(w), res.ContentLength, true
	read := func(p []byte) (int, error) {
		if unflushed && (!isHTTP1 || !body.Ready()) {
			if err := control.Flush(); err != nil {
				return 0, asClientError(err)
			}
		}
		if unflushed = false; isHTTP1 {
			if err := body.AwaitContent(); err != nil {
				return 0, err
			}
		}
		return res.Body.Read(p)
	}
	write := func(p []byte) error {
		if _, err := w.Write(p); err != nil {
			return asClientError(err)
		}
		count(int64(len(p)))
		left -= int64(len(p))
		unflushed = left != 0
		return nil
	}
	buf := tcpconn.GetBuffer()
	defer buf.Free()
	readErr, writeErr := tcpconn.Copy(buf[:], read, write, tcpconn.Always)
	switch {
	case writeErr != nil:
		return writeErr
	case readErr != io.EOF:
		return readErr
	case res.ContentLength < 0:
		return waitForEnd(w, stall)
	}
	return nil
}

// handlerSendsContinue reports whether the handler must send 100 (Continue) before it reads
// the body. Otherwise net/http would send it with the first read, from the goroutine that
// reads, into a buffer that the handler may be writing to. Over HTTP/2 that is harmless.
func handlerSendsContinue(r *http.Request) bool {
	return r.ProtoMajor != 2 && r.ProtoAtLeast(1, 1) && expectsContinue(r)
}

// passInterim sends an interim response to the client that was received over the given
// HTTP version. It drops the fields of a 100 (Continue), which is meant for one hop, and
// does nothing for clients that speak HTTP/1.0. It must not be called concurrently.
func (p *proxy) passInterim(w http.ResponseWriter, r *http.Request, status int, fields http.Header, major, minor int) {
	if !r.ProtoAtLeast(1, 1) {
		return
	}
	header := w.Header()
	saved := maps.Clone(header)
	clear(header)
	if status != http.StatusContinue {
		removeHopByHop(fields)
		p.via.add(fields, major, minor)
		maps.Copy(header, fields)
	}
	startWriteIdleTimeout(r)
	w.WriteHeader(status)
	clear(header)
	maps.Copy(header, saved)
}
