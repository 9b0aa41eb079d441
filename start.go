// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// eventHandler calls a function. It is a struct because Caddy logs it as JSON.
type eventHandler struct{ call func() }

func (h eventHandler) Handle(context.Context, caddy.Event) error { h.call(); return nil }

// registerHooks registers hooks for when the config starts to run, which do not run when it is
// only validated, and for when the server shuts down.
func (p *proxy) registerHooks(ctx caddy.Context, server *caddyhttp.Server) error {
	if server == nil {
		return nil // provisioned outside of the http app
	}
	events, err := ctx.App("events")
	if err != nil {
		return err
	}
	server.RegisterConnContext(withConn)
	server.RegisterConnContext(withSocket)
	server.RegisterConnState(connState)
	server.RegisterConnState(downstream.ConnState)
	server.RegisterConnContext(withWindows())
	server.RegisterOnShutdown(func() { p.onShutdown(ctx) })
	server.RegisterOnStop(func(grace context.Context) error {
		if caddy.Exiting() {
			program.listeners.Drain(grace)
			p.tunnels.Drain(grace)
			p.process.lingering.Wait(grace)
		}
		return nil
	})
	return events.(*caddyevents.App).On("started", eventHandler{func() { p.onStarted(ctx, server) }})
}

// onStarted marks the proxy as running and warns about mistakes in the config that only
// show once the server listens.
func (p *proxy) onStarted(ctx caddy.Context, server *caddyhttp.Server) {
	now := time.Now()
	program.loaded.Store(&now)
	p.configWarnings = p.judgeConfig(ctx, server)
	p.running.Store(true)
	p.process.config.Store(p.configDone)
	program.status.Active() // a new table has no clients
	p.logger.Info("async-proxy listening",
		zap.Strings("addresses", server.Listen),
		zap.Int64("burst", p.config.Burst),
		zap.Float64("refill", p.config.Refill),
		zap.Strings("clients", p.effectiveClients()),
		zap.String("open_to", p.openTo(server)),
		zap.String("usage", usageLine(p.proxyURL(server))),
		zap.Strings("status_pages", p.statusURLs()))
	for _, w := range p.configWarnings {
		p.logger.Warn(w.text, w.fields...)
	}
	p.process.sharers.started(p.configDone, p.logger)
	if app, err := ctx.AppIfConfigured("http"); err == nil && !p.fastPath {
		p.logWithoutFastPath(app.(*caddyhttp.App), server)
	}
	if p.config.RecheckTunnels {
		p.tunnels.CloseIf(tunnel.ReasonForbidden, func(t *tunnel.Tunnel) bool {
			return p.site.supersedes(openedBy(t)) && p.forbids(t)
		})
	}
}

// logWithoutFastPath logs why Caddy's HTTP server serves the clients, and not the fast path. Only if
// the listener wrappers are the reason can the operator change that without losing something.
func (p *proxy) logWithoutFastPath(app *caddyhttp.App, server *caddyhttp.Server) {
	level := zapcore.DebugLevel
	owner, why := fastPathHandler(app, server)
	if owner == p {
		level = zapcore.InfoLevel
		why = "the server's listener_wrappers do not end with async_proxy, or have others than proxy_protocol and tls before it; " +
			"if async_proxy serves the clients, most requests take about 40 % less CPU time"
	}
	p.logger.Log(level, "clients are served by Caddy's HTTP server", zap.Strings("addresses", server.Listen), zap.String("why", why))
}

// onShutdown runs when a server stops accepting connections. When Caddy exits, it waits
// for tunnels over HTTP/2 and HTTP/3 as for all requests. Without a grace period it waits
// without limit, so the tunnels must close now. With one, it closes their connections at
// the end of the period, so the tunnels must close just before.
func (p *proxy) onShutdown(ctx caddy.Context) {
	if !caddy.Exiting() {
		return
	}
	var grace time.Duration
	if app, err := ctx.AppIfConfigured("http"); err == nil {
		grace = time.Duration(app.(*caddyhttp.App).GracePeriod)
	}
	time.AfterFunc(max(grace-graceMargin, grace/2), func() { p.tunnels.CloseAll(tunnel.ReasonShutdown) })
}

// graceMargin is how long before the end of the grace period the proxy closes tunnels.
const graceMargin = 200 * time.Millisecond
