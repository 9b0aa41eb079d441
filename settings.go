// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/policy"
)

// settings returns the options in effect, named as in the Caddyfile, without secrets.
func (h *Handler) settings() []setting {
	var byDefault Handler
	byDefault.setDefaults()
	var list []setting
	add := func(option, value, defaultValue string) {
		list = append(list, setting{option, value, value == defaultValue})
	}
	words := func(list []string) string {
		if len(list) == 0 {
			return "none"
		}
		return strings.Join(list, " ")
	}
	duration := func(d caddy.Duration, zero string) string {
		switch {
		case d < 0:
			return "off"
		case d == 0:
			return zero
		}
		return shortDuration(time.Duration(d))
	}
	d := &byDefault
	add("burst", strconv.FormatInt(h.Burst, 10), strconv.FormatInt(d.Burst, 10))
	add("refill", strconv.FormatFloat(h.Refill, 'f', -1, 64), strconv.FormatFloat(d.Refill, 'f', -1, 64))
	add("ipv4_prefix", strconv.Itoa(h.IPv4Prefix), strconv.Itoa(d.IPv4Prefix))
	add("ipv6_prefix", strconv.Itoa(h.IPv6Prefix), strconv.Itoa(d.IPv6Prefix))
	add("max_clients", strconv.Itoa(h.MaxClients), strconv.Itoa(d.MaxClients))
	add("zone", h.Zone, d.Zone)
	add("exempt", words(h.Exempt), "none")
	shared := "none"
	if h.shared != nil {
		shared = h.shared.(caddy.Module).CaddyModule().ID.Name()
	}
	add("limiter", shared, "none")
	add("limit_by", h.LimitBy, d.LimitBy)
	list = append(list, setting{"clients", words(h.effectiveClients()), len(h.Clients) == 0})
	providers := make([]string, len(h.auth))
	for i, provider := range h.auth {
		providers[i] = provider.name
	}
	add("authentication", words(providers), "none")
	failures := func(h *Handler) string {
		if h.FailedLogins < 0 {
			return "off"
		}
		return fmt.Sprintf("%d per %s", h.FailedLogins, shortDuration(time.Duration(h.FailedLoginsPer)))
	}
	add("failed_logins", failures(h), failures(d))
	for _, rule := range h.Rules {
		value := append([]string(nil), rule.Destinations...)
		for _, file := range rule.Files {
			value = append(value, "file "+file)
		}
		if len(value) == 0 {
			value = []string{"a source of ranges"}
		}
		add(rule.Action, strings.Join(value, " "), "")
	}
	if len(h.Rules) == 0 {
		add("allow, deny", "none", "none")
	}
	ports := words(h.Ports)
	if len(h.Ports) == 0 {
		ports = fmt.Sprintf("all but %d", policy.PortSMTP)
	}
	add("ports", ports, fmt.Sprintf("all but %d", policy.PortSMTP))
	connectPorts := "same as ports"
	if len(h.ConnectPorts) > 0 {
		connectPorts = words(h.ConnectPorts)
	}
	add("connect_ports", connectPorts, "same as ports")
	add("report_only", words(h.ReportOnly), "none")
	upstream := "none"
	if h.dialer.Parent != nil {
		upstream = h.dialer.Parent.Scheme + "://" + h.dialer.Parent.Address
	}
	add("upstream", upstream, "none")
	add("no_upstream", words(h.NoUpstream), "none")
	resolvers := words(h.Resolvers)
	if len(h.Resolvers) == 0 {
		resolvers = "system default"
	}
	add("resolvers", resolvers, "system default")
	add("dial_timeout", duration(h.DialTimeout, ""), duration(d.DialTimeout, ""))
	add("response_header_timeout", duration(h.ResponseHeaderTimeout, ""), duration(d.ResponseHeaderTimeout, ""))
	add("response_idle_timeout", duration(h.ResponseIdleTimeout, ""), duration(d.ResponseIdleTimeout, ""))
	limit := func(n int) string {
		if n == 0 {
			return "no limit"
		}
		return strconv.Itoa(n)
	}
	add("max_tunnels", limit(h.MaxTunnels), "no limit")
	add("max_tunnels per_client", limit(h.MaxTunnelsPerClient), "no limit")
	add("tunnel_idle_timeout", duration(h.TunnelIdleTimeout, ""), duration(d.TunnelIdleTimeout, ""))
	add("tunnel_stall_timeout", duration(h.TunnelStallTimeout, ""), duration(d.TunnelStallTimeout, ""))
	add("tunnel_max_duration", duration(h.TunnelMaxDuration, "none"), "none")
	delay := "never"
	if h.StreamCloseDelay != nil {
		delay = duration(*h.StreamCloseDelay, "immediately")
	}
	add("stream_close_delay", delay, "never")
	onOff := map[bool]string{true: "on", false: "off"}
	add("recheck_tunnels", onOff[h.RecheckTunnels], "off")
	add("hosts", words(h.Hosts), "none")
	name := h.name
	if h.Via == "off" {
		name = "off"
	}
	list = append(list, setting{"via", name, h.Via == ""})
	add("forwarded_for", h.ForwardedFor, d.ForwardedFor)
	add("header_up, header_down", onOff[h.Headers != nil], "off")
	pac := h.ServePAC
	if pac == "" {
		pac = "off"
	}
	add("serve_pac", pac, "off")
	add("serve_pac direct", words(h.PACDirect), "none")
	return list
}

// shortDuration formats a duration without zero units: 1h rather than 1h0m0s.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
