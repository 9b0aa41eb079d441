// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// emptyView returns the view of a process without a proxy.
func emptyView() *View {
	return New(Inputs{
		Versions:    func() Versions { return Versions{Version: "v1", Caddy: "v2"} },
		Loaded:      time.Now,
		Sites:       func() []Site { return nil },
		Counters:    metrics.New(metrics.Labels{}).Read,
		Warnings:    func() []Warning { return nil },
		Tables:      func(func(*bucket.Table) bool) {},
		Blocks:      func(func(client.Key, int64) bool) {},
		Tunnels:     func(func(*tunnel.Tunnel) bool) {},
		OpenTunnels: func() (n, limit int) { return 0, 0 },
	})
}
