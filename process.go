// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/puzpuzpuz/xsync/v4"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// processes holds the process's only process value, under processKey, while any config has
// a proxy.
var processes = caddy.NewUsagePool()

const processKey = "process"

// program holds what lives as long as the program does, even while no config has a proxy.
var program = struct {
	metrics *metrics.Set
	status  *status.View // set by init, because its inputs need program
	started time.Time
	loaded  atomic.Pointer[time.Time] // when the last config with a proxy started to run

	listeners    downstream.Listeners // of the fast path
	invalidLines lineLimit            // log lines about clients that send no valid request
}{metrics: metrics.New(metricLabels()), started: time.Now()}

// process is what all proxies of the process share and what a reload keeps, such as open
// tunnels.
type process struct {
	tunnels *tunnel.Registry
	proxies *xsync.Map[*proxy, struct{}]  // provisioned
	blocks  *xsync.Map[client.Key, int64] // blocked clients, and until when, since epoch
	config  atomic.Value                  // of the proxies that started last: their configDone

	heads     heldHeads            // of responses in progress
	lingering downstream.Lingering // client connections that are being closed in stages
}

// acquireProcess returns the process's only process value. The caller must call
// releaseProcess once for each call that succeeds.
func acquireProcess() (*process, error) {
	p, _, err := processes.LoadOrNew(processKey, func() (caddy.Destructor, error) { return newProcess(tunnel.NewRegistry()), nil })
	if err != nil {
		return nil, err
	}
	return p.(*process), nil
}

func releaseProcess() error {
	_, err := processes.Delete(processKey)
	return err
}

// withProcess calls f with the process's only process value, if any config has a proxy.
func withProcess(f func(*process)) {
	processes.Range(func(_, p any) bool { f(p.(*process)); return true })
}

func newProcess(tunnels *tunnel.Registry) *process {
	return &process{tunnels: tunnels, proxies: xsync.NewMap[*proxy, struct{}](), blocks: xsync.NewMap[client.Key, int64]()}
}

// Destruct implements caddy.Destructor. It is called when no config has a proxy any longer.
func (p *process) Destruct() error {
	reason := tunnel.ReasonReload
	if caddy.Exiting() {
		reason = tunnel.ReasonShutdown
	}
	p.tunnels.CloseAll(reason)
	p.tunnels.Stop()
	return nil
}

// tunnelLimit returns the lowest max_tunnels of the proxies, or 0 if none has a limit.
func (p *process) tunnelLimit() int {
	limit := 0
	for each := range p.proxies.All() {
		if each.config.MaxTunnels > 0 && (limit == 0 || each.config.MaxTunnels < limit) {
			limit = each.config.MaxTunnels
		}
	}
	return limit
}

// site is what a tunnel needs of the proxy that opened it. A tunnel may outlive many
// configs, so a site must not refer to its Handler, which would keep the whole config in
// memory.
type site struct {
	zone       string
	addresses  []string        // that its server listens on
	configDone <-chan struct{} // closed when its config ends; shared by all sites of the config
	closeDelay *caddy.Duration // stream_close_delay
	limiter    *bucket.Table
	logger     *zap.Logger
	process    *process
}

// provisionSite sets site and tunnel.Owner. server is nil outside of the http app.
func (p *proxy) provisionSite(server *caddyhttp.Server) {
	p.site = &site{
		zone: p.config.Zone, configDone: p.configDone, closeDelay: p.config.StreamCloseDelay,
		limiter: p.limiter, logger: p.logger, process: p.process,
	}
	if server != nil {
		p.site.addresses = server.Listen
	}
	p.tunnelOwner = &tunnel.Owner{
		Name:         p.name,
		IdleTimeout:  time.Duration(p.config.TunnelIdleTimeout),
		StallTimeout: time.Duration(p.config.TunnelStallTimeout),
		MaxDuration:  time.Duration(p.config.TunnelMaxDuration),
		Observer:     p.site,
	}
}

// openedBy returns the site that opened a tunnel.
func openedBy(t *tunnel.Tunnel) *site { return t.Owner.Observer.(*site) }

// supersedes reports whether s replaces another site: one of another config, with the same
// zone and a common listen address. s is then responsible for its tunnels.
func (s *site) supersedes(other *site) bool {
	return s.zone == other.zone && s.configDone != other.configDone &&
		slices.ContainsFunc(s.addresses, func(address string) bool { return slices.Contains(other.addresses, address) })
}

// closeTunnelsAfterDelay closes the tunnels of a replaced site after its
// stream_close_delay, if that is set.
func (s *site) closeTunnelsAfterDelay() {
	if s.closeDelay == nil || caddy.Exiting() {
		return
	}
	time.AfterFunc(time.Duration(*s.closeDelay), func() {
		s.process.tunnels.CloseIf(tunnel.ReasonReload, func(t *tunnel.Tunnel) bool { return openedBy(t) == s })
	})
}

// reconcile applies a reload to a tunnel that was still being dialled when its site was
// replaced: it gets the same checks and delays as the site's other tunnels.
func (p *process) reconcile(t *tunnel.Tunnel) {
	current, opener := p.config.Load(), openedBy(t)
	if current == any(opener.configDone) {
		return
	}
	for each := range p.proxies.All() {
		if each.config.RecheckTunnels && current == any(each.configDone) && each.running.Load() && each.site.supersedes(opener) && each.forbids(t) {
			t.Close(tunnel.ReasonForbidden)
		}
	}
	select {
	case <-opener.configDone:
		opener.closeTunnelsAfterDelay()
	default: // the end of the config will call it
	}
}

// waitUntil waits until condition holds, or ctx ends.
func waitUntil(ctx context.Context, condition func() bool) {
	for !condition() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}
