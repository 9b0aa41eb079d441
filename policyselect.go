// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// choosePolicy sets the policy of v, and the bucket that v is charged to, by its client and user.
func (p *proxy) choosePolicy(r *http.Request, v *transaction) error {
	if p.selection != nil {
		var failed error
		i := p.selection.First(v.user, v.addr, func(i int) bool {
			matches, err := p.policies[i].matchers.MatchWithError(r)
			if err != nil && failed == nil {
				failed = fmt.Errorf("policy %s: %w", p.policies[i].name, err)
			}
			return matches
		})
		if failed != nil {
			return caddyhttp.Error(http.StatusInternalServerError, failed)
		}
		if v.policy = p.directive; i >= 0 {
			v.policy = p.policies[i]
		}
	}
	if v.user != "" && v.policy.options.LimitBy == "user" {
		v.limitKey = client.User(v.user)
	}
	return nil
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
	return &access.DeniedError{
		Rule: "methods", Reason: "the method is not in methods " + strings.Join(y.options.Methods, " "),
		Hint: fmt.Sprintf("add %s to methods", method),
	}
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

// policyOfTunnel returns the policy that a CONNECT for an open tunnel would now have. Matchers see
// a request without the header fields of the one that opened it.
func (p *proxy) policyOfTunnel(t *tunnel.Tunnel) *policy {
	if p.selection == nil {
		return p.directive
	}
	r := &http.Request{
		Method: http.MethodConnect, URL: &url.URL{Host: t.Target}, Host: t.Target, RequestURI: t.Target,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: make(http.Header), RemoteAddr: net.JoinHostPort(t.Client.String(), "0"),
	}
	repl := caddy.NewReplacer()
	repl.Set("http.auth.user.id", t.User)
	r = caddyhttp.PrepareRequest(r, repl, nil, p.own.self)
	i := p.selection.First(t.User, t.Client, func(i int) bool { return p.policies[i].matchers.Match(r) })
	if i < 0 {
		return p.directive
	}
	return p.policies[i]
}
