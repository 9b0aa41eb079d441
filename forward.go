// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// newTransport makes the way to https origins for clients of reach r. Each reach
// has one of its own, as it has its own origins, since a connection that was opened for one client is
// used for others later, and what one may reach another may not.
func newTransport(d *dialer, r reach, timeout time.Duration) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			return d.dial(ctx, r, address)
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

// isProxyRequest reports whether r is to be forwarded: its target is in absolute
// form (RFC 9112 §3.2.2), or in a form that is none, of which forward tells what
// is wrong. Over HTTP/2 and 3 all requests look alike, and only the names of
// this server tell which are for itself.
func (h *Handler) isProxyRequest(r *http.Request) bool {
	if r.ProtoMajor == 1 {
		return r.URL.Host != "" || r.URL.Scheme != "" || !strings.HasPrefix(r.RequestURI, "/")
	}
	if len(h.Hosts) == 0 || r.Method == http.MethodConnect {
		return false
	}
	host, _, _ := cutPort(r.Host)
	return !slices.ContainsFunc(h.Hosts, func(own string) bool { return strings.EqualFold(own, host) })
}

// forward sends a request in absolute form to its origin and the response back.
// It returns the status for the log.
func (h *Handler) forward(w http.ResponseWriter, r *http.Request, from caller) (int, error) {
	out, scheme, err := newOutgoing(r)
	if err != nil {
		return 0, refuse(http.StatusBadRequest, "http_request_error", nil, "This is no request that can be forwarded: %v.", err)
	}
	if maxForwards(r.Method, r.Header) {
		return answerLast(w, r)
	}
	h.setRequestFields(r, from)
	h.applyUp(r, &out.host)
	if out.body != nil {
		control := http.NewResponseController(w)
		out.stopBody = func() { _ = control.SetReadDeadline(time.Unix(1, 0)) }
		if r.ProtoMajor == 1 {
			// The response may come while the body is still being sent.
			if err := control.EnableFullDuplex(); err != nil && !errors.Is(err, http.ErrNotSupported) {
				return 0, caddyhttp.Error(http.StatusInternalServerError, err)
			}
		}
	}
	pool := h.origins[from.reach]
	if scheme == "https" {
		if len(r.Header["Upgrade"]) == 0 {
			return h.forwardTLS(w, r, out, from)
		}
		pool = h.secureOrigins[from.reach] // only HTTP/1 has upgrades
	}

	x := &exchange{
		origins: pool, ctx: r.Context(), timeout: time.Duration(h.ResponseHeaderTimeout),
		interim: func(status int, fields http.Header) { passInterim(w, r, status, fields) },
	}
	defer x.finish(false)
	res, err := x.do(out)
	if err != nil {
		return 0, forwardRefusal(r, err)
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		conn, early := x.take()
		t := h.newTunnel(from, out.authority, "", conn.Conn)
		t.fromTarget = early
		return h.upgrade(w, r, res, t)
	}
	if err := h.respond(w, r, res); err != nil {
		return res.StatusCode, err
	}
	x.finish(res.Body.(*originBody).ended && !res.Close)
	return res.StatusCode, nil
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
	res, err := h.upstreams[from.reach].RoundTrip(out)
	interim.stop()
	if err != nil {
		if failure := body.failure.Load(); failure != nil {
			err = failure
		}
		return 0, forwardRefusal(r, err)
	}
	defer res.Body.Close()
	if res.StatusCode < 200 {
		return 0, forwardRefusal(r, protocolError("the response has a status that ends no exchange"))
	}
	return res.StatusCode, h.respond(w, r, res)
}

