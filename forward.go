// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// isProxyRequest reports whether r should be forwarded. Over HTTP/1 that is a
// request whose target is in absolute form (RFC 9112 §3.2.2), or is malformed, which
// forward then reports. Over HTTP/2 and 3 all requests look alike: those for one of
// this server's own names are not forwarded.
func (p *proxy) isProxyRequest(r *http.Request) bool {
	if r.ProtoMajor == 1 {
		return r.URL.Host != "" || r.URL.Scheme != "" || !strings.HasPrefix(r.RequestURI, "/")
	}
	if len(p.config.Hosts) == 0 || r.Method == http.MethodConnect {
		return false
	}
	host, _, _ := hostport.Split(r.Host)
	return !slices.ContainsFunc(p.config.Hosts, func(name string) bool { return strings.EqualFold(name, host) })
}

// errHostByHeaderUp is logged for the operator, whose config is at fault.
var errHostByHeaderUp = errors.New("header_up produces an invalid Host field")

// forward sends a request in absolute form to its origin and the response back.
// It returns the status for the log.
func (p *proxy) forward(w http.ResponseWriter, r *http.Request, from clientIdentity) (int, error) {
	out, err := newOutgoing(r)
	if err != nil {
		return 0, causeTarget.refusal(nil, err)
	}
	if h1.CountLines(r.Header) > h1.MaxFields {
		return 0, causeHeaderLines.refusal(nil, h1.MaxFields)
	}
	if maxForwards(r.Method, r.Header) {
		return answerMaxForwards(w, r)
	}
	requestedHost := out.Host
	if err := p.prepareOutgoing(w, r, out, from); err != nil {
		return 0, err
	}
	y := from.policy
	client := y.origins[from.reach]
	if y.parentOrigins != nil && !out.OverTLS && y.dialer.UsesParent(out.Authority) {
		if err := y.dialer.CheckForParent(r.Context(), from.reach, out.Authority); err != nil {
			return 0, dialRefusal(r.Context(), err, r.Host)
		}
		if f := refuseEcho(y.dialer.Parent, out); f != nil {
			return 0, f
		}
		readdress(y.dialer.Parent, out, requestedHost)
		client = y.parentOrigins
	}
	return p.forwardTo(client, w, r, out, from)
}

// prepareOutgoing makes the request to the next hop out of the client's: its fields, and
// what reading its body does.
func (p *proxy) prepareOutgoing(w http.ResponseWriter, r *http.Request, out *origin.Request, from clientIdentity) error {
	out.NeedsContinue = out.Body != nil && handlerSendsContinue(r)
	p.setRequestFields(r, from)
	from.policy.applyUp(r, &out.Host)
	if !httpguts.ValidHostHeader(out.Host) {
		return causeHostField.refusal(errHostByHeaderUp)
	}
	out.LimitKey, out.ClientAddr, out.User, out.ClientConn = from.limitKey, from.addr, from.user, clientConnection(w, r)
	out.Interim = func(status int, fields http.Header, major, minor int) {
		p.passInterim(w, r, status, fields, major, minor)
	}
	if out.Body == nil {
		return nil
	}
	out.Body.Count = func(n int64) { p.countForwarded(out.Authority, from, n, 0) }
	control := http.NewResponseController(w)
	out.StopBody = func() { tcpconn.Interrupt(control.SetReadDeadline) }
	if r.ProtoMajor == 1 {
		// The response may arrive while the request body is still being sent.
		if err := control.EnableFullDuplex(); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return caddyhttp.Error(http.StatusInternalServerError, err)
		}
	}
	return nil
}

