// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// newOriginLimits returns the limits of exchanges with origins.
func (y *policy) newOriginLimits() *origin.Limits {
	const maxTimeout = 1 << 60 // 36 years: adding to it does not overflow
	return &origin.Limits{
		HeaderTimeout:  min(time.Duration(y.options.ResponseHeaderTimeout), maxTimeout),
		ContentTimeout: min(time.Duration(y.proxy.config.ResponseIdleTimeout), maxTimeout),
		ContentGrace:   origin.ContentGrace,
		Pings:          origin.DefaultPings,
		Admit:          func(key client.Key) bool { return y.admitTunnel(key) == nil },
		Release:        y.releaseTunnel,
	}
}

// admitTunnel reserves a tunnel for a client, which the caller must release with releaseTunnel, or
// returns an error if a limit is reached.
func (y *policy) admitTunnel(key client.Key) *tunnel.LimitError {
	return y.proxy.tunnels.Admit(y.tunnelOwner, key, y.tunnelLimits())
}

// tunnelLimits returns the limits on the policy's tunnels.
func (y *policy) tunnelLimits() tunnel.Limits {
	return tunnel.Limits{
		Process: y.proxy.config.MaxTunnels,
		Policy:  y.options.MaxTunnels, // not asked of the directive's, which has no name
		Client:  y.options.MaxTunnelsPerClient,
	}
}

// releaseTunnel releases what admitTunnel has reserved.
func (y *policy) releaseTunnel(key client.Key) { y.proxy.tunnels.Release(y.tunnelOwner, key) }

// provisionOrigins creates the clients that send forwarded requests for clients of one scope.
func (y *policy) provisionOrigins(r access.Scope) (err error) {
	y.origins[r], err = origin.NewClient(origin.Config{
		Dial: func(ctx context.Context, authority string) (net.Conn, error) {
			conn, err := y.dial(ctx, r, authority)
			if tcp, ok := conn.(*net.TCPConn); ok {
				tcpconn.EnableKeepAlive(tcp) // a pooled connection may be idle from the start
			}
			return conn, err
		},
		Recheck: func(ctx context.Context, authority string, conn net.Conn, to netip.AddrPort) error {
			return y.recheckAccess(ctx, r, authority, conn, to)
		},
		Limits: y.originLimits,
	})
	return err
}

// provisionDialer builds the dialer with its policy, resolver and parent.
func (y *policy) provisionDialer(ctx caddy.Context) error {
	own := y.proxy.own
	rules := &access.Control{IsSelf: own.listensOn, ReportOnly: slices.Contains(y.options.ReportOnly, "rules")}
	var err error
	if rules.Ports, err = access.ParsePortList("ports", y.options.Ports); err != nil {
		return err
	}
	if rules.Connect, err = access.ParsePortList("connect_ports", y.options.ConnectPorts); err != nil {
		return err
	}
	check := &access.RuleCheck{Open: rules.OpenPorts()}
	list := compileRules(ctx, y.own.Rules)
	if rules.Sets, err = access.NewRuleSets(list, check); err != nil {
		return err
	}
	if y.name != "" { // the directive's rules are asked after the policy's own
		rules.Sets = append(rules.Sets, y.proxy.directive.dialer.Access.Sets...)
	}
	if err := reportRules(check, list, rules.Sets, y.logger()); err != nil {
		return err
	}
	rules.RecheckReused = rules.ReportOnly || slices.ContainsFunc(rules.Sets, func(s *access.RuleSet) bool { return len(s.Sources) > 0 })
	y.dialer = egress.NewDialer(rules, time.Duration(y.options.DialTimeout), y.proxy.resolver)
	y.dialer.Report, y.dialer.OwnPort = y.logReported, own.usesPort
	if y.options.Upstream == nil {
		return nil
	}
	if y.dialer.Direct, err = access.NewDirectSet(y.options.NoUpstream); err != nil {
		return fmt.Errorf("no_upstream: %w", err)
	}
	if err := y.provisionParent(ctx); err != nil {
		return fmt.Errorf("upstream: %w", err)
	}
	parent := y.dialer.Parent
	if !parent.IsHTTP() {
		return nil
	}
	y.parentOrigins, err = origin.NewClient(origin.Config{
		Dial: func(ctx context.Context, _ string) (net.Conn, error) {
			start := time.Now()
			conn, err := parent.Dial(ctx)
			countDial(ctx, start, err)
			return conn, err
		},
		Address: parent.Address,
		Explain: func(err error, unread *bufio.Reader) error { return egress.AsAnswerError(err, unread) },
		Limits:  y.originLimits,
	})
	return err
}

// sharesParent reports whether the parent is that of the directive. A parent keeps dial_timeout.
func (y *policy) sharesParent() bool {
	return y.name != "" && y.own.Upstream == nil && y.own.DialTimeout == 0
}

// provisionParent makes the parent.
func (y *policy) provisionParent(ctx caddy.Context) error {
	if y.sharesParent() {
		y.dialer.Parent = y.proxy.directive.dialer.Parent
		return nil
	}
	config, err := y.options.Upstream.parentConfig(ctx, time.Duration(y.options.DialTimeout))
	if err == nil {
		y.dialer.Parent, err = egress.NewParent(config, y.dialer.Connector)
	}
	if err != nil {
		return err
	}
	if y.own.Upstream != nil && y.options.Upstream.hasLiteralSecret() {
		y.logger().Warn("the option upstream contains a password or a key in plain text, which Caddy's debug log and admin endpoint show with the rest of the config; " +
			"use a placeholder such as {env.PROXY_PASSWORD} or {file./run/secrets/proxy}")
	}
	return nil
}

// dial connects to address for a client of the given scope, and counts the attempt.
func (y *policy) dial(ctx context.Context, r access.Scope, address string) (net.Conn, error) {
	start := time.Now()
	conn, err := y.dialer.Dial(ctx, r, address)
	countDial(ctx, start, err)
	return conn, err
}

// recheckAccess checks the rules again for a reused connection that an earlier request of a client
// of scope r opened. The verdict can only have changed if the rules can change, or if the
// connection leads to this machine (then to is valid), where the first check may have
// missed a protected listener that had just been opened.
func (y *policy) recheckAccess(ctx context.Context, r access.Scope, authority string, conn net.Conn, to netip.AddrPort) error {
	rules := y.dialer.Access
	if rules.RecheckReused || to.IsValid() && rules.IsSelf != nil && rules.IsSelf(to, true) {
		return y.dialer.Recheck(ctx, r, authority, conn)
	}
	return nil
}