// newOutgoing makes the request to the origin out of the client's. Their fields
// are one map, which Caddy has copied for its logs before.
func newOutgoing(r *http.Request) (out *outgoing, scheme string, err error) {
	u := r.URL
	if r.ProtoMajor > 1 {
		u = &url.URL{Scheme: "http", Host: r.Host}
	}
	scheme = strings.ToLower(u.Scheme)
	switch {
	case r.RequestURI == "*":
		return nil, "", errors.New("the target * is for OPTIONS to this server only")
	case scheme == "":
		return nil, "", fmt.Errorf("the target %q is no absolute URL", r.RequestURI)
	case scheme != "http" && scheme != "https":
		return nil, "", fmt.Errorf("the scheme %q is neither http nor https", u.Scheme)
	case u.User != nil:
		return nil, "", errors.New("user names and passwords do not belong into a request's target")
	case strings.Contains(r.RequestURI, "#"):
		return nil, "", errors.New("a fragment does not belong into a request's target")
	}
	host, port, _ := cutPort(u.Host)
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[scheme]
	}
	authority, err := joinTarget(host, port)
	if err != nil {
		return nil, "", err
	}
	out = &outgoing{
		method: r.Method, authority: strings.ToLower(authority), target: originForm(r), host: u.Host,
		header: r.Header, length: r.ContentLength, trailer: r.Trailer,
	}
	if r.ContentLength != 0 {
		out.body = r.Body
	}
	return out, scheme, nil
}

// originForm returns the path and query of r's target exactly as the client
// wrote them.
func originForm(r *http.Request) string {
	target := r.RequestURI
	// A handler before this one may have rewritten the target, and left an
	// origin form.
	if _, rest, found := strings.Cut(target, "://"); found && target[0] != '/' {
		i := strings.IndexAny(rest, "/?")
		if i < 0 {
			i = len(rest)
		}
		target = rest[i:]
	}
	switch {
	case target == "" && r.Method == http.MethodOptions:
		return "*" // RFC 9112 §3.2.4
	case target == "" || target[0] == '?':
		return "/" + target
	}
	return target
}

// setRequestFields makes r's fields those of the message to the next hop.
func (h *Handler) setRequestFields(r *http.Request, from caller) {
	prepareRequest(r.Header, r.ProtoMajor, r.ProtoMinor)
	if h.ForwardedFor == "off" {
		delete(r.Header, "X-Forwarded-For")
		delete(r.Header, "X-Real-Ip")
	} else {
		setForwarded(r.Header, from.peer.Addr(), from.addr, from.trusted)
	}
	h.via.add(r.Header, r.ProtoMajor, r.ProtoMinor)
}

// applyUp makes the configured changes to the fields of a request to an origin,
// of which Host is one.
func (h *Handler) applyUp(r *http.Request, host *string) {
	if h.Headers == nil || h.Headers.Request == nil {
		return
	}
	changed := *r
	changed.Host = *host
	h.Headers.Request.ApplyToRequest(&changed)
	*host = changed.Host
}

// applyDown makes the configured changes to the fields of a response.
func (h *Handler) applyDown(res *http.Response, r *http.Request) {
	if h.Headers == nil || h.Headers.Response == nil {
		return
	}
	ops := h.Headers.Response
	if ops.Require != nil && !ops.Require.Match(res.StatusCode, res.Header) {
		return
	}
	ops.ApplyTo(res.Header, r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer))
}

// respond passes a response on. If it breaks off, the answer to the client is
// to be broken off too, so that nobody takes a part for the whole (RFC 9112 §8).
func (h *Handler) respond(w http.ResponseWriter, r *http.Request, res *http.Response) error {
	header := h.setResponseFields(w, r, res)
	announced := len(res.Trailer)
	if announced > 0 {
		header["Trailer"] = []string{strings.Join(slices.Sorted(maps.Keys(res.Trailer)), ", ")}
		if r.ProtoMajor == 1 {
			delete(header, "Content-Length") // HTTP/2 has both, HTTP/1 only one or the other
		}
	}
	w.WriteHeader(res.StatusCode)
	if err := copyBody(w, res); err != nil {
		if r.Context().Err() == nil {
			err = fmt.Errorf("the response broke off: %w", err)
		}
		return errors.Join(http.ErrAbortHandler, err)
	}
	_ = res.Body.Close() // fills in the trailers
	if len(res.Trailer) == 0 {
		return nil
	}
	_ = http.NewResponseController(w).Flush() // puts an empty body into chunks, behind which trailers can be
	for name, values := range res.Trailer {
		if len(res.Trailer) != announced {
			name = http.TrailerPrefix + name
		}
		header[name] = values
	}
	return nil
}

