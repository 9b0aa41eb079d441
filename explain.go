// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// explainSites explains how the proxies of this process would treat a request. If running is set, it
// asks those that run, otherwise those of a config that is only provisioned.
func explainSites(ctx context.Context, q status.Question, running bool) ([]status.Explanation, error) {
	var all []status.Explanation
	process := currentProcess()
	if process == nil {
		return nil, nil
	}
	for p := range process.proxies.All() {
		if p.running.Load() != running {
			continue
		}
		r, err := requestFor(q)
		if err != nil {
			return nil, err
		}
		e, err := p.explain(r.WithContext(ctx), q)
		if err != nil {
			return nil, err
		}
		all = append(all, *e)
	}
	slices.SortStableFunc(all, func(a, b status.Explanation) int { return cmp.Compare(a.Site, b.Site) })
	return all, nil
}

// requestFor returns the request that a question is about, parsed as the server parses a client's.
func requestFor(q status.Question) (*http.Request, error) {
	if strings.ContainsFunc(q.Method+q.Target, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return nil, fmt.Errorf("target %q: unexpected space or control character", q.Target)
	}
	head := q.Method + " " + q.Target + " HTTP/1.1\r\nHost: " + q.Target + "\r\n\r\n"
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head)))
	if err != nil {
		return nil, fmt.Errorf("target %q for %s: %w", q.Target, q.Method, err)
	}
	return r, nil
}

// authorityOf returns the host and port that a request is for.
func authorityOf(v *transaction) (authority string, err error) {
	switch v.kind {
	case metrics.Tunnel:
		authority, err = hostport.Parse(v.r.RequestURI)
	case metrics.Forward:
		out, invalid := newOutgoing(v.r)
		if err = invalid; err == nil {
			authority = out.Authority
		}
	default:
		err = errors.New("it is a path of this server")
	}
	if err != nil {
		err = fmt.Errorf("target %q for %s: %w; expected host:port for CONNECT, or an http:// or https:// URL for other methods", v.r.RequestURI, v.r.Method, err)
	}
	return authority, err
}

// explainer collects what explain says.
type explainer struct {
	*status.Explanation
	*proxy
	v *transaction
	y *policy
}

// explain explains how the proxy would treat r, which no client has sent. It takes no token, opens no
// connection, and leaves no trace in logs and metrics.
func (p *proxy) explain(r *http.Request, q status.Question) (*status.Explanation, error) {
	r.Host = hostport.WithoutUser(r.Host)
	r = p.exampleRequest(r, q.Client)
	v := p.newTransaction(r)
	authority, err := authorityOf(v)
	if err != nil {
		return nil, err
	}
	v.user = p.userFrom(r)
	if err := p.choosePolicy(r, v); err != nil {
		return nil, err
	}
	requiresLogin := p.requiresLogin(r, v)
	x := &explainer{&status.Explanation{Site: strings.Join(p.site.addresses, " "), Client: v.addr.String(), Method: q.Method, Target: q.Target}, p, v, nil}
	switch {
	case q.User == "":
	case p.config.identifiesUsers():
		v.setUser(caddyauth.User{ID: q.User})
		if err := p.choosePolicy(r, v); err != nil {
			return nil, err
		}
	default:
		x.note("user %s is ignored: without basic_auth or user_from, clients have no user", q.User)
	}
	x.y, x.User = v.policy, v.user
	x.Policy, x.Conditions = x.y.name, x.y.conditions
	if slices.ContainsFunc(p.policies, func(y *policy) bool { return len(y.matchers) > 0 }) {
		x.note("match: evaluated without header fields and TLS")
	}
	if list := x.y.options.ReportOnly; len(list) > 0 {
		x.note("report_only %s: not enforced", strings.Join(list, " "))
	}
	x.checkClient(requiresLogin)
	x.checkTokens()
	x.checkMethod()
	x.checkTunnels()
	x.checkDestination(authority)
	x.Decide()
	return x.Explanation, nil
}

func (x *explainer) note(format string, args ...any) {
	x.Notes = append(x.Notes, fmt.Sprintf(format, args...))
}

// add adds a check that denies if denied is set.
func (x *explainer) add(c status.Check, denied bool) {
	if c.Outcome = status.Allowed; denied {
		c.Outcome = status.Denied
	}
	x.Checks = append(x.Checks, c)
}

// addRule adds a check by the ports, methods or rules of the policy. denied is the denial, and
// reported one that report_only suppresses; either may be nil.
func (x *explainer) addRule(c status.Check, denied, reported *access.DeniedError) {
	c.Outcome = status.Allowed
	e := denied
	switch {
	case denied != nil:
		c.Outcome = status.Denied
	case reported != nil:
		e, c.Outcome = reported, status.Reported
	}
	if e != nil {
		c.Rule, c.Detail, c.Hint = cmp.Or(e.Rule, "default"), e.Reason, e.Hint
	}
	x.Checks = append(x.Checks, c)
}

// addOption adds a check by ports or methods, which "report_only rules" also covers. It reports
// whether the check denies the request.
func (x *explainer) addOption(c status.Check, denied *access.DeniedError) (denies bool) {
	var reported *access.DeniedError
	if x.y.dialer.Access.ReportOnly {
		denied, reported = nil, denied
	}
	x.addRule(c, denied, reported)
	x.Checks[len(x.Checks)-1].Rule = c.Rule // with the option's value
	return denied != nil
}

