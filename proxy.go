// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"github.com/gaissmai/bart"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// proxy is what Provision builds from a Handler, which is its configuration. It serves requests.
type proxy struct {
	config              *Handler // with defaults
	logger              *zap.Logger
	events              emitter
	zone                *metrics.Zone // its counters
	limiter             *bucket.Table
	shared              Limiter // or nil
	policy              string  // the value of RateLimit-Policy
	limitedResponse     *atomic.Pointer[limitedAnswer]
	exempt              *bart.Lite
	clients             *bart.Lite      // that may use the proxy
	pacDirect           *access.RuleSet // destinations that the PAC script makes browsers reach directly
	restrictedElsewhere func() bool     // something other than clients restricts who may use the proxy
	auth                []authProvider
	basic               *caddyauth.HTTPBasicAuth // the provider, if it is the only one
	hasBasicAuth        bool                     // http_basic is one of the providers
	failedLogins        *bucket.Table            // counts failed logins; nil: no limit
	dialer              *egress.Dialer
	process             *process
	tunnels             *tunnel.Registry // of process
	site                *site
	tunnelOwner         *tunnel.Owner // of the tunnels of site
	origins             [access.ScopeCount]*origin.Client
	parentOrigins       *origin.Client // sends forwarded requests to the parent; nil: it accepts none
	originLimits        *origin.Limits

	via      via
	name     string        // in Proxy-Status
	pacRules func() string // the PAC script without its head

	running    *atomic.Bool    // its config has started
	fastPath   bool            // its server has our listener wrapper and no other
	configDone <-chan struct{} // closed when its config ends; shared by all handlers of the config
}

// provision builds the proxy from its configuration, whose options are valid. close must be
// called even if it fails.
func (p *proxy) provision(ctx caddy.Context) error {
	p.logger = ctx.Logger()
	p.originLimits = p.newOriginLimits()
	p.running, p.configDone = new(atomic.Bool), ctx.Done()

	var err error
	if p.exempt, err = parsePrefixes("exempt", p.config.Exempt); err != nil {
		return err
	}
	server, _ := ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if err := p.provisionClients(server); err != nil {
		return err
	}
	if p.pacDirect, err = access.NewPACDirect(p.config.PACDirect); err != nil {
		return fmt.Errorf("pac_direct: %w", err)
	}
	if err := p.loadAuth(ctx); err != nil {
		return err
	}
	if err := p.provisionHeaders(ctx); err != nil {
		return fmt.Errorf("headers: %w", err)
	}
	raiseHeadLimit(server)
	if err := p.provisionName(server); err != nil {
		return err
	}
	if err := program.metrics.Register(ctx.GetMetricsRegistry(), metricsState); err != nil {
		return err
	}
	if p.events, err = newEmitter(ctx); err != nil {
		return err
	}
	if err := p.provisionDialer(ctx, server); err != nil {
		return err
	}
	for r := range access.ScopeCount {
		if err := p.provisionOrigins(r); err != nil {
			return err
		}
	}
	if err := p.loadLimiter(ctx); err != nil {
		return err
	}
	return p.provisionShared(ctx, server)
}

func (p *proxy) provisionHeaders(ctx caddy.Context) error {
	if p.config.Headers == nil {
		return nil
	}
	if err := checkHeaders(p.config.Headers); err != nil {
		return err
	}
	if err := p.config.Headers.Provision(ctx); err != nil {
		return err
	}
	return p.config.Headers.Validate()
}

// newOriginLimits returns the limits of exchanges with origins.
func (p *proxy) newOriginLimits() *origin.Limits {
	const maxTimeout = 1 << 60 // 36 years: adding to it does not overflow
	return &origin.Limits{
		HeaderTimeout:  min(time.Duration(p.config.ResponseHeaderTimeout), maxTimeout),
		ContentTimeout: min(time.Duration(p.config.ResponseIdleTimeout), maxTimeout),
		ContentGrace:   origin.ContentGrace,
		Pings:          origin.DefaultPings,
		Admit: func(key client.Key) bool {
			return p.tunnels.Admit(key, p.config.MaxTunnels, p.config.MaxTunnelsPerClient) == nil
		},
		Release: func(key client.Key) { p.tunnels.Release(key) },
	}
}

