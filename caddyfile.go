// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/policy"
)

func init() {
	httpcaddyfile.RegisterDirective("async_proxy", parseCaddyfile)
	// After authentication, so that a site that requires credentials is not an open
	// proxy, and before every handler that responds to requests.
	httpcaddyfile.RegisterDirectiveOrder("async_proxy", httpcaddyfile.After, "request_header")
}

// parseCaddyfile returns a handler and the listener wrapper for its server. A handler
// with a matcher needs the wrapper, too: see Unclaimed.
func parseCaddyfile(h httpcaddyfile.Helper) ([]httpcaddyfile.ConfigValue, error) {
	if !h.Next() {
		return nil, h.ArgErr()
	}
	matchers, err := h.ExtractMatcherSet()
	if err != nil {
		return nil, err
	}
	handler := new(Handler)
	if err := handler.UnmarshalCaddyfile(h.Dispenser); err != nil {
		return nil, err
	}
	values := h.NewRoute(matchers, handler)
	if !isNested(h) {
		values = append(values, httpcaddyfile.ConfigValue{Class: "listener_wrapper", Value: new(ListenerWrapper)})
	}
	return values, nil
}

// isNested reports whether a directive is inside the block of another one. Such a block
// has its own BlockState; at the top level of a site, BlockState and State are the same map.
func isNested(h httpcaddyfile.Helper) bool {
	const mark = "async_proxy"
	h.State[mark] = true
	defer delete(h.State, mark)
	return h.BlockState[mark] == nil
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
//		response_idle_timeout <duration>|off
//		via           <pseudonym>|off
//		forwarded_for auto|off
//		hosts         <own_names...>
//		header_up     [+|-]<field> [<value|regexp> [<replacement>]]
//		header_down   [+|-]<field> [<value|regexp> [<replacement>]]
//
//		max_tunnels         <n> [per_client <n>]
//		tunnel_idle_timeout <duration>|off
//		tunnel_stall_timeout <duration>|off
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
//		connect_ports <port|from-to...>
//		clients     <cidr|private_ranges|all...>
//		basic_auth  [<hash_algorithm> [<realm>]] {
//			<user> <hash>
//		}
//		failed_logins <n> per <duration>|off
//		limit_by    client_ip|user
//		report_only rules|limits...
//		resolvers   <addresses...>
//		serve_pac   [<path>] {
//			direct <cidr|name|*.name...>
//		}
//		no_upstream <cidr|name|*.name|public|private...>
//		upstream    http|https|socks5://[<user>[:<password>]@]<host>[:<port>] {
//			header                   <field> <value>
//			tls_server_name          <name>
//			tls_trust_pool           <module> ...
//			tls_insecure_skip_verify
//		}
//	}
//
// burst and refill may also be given on the directive's own line. Options that accept
// any number of values, header_up and header_down may be repeated; all others may
// appear once. header_up and header_down have reverse_proxy's syntax. Rules (allow and
// deny in all their forms) are evaluated in order.
func (h *Handler) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the directive's name
	p := &caddyfileParser{Dispenser: d, seen: make(map[string]caddyfile.Dispenser)}
	for d.NextArg() {
		name := d.Val()
		if name != "burst" && name != "refill" {
			return d.Errf("unexpected argument '%s'; expected burst <tokens>, refill <tokens_per_second>, or a block of options", name)
		}
		o, err := p.begin(name)
		if err != nil {
			return err
		}
		if !d.NextArg() {
			return p.expectedErr("missing value")
		}
		if !o.set(h, d.Val()) {
			return p.invalid(d.Val())
		}
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		if err := p.option(h, d.Val()); err != nil {
			return err
		}
	}
	return p.check(h)
}

// option describes how to parse one option.
type option struct {
	expected   string                                     // the valid values, as error messages name them
	repeatable bool                                       // it may be repeated, with any number of values
	set        func(h *Handler, value string) bool        // stores one value; false if it is not valid
	parse      func(p *caddyfileParser, h *Handler) error // replaces set: parses everything after the name
}

const (
	expectedDestinations = "addresses, CIDR ranges, names, *.names, public, private or all, each optionally followed by :<ports>"
	expectedRanges       = "addresses, CIDR ranges such as 10.0.0.0/8, or private_ranges"
	expectedSource       = "a source of CIDR ranges, as for trusted_proxies"
	expectedFiles        = "readable files with one destination per line"
	expectedPorts        = "ports from 1 to 65535, or ranges such as 8000-8999"
	expectedHeader       = "[+|-]<field> [<value|regexp> [<replacement>]]"

	// maxCount keeps numbers in the range that a float64 holds exactly, because
	// Caddy's JSON passes through float64.
	maxCount    = 1_000_000_000
	maxDuration = caddy.Duration(1 << 62) // 146 years
)

