// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
	"github.com/asyncproxy/caddy-async-proxy/internal/version"
)

func init() {
	program.status = status.New(status.Inputs{
		Versions: versions,
		Started:  program.started,
		Loaded:   lastLoaded,
		Sites:    runningSites,
		Listen:   listenersOfSites,
		Counters: readCounters,
		Warnings: currentWarnings,

		Tables:      eachTable,
		Blocks:      eachBlock,
		Tunnels:     eachTunnel,
		OpenTunnels: countTunnels,
		TableOf:     tableOf,
		Successor:   successorTable,

		CloseTunnel: func(id uint64) bool {
			p := currentProcess()
			return p != nil && p.closeTunnel(id)
		},
		Refill: func(key client.Key, zone, policy string) bool {
			p := currentProcess()
			return p != nil && p.refillClient(key, zone, policy)
		},
		DirectivePolicy: directivePolicy,
		Block: func(key client.Key, d time.Duration) bool {
			p := currentProcess()
			return p != nil && p.blockClient(key, d)
		},
		ParseDuration: caddy.ParseDuration,

		Explain: func(ctx context.Context, q status.Question) ([]status.Explanation, error) {
			return explainSites(ctx, q, true)
		},
	})
}

// versions returns what the running binary is made of.
func versions() status.Versions {
	build := version.Read()
	server, _ := caddy.Version()
	return status.Versions{Version: build.Version, Commit: build.ShortCommit(), Caddy: server, Go: build.Go}
}

// lastLoaded returns when the last config with a proxy started to run.
func lastLoaded() time.Time {
	if loaded := program.loaded.Load(); loaded != nil {
		return *loaded
	}
	return program.started
}

// runningSites returns the options of all handlers that run.
func runningSites() (sites []status.Site) {
	p := currentProcess()
	if p == nil {
		return nil
	}
	for each := range p.proxies.All() {
		if each.running.Load() {
			site := status.Site{Site: strings.Join(each.site.addresses, " "), Settings: each.settings()}
			for i, y := range each.policies {
				site.Policies = append(site.Policies, status.Policy{Policy: y.name, Settings: y.settings(each.config.Policies[i])})
			}
			sites = append(sites, site)
		}
	}
	return sites
}

// listenersOfSites returns the listeners of all handlers that run, each of them once.
func listenersOfSites() (found []status.Listener) {
	p := currentProcess()
	if p == nil {
		return nil
	}
	for each := range p.proxies.All() {
		server := each.own.self
		app, err := each.own.ctx.AppIfConfigured("http")
		if err != nil || server == nil || !each.running.Load() {
			continue
		}
		for _, ln := range server.Listeners() {
			found = append(found, status.Listener{
				Network: ln.Addr().Network(), Address: ln.Addr().String(), TLS: usesTLS(app.(*caddyhttp.App), server, ln), ProxyProtocol: speaksProxyProtocol(server),
			})
		}
	}
	slices.SortFunc(found, func(a, b status.Listener) int { return strings.Compare(a.Address, b.Address) })
	return slices.Compact(found)
}

// readCounters returns the counters, with the bytes of open tunnels.
func readCounters() metrics.Reading {
	if p := currentProcess(); p != nil {
		p.countTunnelBytes()
	}
	return program.metrics.Read()
}

// eachTable calls yield with the tables of the limiters in use, until it returns false.
func eachTable(yield func(*bucket.Table) bool) {
	if p := currentProcess(); p != nil {
		p.eachTable(yield)
	}
}

// eachBlock calls yield with the blocked clients, until it returns false.
func eachBlock(yield func(client.Key, int64) bool) {
	if p := currentProcess(); p != nil {
		p.blocks.Range(yield)
	}
}

// eachTunnel calls yield with the open tunnels, until it returns false.
func eachTunnel(yield func(*tunnel.Tunnel) bool) {
	if p := currentProcess(); p != nil {
		p.tunnels.All()(yield)
	}
}

// countTunnels returns the number of open tunnels, and the lowest limit of a handler.
func countTunnels() (n, limit int) {
	if p := currentProcess(); p != nil {
		return p.tunnels.Size(), p.tunnelLimit()
	}
	return 0, 0
}
