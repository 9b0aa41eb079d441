// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"runtime/debug"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

func init() {
	program.status = status.New(status.Inputs{
		Versions: versions,
		Started:  program.started,
		Loaded:   lastLoaded,
		Sites:    runningSites,
		Counters: readCounters,

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

const modulePath = "github.com/asyncproxy/caddy-async-proxy"

// versions returns the versions of this module in the running binary, and of Caddy.
func versions() (module, server string) {
	module = "(devel)"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, m := range append(info.Deps, &info.Main) {
			if m.Path == modulePath && m.Version != "" {
				module = m.Version
			}
		}
	}
	server, _ = caddy.Version()
	return module, server
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

// countRefusal counts the refusal of a request in its group, which the status page shows. It
// takes no memory if the group has one already.
func (v *transaction) countRefusal(f *refusal) {
	k := status.RefusalKey{
		Cause: string(f.cause), Reason: f.errorType, Client: v.addr, User: v.user, Policy: v.policy.name, Target: strings.ToLower(v.r.Host),
	}
	denied := deniedBy(f.err)
	if denied != nil {
		k.Rule, k.Address = ruleOf(denied), denied.To.Addr()
	}
	if f.cause == causeMethod {
		k.Method = v.r.Method
	}
	program.status.Refused(k, v.start, func() status.RefusalDetails {
		d := status.RefusalDetails{Status: f.status, Detail: f.text, Allow: denied.AllowLine()}
		if denied != nil {
			d.Hint = denied.Hint
		}
		return d
	})
}
