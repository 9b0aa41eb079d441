// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"slices"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// settings returns the lines of the status page for the option of a policy.
func (o *option) settings(y *policy, byDefault *Handler) []status.Setting {
	if o.showAll != nil {
		return o.showAll(y)
	}
	if o.show == nil {
		return nil // shown with another option
	}
	value := o.show(y.asDirective())
	return []status.Setting{{Option: o.name, Value: value, Default: value == o.show(byDefault)}}
}

// asDirective returns a directive with the policy's own options.
func (y *policy) asDirective() *Handler {
	if y.name == "" {
		return y.proxy.config
	}
	return &Handler{Options: *y.own}
}

// settings returns the directive's options in effect, named as in the Caddyfile, without secrets.
func (p *proxy) settings() []status.Setting {
	var byDefault Handler
	byDefault.setDefaults()
	var all []status.Setting
	for _, o := range options {
		all = append(all, o.settings(p.directive, &byDefault)...)
	}
	return all
}

// settings returns the policy's conditions, and the options that it sets.
func (y *policy) settings(config *Policy) []status.Setting {
	all := y.conditionSettings(config)
	empty := &policy{name: y.name, proxy: y.proxy, own: new(Options)}
	for _, o := range options {
		if !o.inPolicy {
			continue
		}
		unset := o.settings(empty, new(Handler))
		for _, s := range o.settings(y, new(Handler)) {
			if !slices.Contains(unset, s) {
				all = append(all, s)
			}
		}
	}
	return all
}

// conditionSettings returns the policy's conditions. The values of matchers, such as those of a
// header field, may be secret, so it only names them.
func (y *policy) conditionSettings(config *Policy) (all []status.Setting) {
	if len(config.Users) > 0 {
		all = append(all, status.Setting{Option: "users", Value: printable.Text(words(config.Users, ""))})
	}
	if len(config.Clients) > 0 {
		all = append(all, status.Setting{Option: "clients", Value: words(config.Clients, "")})
	}
	var matchers []string
	for _, m := range y.matchers {
		matchers = append(matchers, m.(caddy.Module).CaddyModule().ID.Name())
	}
	if slices.Sort(matchers); len(matchers) > 0 {
		all = append(all, status.Setting{Option: "match", Value: words(matchers, "")})
	}
	if config.Anonymous {
		all = append(all, status.Setting{Option: "anonymous", Value: "on"})
	}
	return all
}

func (y *policy) limiterSettings() []status.Setting {
	if y.proxy.shared == nil {
		return []status.Setting{{Option: "limiter", Value: "none", Default: true}}
	}
	return []status.Setting{{Option: "limiter", Value: y.proxy.shared.(caddy.Module).CaddyModule().ID.Name()}}
}

func (y *policy) upstreamSettings() []status.Setting {
	if y.own.Upstream == nil || y.options.Upstream == nil { // not set, or off
		return []status.Setting{{Option: "upstream", Value: "none", Default: y.own.Upstream == nil}}
	}
	return []status.Setting{{Option: "upstream", Value: y.dialer.Parent.Scheme + "://" + y.dialer.Parent.Address}}
}

func (y *policy) clientSettings() []status.Setting {
	p := y.proxy
	return []status.Setting{{Option: "clients", Value: words(p.effectiveClients(), "none"), Default: len(p.config.Clients) == 0}}
}

func (y *policy) authSettings() []status.Setting {
	p := y.proxy
	providers := make([]string, len(p.auth))
	for i, provider := range p.auth {
		providers[i] = provider.name
	}
	return []status.Setting{{Option: "authentication", Value: words(providers, "none"), Default: len(p.auth) == 0}}
}

func (y *policy) maxTunnelSettings() []status.Setting {
	limit := func(n int) string {
		if n == 0 {
			return "no limit"
		}
		return fmt.Sprint(n)
	}
	return []status.Setting{
		{Option: "max_tunnels", Value: limit(y.own.MaxTunnels), Default: y.own.MaxTunnels == 0},
		{Option: "max_tunnels per_client", Value: limit(y.own.MaxTunnelsPerClient), Default: y.own.MaxTunnelsPerClient == 0},
	}
}

func (y *policy) ruleSettings() (all []status.Setting) {
	for _, rule := range y.own.Rules {
		value := slices.Clone(rule.Destinations)
		for _, file := range rule.Files {
			value = append(value, "file "+file)
		}
		all = append(all, status.Setting{Option: rule.Action, Value: words(value, "a source of ranges")})
	}
	if len(all) == 0 {
		all = []status.Setting{{Option: "allow, deny", Value: "none"}}
	}
	return all
}

func (y *policy) viaSettings() []status.Setting {
	p := y.proxy
	name := p.name
	if p.config.Via == "off" {
		name = "off"
	}
	return []status.Setting{{Option: "via", Value: name, Default: p.config.Via == ""}}
}

func (y *policy) headerSettings() []status.Setting {
	return []status.Setting{{Option: "header_up, header_down", Value: onOff(y.own.Headers != nil), Default: y.own.Headers == nil}}
}

func (y *policy) pacSettings() []status.Setting {
	p := y.proxy
	path := p.config.ServePAC
	if path == "" {
		path = "off"
	}
	return []status.Setting{
		{Option: "serve_pac", Value: path, Default: path == "off"},
		{Option: "serve_pac direct", Value: words(p.config.PACDirect, "none"), Default: len(p.config.PACDirect) == 0},
	}
}
