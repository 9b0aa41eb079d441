// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// newTransport makes the way to https origins for clients of one reach, like
// origins.
func newTransport(dial dialFunc, timeout time.Duration) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			conn, err := dial(ctx, address)
			if err != nil {
				return nil, &dialError{err}
			}
			return conn, nil
		},
		// What is not asked for is not added, such as compression, and the
		// environment has no say in where requests go.
		Proxy:              nil,
		DisableCompression: true,

		ForceAttemptHTTP2:      true,
		TLSHandshakeTimeout:    10 * time.Second,
		ResponseHeaderTimeout:  timeout,
		ExpectContinueTimeout:  continueTimeout,
		MaxResponseHeaderBytes: maxHead,
		// As many idle connections to an origin as there were busy ones, up to
		// a bound for all origins together.
		MaxIdleConns:        maxIdleOrigins,
		MaxIdleConnsPerHost: maxIdleOrigins,
		IdleConnTimeout:     maxIdleTime,
		ReadBufferSize:      16 << 10,
	}
}

// forwardTLS is forward for an https origin, which may speak HTTP/2. That is
// for http.Transport: the way to it is nothing that clients do often, as they
// use CONNECT.
func (h *Handler) forwardTLS(w http.ResponseWriter, r *http.Request, o *outgoing, from caller) (int, error) {
	interim := &interimResponses{w: w, r: r}
	ctx := httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{Got1xxResponse: interim.pass})
	out := r.WithContext(ctx) // shares the trailers, which come after the body
	out.URL = &url.URL{Scheme: "https", Host: o.authority, Opaque: o.target}
	if strings.HasPrefix(o.target, "//") {
		// net/url takes an Opaque that starts with // for an authority, so the
		// target goes in absolute form, which every server must accept.
		out.URL.Opaque = "//" + o.host + o.target
	}
	out.Host, out.RequestURI, out.Close = o.host, "", false
	body := &tlsBody{r: o.body}
	if out.Body = body; o.body == nil {
		out.Body = nil // else it would be sent in chunks, and never again
	}
	delete(r.Header, "Connection") // http.Transport's own affair
	if _, ok := r.Header["User-Agent"]; !ok {
		r.Header["User-Agent"] = nil // else Go puts its own
	}
	start := time.Now()
	res, err := h.upstreams[from.reach].RoundTrip(out)
	interim.stop()
	if err != nil {
		if failure := body.failure.Load(); failure != nil {
			err = failure
		}
		return 0, forwardRefusal(r, err)
	}
	metrics.responses.Observe(time.Since(start).Seconds())
	defer res.Body.Close()
	if res.StatusCode < 200 {
		return 0, forwardRefusal(r, protocolError("the response has a status that ends no exchange"))
	}
	return res.StatusCode, h.respond(w, r, res, from)
}

// interimResponses passes on what http.Transport reports from a goroutine of
// its own, until the handler does not wait for it any more.
type interimResponses struct {
	w    http.ResponseWriter
	r    *http.Request
	mu   sync.Mutex
	done bool
}

func (i *interimResponses) pass(status int, fields textproto.MIMEHeader) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.done {
		passInterim(i.w, i.r, status, http.Header(fields))
	}
	return nil
}

func (i *interimResponses) stop() {
	i.mu.Lock()
	i.done = true
	i.mu.Unlock()
}

// tlsBody remembers whether it was the client that failed to send a body.
type tlsBody struct {
	r       io.Reader
	failure atomic.Pointer[bodyError]
}

func (b *tlsBody) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && err != io.EOF {
		b.failure.Store(&bodyError{err})
	}
	return n, err
}

func (b *tlsBody) Close() error { return nil } // the server's to close
