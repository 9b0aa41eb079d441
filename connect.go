// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// established is the response to a CONNECT over HTTP/1. It is written to the hijacked
// connection, because net/http would add fields that frame a body, and a 2xx to CONNECT has
// none (RFC 9110 §9.3.6).
var established = []byte("HTTP/1.1 200 Connection Established\r\n\r\n")

// connect opens a tunnel to the target of a CONNECT request. It dials before it responds, so
// that a dial failure is an ordinary error response. It returns the status for the log.
func (p *proxy) connect(w http.ResponseWriter, r *http.Request, v *transaction) (int, error) {
	from := v.clientIdentity
	target, err := hostport.Parse(r.RequestURI)
	if err != nil {
		return 0, causeConnectTarget.refusal(nil, err)
	}
	if announcesContent(r) {
		return 0, causeConnectContent.refusal(nil)
	}
	if err := from.policy.admitTunnel(from.limitKey); err != nil {
		return 0, tunnelRefusal(err)
	}
	ctx := from.policy.dialer.Access.WithConnect(p.withParentFields(r, from, target))
	ctx, dialled := p.tunnels.DialContext(ctx, time.Duration(from.policy.options.DialTimeout))
	far, err := from.policy.dial(ctx, from.scope, target)
	dialled()
	if err != nil {
		from.policy.releaseTunnel(from.limitKey)
		if p.tunnels.IsClosed() && r.Context().Err() == nil {
			return 0, causeShuttingDown.refusal(err)
		}
		return 0, dialRefusal(r.Context(), err, target)
	}
	program.status.Served(target)
	t := p.newTunnel(from, target, r.Proto, far)
	if r.ProtoMajor > 1 {
		return p.connectStream(w, r, v, t)
	}
	near, early, err := hijack(w)
	if err != nil {
		_ = far.Close()
		from.policy.releaseTunnel(from.limitKey)
		return 0, caddyhttp.Error(http.StatusInternalServerError, err)
	}
	recordStatus(w, http.StatusOK)
	t.Near, t.ClientPrefix, t.ResponseHead = tunnel.NewConnEnd(near), early, established
	if fast := downstream.WriterOf(w); fast != nil {
		fast.Takeover(t.Run)
		return http.StatusOK, nil
	}
	// The tunnel runs on a new goroutine. This one's stack, the request and all that
	// net/http holds for it are many times as large as what the tunnel needs.
	go t.Run()
	return http.StatusOK, nil
}

// newTunnel prepares a tunnel to the target over the dialled connection far.
func (p *proxy) newTunnel(from clientIdentity, target, proto string, far net.Conn) *tunnel.Tunnel {
	return &tunnel.Tunnel{
		Client: from.addr, User: from.user, LimitKey: from.limitKey, Target: target, Proto: proto, Start: time.Now(),
		Owner: from.policy.tunnelOwner, Scope: int(from.scope), Registry: p.tunnels,
		Far: tunnel.NewConnEnd(far), Address: hostport.AddrPortOf(far.RemoteAddr()), LocalAddr: hostport.AddrPortOf(far.LocalAddr()),
	}
}

// announcesContent reports whether a CONNECT request declares content, which it must not
// have (RFC 9110 §9.3.6). Over HTTP/2 and HTTP/3, the tunnel's bytes are content of unknown
// length.
func announcesContent(r *http.Request) bool {
	if r.ProtoMajor == 1 {
		return r.ContentLength != 0
	}
	length, err := h1.ContentLength(r.Header["Content-Length"])
	return r.ContentLength > 0 || length > 0 || err != nil
}

// withParentFields returns the context for dialing the target of a CONNECT. If a parent
// proxy will receive the request, the context carries the fields that tell it of the path
// (Via, RFC 9110 §7.6.3) and of the client.
func (p *proxy) withParentFields(r *http.Request, from clientIdentity, target string) context.Context {
	if !from.policy.dialer.UsesParent(target) {
		return r.Context()
	}
	p.setRequestFields(r, from)
	fields := make(http.Header)
	for _, name := range [...]string{"Via", "X-Forwarded-For", "X-Real-Ip"} {
		if values := r.Header[name]; len(values) > 0 {
			fields[name] = values
		}
	}
	return context.WithValue(r.Context(), egress.ParentRequestKey{}, &egress.ParentRequest{Fields: fields, LimitKey: from.limitKey})
}

// connectStream runs a tunnel on an HTTP/2 or HTTP/3 stream, which ends when the handler
// returns.
func (p *proxy) connectStream(w http.ResponseWriter, r *http.Request, v *transaction, t *tunnel.Tunnel) (int, error) {
	clear(w.Header()) // Server and Alt-Svc do not describe the target
	w.WriteHeader(http.StatusOK)
	p.count(v, nil)
	near := newStreamPeer(w, r)
	t.Near = near
	t.Run() // flushes the response headers first
	if near.IsAborted() {
		return http.StatusOK, near.reset()
	}
	return http.StatusOK, nil
}

// hijack takes over the client's connection. early is what the client has sent after the
// request.
func hijack(w http.ResponseWriter) (conn net.Conn, early []byte, err error) {
	// The innermost writer hands out the accepted connection. The one that Caddy's response
	// recorders hand out has no half-close.
	hijacker, ok := innermost(w).(http.Hijacker)
	if !ok {
		return nil, nil, errors.New("the connection cannot be hijacked")
	}
	conn, buffered, err := hijacker.Hijack()
	if err != nil {
		return nil, nil, err
	}
	if n := buffered.Reader.Buffered(); n > 0 {
		peeked, _ := buffered.Reader.Peek(n) // never fails: n bytes are there
		early = append(early, peeked...)
	}
	conn, unread := downstream.UnwrapHijacked(conn)
	return conn, append(early, unread...), nil
}

// resetConnection resets an HTTP/1 connection, so that the client does not take the response
// for complete.
func resetConnection(w http.ResponseWriter) {
	if fast := downstream.WriterOf(w); fast != nil {
		fast.ResetAtEnd()
		return
	}
	if conn, _, err := hijack(w); err == nil {
		_ = tunnel.NewConnEnd(conn).Abort()
	}
}

// recordStatus tells Caddy's access log and metrics, if there are any, the status of a
// hijacked request. net/http itself ignores the call.
func recordStatus(w http.ResponseWriter, status int) {
	for inner := w; ; {
		if _, ok := inner.(caddyhttp.ResponseRecorder); ok {
			w.WriteHeader(status)
			return
		}
		u, ok := inner.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return
		}
		inner = u.Unwrap()
	}
}

// isExtendedConnect reports whether a CONNECT has a :protocol (RFC 8441, RFC 9220). Such a
// request is for a resource of this server, not for a tunnel.
func isExtendedConnect(r *http.Request) bool {
	return r.Method == http.MethodConnect &&
		(len(r.Header[":protocol"]) > 0 || r.ProtoMajor == 3 && r.Proto != "HTTP/3.0")
}
