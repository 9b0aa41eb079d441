// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//lint:file-ignore SA1019 net/http offers no way to ping an HTTP/2 connection, or to ask for its state

package origin

import (
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strings"
	"sync/atomic"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// doHTTP2 sends the request over HTTP/2. If the origin does not speak HTTP/2, it returns
// errNoHTTP2 and has not read the body.
func (x *Exchange) doHTTP2() (*http.Response, error) {
	o, wait := x.Request, newHeadTimer(x.ctx, x.limits.HeaderTimeout)
	x.wait = wait
	interim := &interimQueue{
		write: func(status int, fields http.Header) { o.Interim(status, fields, 2, 0) },
		clock: &wait.headClock,
	}
	defer interim.end()
	out, body := o.overHTTP2(wait, interim)
	transport := x.client.http2.transport
	res, err := transport.RoundTrip(out)
	if err != nil && x.mayRetry(wait.isStale(err), interim.any()) {
		res, err = transport.RoundTrip(out)
	}
	interim.end()
	if errors.Is(err, errNoHTTP2) {
		x.endHTTP2()
		return nil, errNoHTTP2
	}
	if err != nil {
		return nil, http2Failure(err, o, wait, interim)
	}
	wait.stop()
	res.Body = &http2Response{res.Body, body, &contentWait{limits: x.limits, client: o.LimitKey}, func() { wait.cancel(os.ErrDeadlineExceeded) }}
	x.Response = res
	if err := checkHTTP2Head(res); err != nil {
		return nil, err
	}
	return res, nil
}

// endHTTP2 ends a stream.
func (x *Exchange) endHTTP2() {
	if x.Response != nil {
		_ = x.Response.Body.Close()
	}
	x.wait.end()
	x.wait = nil
}

// overHTTP2 returns the request as net/http sends it over HTTP/2, and its body, or nil.
func (o *Request) overHTTP2(wait *headTimer, interim *interimQueue) (out *http.Request, body *http2Body) {
	trace := &httptrace.ClientTrace{GotConn: wait.connected, Got1xxResponse: interim.got1xx}
	out = (&http.Request{
		Method: o.Method, URL: &url.URL{Scheme: "https", Host: o.Authority, Opaque: o.Target},
		Header: maps.Clone(o.Header), Host: o.Host,
	}).WithContext(httptrace.WithClientTrace(wait.ctx, trace))
	if strings.HasPrefix(o.Target, "//") {
		// net/url treats an Opaque that starts with // as an authority. So pass the
		// target in absolute form, from which :path is derived.
		out.URL.Opaque = "//" + o.Host + o.Target
	}
	if o.Body != nil { // a non-nil Body would be sent, and could not be retried
		body = &http2Body{from: o, to: out, wait: wait}
		if o.NeedsContinue {
			body.sendContinue = interim.sendContinue
		}
		out.Body, out.ContentLength = body, o.Body.Length
		for _, name := range o.TrailerNames {
			if out.Trailer == nil {
				out.Trailer = make(http.Header)
			}
			out.Trailer[name] = nil
		}
	}
	delete(out.Header, "Connection")
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header["User-Agent"] = nil // keeps the transport from adding Go's
	}
	return out, body
}

// http2Failure returns why there is no response, of which err, the transport's error, may be
// only a consequence.
func http2Failure(err error, o *Request, wait *headTimer, interim *interimQueue) error {
	if failure := o.Body.failed(); failure != nil {
		return failure
	}
	wrong := interim.error()
	switch {
	case wait.expired():
		return os.ErrDeadlineExceeded
	case wrong != nil:
		return wrong
	case wait.lost():
		return errSilent
	case strings.Contains(err.Error(), "response header list larger"): // the error has no type
		return h1.ErrHeadTooLarge
	}
	return err
}

// checkHTTP2Head returns what is wrong with a response's head, if anything is. It is as
// strict as ReadResponse is with HTTP/1.
func checkHTTP2Head(res *http.Response) error {
	switch {
	case res.StatusCode < 200:
		return h1.ProtocolError("the final response has a 1xx status")
	case h1.CountLines(res.Header) > h1.MaxFields || len(res.Trailer) > h1.MaxFields || h1.CountMembers(res.Header["Connection"]) > h1.MaxFields:
		return h1.ErrTooManyFields
	}
	length, err := h1.NormalizeContentLength(res.Header)
	if length >= 0 && res.ContentLength < 0 { // several equal values
		res.ContentLength = length
	}
	return err
}

// http2Body is the body of a request over HTTP/2, with its trailers.
type http2Body struct {
	from         *Request
	to           *http.Request
	wait         *headTimer
	sendContinue func() // sends 100 (Continue) to the client; nil: the client does not wait for it
	begun        atomic.Bool
	ended        atomic.Bool
}

func (b *http2Body) Read(p []byte) (int, error) {
	if b.wait.setTurn(false); b.sendContinue != nil {
		b.sendContinue()
		b.sendContinue = nil
	}
	b.begun.Store(true)
	n, err := b.from.readBody(p, &b.wait.headClock)
	if err == io.EOF {
		for name := range b.to.Trailer {
			b.to.Trailer[name] = b.from.Trailer[name]
		}
	}
	if err != nil {
		b.ended.Store(true)
	}
	return n, err
}

// Close implements io.Closer. It does nothing: the server closes the client's body.
func (b *http2Body) Close() error { return nil }

// http2Response is the body of a response, which may arrive before the request body is
// complete.
type http2Response struct {
	io.ReadCloser
	request *http2Body // nil: the request has none
	wait    *contentWait
	cancel  func() // aborts the response
}

func (b *http2Response) Read(p []byte) (int, error) {
	return b.wait.read(p, b.ReadCloser.Read, b.cancel)
}

// Close implements io.Closer. It aborts a read of the request body that waits for the
// client, because the transport would wait for it. That must not happen earlier: net/http
// takes an aborted read for a disconnect of the client.
func (b *http2Response) Close() error {
	b.wait.end()
	if b.request != nil && b.request.begun.Load() && !b.request.ended.Load() {
		b.request.from.StopBody()
	}
	return b.ReadCloser.Close()
}