// options maps the name of each option of the directive to its description.
var options = map[string]option{
	"burst": numberOption("a whole number of tokens from 1 to 1000000000", func(h *Handler) *int64 { return &h.Burst }, bucket.MinBurst, bucket.MaxBurst),
	"refill": {expected: "tokens per second from 0.00001 to 1000000", set: func(h *Handler, s string) bool {
		var err error
		h.Refill, err = strconv.ParseFloat(s, 64)
		return err == nil && h.Refill >= bucket.MinRefill && h.Refill <= bucket.MaxRefill
	}},
	"ipv4_prefix": numberOption("a number of bits from 1 to 32", func(h *Handler) *int { return &h.IPv4Prefix }, 1, 32),
	"ipv6_prefix": numberOption("a number of bits from 1 to 128", func(h *Handler) *int { return &h.IPv6Prefix }, 1, 128),
	"max_clients": numberOption("a whole number of clients from 2 to 1000000000", func(h *Handler) *int { return &h.MaxClients }, bucket.MinClients, maxCount),
	"zone":        wordOption("a name in printable ASCII without spaces, quotes and backslashes", func(h *Handler) *string { return &h.Zone }, bucket.ValidZone),
	"exempt":      listOption(expectedRanges, func(h *Handler) *[]string { return &h.Exempt }, checkRange),
	"limiter": {
		expected: "a limiter that this Caddy is built with; for redis, build it with --with github.com/asyncproxy/caddy-async-proxy/redis",
		parse:    (*caddyfileParser).limiter,
	},
	"limit_by": wordOption("client_ip or user", func(h *Handler) *string { return &h.LimitBy }, oneOf("client_ip", "user")),

	"clients":    listOption("all, or "+expectedRanges, func(h *Handler) *[]string { return &h.Clients }, checkClients),
	"basic_auth": {expected: "[bcrypt|argon2id [<realm>]] and a block of `<user> <hash>` lines", parse: (*caddyfileParser).basicAuth},

	"failed_logins": {expected: "<n> per <duration>, such as 10 per 1m, or off", parse: (*caddyfileParser).failedLogins},

	"allow":      {expected: expectedDestinations, repeatable: true, parse: (*caddyfileParser).rule},
	"deny":       {expected: expectedDestinations, repeatable: true, parse: (*caddyfileParser).rule},
	"allow_file": {expected: expectedFiles, repeatable: true, parse: (*caddyfileParser).ruleFiles},
	"deny_file":  {expected: expectedFiles, repeatable: true, parse: (*caddyfileParser).ruleFiles},
	"allow_from": {expected: expectedSource, repeatable: true, parse: (*caddyfileParser).ruleSource},
	"deny_from":  {expected: expectedSource, repeatable: true, parse: (*caddyfileParser).ruleSource},

	"ports":         listOption(expectedPorts, func(h *Handler) *[]string { return &h.Ports }, checkPorts),
	"connect_ports": listOption(expectedPorts, func(h *Handler) *[]string { return &h.ConnectPorts }, checkPorts),

	"report_only": {expected: "rules, limits or both", repeatable: true, set: func(h *Handler, s string) bool {
		h.ReportOnly = append(h.ReportOnly, s)
		return s == "rules" || s == "limits"
	}},

	"resolvers": listOption("IP addresses of DNS servers, such as 192.0.2.53", func(h *Handler) *[]string { return &h.Resolvers },
		func(s string) error { _, err := parseResolvers([]string{s}); return err }),
	"upstream": {expected: "http|https|socks5://[<user>[:<password>]@]<host>[:<port>]", parse: (*caddyfileParser).upstream},
	"no_upstream": listOption("destinations without ports: addresses, CIDR ranges, names, *.names, public or private", func(h *Handler) *[]string { return &h.NoUpstream },
		func(s string) error { _, err := policy.NewDirectSet([]string{s}); return err }),
	"dial_timeout":            durationOption("a positive duration such as 10s", func(h *Handler) *caddy.Duration { return &h.DialTimeout }),
	"response_header_timeout": durationOrOffOption("a positive duration such as 5m, or off", func(h *Handler) *caddy.Duration { return &h.ResponseHeaderTimeout }),
	"response_idle_timeout":   durationOrOffOption("a positive duration such as 5m, or off", func(h *Handler) *caddy.Duration { return &h.ResponseIdleTimeout }),

	"max_tunnels":          {expected: "<n> [per_client <n>], each from 1 to 1000000000", parse: (*caddyfileParser).maxTunnels},
	"tunnel_idle_timeout":  durationOrOffOption("a positive duration such as 1h, or off", func(h *Handler) *caddy.Duration { return &h.TunnelIdleTimeout }),
	"tunnel_stall_timeout": durationOrOffOption("a positive duration such as 1m, or off", func(h *Handler) *caddy.Duration { return &h.TunnelStallTimeout }),
	"tunnel_max_duration":  durationOption("a positive duration such as 24h", func(h *Handler) *caddy.Duration { return &h.TunnelMaxDuration }),
	"stream_close_delay": {expected: "a duration such as 5m, or 0 for immediately", set: func(h *Handler, s string) (ok bool) {
		h.StreamCloseDelay = new(caddy.Duration)
		*h.StreamCloseDelay, ok = parseDuration(s, 0)
		return ok
	}},
	"recheck_tunnels": {expected: "no value", parse: func(p *caddyfileParser, h *Handler) error {
		h.RecheckTunnels = true
		_, err := p.values(0, 0)
		return err
	}},

	"hosts":         listOption("names of this server, without ports", func(h *Handler) *[]string { return &h.Hosts }, hostport.CheckHost),
	"via":           wordOption("a pseudonym that starts with a letter, or off", func(h *Handler) *string { return &h.Via }, validPseudonym),
	"forwarded_for": wordOption("auto or off", func(h *Handler) *string { return &h.ForwardedFor }, oneOf("auto", "off")),
	"header_up":     {expected: expectedHeader, repeatable: true, parse: (*caddyfileParser).headerUp},
	"header_down":   {expected: expectedHeader, repeatable: true, parse: (*caddyfileParser).headerDown},
	"serve_pac":     {expected: "a path that begins with /, or no value", parse: (*caddyfileParser).servePAC},
}