// forwardTo sends a request through client and passes the response on.
func (p *proxy) forwardTo(client *origin.Client, w http.ResponseWriter, r *http.Request, out *origin.Request, from clientIdentity) (int, error) {
	reserved := len(r.Header["Upgrade"]) > 0 // a tunnel, which an upgraded request becomes
	if reserved {
		if err := from.policy.admitTunnel(from.limitKey); err != nil {
			return 0, tunnelRefusal(err)
		}
	}
	defer func() {
		if reserved {
			from.policy.releaseTunnel(from.limitKey)
		}
	}()
	x := client.NewExchange(r.Context(), out)
	defer x.Close()
	res, err := awaitHead(r, x, client == from.policy.parentOrigins)
	if err != nil {
		return 0, err
	}
	program.status.Served(out.Authority)
	if res.StatusCode == http.StatusSwitchingProtocols {
		conn, early, err := x.Detach()
		if err != nil {
			return 0, forwardRefusal(r, err)
		}
		t := p.newTunnel(from, out.Authority, "", conn)
		t.TargetPrefix = early
		status, err := from.policy.upgrade(w, r, res, t)
		reserved = reserved && err != nil // on success the tunnel itself leaves when it ends
		return status, err
	}
	if reserved {
		from.policy.releaseTunnel(from.limitKey)
		reserved = false
	}
	if err := p.respond(w, r, x, from); err != nil {
		return res.StatusCode, err
	}
	if x.Finish(); x.Body != nil && isLastOnConnection(r, out) {
		p.closeInStages(w, r, from.addr)
	}
	return res.StatusCode, nil
}

// awaitHead sends a request and returns the head of the final response. It refuses
// responses that are not for the client.
func awaitHead(r *http.Request, x *origin.Exchange, viaParent bool) (*http.Response, error) {
	start := time.Now()
	res, err := x.Do()
	if err != nil {
		return nil, forwardRefusal(r, err)
	}
	program.metrics.ResponseHead(time.Since(start))
	switch {
	case res.StatusCode != http.StatusProxyAuthRequired:
		return res, nil
	case viaParent: // it rejected this proxy's credentials, and the client has none for it
		return nil, dialRefusal(r.Context(), &egress.ParentError{Phase: egress.ParentAnswering, Status: res.StatusCode, Header: res.Header, Err: errors.New("it asks for credentials")}, r.Host)
	}
	return nil, forwardRefusal(r, errOriginSent407)
}

// newOutgoing derives the request to the origin from the client's. Both share one
// header map; Caddy has already copied it for its logs.
func newOutgoing(r *http.Request) (*origin.Request, error) {
	u := r.URL
	if r.ProtoMajor > 1 {
		u = &url.URL{Scheme: "http", Host: r.Host} // net/http does not expose :scheme
	}
	scheme := strings.ToLower(u.Scheme)
	switch {
	case r.RequestURI == "*" && (r.ProtoMajor == 1 || r.Method != http.MethodOptions): // over HTTP/2 and 3, OPTIONS * means an empty path
		return nil, errors.New("the target * is for OPTIONS to this server only")
	case scheme == "":
		return nil, errors.New("its target is not an absolute URL")
	case scheme != "http" && scheme != "https":
		return nil, fmt.Errorf("the scheme %q is neither http nor https", u.Scheme)
	case u.User != nil:
		return nil, errors.New("user names and passwords do not belong in a request target")
	case strings.Contains(r.RequestURI, "#"):
		return nil, errors.New("a fragment does not belong in a request target")
	}
	port := "80"
	if scheme == "https" {
		port = "443"
	}
	authority, err := hostport.WithPort(u.Host, port)
	if err != nil {
		return nil, err
	}
	out := &origin.Request{
		OverTLS: scheme == "https", Method: r.Method, Authority: strings.ToLower(authority), Target: originForm(r), Host: u.Host,
		Header: r.Header, TrailerNames: requestTrailers(r), Trailer: r.Trailer,
	}
	if r.ContentLength != 0 {
		out.Body = &origin.RequestBody{Reader: r.Body, Length: r.ContentLength}
		if r.ProtoMajor == 3 && r.ContentLength < 0 && !probeBody(out) {
			out.Body, r.ContentLength = nil, 0
		}
	}
	if r.ProtoMajor > 1 {
		return out, checkFrames(out)
	}
	return out, nil
}

// checkFrames returns an error for an HTTP/2 or HTTP/3 request that would change its
// meaning in HTTP/1. Frames may carry spaces and line ends where HTTP/1 uses them as
// delimiters, and do not depend on Content-Length for the end of the content.
func checkFrames(out *origin.Request) error {
	if !httpguts.ValidHeaderFieldName(out.Method) {
		return fmt.Errorf("the method %q is not a token", out.Method)
	}
	if strings.ContainsFunc(out.Target, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return errors.New("its target contains a space or a control character")
	}
	length, err := h1.ContentLength(out.Header["Content-Length"])
	has := int64(0)
	if out.Body != nil {
		has = out.Body.Length
	}
	if err != nil || length >= 0 && length != has {
		return fmt.Errorf("the Content-Length %q does not match the content", out.Header["Content-Length"])
	}
	return nil
}