// provisionOrigins creates the clients that send forwarded requests for clients of one scope.
func (p *proxy) provisionOrigins(r access.Scope) (err error) {
	p.origins[r], err = origin.NewClient(origin.Config{
		Dial: func(ctx context.Context, authority string) (net.Conn, error) {
			conn, err := p.dial(ctx, r, authority)
			if tcp, ok := conn.(*net.TCPConn); ok {
				tcpconn.EnableKeepAlive(tcp) // a pooled connection may be idle from the start
			}
			return conn, err
		},
		Recheck: func(ctx context.Context, authority string, conn net.Conn, to netip.AddrPort) error {
			return p.recheckAccess(ctx, r, authority, conn, to)
		},
		Limits: p.originLimits,
	})
	return err
}

// provisionShared acquires what the proxy shares with others. It runs last, because
// close has to release it.
func (p *proxy) provisionShared(ctx caddy.Context, server *caddyhttp.Server) error {
	limits := p.config.limits()
	var err error
	if p.process, err = acquireProcess(); err != nil {
		return err
	}
	p.tunnels = p.process.tunnels
	p.originLimits.Exit, p.originLimits.Heads = p.tunnels.Context(), &p.process.heads
	if p.limiter, err = acquireTable(p.process.limiters, limits); err != nil {
		return err
	}
	if err := p.provisionFailedLogins(); err != nil {
		return err
	}
	p.policy, p.limitedResponse = rateLimitPolicy(limits), new(atomic.Pointer[limitedAnswer])
	p.zone = program.metrics.Zone(p.config.Zone)
	p.provisionSite(server)
	p.process.proxies.Store(p, struct{}{})
	return p.registerHooks(ctx, server)
}

// close releases what the proxy shares with others, and closes its connections.
func (p *proxy) close() error {
	for _, origins := range p.origins {
		if origins != nil {
			origins.Close()
		}
	}
	if p.parentOrigins != nil {
		p.parentOrigins.Close()
	}
	if p.dialer != nil && p.dialer.Parent != nil {
		p.dialer.Parent.Close()
	}
	if p.process == nil {
		return nil
	}
	p.process.proxies.Delete(p)
	if p.site != nil {
		p.site.closeTunnelsAfterDelay()
	}
	var err, err2 error
	if p.limiter != nil {
		_, err = p.process.limiters.Delete(p.limiter.Limits)
	}
	if p.failedLogins != nil {
		_, err2 = p.process.failedLogins.Delete(p.failedLogins.Limits)
	}
	return errors.Join(err, err2, releaseProcess())
}

