// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// errHostByHeaderUp tells the operator, in the log, that the config is at fault.
var errHostByHeaderUp = errors.New("header_up produces an invalid Host field")

// prepareOutgoing sets the header fields of the request to the next hop, and the functions that
// the exchange calls: for interim responses, and while it reads the client's body.
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
	client := from // the closure moves what it captures to the heap, which requests without content do not need
	out.Body.Count = func(n int64) { p.countForwarded(out.Authority, client, n, 0) }
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

// checkFrames returns an error for an HTTP/2 or HTTP/3 request that would mean something else
// in HTTP/1. Frames can carry spaces and line ends where HTTP/1 uses them as delimiters, and
// the end of their content does not depend on Content-Length.
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
		setForwarded(r.Header, from)
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