// isLastOnConnection reports whether the HTTP/1 connection must close after the response
// to r. It must if
//   - the client speaks HTTP/1.0, with which a proxy keeps no connection (RFC 9112 §9.3),
//   - the request body was not read to its end, as net/http would look for the next
//     request in the rest of it,
//   - the body was chunked and net/http has read the head: with a Content-Length as well, RFC 9112
//     §6.1 requires closing, and net/http does not say whether there was one.
func isLastOnConnection(r *http.Request, out *origin.Request) bool {
	switch {
	case r.ProtoMajor > 1:
		return false
	case r.ProtoMinor == 0:
		return true
	}
	return out.Body != nil && !out.Body.IsRead(downstream.Serves(r))
}

// originForm returns the path and query of r's target exactly as the client wrote them.
func originForm(r *http.Request) string {
	target := r.RequestURI
	// An earlier handler may have rewritten the target to origin form.
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

// setRequestFields turns r's header fields into those of the request to the next hop.
func (p *proxy) setRequestFields(r *http.Request, from clientIdentity) {
	prepareRequest(r.Header, r.ProtoMajor, r.ProtoMinor)
	if from.policy.options.ForwardedFor == "off" {
		delete(r.Header, "X-Forwarded-For")
		delete(r.Header, "X-Real-Ip")
	} else {
		setForwarded(r.Header, from.peer.Addr(), from.addr, from.trusted)
	}
	p.via.add(r.Header, r.ProtoMajor, r.ProtoMinor)
}

// applyUp applies header_up to the request's header fields, and to host, its Host field.
func (y *policy) applyUp(r *http.Request, host *string) {
	if y.options.Headers == nil || y.options.Headers.Request == nil {
		return
	}
	changed := *r
	changed.Host = *host
	y.options.Headers.Request.ApplyToRequest(&changed)
	*host = changed.Host
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

// respond sends the origin's response to the client. If the origin's response is cut
// off, so is the client's, which must not mistake a part for the whole (RFC 9112 §8).
func (p *proxy) respond(w http.ResponseWriter, r *http.Request, x *origin.Exchange, from clientIdentity) error {
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
	err := p.passContent(w, r, x, from)
	var gone *clientError
	switch {
	case errors.As(err, &gone) || err != nil && r.Context().Err() != nil:
		return clientDisconnected(err)
	case err != nil:
		_ = http.NewResponseController(w).Flush() // send what arrived before the failure
		return cutOffError{err}
	}
	if res.ContentLength < 0 && r.ProtoMajor == 1 {
		startWriteIdleTimeout(r) // for the final chunk, which net/http writes after this handler
	}
	_ = res.Body.Close() // fills in the trailers
	return passTrailers(w, res, announced, connection)
}

// errOriginSent407 reports a 407 from an origin. If it were passed on, the client would take
// it for this proxy's, and browsers would prompt their users for a password.
const errOriginSent407 = h1.ProtocolError("it asks for credentials that only a proxy may ask for (407)")

// setResponseFields makes the header of res, adapted for the client, that of w. Nothing may use
// that of res afterwards.
func (y *policy) setResponseFields(w http.ResponseWriter, r *http.Request, res *http.Response) http.Header {
	few := len(res.Header) < h1.MaxFreedHeader // and so have always been
	removeHopByHop(res.Header)
	y.proxy.via.add(res.Header, res.ProtoMajor, res.ProtoMinor)
	y.applyDown(res, r)
	header := w.Header()
	// Caddy's Server field does not describe the origin. A nil Content-Type keeps
	// net/http from guessing one.
	delete(header, "Server")
	header["Content-Type"] = nil
	if fast := downstream.WriterOf(w); fast != nil && few && res.ProtoMajor == 1 {
		fast.TakeHeader(res.Header)
		return res.Header
	}
	for name, values := range res.Header {
		header[h1.WireName(name)] = values
	}
	return header
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
	target := x.Request.Authority // a closure that had x would move it to the heap
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
	return copyBody(w, r, x, func(n int64) { p.countForwarded(target, from, 0, n) })
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
	slow := newStallTimer(w, r)
	defer slow.Stop()
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
		return waitForEnd(w, slow)
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