// provisionDialer builds the dialer with its policy, resolver and parent.
func (p *proxy) provisionDialer(ctx caddy.Context, server *caddyhttp.Server) error {
	own := &protectedListeners{ctx, server, p.running}
	rules := &access.Control{IsSelf: own.listensOn, ReportOnly: slices.Contains(p.config.ReportOnly, "rules")}
	var err error
	if rules.Ports, err = access.ParsePortList("ports", p.config.Ports); err != nil {
		return err
	}
	if rules.Connect, err = access.ParsePortList("connect_ports", p.config.ConnectPorts); err != nil {
		return err
	}
	check := &access.RuleCheck{Open: rules.OpenPorts()}
	list := compileRules(ctx, p.config.Rules)
	if rules.Sets, err = access.NewRuleSets(list, check); err != nil {
		return err
	}
	if err := reportRules(check, list, rules.Sets, p.logger); err != nil {
		return err
	}
	rules.RecheckReused = rules.ReportOnly || slices.ContainsFunc(rules.Sets, func(s *access.RuleSet) bool { return len(s.Sources) > 0 })
	servers, err := parseResolvers(p.config.Resolvers)
	if err != nil {
		return err
	}
	p.dialer = egress.NewDialer(rules, time.Duration(p.config.DialTimeout), egress.NewResolver(servers))
	p.dialer.Report, p.dialer.OwnPort = p.logReported, own.usesPort
	p.pacRules = sync.OnceValue(p.makePACRules)
	if p.config.Upstream == nil {
		return nil
	}
	if p.dialer.Direct, err = access.NewDirectSet(p.config.NoUpstream); err != nil {
		return fmt.Errorf("no_upstream: %w", err)
	}
	config, err := p.config.Upstream.parentConfig(ctx, time.Duration(p.config.DialTimeout))
	if err == nil {
		p.dialer.Parent, err = egress.NewParent(config, p.dialer.Connector)
	}
	if err != nil {
		return fmt.Errorf("upstream: %w", err)
	}
	if p.config.Upstream.hasLiteralSecret() {
		p.logger.Warn("the option upstream contains a password or a key in plain text, which Caddy's debug log and admin endpoint show with the rest of the config; " +
			"use a placeholder such as {env.PROXY_PASSWORD} or {file./run/secrets/proxy}")
	}
	if parent := p.dialer.Parent; parent.IsHTTP() {
		p.parentOrigins, err = origin.NewClient(origin.Config{
			Dial: func(ctx context.Context, _ string) (net.Conn, error) {
				start := time.Now()
				conn, err := parent.Dial(ctx)
				countDial(ctx, start, err)
				return conn, err
			},
			Address: parent.Address,
			Explain: func(err error, unread *bufio.Reader) error { return egress.AsAnswerError(err, unread) },
			Limits:  p.originLimits,
		})
	}
	return err
}

// dial connects to address for a client of the given reach, and counts the attempt.
func (p *proxy) dial(ctx context.Context, r access.Scope, address string) (net.Conn, error) {
	start := time.Now()
	conn, err := p.dialer.Dial(ctx, r, address)
	countDial(ctx, start, err)
	return conn, err
}

// forbids reports whether the rules would now deny an open tunnel.
func (p *proxy) forbids(t *tunnel.Tunnel) bool {
	ctx := context.Background()
	if strings.HasPrefix(t.Proto, "HTTP/") { // a CONNECT, not an upgraded request
		ctx = p.dialer.Access.WithConnect(ctx)
	}
	return p.dialer.Denies(ctx, access.Scope(t.Scope), t.Target, t.Address)
}

// recheckAccess checks the rules for a reused connection that an earlier request of a client
// of reach r opened. The verdict can only have changed if the rules can change, or if the
// connection leads to this machine (then to is valid), where the first check may have
// missed a protected listener that had just been opened.
func (p *proxy) recheckAccess(ctx context.Context, r access.Scope, authority string, conn net.Conn, to netip.AddrPort) error {
	rules := p.dialer.Access
	if rules.RecheckReused || to.IsValid() && rules.IsSelf != nil && rules.IsSelf(to, true) {
		return p.dialer.Recheck(ctx, r, authority, conn)
	}
	return nil
}

// idleConnections returns the number of idle connections to origins and the parent.
func (p *proxy) idleConnections() int {
	n := 0
	for _, origins := range p.origins {
		n += origins.Idle()
	}
	if p.parentOrigins != nil {
		n += p.parentOrigins.Idle()
	}
	return n
}

// parsePrefixes reads the addresses and CIDR ranges of an option.
func parsePrefixes(option string, exprs []string) (*bart.Lite, error) {
	table := new(bart.Lite)
	for _, expr := range exprs {
		for _, cidr := range access.ExpandRanges(expr) {
			prefix, err := access.ParsePrefix(cidr)
			if bits := access.CheckHostBits(cidr); bits != nil {
				return nil, fmt.Errorf("%s: %w", option, bits)
			}
			if err != nil {
				return nil, fmt.Errorf("%s %q: expected an address, a CIDR range such as 10.0.0.0/8, or private_ranges", option, expr)
			}
			table.Insert(prefix)
		}
	}
	return table, nil
}
