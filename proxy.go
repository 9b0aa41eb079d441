// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"github.com/gaissmai/bart"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/selection"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// proxy is what Provision builds from a Handler, which is its configuration. It serves requests.
type proxy struct {
	config              *Handler // with defaults
	logger              *zap.Logger
	events              emitter
	zone                *metrics.Zone // the counters of its zone
	shared              Limiter       // nil: none
	exempt              *bart.Lite
	clients             *bart.Lite      // the clients that may use the proxy
	pacDirect           *access.RuleSet // destinations that the PAC script makes browsers reach directly
	restrictedElsewhere func() bool     // whether something other than the option clients restricts access
	clientsLine         func() (reason, line string)
	auth                []authProvider
	users               *usersFile                      // nil: there is none; it is among auth
	basic               func() *caddyauth.HTTPBasicAuth // returns http_basic with the current users; nil unless it is the only provider
	hasBasicAuth        bool                            // http_basic is one of the providers
	failedLogins        *bucket.Table                   // counts failed logins; nil: no limit
	process             *process
	tunnels             *tunnel.Registry // of process
	site                *site
	resolver            *egress.Resolver
	own                 *protectedListeners
	directive           *policy        // the directive's own options, for clients without a policy
	policies            []*policy      // the policies of the directive, in their order
	selection           *selection.Set // finds the policy of a client; nil: there are no policies

	via      via
	name     string        // in Proxy-Status
	pacRules func() string // the PAC script without its head

	running        *atomic.Bool    // its config has started
	configWarnings []warning       // does not change once running is set
	fastPath       bool            // its server has our listener wrapper and no other
	configDone     <-chan struct{} // closed when its config ends; shared by all handlers of the config
}

// provision builds the proxy from its configuration, whose options are valid. close must be
// called even if it fails.
func (p *proxy) provision(ctx caddy.Context) error {
	p.logger = ctx.Logger()
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
	servers, err := parseResolvers(p.config.Resolvers)
	if err != nil {
		return err
	}
	p.resolver = egress.NewResolver(servers)
	p.own = &protectedListeners{ctx, server, p.running}
	p.pacRules = sync.OnceValue(p.makePACRules)
	if err := p.loadLimiter(ctx); err != nil {
		return err
	}
	return p.provisionShared(ctx, server)
}

// provisionShared acquires what the proxy shares with others. It runs last, because
// close has to release it.
func (p *proxy) provisionShared(ctx caddy.Context, server *caddyhttp.Server) error {
	var err error
	if p.process, err = acquireProcess(); err != nil {
		return err
	}
	p.tunnels = p.process.tunnels
	if err := p.provisionFailedLogins(); err != nil {
		return err
	}
	p.zone = program.metrics.Zone(p.config.Zone)
	p.provisionSite(server)
	if err := p.provisionPolicies(ctx); err != nil {
		return err
	}
	p.site.tables = make(map[string]*bucket.Table)
	for y := range p.eachPolicy {
		p.site.tables[y.name] = y.limiter
	}
	p.process.proxies.Store(p, struct{}{})
	return p.registerHooks(ctx, server)
}

// close releases what the proxy shares with others, and closes its connections.
func (p *proxy) close() error {
	if p.process == nil {
		return nil
	}
	p.process.proxies.Delete(p)
	if p.site != nil {
		p.site.closeTunnelsAfterDelay()
	}
	var errs []error
	for y := range p.eachPolicy {
		errs = append(errs, y.close())
	}
	if p.failedLogins != nil {
		_, err := p.process.failedLogins.Delete(p.failedLogins.Limits)
		errs = append(errs, err)
	}
	return errors.Join(append(errs, releaseProcess())...)
}

// forbids reports whether the policy that an open tunnel now has would deny it. It returns true if
// that policy cannot be determined.
func (p *proxy) forbids(t *tunnel.Tunnel) bool {
	ctx := context.Background()
	y, err := p.policyOfTunnel(t)
	if err != nil {
		p.logger.Error("cannot determine the policy of an open tunnel, so it is closed", zap.Uint64("id", t.ID), errorField(err))
		return true
	}
	if isConnect(t) {
		if y.deniesMethod(http.MethodConnect) != nil && !y.dialer.Access.ReportOnly {
			return true
		}
		ctx = y.dialer.Access.WithConnect(ctx)
	}
	return y.dialer.Denies(ctx, access.Scope(t.Scope), t.Target, t.Address)
}

// idleConnections returns the number of idle connections to origins and the parent.
func (p *proxy) idleConnections() int {
	n := 0
	for y := range p.eachPolicy {
		for _, origins := range y.origins {
			n += origins.Idle()
		}
		if y.parentOrigins != nil {
			n += y.parentOrigins.Idle()
		}
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
