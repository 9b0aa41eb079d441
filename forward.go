// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// newTransport makes the way to origins for clients of reach r. Each reach has
// a transport of its own, since a connection that was opened for one client is
// used for others later, and what one may reach another may not.
func newTransport(d *dialer, r reach) *http.Transport {
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
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 1 << 20,
		// As many idle connections to an origin as there were busy ones, up to
		// a bound for all origins together.
		MaxIdleConns:        4096,
		MaxIdleConnsPerHost: 4096,
		IdleConnTimeout:     90 * time.Second,
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
	target, err := originTarget(r)
	if err != nil {
		return 0, refuse(http.StatusBadRequest, "http_request_error", nil, "This is no request that can be forwarded: %v.", err)
	}
	if maxForwards(r.Method, r.Header) {
		return answerLast(w, r)
	}
	if r.ContentLength != 0 && r.ProtoMajor == 1 {
		// The response may come while the body is still being sent.
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return 0, caddyhttp.Error(http.StatusInternalServerError, err)
		}
	}

	interim := &interimResponses{w: w, skip: !r.ProtoAtLeast(1, 1)}
	body := &requestBody{ReadCloser: r.Body}
	out := h.outgoing(r, from, target, interim, body)
	res, err := h.upstreams[from.reach].RoundTrip(out)
	interim.stop()
	if err != nil {
		return 0, h.forwardRefusal(r, err, body)
	}
	defer res.Body.Close()
	if res.StatusCode < 200 && res.StatusCode != http.StatusSwitchingProtocols {
		return 0, refuse(http.StatusBadGateway, "http_protocol_error", nil, "%s answered with the status %d, which ends no exchange.", r.Host, res.StatusCode)
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		return h.upgrade(w, r, out, res, from)
	}
	h.respond(w, res)
	return res.StatusCode, nil
}

// originTarget returns the URL of r's origin, whose Opaque holds the path and
// query exactly as the client wrote them.
func originTarget(r *http.Request) (*url.URL, error) {
	u := r.URL
	if r.ProtoMajor > 1 {
		u = &url.URL{Scheme: "http", Host: r.Host}
	}
	scheme := strings.ToLower(u.Scheme)
	switch {
	case r.RequestURI == "*":
		return nil, errors.New("the target * is for OPTIONS to this server only")
	case scheme == "":
		return nil, fmt.Errorf("the target %q is no absolute URL", r.RequestURI)
	case scheme != "http" && scheme != "https":
		return nil, fmt.Errorf("the scheme %q is neither http nor https", u.Scheme)
	case u.User != nil:
		return nil, errors.New("user names and passwords do not belong into a request's target")
	case strings.Contains(r.RequestURI, "#"):
		return nil, errors.New("a fragment does not belong into a request's target")
	}
	host, port, found := cutPort(u.Host)
	if !found || port == "" {
		port = map[string]string{"http": "80", "https": "443"}[scheme]
	}
	authority, err := joinTarget(host, port)
	if err != nil {
		return nil, err
	}
	out := &url.URL{Scheme: scheme, Host: authority}
	raw := pathAndQuery(r)
	switch {
	case raw == "" && r.Method == http.MethodOptions:
		out.Opaque = "*" // RFC 9112 §3.2.4
	case raw == "" || raw[0] == '?':
		out.Opaque = "/" + raw
	case strings.HasPrefix(raw, "//"):
		// net/url takes an Opaque that starts with // for an authority, so the
		// target stays in absolute form, which every server must accept.
		out.Opaque = "//" + u.Host + raw
	default:
		out.Opaque = raw
	}
	return out, nil
}

// pathAndQuery returns what follows the authority in r's target. A handler
// before this one may have rewritten the target, and leaves an origin form.
func pathAndQuery(r *http.Request) string {
	_, rest, found := strings.Cut(r.RequestURI, "://")
	if !found || strings.HasPrefix(r.RequestURI, "/") {
		return r.RequestURI
	}
	if i := strings.IndexAny(rest, "/?"); i >= 0 {
		return rest[i:]
	}
	return ""
}

