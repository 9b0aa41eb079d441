// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// passOn hands a request that is not for the proxy to the next handler.
func (p *proxy) passOn(w http.ResponseWriter, r *http.Request, from clientIdentity, next caddyhttp.Handler) (int, error) {
	prior := r.Header["X-Forwarded-For"]
	p.setRequestFields(r, from)
	if from.trusted && from.policy.options.ForwardedFor != "off" {
		// The next handler, if it is reverse_proxy, appends the peer itself.
		if r.Header["X-Forwarded-For"] = prior; len(prior) == 0 {
			delete(r.Header, "X-Forwarded-For")
		}
	}
	recorder := &statusRecorder{ResponseWriterWrapper: caddyhttp.ResponseWriterWrapper{ResponseWriter: w}, r: r}
	err := next.ServeHTTP(recorder, r)
	if err == nil && recorder.status == 0 {
		return 0, p.noHandlerRefusal(r)
	}
	return recorder.status, err
}

// errNoHandler reports that no handler responded to a request for this server.
var errNoHandler = errors.New("no handler answered this request for the server itself")

// errNoHosts is errNoHandler for a request that may have been meant for the proxy.
var errNoHosts = errors.New("no handler answered; over HTTP/2 and HTTP/3, the proxy can tell its requests from requests for this server only if the option hosts is set")

// noHandlerRefusal returns the response to a request that no handler responded to. Caddy would
// send an empty 200. A client would take that for the response of the site that it
// requested, or, after an extended CONNECT, for the start of the other protocol (RFC 8441
// §5).
func (p *proxy) noHandlerRefusal(r *http.Request) *refusal {
	switch {
	case isExtendedConnect(r):
		return causeNoProtocol.refusal(nil)
	case r.ProtoMajor > 1 && len(p.config.Hosts) == 0:
		f := causeNoHosts.refusal(errNoHosts, r.ProtoMajor)
		f.setup = true
		return f
	}
	f := causeNoHandler.refusal(errNoHandler)
	f.setup = true
	return f
}

// statusRecorder records the status of a response; 0 if there is none. Unlike Caddy's
// recorders it does not wrap a hijacked connection.
type statusRecorder struct {
	caddyhttp.ResponseWriterWrapper
	r      *http.Request // whose write timeout starts with the response; nil: none does
	status int
}

func (w *statusRecorder) WriteHeader(status int) {
	if w.status < 200 {
		w.status = status
	}
	if w.r != nil {
		startWriteIdleTimeout(w.r)
	}
	w.ResponseWriterWrapper.WriteHeader(status)
}

func (w *statusRecorder) Write(p []byte) (int, error) {
	w.wroteBody()
	return w.ResponseWriterWrapper.Write(p)
}

// FlushError implements the flushing of http.ResponseController.
func (w *statusRecorder) FlushError() error {
	w.wroteBody()
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Hijack implements http.Hijacker. The hijacker writes the response itself.
func (w *statusRecorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err == nil && w.status == 0 {
		w.status = http.StatusSwitchingProtocols
	}
	return conn, buffered, err
}

func (w *statusRecorder) ReadFrom(r io.Reader) (int64, error) {
	w.wroteBody()
	return w.ResponseWriterWrapper.ReadFrom(r)
}

func (w *statusRecorder) wroteBody() {
	if w.status < 200 {
		w.status = http.StatusOK
	}
}
