// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// serveHTTP serves a request that arrived by either entrance.
func (p *proxy) serveHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) error {
	r.Host = hostport.WithoutUser(r.Host) // RequestURI keeps the password, for which the request is refused
	v := p.newTransaction(r)
	if v.kind != metrics.Other {
		delete(w.Header(), "Alt-Svc") // advertises this server, not the requested host
	}
	return p.finish(w, r, v, p.serveRecordingPanics(w, r, v, next))
}

// kindOf returns what kind of request r is.
func (p *proxy) kindOf(r *http.Request) metrics.Kind {
	switch {
	case r.Method == http.MethodConnect && !isExtendedConnect(r):
		return metrics.Tunnel
	case p.isProxyRequest(r):
		return metrics.Forward
	}
	return metrics.Other
}

// serveRecordingPanics calls serve. If serve panics, it counts and logs the request as failed
// and re-panics.
func (p *proxy) serveRecordingPanics(w http.ResponseWriter, r *http.Request, v *transaction, next caddyhttp.Handler) error {
	defer func() {
		if panicked := recover(); panicked != nil {
			err := cutOffError{fmt.Errorf("panic: %v", panicked)}
			if v.status == 0 && panicked != http.ErrAbortHandler {
				v.status = http.StatusInternalServerError
			}
			p.count(v, err)
			p.logRequest(r, v, err)
			panic(panicked)
		}
	}()
	return p.serve(w, r, v, next)
}

// errRateLimited reports that the rate limiter denied the request; the transaction's verdict says why.
var errRateLimited = errors.New("denied by the rate limiter")

// serve admits, authenticates and handles a request, or returns why it does not.
func (p *proxy) serve(w http.ResponseWriter, r *http.Request, v *transaction, next caddyhttp.Handler) (err error) {
	requiresLogin := false
	if v.kind != metrics.Other {
		v.user = p.userFrom(r)
		if err := p.choosePolicy(r, v); err != nil {
			return err
		}
		requiresLogin = p.requiresLogin(r, v)
	}
	v.admitted = !requiresLogin
	if !requiresLogin {
		if err := p.charge(r, v); err != nil {
			return err
		}
	}
	if f := p.refuseAccess(r, v); f != nil {
		if requiresLogin {
			if err := p.charge(r, v); err != nil {
				return err
			}
		}
		return f
	}
	if requiresLogin {
		if err := p.login(w, r, v); err != nil {
			return err
		}
		v.admitted = true
	}
	if v.kind != metrics.Other {
		if f := v.policy.refuseMethod(r); f != nil {
			return f
		}
	}
	switch v.kind {
	case metrics.Tunnel:
		v.status, err = p.connect(w, r, v)
	case metrics.Forward:
		v.status, err = p.forward(w, r, v.clientIdentity)
	default:
		if p.isPAC(r) {
			v.status = p.servePAC(w, r)
		} else {
			v.status, err = p.passOn(w, r, v.clientIdentity, next)
		}
	}
	return err
}

// requiresLogin reports whether v, whose policy is the one of a client that has not logged in, must
// have credentials.
func (p *proxy) requiresLogin(r *http.Request, v *transaction) bool {
	return len(p.auth) > 0 && (hasCredentials(r) || !v.policy.servesWithoutLogin(v.addr))
}

// refuseAccess returns the refusal of a request that no user may make: one that loops, or
// one from a client that may not use the proxy. It returns nil for all others.
func (p *proxy) refuseAccess(r *http.Request, v *transaction) *refusal {
	if p.via.seen(r.Header) || p.isLoop(r, v.peer) {
		return causeLoop.refusal(nil, p.name)
	}
	if v.kind != metrics.Other && !p.admits(v.addr) {
		return causeClient.refusal(p.deniedClient(v.addr), v.addr)
	}
	return nil
}

// login authenticates the user and then charges the request: to the user's bucket with
// limit_by user, otherwise to the client's. A challenge is charged to the client, too.
// A failed login is not, because it has its own bucket: otherwise a job with an old
// password would use up the tokens of everyone behind the same address.
func (p *proxy) login(w http.ResponseWriter, r *http.Request, v *transaction) error {
	now := monotime.Of(v.start)
	if verdict, blocked := p.refuseBlocked(v, now); blocked {
		v.verdict = verdict
		return errRateLimited
	}
	key := v.limitKey
	err := p.authenticate(w, r, v)
	failed := err != nil && hasCredentials(r)
	if !failed {
		if err := p.choosePolicy(r, v); err != nil {
			return err
		}
	}
	if failed || v.limitKey != key {
		v.policy.limiter.RecordRequest(key, now) // count the request for the client as well
	}
	if failed {
		return err
	}
	if limited := p.charge(r, v); limited != nil {
		delete(w.Header(), "Proxy-Authenticate") // a login would be rate limited, too
		return limited
	}
	return err
}

