// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"context"
	"reflect"
	"slices"
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
		level := zapcore.DebugLevel
		owner, why := fastPathHandler(app.(*caddyhttp.App), server)
		if owner == p {
			level, why = zapcore.InfoLevel, "async_proxy is not the last of the server's listener_wrappers, or there are others than proxy_protocol and tls; with async_proxy, most requests would take about 30 % less CPU"
		}
		p.logger.Log(level, "clients are served by Caddy's HTTP server", zap.Strings("addresses", server.Listen), zap.String("why", why))
	}
	if p.config.RecheckTunnels {
		p.tunnels.CloseIf(tunnel.ReasonForbidden, func(t *tunnel.Tunnel) bool {
			return p.site.supersedes(openedBy(t)) && p.forbids(t)
		})
	}
}

// trustsProxies reports whether trusted_proxies is set. It reads an unexported field,
// because Caddy has no other way to tell once it has loaded the module.
func trustsProxies(server *caddyhttp.Server) bool {
	field := reflect.ValueOf(server).Elem().FieldByName("trustedProxies")
	return field.IsValid() && field.Kind() == reflect.Interface && !field.IsNil()
}

// plainAddresses returns the listener addresses that other machines may connect to without
// TLS. It asks the listeners, because the config does not contain the address of an
// inherited socket (fd/3).
func (p *proxy) plainAddresses(ctx caddy.Context, server *caddyhttp.Server) (plain []string) {
	app, err := ctx.AppIfConfigured("http")
	if err != nil {
		return nil
	}
	for _, ln := range server.Listeners() {
		if isBeyondLoopback(ln.Addr()) && !usesTLS(app.(*caddyhttp.App), server, ln) {
			plain = append(plain, ln.Addr().String())
		}
	}
	return plain
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

// minHeadLimit is the smallest size limit for request heads that suits a proxy: as much as
// Chromium sends. Kerberos tickets alone may take 64 KiB.
const minHeadLimit = 256 << 10

// caddyHeadLimit is Caddy's default size limit for request heads. It suits applications.
const caddyHeadLimit = 16 << 10

// raiseHeadLimit raises a server's limit to minHeadLimit unless the operator has set one.
func raiseHeadLimit(server *caddyhttp.Server) {
	if server != nil && server.MaxHeaderBytes == caddyHeadLimit {
		server.MaxHeaderBytes = minHeadLimit
	}
}

// speaksHTTP2 reports whether a server accepts HTTP/2 or HTTP/3 over TLS.
func speaksHTTP2(app *caddyhttp.App, server *caddyhttp.Server) bool {
	if len(server.TLSConnPolicies) == 0 || !slices.ContainsFunc(server.Protocols, func(p string) bool { return p == "h2" || p == "h3" }) {
		return false
	}
	return slices.ContainsFunc(server.Listen, func(address string) bool {
		addr, err := caddy.ParseNetworkAddress(address)
		return err == nil && int(addr.StartPort) != cmp.Or(app.HTTPPort, caddyhttp.DefaultHTTPPort)
	})
}

// hostsLeadingTo returns the host names that the routes to h are restricted to, if they are,
// and whether the routes lead to h at all.
func hostsLeadingTo(routes caddyhttp.RouteList, h caddyhttp.MiddlewareHandler) (hosts []string, found bool) {
	for _, route := range routes {
		for _, handler := range route.Handlers {
			if sub, ok := handler.(*caddyhttp.Subroute); ok {
				hosts, found = hostsLeadingTo(sub.Routes, h)
			} else {
				found = handler == h
			}
			if found {
				return append(matchedHosts(route), hosts...), true
			}
		}
	}
	return nil, false
}

// matchedHosts returns the hosts that a route is restricted to; none if it matches others.
func matchedHosts(route caddyhttp.Route) []string {
	var hosts []string
	for _, set := range route.MatcherSets {
		i := slices.IndexFunc(set, func(m any) bool { _, ok := m.(*caddyhttp.MatchHost); return ok })
		if i < 0 {
			return nil
		}
		hosts = append(hosts, *set[i].(*caddyhttp.MatchHost)...)
	}
	return hosts
}
