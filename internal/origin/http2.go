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
	if o.Body != nil {
		x.content = newBodyReader(o, &wait.headClock, interim.sendContinue)
	}
	out := x.overHTTP2(interim)
	res, err := x.roundTrip(out, interim)
	if err != nil && x.mayRetry(err, wait.reused.Load(), interim.any()) {
		res, err = x.roundTrip(out, interim)
	}
	interim.end()
	if err == errNoHTTP2 {
		x.endHTTP2()
	}
	if err != nil {
		return nil, err
	}
	wait.stop()
	res.Body = &http2Response{res.Body, x.content, &contentWait{limits: x.limits, client: o.LimitKey}, func() { wait.cancel(os.ErrDeadlineExceeded) }}
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
	if x.content != nil {
		x.content.stop()
		x.content = nil
	}
}

// overHTTP2 returns the request as net/http sends it over HTTP/2.
func (x *Exchange) overHTTP2(interim *interimQueue) *http.Request {
	o := x.Request
	trace := &httptrace.ClientTrace{GotConn: x.wait.connected, Got1xxResponse: interim.got1xx}
	out := (&http.Request{
		Method: o.Method, URL: &url.URL{Scheme: "https", Host: o.Authority, Opaque: o.Target},
		Header: maps.Clone(o.Header), Host: o.Host,
	}).WithContext(httptrace.WithClientTrace(x.wait.ctx, trace))
	if strings.HasPrefix(o.Target, "//") {
		// net/url treats an Opaque that starts with // as an authority. So pass the
		// target in absolute form, from which :path is derived.
		out.URL.Opaque = "//" + o.Host + o.Target
	}
	if x.content != nil { // a non-nil Body would be sent, and could not be retried
		out.Body = io.NopCloser(x.content) // the server closes the client's body
		out.ContentLength, out.Trailer = o.Body.Length, x.content.trailer
	}
	delete(out.Header, "Connection")
	if _, ok := out.Header["User-Agent"]; !ok {
		out.Header["User-Agent"] = nil // keeps the transport from adding Go's
	}
	return out
}

// roundTrip sends a request. If there is no response, it returns the reason, of which the
// transport's error may be only a consequence.
func (x *Exchange) roundTrip(out *http.Request, interim *interimQueue) (*http.Response, error) {
	res, err := x.client.http2.transport.RoundTrip(out)
	if err == nil {
		return res, nil
	}
	if failure := x.content.failure(x.ctx.Err() != nil); failure != nil {
		return nil, failure
	}
	wrong := interim.error()
	switch {
	case errors.Is(err, errNoHTTP2):
		return nil, errNoHTTP2
	case x.wait.expired():
		return nil, os.ErrDeadlineExceeded
	case wrong != nil:
		return nil, wrong
	case x.wait.lost():
		return nil, errSilent
	case strings.Contains(err.Error(), "response header list larger"): // the error has no type
		return nil, h1.ErrHeadTooLarge
	}
	return nil, err
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

// http2Response is the body of a response, which may arrive before the request body is
// complete.
type http2Response struct {
	io.ReadCloser
	content *bodyReader // of the request; nil: it has none
	wait    *contentWait
	cancel  func() // aborts the response
}

func (b *http2Response) Read(p []byte) (int, error) {
	return b.wait.read(p, b.ReadCloser.Read, b.cancel)
}

// Close implements io.Closer. It stops the reading of the request body, because the transport
// would wait for that.
func (b *http2Response) Close() error {
	b.wait.end()
	if b.content != nil {
		b.content.stop()
	}
	return b.ReadCloser.Close()
}
