// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/puzpuzpuz/xsync/v4"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// program holds what lives as long as the program does, even while no config has a proxy. It is
// the only package-level variable that changes. It has to be one: Caddy creates every module
// with a function without parameters, and the modules of overlapping configs must find the same
// values.
var program = struct {
	metrics *metrics.Set
	status  *status.View // set by init, because its inputs need program
	started time.Time
	loaded  atomic.Pointer[time.Time] // when the last config with a proxy started to run

	processes     *caddy.UsagePool     // the only process, under processKey, while any config has a proxy
	listeners     downstream.Listeners // of the fast path
	sockets       socketCache          // on which Caddy listens
	descriptors   descriptorCount
	statusServers sync.Map  // *Status -> *caddyhttp.Server, to which no client is connected
	invalidLines  lineLimit // log lines about clients that send no valid request

	// logins checks passwords with half of the processors. The other half carry traffic.
	logins *loginGate

	// Credentials that providers have accepted and rejected. For http_basic, an entry stays true
	// forever, because its key depends on the stored hash.
	rightCredentials, wrongCredentials *credentialSet
}{
	metrics: metrics.New(metricLabels()), started: time.Now(), processes: caddy.NewUsagePool(),
	logins:           newLoginGate(max(1, runtime.GOMAXPROCS(0)/2), loginPatience),
	rightCredentials: newCredentialSet(10_000), wrongCredentials: newCredentialSet(10_000),
}

// process is what all proxies of the process share and what a reload keeps, such as open
// tunnels.
type process struct {
	tunnels *tunnel.Registry
	proxies *xsync.Map[*proxy, struct{}]  // provisioned
	blocks  *xsync.Map[client.Key, int64] // blocked clients, and until when, since epoch
	config  atomic.Value                  // of the proxies that started last: their configDone

	// limiters holds the tables of buckets in use, by their limits. Handlers with the same zone
	// and limits share one budget for each client; changed limits make a new table, with every
	// bucket full. A new config acquires its tables before the old one releases them, so that
	// clients' tokens survive a reload. failedLogins holds those of failed logins in the same way.
	limiters, failedLogins *caddy.UsagePool

	sharers   sharerWatch          // looks for other processes at our addresses
	heads     origin.HeldHeads     // of responses in progress
	lingering downstream.Lingering // client connections that are being closed in stages
}

const processKey = "process"

// acquireProcess returns the process's only process value. The caller must call
// releaseProcess once for each call that succeeds.
func acquireProcess() (*process, error) {
	p, _, err := program.processes.LoadOrNew(processKey, func() (caddy.Destructor, error) { return newProcess(tunnel.NewRegistry()), nil })
	if err != nil {
		return nil, err
	}
	return p.(*process), nil
}

func releaseProcess() error {
	_, err := program.processes.Delete(processKey)
	return err
}

// currentProcess returns the process's only process value, or nil if no config has a proxy.
func currentProcess() (current *process) {
	program.processes.Range(func(_, p any) bool { current = p.(*process); return false })
	return current
}

func newProcess(tunnels *tunnel.Registry) *process {
	return &process{
		tunnels: tunnels, proxies: xsync.NewMap[*proxy, struct{}](), blocks: xsync.NewMap[client.Key, int64](),
		limiters: caddy.NewUsagePool(), failedLogins: caddy.NewUsagePool(),
	}
}

// Destruct implements caddy.Destructor. It is called when no config has a proxy any longer.
func (p *process) Destruct() error {
	reason := tunnel.ReasonReload
	if caddy.Exiting() {
		reason = tunnel.ReasonShutdown
	}
	p.tunnels.CloseAll(reason)
	p.tunnels.Stop()
	p.sharers.stop()
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