// numberOption returns an option for a whole number in a range.
func numberOption[T int | int64](expected string, field func(*Handler) *T, low, high T) option {
	return option{expected: expected, set: func(h *Handler, s string) (ok bool) {
		*field(h), ok = parseInt(s, low, high)
		return ok
	}}
}

// wordOption returns an option for one value, stored verbatim.
func wordOption(expected string, field func(*Handler) *string, valid func(string) bool) option {
	return option{expected: expected, set: func(h *Handler, s string) bool {
		*field(h) = s
		return valid(s)
	}}
}

func oneOf(words ...string) func(string) bool {
	return func(s string) bool { return slices.Contains(words, s) }
}

// listOption returns an option for any number of values.
func listOption(expected string, field func(*Handler) *[]string, check func(string) error) option {
	return option{expected: expected, repeatable: true, set: func(h *Handler, s string) bool {
		*field(h) = append(*field(h), s)
		return check(s) == nil
	}}
}

// durationOption returns an option for a positive duration.
func durationOption(expected string, field func(*Handler) *caddy.Duration) option {
	return option{expected: expected, set: func(h *Handler, s string) (ok bool) {
		*field(h), ok = parseDuration(s, 1)
		return ok
	}}
}

// durationOrOffOption returns an option for a positive duration or off.
func durationOrOffOption(expected string, field func(*Handler) *caddy.Duration) option {
	return option{expected: expected, set: func(h *Handler, s string) (ok bool) {
		if *field(h) = -1; s == "off" {
			return true
		}
		*field(h), ok = parseDuration(s, 1)
		return ok
	}}
}

// caddyfileParser parses options. Its errors name the option, the value and what was
// expected; the Dispenser adds the file and the line.
type caddyfileParser struct {
	*caddyfile.Dispenser
	seen           map[string]caddyfile.Dispenser // the position of each option
	rules          []caddyfile.Dispenser          // the position of each rule
	name, expected string                         // of the option being parsed
}

// expectedErr returns an error about the option being parsed.
func (p *caddyfileParser) expectedErr(format string, args ...any) error {
	return p.Errf("%s: %s; expected %s", p.name, fmt.Sprintf(format, args...), p.expected)
}

func (p *caddyfileParser) invalid(value string) error {
	return p.Errf("%v", invalidValue(p.name, p.expected, value))
}

