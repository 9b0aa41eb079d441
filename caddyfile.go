// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"math"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
)

func init() {
	httpcaddyfile.RegisterHandlerDirective("async_proxy", parseCaddyfile)
	// After authentication, so that a site that asks for credentials is no open
	// proxy, and before everything that answers requests.
	httpcaddyfile.RegisterDirectiveOrder("async_proxy", httpcaddyfile.After, "request_header")
}

func parseCaddyfile(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	handler := new(Handler)
	return handler, handler.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens. Syntax:
//
//	async_proxy [<matcher>] [burst <tokens>] [refill <tokens_per_second>] {
//		burst         <tokens>
//		refill        <tokens_per_second>
//		ipv4_prefix   <bits>
//		ipv6_prefix   <bits>
//		max_clients   <n>
//		zone          <name>
//		exempt        <cidr|private_ranges...>
//		limiter       <module> ...
//		dial_timeout  <duration>
//		response_header_timeout <duration>|off
//		via           <pseudonym>|off
//		forwarded_for auto|off
//		hosts         <own_names...>
//		header_up     [+|-]<field> [<value|regexp> [<replacement>]]
//		header_down   [+|-]<field> [<value|regexp> [<replacement>]]
//
//		max_tunnels         <n> [per_client <n>]
//		tunnel_idle_timeout <duration>|off
//		tunnel_max_duration <duration>
//		stream_close_delay  <duration>
//		recheck_tunnels
//
//		allow       <cidr|name|*.name|public|private|all>[:<ports>]...
//		deny        <cidr|name|*.name|public|private|all>[:<ports>]...
//		allow_file  <path...>
//		deny_file   <path...>
//		allow_from  <ip_source> ...
//		deny_from   <ip_source> ...
//		ports       <port|from-to...>
//		clients     <cidr|private_ranges...>
//		basic_auth  [<hash_algorithm> [<realm>]] {
//			<user> <hash>
//		}
//		limit_by    client_ip|user
//		report_only rules|limits...
//		resolvers   <addresses...>
//		serve_pac   [<path>]
//		no_upstream <cidr|name|*.name|public|private...>
//		upstream    http|https|socks5://[<user>[:<password>]@]<host>[:<port>] {
//			header                   <field> <value>
//			tls_server_name          <name>
//			tls_trust_pool           <module> ...
//			tls_insecure_skip_verify
//		}
//	}
//
// burst and refill may stand on the directive's own line. Options that take
// any number of values, header_up and header_down may stand more than once;
// everything else once. The latter two are reverse_proxy's. The order of allow
// and deny in all their forms counts.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	p := caddyfileParser{Dispenser: d, seen: make(map[string]bool)}
	for d.NextArg() {
		name := d.Val()
		if name != "burst" && name != "refill" {
			return d.Errf("unexpected argument '%s'; expected burst <tokens>, refill <tokens_per_second>, or a block of options", name)
		}
		if !d.NextArg() {
			return d.Errf("%s: there is no value; expected %s", name, expectations[name])
		}
		if err := p.option(h, name, []string{d.Val()}); err != nil {
			return err
		}
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		if parse, ok := blocks[name]; ok {
			if err := parse(p, h, name); err != nil {
				return err
			}
			continue
		}
		args := d.RemainingArgs()
		if err := p.option(h, name, args); err != nil {
			return err
		}
		if last := d.Val(); d.NextBlock(d.Nesting()) || d.Val() != last { // an empty block only moves on
			return d.Errf("%s: unexpected block; expected %s", name, expectations[name])
		}
	}
	return nil
}

