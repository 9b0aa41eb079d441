// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
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
	client := y.origins[from.scope]
	if y.parentOrigins != nil && !out.OverTLS && y.dialer.UsesParent(out.Authority) {
		if err := y.dialer.CheckForParent(r.Context(), from.scope, out.Authority); err != nil {
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

// forwardTo sends a request through client and passes the response on.
func (p *proxy) forwardTo(client *origin.Client, w http.ResponseWriter, r *http.Request, out *origin.Request, from clientIdentity) (int, error) {
	reserved := len(r.Header["Upgrade"]) > 0 // an upgraded request becomes a tunnel, which counts from now on
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
		reserved = reserved && err != nil // on success, the tunnel releases it when it ends
		return status, err
	}
	if reserved {
		from.policy.releaseTunnel(from.limitKey)
		reserved = false
	}
	if err := p.passResponse(w, r, x, from); err != nil {
		return res.StatusCode, err
	}
	// By now, the client may have sent the rest of its content, and more behind it.
	if x.Finish(); wasLast(w.Header()) {
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

// errOriginSent407 reports a 407 from an origin. If it were passed on, the client would mistake
// it for this proxy's, and browsers would ask their users for a password.
const errOriginSent407 = h1.ProtocolError("it asks for credentials that only a proxy may ask for (407)")

// answerMaxForwards responds to a TRACE or OPTIONS request whose Max-Forwards is used up.
func answerMaxForwards(w http.ResponseWriter, r *http.Request) (int, error) {
	if hasUnreadInput(r) {
		w.Header()["Connection"] = []string{"close"}
	}
	startWriteIdleTimeout(r)
	if r.Method == http.MethodOptions {
		w.Header()["Allow"] = []string{"CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, TRACE"}
		w.Header()["Content-Length"] = []string{"0"}
		w.WriteHeader(http.StatusOK)
		return http.StatusOK, nil
	}
	if r.ContentLength != 0 {
		return 0, causeTraceContent.refusal(nil)
	}
	// RFC 9110 §9.3.8: the request as it was received, without secrets.
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