// finish counts and logs a request, and responds to it if no handler has.
func (p *proxy) finish(w http.ResponseWriter, r *http.Request, v *transaction, err error) error {
	if err == errRateLimited {
		if err := p.refuseLimited(w, r, v, v.verdict); err != nil {
			return err
		}
		p.closeInStages(w, r, v.addr)
		return nil
	}
	f := p.count(v, err)
	if f == nil {
		if v.status == 0 && err != nil {
			v.status = caddyStatus(err) // Caddy writes this response
		}
		p.logRequest(r, v, err)
		if errors.Is(err, http.ErrAbortHandler) {
			if r.ProtoMajor == 1 && r.ProtoMinor == 0 {
				// An HTTP/1.0 response may end with the connection: after a clean close
				// the truncated response would look complete, so send RST.
				resetConnection(w)
			}
			panic(http.ErrAbortHandler) // truncates the response, or resets the stream
		}
		return err
	}
	v.setRefusal(f)
	if v.admitted && f.isDenial() {
		f.hint = v.policy.denyHint(r)
	}
	// Neither a disconnected client nor a challenge is a refusal.
	if f.status != statusClientClosedRequest && v.cause != causeAuthRequired {
		v.countRefusal(f)
	}
	p.logRequest(r, v, f.err)
	if f.status == statusClientClosedRequest {
		panic(http.ErrAbortHandler) // the client has disconnected
	}
	if err := p.sendRefusal(w, r, v, f); err != nil {
		return err
	}
	p.closeInStages(w, r, v.addr)
	return nil
}

// caddyStatus returns the status of Caddy's response to an error; 0 if the error does not
// contain one.
func caddyStatus(err error) int {
	var failed caddyhttp.HandlerError
	errors.As(err, &failed)
	return failed.StatusCode
}

// isLoop reports whether r arrived over one of this proxy's own connections to targets.
func (p *proxy) isLoop(r *http.Request, peer netip.AddrPort) bool {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return p.tunnels.Loops(p.name, peer, local)
}

// clientIdentity identifies the sender of a request.
type clientIdentity struct {
	addr     netip.Addr     // the client, after Caddy's trusted_proxies; v4-mapped is v4
	name     string         // of addr, as client.Name returns it
	user     string         // the authenticated user name; "" if none
	policy   *policy        // what it may do
	limitKey client.Key     // the key of its limits: a network or a user
	peer     netip.AddrPort // the remote end of the connection
	trusted  bool           // the peer is a trusted proxy
	scope    access.Scope   // which addresses it may reach by default
}

// identifyClient returns the sender of r. Connections over a Unix socket have no address: they
// count as one client, unless the peer is a trusted proxy that names the clients.
func identifyClient(r *http.Request) clientIdentity {
	var c clientIdentity
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		c.peer = netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
	}
	if downstream.Serves(r) && !namesClient(r) {
		c.addr, c.name = c.peer.Addr(), addressIn(r.RemoteAddr, c.peer.Addr())
	} else {
		if s, ok := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string); ok {
			if addr, err := netip.ParseAddr(s); err == nil {
				c.addr = addr.Unmap().WithZone("")
			}
		}
		c.trusted, _ = caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool)
		c.name = client.Name(c.addr)
	}
	// A request that was forwarded for another client is not local only because the
	// load balancer or proxy that forwarded it is.
	if c.addr.IsLoopback() && c.peer.Addr().IsLoopback() &&
		len(r.Header["X-Forwarded-For"]) == 0 && len(r.Header["Forwarded"]) == 0 && len(r.Header["Via"]) == 0 {
		c.scope = access.LocalScope
	}
	return c
}

// addressIn returns what client.Name does for the address in an address with a port. Most are written
// like that already, so it needs no allocation.
func addressIn(withPort string, addr netip.Addr) string {
	host := strings.Trim(withPort[:max(0, strings.LastIndexByte(withPort, ':'))], "[]")
	if buf := [len("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")]byte{}; addr.IsValid() && string(addr.AppendTo(buf[:0])) == host {
		return host
	}
	return client.Name(addr)
}