// expectations are what the options want, in the words of the errors.
var expectations = map[string]string{
	"burst":                   "a whole number of tokens from 1 to 1000000000",
	"refill":                  "tokens per second from 0.00001 to 1000000",
	"ipv4_prefix":             "a number of bits from 1 to 32",
	"ipv6_prefix":             "a number of bits from 1 to 128",
	"max_clients":             "a whole number of clients, at least 2",
	"zone":                    "a name",
	"limiter":                 "a limiter that this Caddy is built with, such as redis",
	"exempt":                  "addresses, CIDR ranges such as 10.0.0.0/8, or private_ranges",
	"allow":                   "destinations: addresses, CIDR ranges, names, *.names, public, private or all, each perhaps with :<ports>",
	"deny":                    "destinations: addresses, CIDR ranges, names, *.names, public, private or all, each perhaps with :<ports>",
	"allow_file":              "files with destinations, one a line",
	"deny_file":               "files with destinations, one a line",
	"allow_from":              "a source of CIDR ranges, as for trusted_proxies",
	"deny_from":               "a source of CIDR ranges, as for trusted_proxies",
	"ports":                   "ports from 1 to 65535, or ranges such as 8000-8999",
	"clients":                 "addresses, CIDR ranges such as 10.0.0.0/8, or private_ranges",
	"basic_auth":              "perhaps bcrypt or argon2id and a realm, and a block with a user and a hash a line",
	"limit_by":                "client_ip or user",
	"report_only":             "rules, limits or both",
	"resolvers":               "addresses of DNS servers, such as 192.0.2.53",
	"serve_pac":               "a path that begins with /, or nothing",
	"no_upstream":             "destinations without ports: addresses, CIDR ranges, names, *.names, public or private",
	"upstream":                "http://, https:// or socks5://, perhaps <user>:<password>@, a host and perhaps a port",
	"dial_timeout":            "a positive duration such as 10s",
	"response_header_timeout": "a positive duration such as 5m, or off",
	"via":                     "a pseudonym that starts with a letter, or off",
	"forwarded_for":           "auto or off",
	"hosts":                   "names of this server, without ports",
	"header_up":               "a field, and perhaps a value, or a regular expression and its replacement",
	"header_down":             "a field, and perhaps a value, or a regular expression and its replacement",
	"max_tunnels":             "a whole number of tunnels from 1, and perhaps per_client with another",
	"tunnel_idle_timeout":     "a positive duration such as 1h, or off",
	"tunnel_max_duration":     "a positive duration such as 24h",
	"stream_close_delay":      "a duration such as 5m, or 0 for at once",
	"recheck_tunnels":         "no value",
}

// lists are the options that take any number of values, any number of times.
var lists = map[string]bool{
	"exempt": true, "hosts": true, "allow": true, "deny": true, "allow_file": true, "deny_file": true, "ports": true,
	"clients": true, "report_only": true, "resolvers": true, "no_upstream": true,
}

// caddyfileParser says of each mistake the option, the value and what was
// expected; the Dispenser adds the file and the line.
type caddyfileParser struct {
	*caddyfile.Dispenser
	seen map[string]bool
}

// option reads one option with its arguments.
func (p caddyfileParser) option(h *Handler, name string, args []string) error {
	expected, known := expectations[name]
	if !known {
		return p.Errf("unrecognized option '%s'", name)
	}
	list := lists[name]
	switch {
	case name == "recheck_tunnels" && len(args) == 0:
		if p.seen[name] {
			return p.Errf("%s: the option is given twice; expected it once", name)
		}
		p.seen[name] = true
		h.RecheckTunnels = true
		return nil
	case name == "serve_pac" && len(args) == 0:
		args = []string{"/proxy.pac"}
	case name == "max_tunnels" && len(args) == 3 && args[1] == "per_client":
		var ok bool
		if h.MaxTunnelsPerClient, ok = parseInt(args[2], 1, math.MaxInt); !ok {
			return p.Errf("max_tunnels: the value '%s' of per_client is not valid; expected a whole number of tunnels from 1", args[2])
		}
		args = args[:1]
	}
	switch {
	case name == "header_up" || name == "header_down":
		return p.headerOp(h, name, args)
	case len(args) == 0:
		return p.Errf("%s: there is no value; expected %s", name, expected)
	case len(args) > 1 && !list:
		return p.Errf("%s: there is more than one value, '%s' after '%s'; expected %s", name, args[1], args[0], expected)
	case p.seen[name] && !list:
		return p.Errf("%s: the option is given twice, now with '%s'; expected it once", name, args[0])
	}
	p.seen[name] = true

	value, ok := args[0], true
	switch name {
	case "burst":
		h.Burst, ok = parseInt[int64](value, minBurst, maxBurst)
	case "refill":
		var err error
		h.Refill, err = strconv.ParseFloat(value, 64)
		ok = err == nil && h.Refill >= minRefill && h.Refill <= maxRefill
	case "ipv4_prefix":
		h.IPv4Prefix, ok = parseInt(value, 1, 32)
	case "ipv6_prefix":
		h.IPv6Prefix, ok = parseInt(value, 1, 128)
	case "max_clients":
		h.MaxClients, ok = parseInt(value, minClients, math.MaxInt)
	case "zone":
		h.Zone = value
		ok = validZone(value)
	case "exempt":
		return p.prefixes(name, args, &h.Exempt)
	case "clients":
		return p.prefixes(name, args, &h.Clients)
	case "allow", "deny":
		return p.rule(h, name, args)
	case "allow_file", "deny_file":
		h.Rules = append(h.Rules, Rule{Action: name[:strings.IndexByte(name, '_')], Files: args})
	case "ports":
		return p.values(name, args, &h.Ports, func(s string) bool { _, err := parsePorts(s); return err == nil })
	case "report_only":
		return p.values(name, args, &h.ReportOnly, func(s string) bool { return s == "rules" || s == "limits" })
	case "resolvers":
		return p.values(name, args, &h.Resolvers, func(s string) bool { _, err := newResolver([]string{s}); return err == nil })
	case "no_upstream":
		return p.values(name, args, &h.NoUpstream, func(s string) bool { _, err := newDirectSet([]string{s}); return err == nil })
	case "limit_by":
		h.LimitBy = value
		ok = value == "client_ip" || value == "user"
	case "serve_pac":
		h.ServePAC = value
		ok = value[0] == '/'
	case "hosts":
		return p.values(name, args, &h.Hosts, func(s string) bool { return checkHost(s) == nil })
	case "dial_timeout":
		h.DialTimeout, ok = parseDuration(value, 1)
	case "max_tunnels":
		h.MaxTunnels, ok = parseInt(value, 1, math.MaxInt)
	case "response_header_timeout":
		if h.ResponseHeaderTimeout = -1; value != "off" {
			h.ResponseHeaderTimeout, ok = parseDuration(value, 1)
		}
	case "tunnel_idle_timeout":
		if h.TunnelIdleTimeout = -1; value != "off" {
			h.TunnelIdleTimeout, ok = parseDuration(value, 1)
		}
	case "tunnel_max_duration":
		h.TunnelMaxDuration, ok = parseDuration(value, 1)
	case "stream_close_delay":
		var delay caddy.Duration
		delay, ok = parseDuration(value, 0)
		h.StreamCloseDelay = &delay
	case "recheck_tunnels":
		ok = false
	case "via":
		h.Via = value
		ok = validPseudonym(value)
	case "forwarded_for":
		h.ForwardedFor = value
		ok = value == "auto" || value == "off"
	}
	if !ok {
		return p.Errf("%s: the value '%s' is not valid; expected %s", name, value, expected)
	}
	return nil
}