// checkClient adds the checks of the client's address and its credentials.
func (x *explainer) checkClient(requiresLogin bool) {
	x.add(status.Check{Check: "client", Rule: "clients " + strings.Join(x.effectiveClients(), " ")}, !x.admits(x.v.addr))
	c, denied := status.Check{Check: "credentials", Detail: "not required"}, false
	switch {
	case !requiresLogin:
	case x.v.user == "":
		c.Detail, denied = "required, but missing", true
	default:
		c.Detail = "required, and assumed to be correct"
		if x.basic != nil && len(x.config.UserFrom) == 0 {
			if _, known := x.basic().Accounts[x.v.user]; !known {
				c.Detail, denied = "required, but there is no such user", true
			}
		}
	}
	x.add(c, denied)
}

// checkTokens adds the check of the bucket that the request would be charged to.
func (x *explainer) checkTokens() {
	table, key, now := x.y.limiter, x.v.limitKey, monotime.Of(x.v.start)
	x.Limits = &status.Limits{
		Bucket: table.Name(key), Burst: table.Limits.Burst, Refill: table.Limits.Refill, Tunnels: []status.TunnelLimit{},
	}
	c := status.Check{Check: "tokens", Rule: fmt.Sprintf("burst %d, refill %s", table.Limits.Burst, strconv.FormatFloat(table.Limits.Refill, 'f', -1, 64))}
	switch blocked, wait := x.blockOf(x.v, now); {
	case wait > 0:
		c.Rule, c.Detail = "", "an operator has blocked "+table.Name(blocked)+" for another "+formatAge(wait)
		x.add(c, true)
	case x.exempt.Contains(x.v.addr):
		c.Rule, c.Detail = "exempt", "the client is not limited"
		x.add(c, false)
	case !x.running.Load():
		x.add(c, false)
	default:
		if x.shared != nil {
			x.note("the shared limiter is not queried; it may deny the request")
		}
		tokens := table.TokensOf(key, now)
		x.Limits.Tokens = &tokens
		c.Detail = fmt.Sprintf("%s has %.1f tokens left", x.Limits.Bucket, tokens)
		x.add(c, tokens < 1)
		if last := &x.Checks[len(x.Checks)-1]; tokens < 1 && slices.Contains(x.y.options.ReportOnly, "limits") {
			last.Outcome = status.Reported
		}
	}
}

// checkMethod adds the check of the method.
func (x *explainer) checkMethod() {
	c := status.Check{Check: "method", Rule: "methods all"}
	if list := x.y.options.Methods; len(list) > 0 {
		c.Rule = "methods " + strings.Join(list, " ")
	}
	x.addOption(c, x.y.deniesMethod(x.v.r.Method))
}

// checkTunnels adds the check of the limits on open tunnels, if they apply to the request and
// there are any.
func (x *explainer) checkTunnels() {
	if x.v.kind != metrics.Tunnel {
		return
	}
	limits, open := x.y.tunnelLimits(), x.tunnels.Counts(x.y.tunnelOwner, x.v.limitKey)
	if x.y.name == "" {
		limits.Policy = 0
	}
	var texts []string
	reached := false
	for _, l := range []struct {
		of       string
		max, now int
	}{{"process", limits.Process, open.Process}, {"policy", limits.Policy, open.Policy}, {"client", limits.Client, open.Client}} {
		if l.max == 0 {
			continue
		}
		limit, text := status.TunnelLimit{Of: l.of, Max: l.max}, fmt.Sprintf("%s: at most %d", l.of, l.max)
		if x.running.Load() {
			limit.Open, text = &l.now, fmt.Sprintf("%s: %d of %d open", l.of, l.now, l.max)
			reached = reached || l.now >= l.max
		}
		x.Limits.Tunnels, texts = append(x.Limits.Tunnels, limit), append(texts, text)
	}
	if len(texts) > 0 {
		x.add(status.Check{Check: "tunnels", Rule: "max_tunnels", Detail: strings.Join(texts, ", ")}, reached)
	}
}

// checkDestination adds the checks of the destination: its port, its name and its addresses.
func (x *explainer) checkDestination(authority string) {
	dialer, ctx, t := x.y.dialer, x.v.r.Context(), hostport.TargetOf(authority)
	if x.v.kind == metrics.Tunnel {
		ctx = dialer.Access.WithConnect(ctx)
	}
	ports, option := dialer.Access.PortsFor(ctx)
	c := status.Check{Check: "port", Rule: fmt.Sprintf("%s all but %d", option, access.PortSMTP)}
	if len(ports) > 0 {
		c.Rule = option
		for _, p := range ports {
			c.Rule += " " + p.String()
		}
	}
	if x.addOption(c, dialer.Access.CheckPort(ctx, t.Port)) {
		return
	}
	e := dialer.Explain(ctx, x.v.scope, authority)
	if e.ThroughParent {
		x.Parent = dialer.Parent.Scheme + "://" + dialer.Parent.Address
	} else if dialer.Parent != nil {
		x.note("no_upstream: the parent proxy is bypassed")
	}
	if t.Name != "" || e.ThroughParent {
		name := status.Check{Check: "name", Rule: e.Name.Rule()}
		if name.Rule == "" {
			name.Detail = "no rule matches it"
		}
		x.addRule(name, e.Name.Denied, e.Name.Reported)
	}
	x.checkAddresses(e)
}

// checkAddresses adds the checks of the addresses of the destination.
func (x *explainer) checkAddresses(e egress.Explanation) {
	for _, a := range e.Addresses {
		c := status.Check{Check: status.CheckAddress, Address: a.AddrPort.String(), Rule: a.Rule()}
		if c.Rule == "" {
			c.Rule, c.Detail = "default", "its address is public"
			if x.v.scope == access.LocalScope {
				c.Detail = "clients on this machine may reach it"
			}
		}
		x.addRule(c, a.Denied, a.Reported)
	}
	if e.Err != nil {
		x.Checks = append(x.Checks, status.Check{Check: "resolution", Outcome: status.Unresolved, Detail: e.Err.Error()})
	}
}
