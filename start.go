// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"
)

// eventFunc is a handler of events that is a function.
type eventFunc func()

func (f eventFunc) Handle(context.Context, caddy.Event) error { f(); return nil }

// reportStart has what an operator should know at the start logged as soon as
// the config runs, and not when it is only validated.
func (h *Handler) reportStart(ctx caddy.Context, server *caddyhttp.Server) error {
	if server == nil {
		return nil // provisioned outside of the http app
	}
	app, err := ctx.App("events")
	if err != nil {
		return err
	}
	return app.(*caddyevents.App).On("started", eventFunc(func() {
		h.logger.Info("async-proxy listening",
			zap.Strings("addresses", server.Listen),
			zap.Int64("burst", h.Burst),
			zap.Float64("refill", h.Refill))
		if hosts, _ := hostsBefore(server.Routes, h); len(hosts) > 0 {
			h.logger.Warn("this proxy's site has a host name in its address, so requests for other hosts never reach the proxy "+
				"and get an empty answer with status 200; give the site an address without a host, such as :8080",
				zap.Strings("hosts", hosts))
		}
	}))
}

// hostsBefore returns the host names that only lead to h, if the way there is
// for certain hosts only.
func hostsBefore(routes caddyhttp.RouteList, h *Handler) (hosts []string, found bool) {
	for _, route := range routes {
		for _, handler := range route.Handlers {
			switch handler := handler.(type) {
			case *caddyhttp.Subroute:
				hosts, found = hostsBefore(handler.Routes, h)
			case *Handler:
				found = handler == h
			}
			if found {
				return append(matchedHosts(route), hosts...), true
			}
		}
	}
	return nil, false
}

// matchedHosts returns the hosts of a route that matches no others.
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
