// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/selection"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// policy is what some of a proxy's clients may do, built from Options: their limits, the
// destinations that are open to them, and the connections that are kept for them. A pooled
// connection belongs to one policy, so that no other client can use what its own policy would
// not have opened.
type policy struct {
	proxy     *proxy
	name      string   // "": the directive's own options
	options   *Options // with defaults
	own       *Options // those that it sets itself; the others are inherited from the directive
	anonymous bool     // its clients need no credentials

	conditions []string // as an operator writes them; none of the directive's
	matchers   caddyhttp.MatcherSet

	namesClients bool // its conditions name clients or users
	isOpen       bool // its conditions name clients, but every client meets them

	limiter         *bucket.Table
	rateLimit       string // the value of RateLimit-Policy
	limitedResponse atomic.Pointer[limitedAnswer]

	dialer        *egress.Dialer
	origins       [access.ScopeCount]*origin.Client
	parentOrigins *origin.Client // sends forwarded requests to the parent; nil: it accepts none
	originLimits  *origin.Limits

	tunnelOwner *tunnel.Owner
	counters    *metrics.Policy
}

// provisionPolicies builds the policies from valid options.
func (p *proxy) provisionPolicies(ctx caddy.Context) error {
	conditions, invalid := p.config.policyConditions()
	if invalid != nil {
		return invalid
	}
	var all []*Options
	for _, config := range p.config.Policies {
		options, err := p.config.optionsOf(config) // before those of the directive are provisioned
		if err != nil {
			return err
		}
		all = append(all, options)
	}
	var err error
	if p.directive, err = p.newPolicy(ctx, "", &p.config.Options, &p.config.Options); err != nil {
		return err
	}
	for i, config := range p.config.Policies {
		y, err := p.newPolicy(ctx, config.Name, all[i], &config.Options)
		p.policies = append(p.policies, y)
		if err == nil {
			err = y.loadMatchers(ctx, config)
		}
		if err != nil {
			return fmt.Errorf("policy %s: %w", config.Name, err)
		}
		y.anonymous, y.conditions = config.Anonymous, config.describe(conditions[i].Match)
		y.namesClients = len(config.Clients) > 0 || len(config.Users) > 0 || matchesClients(y.matchers)
		y.isOpen = len(config.Clients) > 0 && !namesClients(config.Clients) && len(config.Users) == 0 && !matchesClients(y.matchers)
		if by := selection.Shadowing(conditions, i); by >= 0 {
			p.logger.Warn("a policy never applies: an earlier one has the same or wider conditions",
				zap.String("policy", config.Name), zap.String("earlier", p.config.Policies[by].Name))
		}
	}
	if len(conditions) > 0 {
		p.selection = selection.New(conditions)
	}
	return nil
}

// logger returns the logger for what the operator should know about the policy's options.
func (y *policy) logger() *zap.Logger { return y.proxy.logger.With(policyField(y.name)) }

// loadMatchers provisions the matchers of a policy.
func (y *policy) loadMatchers(ctx caddy.Context, config *Policy) error {
	if len(config.MatchRaw) == 0 {
		return nil
	}
	modules, err := ctx.LoadModule(config, "MatchRaw")
	if err != nil {
		return fmt.Errorf("match: %w", err)
	}
	for name, module := range modules.(map[string]any) {
		if _, ok := module.(caddyhttp.RequestMatcherWithError); !ok {
			return fmt.Errorf("match: the module %s is not a request matcher", name)
		}
		y.matchers = append(y.matchers, module)
	}
	return nil
}

// eachPolicy calls yield with the directive's policy and then the others, until it returns false.
func (p *proxy) eachPolicy(yield func(*policy) bool) {
	if p.directive == nil || !yield(p.directive) {
		return
	}
	for _, y := range p.policies {
		if !yield(y) {
			return
		}
	}
}

// newPolicy builds a policy. own are the options that it sets itself, and options are those in effect.
// close must be called even if newPolicy fails.
func (p *proxy) newPolicy(ctx caddy.Context, name string, options, own *Options) (*policy, error) {
	y := &policy{proxy: p, name: name, options: options, own: own}
	y.counters = program.metrics.Policy(cmp.Or(name, directivePolicy))
	y.originLimits = y.newOriginLimits()
	y.originLimits.Exit, y.originLimits.Heads = p.tunnels.Context(), &p.process.heads
	if err := provisionHeaders(ctx, options.Headers); err != nil {
		return y, fmt.Errorf("headers: %w", err)
	}
	if err := y.provisionDialer(ctx); err != nil {
		return y, err
	}
	for r := range access.ScopeCount {
		if err := y.provisionOrigins(r); err != nil {
			return y, err
		}
	}
	limits := p.config.limits(options)
	limits.Policy = name
	y.rateLimit = rateLimitPolicy(limits)
	y.tunnelOwner = &tunnel.Owner{
		Name:         p.name,
		Zone:         p.config.Zone,
		Policy:       name,
		IdleTimeout:  time.Duration(options.TunnelIdleTimeout),
		StallTimeout: time.Duration(p.config.TunnelStallTimeout),
		MaxDuration:  time.Duration(options.TunnelMaxDuration),
		Observer:     p.site,
	}
	var err error
	y.limiter, err = acquireTable(p.process.limiters, limits)
	return y, err
}

// close releases what the policy shares with others, and closes its connections.
func (y *policy) close() error {
	y.counters.Release()
	for _, origins := range y.origins {
		if origins != nil {
			origins.Close()
		}
	}
	if y.parentOrigins != nil {
		y.parentOrigins.Close()
	}
	if y.dialer != nil && y.dialer.Parent != nil && !y.sharesParent() {
		y.dialer.Parent.Close()
	}
	if y.limiter == nil {
		return nil
	}
	_, err := y.proxy.process.limiters.Delete(y.limiter.Limits)
	return err
}

// denyHint returns what follows the sentence of a denial of r.
func (y *policy) denyHint(r *http.Request) string {
	hint := y.options.DenyHint
	if !strings.Contains(hint, "{") {
		return hint // without Caddy's part of the context, which the fast path would have to prepare
	}
	repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return hint
	}
	return repl.ReplaceAll(hint, "")
}

func provisionHeaders(ctx caddy.Context, h *headers.Handler) error {
	if h == nil {
		return nil
	}
	if err := checkHeaders(h); err != nil {
		return err
	}
	if err := h.Provision(ctx); err != nil {
		return err
	}
	return h.Validate()
}