// setResponseFields makes the fields of the answer those of res.
func (h *Handler) setResponseFields(w http.ResponseWriter, r *http.Request, res *http.Response) http.Header {
	removeHopByHop(res.Header)
	h.via.add(res.Header, res.ProtoMajor, res.ProtoMinor)
	h.applyDown(res, r)
	header := w.Header()
	// What Caddy says of itself is not true of the origin, and net/http is not
	// to guess at a type.
	delete(header, "Server")
	delete(header, "Alt-Svc")
	header["Content-Type"] = nil
	maps.Copy(header, res.Header)
	return header
}

const copyBuffer = 32 << 10

// copyBuffers are what bodies are copied through.
var copyBuffers = sync.Pool{New: func() any { return new([copyBuffer]byte) }}

// copyBody copies the body of a response, and flushes what has come whenever
// there may be a wait for more.
func copyBody(w http.ResponseWriter, res *http.Response) error {
	body, own := res.Body.(*originBody)
	if own {
		if rest, ok := body.rest(); ok {
			_, err := w.Write(rest)
			return err
		}
		if done, err := body.splice(w); done || err != nil {
			return err
		}
	}
	control := http.NewResponseController(w)
	if !own || body.r.Buffered() == 0 {
		if err := control.Flush(); err != nil {
			return err
		}
	}
	buf := copyBuffers.Get().(*[copyBuffer]byte)
	defer copyBuffers.Put(buf)
	left := res.ContentLength
	for {
		n, err := res.Body.Read(buf[:])
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			if left -= int64(n); err == nil && left != 0 && (!own || body.r.Buffered() == 0) {
				if err := control.Flush(); err != nil {
					return err
				}
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// upgrade joins a client and an origin that has agreed to speak another
// protocol on the connection (RFC 9110 §7.8).
func (h *Handler) upgrade(w http.ResponseWriter, r *http.Request, res *http.Response, t *tunnel) (int, error) {
	if len(r.Header["Upgrade"]) == 0 {
		_ = t.far.Close()
		return 0, forwardRefusal(r, protocolError("the protocol was changed without having been asked for"))
	}
	if f := h.tunnels.admit(t.bucket, h.MaxTunnels, h.MaxTunnelsPerClient); f != nil {
		_ = t.far.Close()
		return 0, f
	}
	protocol := res.Header["Upgrade"]
	header := h.setResponseFields(w, r, res)
	delete(header, "Content-Type")
	header["Connection"] = []string{"Upgrade"}
	header["Upgrade"] = protocol
	conn, early, err := hijack(w)
	if err != nil {
		_ = t.far.Close()
		h.tunnels.leave(t.bucket)
		return 0, caddyhttp.Error(http.StatusInternalServerError, err)
	}
	recordStatus(w, http.StatusSwitchingProtocols)
	var head bytes.Buffer
	head.WriteString("HTTP/1.1 101 Switching Protocols\r\n")
	_ = header.Write(&head)
	head.WriteString("\r\n")
	head.Write(t.fromTarget)
	t.proto = strings.Join(protocol, ", ")
	t.near, t.early, t.greeting, t.fromTarget = newConnPeer(conn), early, head.Bytes(), nil
	go t.run()
	return http.StatusSwitchingProtocols, nil
}

// answerLast answers a request that Max-Forwards lets go no further.
func answerLast(w http.ResponseWriter, r *http.Request) (int, error) {
	if r.Method == http.MethodOptions {
		w.Header()["Allow"] = []string{"CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, TRACE"}
		w.Header()["Content-Length"] = []string{"0"}
		w.WriteHeader(http.StatusOK)
		return http.StatusOK, nil
	}
	if r.ContentLength != 0 {
		return 0, refuse(http.StatusBadRequest, "http_request_error", nil, "A TRACE request has no content, this one announces some.")
	}
	// RFC 9110 §9.3.8: the request as it was received, without what is secret.
	for _, name := range []string{"Authorization", "Cookie", "Proxy-Authorization"} {
		delete(r.Header, name)
	}
	w.Header()["Content-Type"] = []string{"message/http"}
	w.WriteHeader(http.StatusOK)
	_, _ = fmt.Fprintf(w, "TRACE %s %s\r\nHost: %s\r\n", r.RequestURI, r.Proto, r.Host)
	_ = r.Header.Write(w)
	_, _ = io.WriteString(w, "\r\n")
	return http.StatusOK, nil
}

// passOn hands a request that is not for the proxy to the next handler.
func (h *Handler) passOn(w http.ResponseWriter, r *http.Request, from caller, next caddyhttp.Handler) (int, error) {
	if from.trusted {
		// A reverse_proxy appends the peer itself.
		prior := r.Header["X-Forwarded-For"]
		h.setRequestFields(r, from)
		if h.ForwardedFor != "off" && len(prior) > 0 {
			r.Header["X-Forwarded-For"] = prior
		}
	} else {
		h.setRequestFields(r, from)
	}
	recorder := &statusRecorder{ResponseWriterWrapper: caddyhttp.ResponseWriterWrapper{ResponseWriter: w}}
	err := next.ServeHTTP(recorder, r)
	return recorder.status, err
}

// statusRecorder notes the status for the log. Unlike Caddy's recorders it does
// not stand between a connection that is taken over and its socket.
type statusRecorder struct {
	caddyhttp.ResponseWriterWrapper
	status int
}

func (w *statusRecorder) WriteHeader(status int) {
	if w.status < 200 {
		w.status = status
	}
	w.ResponseWriterWrapper.WriteHeader(status)
}

func (w *statusRecorder) Write(p []byte) (int, error) {
	w.wroteBody()
	return w.ResponseWriterWrapper.Write(p)
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

// passInterim passes a 1xx response on.
func passInterim(w http.ResponseWriter, r *http.Request, status int, fields http.Header) {
	// HTTP/1.0 has none. 100 is between each two neighbours: net/http sends the
	// client its own as soon as the body is read.
	if !r.ProtoAtLeast(1, 1) || status == http.StatusContinue {
		return
	}
	header := w.Header()
	saved := maps.Clone(header)
	clear(header)
	removeHopByHop(fields)
	maps.Copy(header, fields)
	w.WriteHeader(status)
	clear(header)
	maps.Copy(header, saved)
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

// forwardRefusal says to the client why there is no response from the origin.
func forwardRefusal(r *http.Request, err error) *refusal {
	host := r.Host
	var (
		body     *bodyError
		dial     *dialError
		op       *net.OpError
		record   tls.RecordHeaderError
		cert     *tls.CertificateVerificationError
		timeout  net.Error
		answered = "%s did not answer with a valid HTTP response"
	)
	switch {
	case r.Context().Err() != nil:
		return refuse(statusClientClosedRequest, "connection_terminated", context.Cause(r.Context()), "the client left")
	case errors.As(err, &body) && errors.Is(body, os.ErrDeadlineExceeded):
		return refuse(http.StatusRequestTimeout, "http_request_error", err, "The content of the request did not arrive in time.")
	case errors.As(err, &body):
		return refuse(http.StatusBadRequest, "http_request_error", err, "The content of the request is broken off or malformed.")
	case errors.As(err, &dial), errors.As(err, &op) && op.Op == "dial":
		return dialRefusal(r.Context(), err, host)
	case errors.As(err, &cert):
		return refuse(http.StatusBadGateway, "tls_certificate_error", err, "The certificate of %s is not trusted.", host)
	case errors.As(err, &record):
		return refuse(http.StatusBadGateway, "tls_protocol_error", err, "%s does not speak TLS.", host)
	case errors.Is(err, errHeadTooLarge):
		return refuse(http.StatusBadGateway, "http_response_header_section_size", err, answered+": its head is too large.", host)
	case errors.As(err, &timeout) && timeout.Timeout():
		return refuse(http.StatusGatewayTimeout, "http_response_timeout", err, "%s did not answer in time.", host)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return refuse(http.StatusBadGateway, "http_response_incomplete", err, "%s closed the connection before its response was complete.", host)
	default:
		return refuse(http.StatusBadGateway, "http_protocol_error", err, answered+".", host)
	}
}