// outgoing makes the request to the origin out of the client's. Their fields
// are one map, which Caddy has copied for its logs before.
func (h *Handler) outgoing(r *http.Request, from caller, target *url.URL, interim *interimResponses, body *requestBody) *http.Request {
	ctx := httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{Got1xxResponse: interim.pass})
	out := r.WithContext(ctx) // shares the trailers, which come after the body
	out.URL = target
	out.Host = r.Host // the target's authority, whatever the Host field said
	out.RequestURI = ""
	out.Close = false
	out.Body = body
	if r.ContentLength == 0 {
		out.Body = nil // else it would be sent as chunks, and never be retried
	}
	h.setRequestFields(r, from)
	if _, ok := r.Header["User-Agent"]; !ok {
		r.Header["User-Agent"] = nil // else Go puts its own
	}
	return out
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

// respond passes a response on. If it breaks off, the client's is broken off
// too, so that nobody takes a part for the whole (RFC 9112 §8).
func (h *Handler) respond(w http.ResponseWriter, res *http.Response) {
	header := h.setResponseFields(w, res)
	announced := len(res.Trailer)
	if announced > 0 {
		header["Trailer"] = []string{strings.Join(slices.Sorted(maps.Keys(res.Trailer)), ", ")}
	}
	w.WriteHeader(res.StatusCode)
	stream := res.ContentLength < 0 || isEventStream(res.Header)
	if err := copyBody(w, res, stream); err != nil {
		panic(http.ErrAbortHandler)
	}
	_ = res.Body.Close() // fills in the trailers
	if len(res.Trailer) == 0 {
		return
	}
	_ = http.NewResponseController(w).Flush() // makes the body chunked, if it was empty
	for name, values := range res.Trailer {
		if len(res.Trailer) != announced {
			name = http.TrailerPrefix + name
		}
		header[name] = values
	}
}

// setResponseFields makes the fields of the answer those of res.
func (h *Handler) setResponseFields(w http.ResponseWriter, res *http.Response) http.Header {
	removeHopByHop(res.Header)
	h.via.add(res.Header, res.ProtoMajor, res.ProtoMinor)
	header := w.Header()
	// What Caddy says of itself is not true of the origin, and net/http is not
	// to guess at a type.
	delete(header, "Server")
	delete(header, "Alt-Svc")
	header["Content-Type"] = nil
	maps.Copy(header, res.Header)
	return header
}

