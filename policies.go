// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// policy is what some of a proxy's clients may do, built from Options: their limits, the
// destinations that are open to them, and the connections that are kept for them. A pooled
// connection belongs to one policy, so that no other client can use what its own policy would
// not have opened.
type policy struct {
	proxy   *proxy
	options *Options // with defaults

	limiter         *bucket.Table
	rateLimit       string // the value of RateLimit-Policy
	limitedResponse atomic.Pointer[limitedAnswer]

	dialer        *egress.Dialer
	origins       [access.ScopeCount]*origin.Client
	parentOrigins *origin.Client // sends forwarded requests to the parent; nil: it accepts none
	originLimits  *origin.Limits

	tunnelOwner *tunnel.Owner
}

// newPolicy builds a policy from valid options. close must be called even if it fails.
func (p *proxy) newPolicy(ctx caddy.Context, options *Options) (*policy, error) {
	y := &policy{proxy: p, options: options}
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
	y.rateLimit = rateLimitPolicy(limits)
	y.tunnelOwner = &tunnel.Owner{
		Name:         p.name,
		Zone:         p.config.Zone,
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
	for _, origins := range y.origins {
		if origins != nil {
			origins.Close()
		}
	}
	if y.parentOrigins != nil {
		y.parentOrigins.Close()
	}
	if y.dialer != nil && y.dialer.Parent != nil {
		y.dialer.Parent.Close()
	}
	if y.limiter == nil {
		return nil
	}
	_, err := y.proxy.process.limiters.Delete(y.limiter.Limits)
	return err
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
