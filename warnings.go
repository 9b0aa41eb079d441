// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// warning is something that is wrong with the config of a proxy. It is logged when the config
// starts, and shown to operators while it runs.
type warning struct {
	code   string // for programs
	text   string // what is wrong, and what to do
	fields []zap.Field
}

// judgeConfig returns the warnings about the config that can only be found once the server listens.
func (p *proxy) judgeConfig(ctx caddy.Context, server *caddyhttp.Server) (found []warning) {
	warn := func(code, text string, fields ...zap.Field) { found = append(found, warning{code, text, fields}) }
	addresses := zap.Strings("addresses", server.Listen)
	if hosts, _ := hostsLeadingTo(routesOf(server), p.config); len(hosts) > 0 {
		warn("host_in_address", "this proxy's site has a host name in its address, so requests for other hosts never reach the proxy; "+
			"give the site an address without a host, such as :8080", zap.Strings("hosts", hosts))
	}
	if site := siteOf(server, p.config); mayFallThrough(site) && firstProxy(site) == p {
		warn("no_match", "every async_proxy of this site has a matcher, and nothing responds to requests that none of them matches; "+
			"add one without a matcher, or respond with 403 at the end", addresses)
	}
	if first := shadowing(siteOf(server, p.config), p.config); first != nil {
		warn("unreachable", "an async_proxy without a matcher comes before this one in the site and handles every request for the proxy; "+
			"give the first one a matcher, or remove one of them", addresses)
	}
	if comparesSNI(server) {
		warn("strict_sni_host", "each request to this server must be for the host of its TLS handshake (strict_sni_host, which client_auth implies), "+
			"so requests through the proxy get 421; set strict_sni_host insecure_off in the global option servers", addresses)
	}
	if server.TrustedProxiesStrict == 0 && trustsProxies(server) {
		warn("forgeable_clients", "the server has trusted_proxies without trusted_proxies_strict, so it trusts the first address in X-Forwarded-For, "+
			"which a client can forge to bypass clients, limits and blocks; add trusted_proxies_strict", addresses)
	}
	if p.isOpen() {
		warn("open_proxy", "open proxy: anyone who can reach this address can use it; restrict it with the option clients, or add basic_auth or a remote_ip matcher",
			addresses, zap.Strings("clients", p.config.Clients))
	}
	if plain := p.plainAddresses(ctx, server); len(p.auth) > 0 && len(plain) > 0 {
		warn("clear_passwords", "passwords are sent in clear text: other machines can reach this address, and it does not use TLS; "+
			"give the site a certificate, or bind it to 127.0.0.1", zap.Strings("addresses", plain))
	}
	if app, err := ctx.AppIfConfigured("http"); err == nil && len(p.config.Hosts) == 0 && speaksHTTP2(app.(*caddyhttp.App), server) {
		warn("hosts_missing", "this proxy uses TLS, but the option hosts, which lists the server's own names, is not set; without it, requests for http:// URLs "+
			"over HTTP/2 and HTTP/3 look like requests for the server itself, and are answered with 421 unless another handler answers them", addresses)
	}
	if outputs := unbufferedLogs(ctx.Done()); len(outputs) > 0 {
		warn("log_not_buffered", "the output async_proxy_buffer has no effect on "+strings.Join(outputs, ", ")+", because this process, or another log, already writes to the file "+
			"without it; give all logs of the file that output, and restart Caddy", zap.Strings("outputs", outputs))
	}
	return found
}

// currentWarnings returns what is wrong with the running proxies and the process now.
func currentWarnings() (found []status.Warning) {
	p := currentProcess()
	if p == nil {
		return nil
	}
	for each := range p.proxies.All() {
		if each.running.Load() {
			found = append(found, each.warnings()...)
		}
	}
	for _, other := range currentSharers() {
		found = append(found, status.Warning{Code: "other_process",
			Text: fmt.Sprintf("another process (%v) listens at %v and gets some of the connections; stop it, or use another port", other, other.at)})
	}
	for _, at := range ownConflicts() {
		found = append(found, status.Warning{Code: "shared_address",
			Text: fmt.Sprintf("two listeners of this process, such as a site and the admin endpoint, are at %v, and each gets some of the connections; give them different ports", at)})
	}
	if limit := program.descriptors.nearLimit(); limit > 0 {
		found = append(found, status.Warning{Code: "descriptors_near_limit",
			Text: fmt.Sprintf("at least 90 %% of the %d file descriptors that this process may open are in use, and without one it accepts no connection; raise the limit (LimitNOFILE in systemd, ulimit -n)", limit)})
	}
	return found
}

// warnings returns what is wrong with a running proxy now.
func (p *proxy) warnings() (found []status.Warning) {
	site := strings.Join(p.site.addresses, " ")
	for _, w := range p.configWarnings {
		found = append(found, status.Warning{Code: w.code, Site: site, Text: w.text})
	}
	if what := p.onlyReported(); len(what) > 0 {
		found = append(found, status.Warning{Code: "report_only", Site: site,
			Text: fmt.Sprintf("denials by %s are only logged and not enforced, because report_only is on; remove the option to enforce them", strings.Join(what, " and "))})
	}
	if p.users != nil {
		found = append(found, p.users.warnings(site)...)
	}
	if shared, ok := p.shared.(Troubled); ok {
		if trouble := shared.Trouble(); trouble != "" {
			found = append(found, status.Warning{Code: "limiter_away", Site: site, Text: trouble})
		}
	}
	return found
}

// onlyReported returns the values of report_only in any policy.
func (p *proxy) onlyReported() (what []string) {
	for y := range p.eachPolicy {
		what = append(what, y.options.ReportOnly...)
	}
	slices.Sort(what)
	return slices.Compact(what)
}