// invalidValue returns the error for an invalid value of an option. If the intended
// destination is obvious, the error says how to write it.
func invalidValue(option, expected, value string) error {
	_, err := policy.ParseDestination(value)
	if bits := new(policy.HostBitsError); errors.As(err, &bits) || strings.HasPrefix(value, ".") && strings.Contains(expected, "*.names") {
		return fmt.Errorf("%s: %w", option, err)
	}
	return fmt.Errorf("%s: the value '%s' is not valid; expected %s", option, value, expected)
}

// begin looks up the option whose name was just parsed, and records its position.
func (p *caddyfileParser) begin(name string) (option, error) {
	o, known := options[name]
	if !known {
		return o, p.unknown(name)
	}
	p.name, p.expected = name, o.expected
	if first, twice := p.seen[name]; twice && !o.repeatable {
		return o, p.Errf("%s: the option is already set at %s:%d; expected it once", name, first.File(), first.Line())
	}
	p.seen[name] = *p.Dispenser
	return o, nil
}

// option parses one line or block of the directive's block.
func (p *caddyfileParser) option(h *Handler, name string) error {
	o, err := p.begin(name)
	if err != nil {
		return err
	}
	if o.parse != nil {
		err = o.parse(p, h)
	} else {
		err = p.set(h, o)
	}
	if err != nil {
		return err
	}
	if last := p.Val(); p.NextBlock(p.Nesting()) || p.Val() != last { // an empty block only advances the Dispenser
		at := p.seen[name]
		return at.Errf("%s: unexpected block; expected %s", name, o.expected)
	}
	return nil
}

func (p *caddyfileParser) set(h *Handler, o option) error {
	most := 1
	if o.repeatable {
		most = math.MaxInt
	}
	args, err := p.values(1, most)
	for _, value := range args {
		if err == nil && !o.set(h, value) {
			err = p.invalid(value)
		}
	}
	return err
}

// values returns the values on the option's line, and fails unless there are between
// least and most of them.
func (p *caddyfileParser) values(least, most int) ([]string, error) {
	args := p.RemainingArgs()
	switch {
	case len(args) < least:
		return nil, p.expectedErr("missing value")
	case len(args) > most:
		return nil, p.expectedErr("unexpected value '%s'", args[most])
	}
	return args, nil
}

// unknown returns the error for an unknown option, and suggests the most similar name.
func (p *caddyfileParser) unknown(name string) error {
	all := slices.Sorted(maps.Keys(options))
	nearest := slices.MinFunc(all, func(a, b string) int { return editDistance(name, a) - editDistance(name, b) })
	if editDistance(name, nearest) <= 2 {
		return p.Errf("unrecognized option '%s'; did you mean %s?", name, nearest)
	}
	return p.Errf("unrecognized option '%s'; expected one of %s", name, strings.Join(all, ", "))
}

// editDistance returns the Levenshtein distance of a and b: how many bytes must be inserted,
// deleted or replaced to turn a into b.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0]++
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, diagonal+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// check rejects invalid combinations of options.
func (p *caddyfileParser) check(h *Handler) error {
	full := *h
	full.setDefaults()
	if err := full.limits().Validate(); err != nil {
		at, ok := p.seen["refill"]
		if !ok {
			at = p.seen["burst"]
		}
		return at.WrapErr(err)
	}
	if err := p.checkRules(h); err != nil {
		return err
	}
	if at := p.seen["no_upstream"]; h.NoUpstream != nil && h.Upstream == nil {
		return at.Errf("no_upstream: no upstream is configured; expected the option upstream as well")
	}
	if at := p.seen["limit_by"]; h.LimitBy == "user" && h.AuthRaw == nil {
		return at.Errf("limit_by: user requires authentication; expected the option basic_auth as well")
	}
	if at, given := p.seen["failed_logins"]; given && h.AuthRaw == nil {
		return at.Errf("failed_logins: no authentication is configured; expected the option basic_auth as well")
	}
	return nil
}

func parseInt[T int | int64](s string, low, high T) (T, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return T(n), err == nil && n >= int64(low) && n <= int64(high)
}

func parseDuration(s string, low caddy.Duration) (caddy.Duration, bool) {
	d, err := caddy.ParseDuration(s)
	return caddy.Duration(d), err == nil && caddy.Duration(d) >= low && caddy.Duration(d) <= maxDuration
}

func checkPorts(s string) error {
	_, err := policy.ParsePorts(s)
	return err
}

func checkClients(s string) error {
	if s == allClients {
		return nil
	}
	return checkRange(s)
}

func checkRange(s string) error {
	_, err := parsePrefixes("", []string{s})
	return err
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Handler)(nil)