// copyBuffers are what bodies are copied through.
var copyBuffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// copyBody copies the body of a response and flushes what has come whenever
// there may be a wait for more.
func copyBody(w http.ResponseWriter, res *http.Response, stream bool) error {
	control := http.NewResponseController(w)
	if stream {
		if err := control.Flush(); err != nil {
			return err
		}
	}
	buf := copyBuffers.Get().(*[32 << 10]byte)
	defer copyBuffers.Put(buf)
	var written int64
	for {
		n, err := res.Body.Read(buf[:])
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			written += int64(n)
			if stream || written < res.ContentLength {
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

// isEventStream reports whether a response is one of server-sent events, which
// are of use only as long as they are fresh.
func isEventStream(h http.Header) bool {
	kind, _, _ := mime.ParseMediaType(h.Get("Content-Type"))
	return kind == "text/event-stream"
}

// upgrade joins a client and an origin that has agreed to speak another
// protocol on the connection (RFC 9110 §7.8).
func (h *Handler) upgrade(w http.ResponseWriter, r, out *http.Request, res *http.Response, from caller) (int, error) {
	far, ok := res.Body.(io.ReadWriteCloser)
	if !ok || len(out.Header["Upgrade"]) == 0 {
		return 0, refuse(http.StatusBadGateway, "http_upgrade_failed", nil, "%s changed the protocol without having been asked to.", r.Host)
	}
	bucket := h.limiter.client(from.addr)
	if f := h.tunnels.admit(bucket, h.MaxTunnels, h.MaxTunnelsPerClient); f != nil {
		return 0, f
	}
	protocol := res.Header["Upgrade"]
	header := h.setResponseFields(w, res)
	header["Connection"] = []string{"Upgrade"}
	header["Upgrade"] = protocol
	delete(header, "Content-Type")

	conn, early, err := hijack(w)
	if err != nil {
		h.tunnels.leave(bucket)
		return 0, caddyhttp.Error(http.StatusInternalServerError, err)
	}
	var head strings.Builder
	head.WriteString("HTTP/1.1 101 Switching Protocols\r\n")
	_ = header.Write(&head)
	head.WriteString("\r\n")
	recordStatus(w, http.StatusSwitchingProtocols)
	t := h.newTunnel(from, out.URL.Host, strings.Join(protocol, ", "), nil)
	t.near, t.far, t.early, t.greeting = newConnPeer(conn), upgradedPeer{far}, early, []byte(head.String())
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

// interimResponses passes 1xx responses on. It is called by the goroutine that
// reads from the origin, so it must know when the handler does not wait for it
// any more.
type interimResponses struct {
	mu   sync.Mutex
	w    http.ResponseWriter
	skip bool // HTTP/1.0 has none
	done bool
}

func (i *interimResponses) pass(code int, fields textproto.MIMEHeader) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	// 100 is between each two neighbours: net/http sends the client its own as
	// soon as the body is read.
	if i.done || i.skip || code == http.StatusContinue {
		return nil
	}
	header := i.w.Header()
	saved := maps.Clone(header)
	clear(header)
	interim := http.Header(fields)
	removeHopByHop(interim)
	maps.Copy(header, interim)
	i.w.WriteHeader(code)
	clear(header)
	maps.Copy(header, saved)
	return nil
}

func (i *interimResponses) stop() {
	i.mu.Lock()
	i.done = true
	i.mu.Unlock()
}

// requestBody remembers whose fault it is when a body breaks off.
type requestBody struct {
	io.ReadCloser
	mu  sync.Mutex
	err error
}

func (b *requestBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		b.mu.Lock()
		b.err = err
		b.mu.Unlock()
	}
	return n, err
}

func (b *requestBody) failure() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// forwardRefusal says to the client why there is no response from the origin.
func (h *Handler) forwardRefusal(r *http.Request, err error, body *requestBody) *refusal {
	host := r.Host
	var opErr *net.OpError
	var record tls.RecordHeaderError
	var cert *tls.CertificateVerificationError
	var unknown x509.UnknownAuthorityError
	broken := body.failure()
	switch {
	case r.Context().Err() != nil:
		return refuse(statusClientClosedRequest, "connection_terminated", context.Cause(r.Context()), "the client left")
	case errors.Is(broken, os.ErrDeadlineExceeded):
		return refuse(http.StatusRequestTimeout, "http_request_error", broken, "The content of the request did not arrive in time.")
	case broken != nil:
		return refuse(http.StatusBadRequest, "http_request_error", broken, "The content of the request is broken off or malformed.")
	case errors.As(err, &opErr) && opErr.Op == "dial":
		return dialRefusal(r.Context(), err, host)
	case errors.As(err, &cert), errors.As(err, &unknown):
		return refuse(http.StatusBadGateway, "tls_certificate_error", err, "The certificate of %s is not trusted.", host)
	case errors.As(err, &record):
		return refuse(http.StatusBadGateway, "tls_protocol_error", err, "%s does not speak TLS.", host)
	case errors.Is(err, os.ErrDeadlineExceeded), isTimeout(err):
		return refuse(http.StatusGatewayTimeout, "http_response_timeout", err, "%s did not answer in time.", host)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return refuse(http.StatusBadGateway, "http_response_incomplete", err, "%s closed the connection before its response was complete.", host)
	default:
		return refuse(http.StatusBadGateway, "http_protocol_error", err, "%s did not answer with a valid HTTP response.", host)
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}
