// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
)

func init() {
	httpcaddyfile.RegisterDirective("async_proxy", parseCaddyfile)
	// After authentication, so that a site that requires credentials is not an open
	// proxy, and before every handler that responds to requests.
	httpcaddyfile.RegisterDirectiveOrder("async_proxy", httpcaddyfile.After, "request_header")
}

// parseCaddyfile returns a handler and the listener wrapper for its server.
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
//		burst                   <tokens>
//		refill                  <tokens_per_second>
//		ipv4_prefix             <bits>
//		ipv6_prefix             <bits>
//		max_clients             <n>
//		zone                    <name>
//		exempt                  <cidr|private_ranges...>
//		limiter                 <module> ...
//		limit_by                client_ip|user
//		clients                 <cidr|private_ranges|all...>
//		basic_auth              [<hash_algorithm> [<realm>]] {
//			<user> <hash>
//		}
//		users_file              <path>
//		user_from               <placeholders...>
//		failed_logins           <n> per <duration>|off
//		allow                   <cidr|name|*.name|public|private|all>[:<ports>]...
//		deny                    <cidr|name|*.name|public|private|all>[:<ports>]...
//		allow_file              <path...>
//		deny_file               <path...>
//		allow_from              <ip_source> ...
//		deny_from               <ip_source> ...
//		ports                   <port|from-to...>
//		connect_ports           <port|from-to...>
//		methods                 <names...>|all
//		report_only             rules|limits...|off
//		deny_hint               <text>|off
//		upstream                http|https|socks5://[<user>[:<password>]@]<host>[:<port>]|off {
//			header                   <field> <value>
//			tls_server_name          <name>
//			tls_trust_pool           <module> ...
//			tls_insecure_skip_verify
//		}
//		no_upstream             <cidr|name|*.name|public|private...>
//		resolvers               <addresses...>
//		dial_timeout            <duration>
//		response_header_timeout <duration>|off
//		response_idle_timeout   <duration>|off
//		max_tunnels             <n> [per_client <n>]
//		tunnel_idle_timeout     <duration>|off
//		tunnel_stall_timeout    <duration>|off
//		tunnel_max_duration     <duration>|off
//		stream_close_delay      <duration>
//		recheck_tunnels
//		hosts                   <own_names...>
//		via                     <pseudonym>|off
//		forwarded_for           auto|off
//		header_up               [+|-]<field> [<value|regexp> [<replacement>]]
//		header_down             [+|-]<field> [<value|regexp> [<replacement>]]
//		serve_pac               [<path>] {
//			direct <cidr|name|*.name...>
//		}
//		policy                  <name> {
//			users     <patterns...>
//			clients   <cidr|private_ranges...>
//			match     <matchers>
//			anonymous
//			<option> ...
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
		parse := p.option
		if d.Val() == "policy" {
			parse = p.policy
		}
		if err := parse(h, d.Val()); err != nil {
			return err
		}
	}
	return p.check(h)
}

// caddyfileParser parses options. Its errors name the option, the value and what was
// expected; the Dispenser adds the file and the line.
type caddyfileParser struct {
	*caddyfile.Dispenser
	seen           map[string]caddyfile.Dispenser // the position of each option
	rules          []caddyfile.Dispenser          // the position of each rule
	policies       []policyParser
	inPolicy       bool   // a policy is being parsed
	name, expected string // of the option being parsed
}

// expectedErr returns an error about the option being parsed.
func (p *caddyfileParser) expectedErr(format string, args ...any) error {
	return p.Errf("%s: %s; expected %s", p.name, fmt.Sprintf(format, args...), p.expected)
}

func (p *caddyfileParser) invalid(value string) error {
	return p.Errf("%v", invalidValue(p.name, p.expected, value))
}

// begin looks up the option whose name was just parsed, and records its position.
func (p *caddyfileParser) begin(name string) (option, error) {
	o, known := optionNamed(name)
	if !known {
		return o, p.unknown(name)
	}
	if p.inPolicy && !o.inPolicy {
		return o, p.Errf("policy: the option '%s' is the directive's only; expected one of %s", name, strings.Join(p.names(), ", "))
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
	return p.noBlock(name, o.expected)
}

func (p *caddyfileParser) noBlock(name, expected string) error {
	return noBlock(p.Dispenser, p.seen[name], name, expected)
}

// noBlock returns an error if a block follows the option that was just parsed. It begins at the given
// position.
func noBlock(d *caddyfile.Dispenser, at caddyfile.Dispenser, name, expected string) error {
	if last := d.Val(); d.NextBlock(d.Nesting()) || d.Val() != last { // an empty block only advances the Dispenser
		return at.Errf("%s: unexpected block; expected %s", name, expected)
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
	all := p.names()
	if before, value, found := strings.Cut(name, "="); found && slices.Contains(all, before) {
		return p.Errf("unrecognized option '%s'; expected a space in place of =, as in %s %s", name, before, value)
	}
	nearest := slices.MinFunc(all, func(a, b string) int { return editDistance(name, a) - editDistance(name, b) })
	if editDistance(name, nearest) <= 2 {
		return p.Errf("unrecognized option '%s'; did you mean %s?", name, nearest)
	}
	return p.Errf("unrecognized option '%s'; expected one of %s", name, strings.Join(all, ", "))
}

// names returns the names of all options that are known where the parser is.
func (p *caddyfileParser) names() []string {
	if p.inPolicy {
		return policyOptionNames()
	}
	return optionNames()
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
	if err := p.checkRules(h, nil); err != nil {
		return err
	}
	if err := h.checkTogether(); err != nil {
		return p.at(err.options).WrapErr(err)
	}
	if err := p.checkPolicies(h); err != nil {
		return err
	}
	if at, given := p.seen["failed_logins"]; given && !h.requiresLogin() {
		return at.Errf("failed_logins: no authentication is configured; expected the option basic_auth or users_file as well")
	}
	return nil
}

// at returns the position of the first of these options that the directive has.
func (p *caddyfileParser) at(names []string) *caddyfile.Dispenser {
	for _, name := range names {
		if at, given := p.seen[name]; given {
			return &at
		}
	}
	return p.Dispenser
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Handler)(nil)
