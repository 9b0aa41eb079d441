// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// choosePolicy sets the policy of v, and the bucket that v is charged to, by its client and user.
func (p *proxy) choosePolicy(r *http.Request, v *transaction) error {
	var err error
	if v.policy, err = p.policyFor(r, v.user, v.addr); err != nil {
		return caddyhttp.Error(http.StatusInternalServerError, err)
	}
	if v.user != "" && v.policy.options.LimitBy == "user" {
		v.limitKey = client.User(v.user)
	} else if v.limitKey.User() != "" { // of the policy before the login
		v.limitKey = v.policy.limiter.Key(v.addr)
	}
	return nil
}

// policyFor returns the first policy whose conditions a request meets, or the directive's. If a
// matcher before that fails, it returns the directive's and an error: it is not certain which policy
// holds.
func (p *proxy) policyFor(r *http.Request, user string, addr netip.Addr) (*policy, error) {
	if p.selection == nil {
		return p.directive, nil
	}
	var failed error
	failedAt := len(p.policies)
	found := p.selection.First(user, addr, func(i int) bool {
		matches, err := p.policies[i].matchers.MatchWithError(r)
		if err != nil && i < failedAt {
			failed, failedAt = fmt.Errorf("policy %s: %w", p.policies[i].name, err), i
		}
		return err == nil && matches
	})
	switch {
	case failed != nil && (found < 0 || failedAt < found):
		return p.directive, failed
	case found < 0:
		return p.directive, nil
	}
	return p.policies[found], nil
}

// userFrom returns the user that user_from gives a request, or "".
func (p *proxy) userFrom(r *http.Request) string {
	if len(p.config.UserFrom) == 0 {
		return ""
	}
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return ""
	}
	for _, placeholder := range p.config.UserFrom {
		if user := strings.TrimSpace(repl.ReplaceAll(placeholder, "")); user != "" {
			return user
		}
	}
	return ""
}

// deniesMethod returns why the policy does not allow a method; nil if it does.
func (y *policy) deniesMethod(method string) *access.DeniedError {
	if len(y.options.Methods) == 0 || slices.Contains(y.options.Methods, method) {
		return nil
	}
	listed := "methods " + strings.Join(y.options.Methods, " ")
	e := &access.DeniedError{Rule: "methods", Reason: "the method is not in " + listed, Hint: fmt.Sprintf("add %s to methods", method)}
	if isPlainMethod(method) {
		e.Allow = func() string { return listed + " " + method }
	}
	return e
}

// isPlainMethod reports whether the option methods can list a method that a client has sent, and
// a Caddyfile needs no quotes for it.
func isPlainMethod(method string) bool {
	return len(method) <= printable.MaxText && checkMethod(method) == nil && !strings.ContainsFunc(method, func(c rune) bool {
		return c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'A' || c > 'Z')
	})
}

// refuseMethod returns the refusal of a request whose method the policy does not allow.
func (y *policy) refuseMethod(r *http.Request) *refusal {
	denied := y.deniesMethod(r.Method)
	if denied == nil {
		return nil
	}
	if y.dialer.Access.ReportOnly {
		y.logReported(r.Context(), r.Host, denied)
		return nil
	}
	return causeMethod.refusal(denied, r.Method)
}

// policyOfTunnel returns the policy that the request for an open tunnel would now have. Matchers see
// a request without the header fields of the one that opened it.
func (p *proxy) policyOfTunnel(t *tunnel.Tunnel) (*policy, error) {
	if p.selection == nil {
		return p.directive, nil
	}
	r := &http.Request{
		Method: http.MethodConnect, URL: &url.URL{Host: t.Target}, Host: t.Target, RequestURI: t.Target,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: make(http.Header),
	}
	if !isConnect(t) {
		r.Method, r.URL.Scheme, r.URL.Path = http.MethodGet, "http", "/"
		r.RequestURI = r.URL.String()
	}
	r = p.exampleRequest(r, t.Client)
	r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer).Set("http.auth.user.id", t.User)
	return p.policyFor(r, t.User, t.Client)
}

// exampleRequest prepares a request that a client might have sent, for matchers.
func (p *proxy) exampleRequest(r *http.Request, from netip.Addr) *http.Request {
	r.RemoteAddr = net.JoinHostPort(from.String(), "0")
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, p.own.self)
}

// isConnect reports whether a CONNECT opened a tunnel, and not a request that was upgraded.
func isConnect(t *tunnel.Tunnel) bool { return strings.HasPrefix(t.Proto, "HTTP/") }