// headerOp reads an operation on a field, in reverse_proxy's syntax.
func (p caddyfileParser) headerOp(h *Handler, name string, args []string) error {
	if len(args) < 1 || len(args) > 3 {
		return p.Errf("%s: there are %d values; expected %s", name, len(args), expectations[name])
	}
	if h.Headers == nil {
		h.Headers = new(headers.Handler)
	}
	var ops *headers.HeaderOps
	if name == "header_up" {
		if h.Headers.Request == nil {
			h.Headers.Request = new(headers.HeaderOps)
		}
		ops = h.Headers.Request
	} else {
		if h.Headers.Response == nil {
			h.Headers.Response = &headers.RespHeaderOps{HeaderOps: new(headers.HeaderOps)}
		}
		ops = h.Headers.Response.HeaderOps
	}
	value, replacement := "", (*string)(nil)
	if len(args) > 1 {
		value = args[1]
	}
	if len(args) > 2 {
		replacement = &args[2]
	}
	if err := headers.CaddyfileHeaderOp(ops, args[0], value, replacement); err != nil {
		return p.Errf("%s: the values '%s' are not valid: %v; expected %s", name, strings.Join(args, " "), err, expectations[name])
	}
	return nil
}

// prefixes appends the values of an option that is a list of CIDR ranges.
func (p caddyfileParser) prefixes(name string, args []string, list *[]string) error {
	return p.values(name, args, list, func(s string) bool { _, err := parsePrefixes(name, []string{s}); return err == nil })
}

// values appends the values of an option that is a list.
func (p caddyfileParser) values(name string, args []string, list *[]string, valid func(string) bool) error {
	for _, arg := range args {
		if !valid(arg) {
			return p.Errf("%s: the value '%s' is not valid; expected %s", name, arg, expectations[name])
		}
	}
	*list = append(*list, args...)
	return nil
}

// rule appends a rule of destinations.
func (p caddyfileParser) rule(h *Handler, name string, args []string) error {
	for _, arg := range args {
		for _, text := range expandRanges(arg) {
			if _, err := parseDestination(text); err != nil {
				return p.Errf("%s: the value '%s' is not valid; expected %s", name, arg, expectations[name])
			}
		}
	}
	h.Rules = append(h.Rules, Rule{Action: name, Destinations: args})
	return nil
}

func parseInt[T int | int64](s string, low, high T) (T, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return T(n), err == nil && n >= int64(low) && n <= int64(high)
}

func parseDuration(s string, low caddy.Duration) (caddy.Duration, bool) {
	d, err := caddy.ParseDuration(s)
	return caddy.Duration(d), err == nil && caddy.Duration(d) >= low
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Handler)(nil)
