// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// option is one option of the directive. Its entry in options and its fields of Handler are all
// there is to it: the Caddyfile parser, Validate, the status page, and the reference's syntax and
// table of options are made from them.
type option struct {
	name     string
	syntax   string // what follows the name in a Caddyfile; lines after the first belong to its block
	doc      string // its meaning, in the table of docs/reference.md; equal texts in a row share a row
	absent   string // the default, in the same table; "": as the status page shows it
	inPolicy bool   // a policy may set it, too
	optionValue
}

const (
	expectedDestinations = "addresses, CIDR ranges, names, *.names, public, private or all, each optionally followed by :<ports>"
	expectedRanges       = "addresses, CIDR ranges such as 10.0.0.0/8, or private_ranges"
	expectedSource       = "a source of CIDR ranges, as for trusted_proxies"
	expectedFiles        = "readable files with one destination per line"
	expectedPorts        = "ports from 1 to 65535, or ranges such as 8000-8999"
	expectedHeader       = "[+|-]<field> [<value|regexp> [<replacement>]]"

	syntaxDestinations = "<cidr|name|*.name|public|private|all>[:<ports>]..."
	syntaxPorts        = "<port|from-to...>"

	docPrefix      = "leading bits of an address that identify a client, up to 32 and 128"
	docRules       = "[where clients may go](#destinations); the first match decides"
	docRuleFiles   = "the same from files: one destination per line, `#` starts a comment. The files are read when the config is adapted and loaded, so `caddy reload` picks up changes; use absolute paths"
	docRuleSources = "the same from one of Caddy's IP range sources, as for `trusted_proxies`"
	docHeaders     = "change request and response headers, in `reverse_proxy`'s syntax"
)

// options are the options of the directive, in the order in which docs/reference.md and the status page
// list them.
var options = []option{
	{
		name: "burst", inPolicy: true, syntax: "<tokens>",
		doc:         "requests a client may make at once, 1 to 1000000000",
		optionValue: number("a whole number of tokens", func(h *Handler) *int64 { return &h.Burst }, bucket.MinBurst, bucket.MaxBurst, 10),
	},
	{
		name: "refill", inPolicy: true, syntax: "<tokens_per_second>",
		doc:         "requests that a client regains per second, up to `burst`; 0.00001 (about one a day) to 1000000",
		optionValue: decimal("tokens per second", func(h *Handler) *float64 { return &h.Refill }, bucket.MinRefill, bucket.MaxRefill, 0.5),
	},
	{
		name: "ipv4_prefix", syntax: "<bits>", doc: docPrefix,
		optionValue: number("a number of bits", func(h *Handler) *int { return &h.IPv4Prefix }, 1, 32, 32),
	},
	{
		name: "ipv6_prefix", syntax: "<bits>", doc: docPrefix,
		optionValue: number("a number of bits", func(h *Handler) *int { return &h.IPv6Prefix }, 1, 128, 64),
	},
	{
		name: "max_clients", syntax: "<n>",
		doc:         "maximum number of tracked clients, at least 2. Bounds the limiter's memory: each takes about 130 bytes. When more than half of this number are active, the clients that have been idle longest may be forgotten and start again with a full bucket",
		optionValue: number("a whole number of clients", func(h *Handler) *int { return &h.MaxClients }, bucket.MinClients, maxCount, 1_000_000),
	},
	{
		name: "zone", syntax: "<name>",
		doc:         "sites with the same zone and the same limits share one budget per client. It is also a label of [metrics](observability.md#metrics)",
		optionValue: word("a name in printable ASCII without spaces, quotes and backslashes", func(h *Handler) *string { return &h.Zone }, bucket.ValidZone, "default"),
	},
	{
		name: "exempt", syntax: "<cidr|private_ranges...>",
		doc:         "clients that are never limited",
		optionValue: list(expectedRanges, func(h *Handler) *[]string { return &h.Exempt }, checkRange, "none"),
	},
	{
		name: "limiter", syntax: "<module> ...",
		doc: "counts clients together on several machines: [`redis`](redis.md)", absent: "each machine counts alone",
		optionValue: optionValue{
			expected: "a limiter that this Caddy is built with; for redis, build it with --with github.com/asyncproxy/caddy-async-proxy/redis",
			parse:    (*caddyfileParser).limiter,
		}.shownAs((*policy).limiterSettings),
	},
	{
		name: "limit_by", inPolicy: true, syntax: "client_ip|user",
		doc:         "one bucket per client address, or one per user across all addresses (needs `basic_auth`, `users_file` or `user_from`)",
		optionValue: choice(func(h *Handler) *string { return &h.LimitBy }, "client_ip", "user"),
	},
	{
		name: "clients", syntax: "<cidr|private_ranges|all...>",
		doc:         "the only clients that may use the proxy; others get 403. `all` opens it to everybody",
		absent:      "`private_ranges`; `all` with authentication, or behind an address matcher",
		optionValue: list("all, or "+expectedRanges, func(h *Handler) *[]string { return &h.Clients }, checkClients, "none").shownAs((*policy).clientSettings),
	},
	{
		name: "basic_auth", syntax: "[<hash_algorithm> [<realm>]] {\n\t<user> <hash>\n}",
		doc:    "users and password hashes, in [Caddy's syntax](https://caddyserver.com/docs/caddyfile/directives/basic_auth); requests without valid credentials get 407. Other providers are configured in the JSON field `authentication`",
		absent: "no authentication",
		optionValue: optionValue{
			expected: "[bcrypt|argon2id [<realm>]] and a block of `<user> <hash>` lines",
			parse:    (*caddyfileParser).basicAuth,
		}.shownAs((*policy).authSettings),
	},
	{
		name: "users_file", syntax: "<path>",
		doc: "further users from a file, with `<user>:<hash>` on each line, as `htpasswd -B -C 14` writes it. A change applies to logins that come more than a second later. A mistake leaves the users as they were; the log and the status page say so, and also if there are no users. Use an absolute path", absent: "none",
		optionValue: optionValue{
			expected: "a readable file with <user>:<hash> on each line",
			parse:    (*caddyfileParser).usersFile,
			show:     func(h *Handler) string { return cmp.Or(h.UsersFile, "none") },
		},
	},
	{
		name: "user_from", syntax: "<placeholders...>",
		doc:         "identifies the [user](#policies) of requests without credentials: the first placeholder that is not empty, such as `{http.request.tls.client.subject}`",
		optionValue: list("placeholders such as {http.request.tls.client.subject}", func(h *Handler) *[]string { return &h.UserFrom }, checkPlaceholder, "none"),
	},
	{
		name: "failed_logins", syntax: "<n> per <duration>|off",
		doc: "how many [logins a client may fail](security.md), such as `10 per 1m`, or `off`",
		optionValue: optionValue{
			expected: fmt.Sprintf("<n> per <duration>, such as 10 per 1m, with 1 to %d logins per 1s to %s, or off", maxFailedLogins, shortDuration(time.Duration(maxFailedLoginsPer))),
			parse:    (*caddyfileParser).failedLogins,
			isSet:    func(h *Handler) bool { return h.FailedLogins != 0 || h.FailedLoginsPer != 0 },
			invalid:  (*Handler).invalidFailedLogins,
			setDefault: func(h *Handler) {
				setIfZero(&h.FailedLogins, defaultFailedLogins)
				setIfZero(&h.FailedLoginsPer, defaultFailedLoginsPer)
			},
			show: (*Handler).showFailedLogins,
		},
	},
	{name: "allow", inPolicy: true, syntax: syntaxDestinations, doc: docRules, absent: "see there", optionValue: ruleList(expectedDestinations, (*caddyfileParser).rule).shownAs((*policy).ruleSettings)},
	{name: "deny", inPolicy: true, syntax: syntaxDestinations, doc: docRules, absent: "see there", optionValue: ruleList(expectedDestinations, (*caddyfileParser).rule)},
	{name: "allow_file", inPolicy: true, syntax: "<path...>", doc: docRuleFiles, absent: "none", optionValue: ruleList(expectedFiles, (*caddyfileParser).ruleFiles)},
	{name: "deny_file", inPolicy: true, syntax: "<path...>", doc: docRuleFiles, absent: "none", optionValue: ruleList(expectedFiles, (*caddyfileParser).ruleFiles)},
	{name: "allow_from", inPolicy: true, syntax: "<ip_source> ...", doc: docRuleSources, absent: "none", optionValue: ruleList(expectedSource, (*caddyfileParser).ruleSource)},
	{name: "deny_from", inPolicy: true, syntax: "<ip_source> ...", doc: docRuleSources, absent: "none", optionValue: ruleList(expectedSource, (*caddyfileParser).ruleSource)},
	{
		name: "ports", inPolicy: true, syntax: syntaxPorts,
		doc:         "the only allowed destination ports",
		optionValue: list(expectedPorts, func(h *Handler) *[]string { return &h.Ports }, checkPorts, fmt.Sprintf("all but %d", access.PortSMTP)),
	},
	{
		name: "connect_ports", inPolicy: true, syntax: syntaxPorts,
		doc:         "the only allowed destination ports for CONNECT; replaces `ports` there",
		optionValue: list(expectedPorts, func(h *Handler) *[]string { return &h.ConnectPorts }, checkPorts, "same as ports"),
	},
	{
		name: "methods", syntax: "<names...>|all", inPolicy: true,
		doc:         "the only allowed methods, such as `GET HEAD CONNECT`; others get 403",
		optionValue: list("names of methods in capitals, such as GET HEAD CONNECT, or all", func(h *Handler) *[]string { return &h.Methods }, checkMethod, allMethods),
	},
	{
		name: "report_only", inPolicy: true, syntax: "rules|limits...|off",
		doc:         "`rules` (destinations, ports, methods) and `limits` (tokens): denials are logged but not enforced. `clients`, logins and `max_tunnels` stay in force",
		optionValue: list("rules, limits or both, or off", func(h *Handler) *[]string { return &h.ReportOnly }, oneOf("rules", "limits", off), "none"),
	},
	{
		name: "deny_hint", inPolicy: true, syntax: "<text>|off",
		doc: "ends the text of each denial (403), to say [whom to ask](#responses-of-the-proxy). Placeholders work", absent: "none",
		optionValue: optionValue{
			expected: "a text in one line, in quotes, or off",
			set: func(h *Handler, s string) bool {
				h.DenyHint = s
				return s != "" && !strings.ContainsFunc(s, unicode.IsControl)
			},
			isSet: func(h *Handler) bool { return h.DenyHint != "" },
			invalid: func(h *Handler) (string, bool) {
				return h.DenyHint, strings.ContainsFunc(h.DenyHint, unicode.IsControl)
			},
			show: func(h *Handler) string { return cmp.Or(h.DenyHint, "none") },
		},
	},
	{
		name: "upstream", inPolicy: true, syntax: "http|https|socks5://[<user>[:<password>]@]<host>[:<port>]|off {\n\theader                   <field> <value>\n\ttls_server_name          <name>\n\ttls_trust_pool           <module> ...\n\ttls_insecure_skip_verify\n}",
		doc: "the [parent proxy](#upstream)", absent: "none",
		optionValue: optionValue{
			expected: "http|https|socks5://[<user>[:<password>]@]<host>[:<port>], or off",
			parse:    (*caddyfileParser).upstream,
		}.shownAs((*policy).upstreamSettings),
	},
	{
		name: "no_upstream", inPolicy: true, syntax: "<cidr|name|*.name|public|private...>",
		doc:         "destinations to reach directly, without the parent",
		optionValue: list("destinations without ports: addresses, CIDR ranges, names, *.names, public or private", func(h *Handler) *[]string { return &h.NoUpstream }, checkDirect, "none"),
	},
	{
		name: "resolvers", syntax: "<addresses...>",
		doc:         "IP addresses of DNS servers, such as `192.0.2.53` or `tcp/[2001:db8::53]:53`. A query starts with a random one and moves on to the next when that one fails or has not answered for a second",
		optionValue: list("IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53", func(h *Handler) *[]string { return &h.Resolvers }, checkResolver, "system default"),
	},
	{
		name: "dial_timeout", inPolicy: true, syntax: "<duration>",
		doc:         "time limit for DNS and connecting together, over all addresses of a name",
		optionValue: duration(func(h *Handler) *caddy.Duration { return &h.DialTimeout }, 10*time.Second),
	},
	{
		name: "response_header_timeout", inPolicy: true, syntax: "<duration>|off",
		doc:         "how long to wait for response headers before answering 504. A `102` or `103` from the origin restarts the wait, up to ten times this duration in total",
		optionValue: durationOrOff(func(h *Handler) *caddy.Duration { return &h.ResponseHeaderTimeout }, 5*time.Minute),
	},
	{
		name: "response_idle_timeout", syntax: "<duration>|off",
		doc:         "aborts a response when the origin sends none of its content for this long",
		optionValue: durationOrOff(func(h *Handler) *caddy.Duration { return &h.ResponseIdleTimeout }, 5*time.Minute),
	},
	{
		name: "max_tunnels", inPolicy: true, syntax: "<n> [per_client <n>]",
		doc: "maximum number of open tunnels in this process (beyond: 503) and per client (beyond: 429). A response whose content has been stalled for ten seconds counts as well, and is aborted if it exceeds the limit", absent: "no limit",
		optionValue: optionValue{
			expected: fmt.Sprintf("<n> [per_client <n>], each from 1 to %d", maxCount),
			parse:    (*caddyfileParser).maxTunnels,
			isSet:    func(h *Handler) bool { return h.MaxTunnels != 0 || h.MaxTunnelsPerClient != 0 },
			invalid:  (*Handler).invalidMaxTunnels,
		}.shownAs((*policy).maxTunnelSettings),
	},
	{
		name: "tunnel_idle_timeout", inPolicy: true, syntax: "<duration>|off",
		doc:         "closes tunnels that have had no traffic in either direction for this long",
		optionValue: durationOrOff(func(h *Handler) *caddy.Duration { return &h.TunnelIdleTimeout }, time.Hour),
	},
	{
		name: "tunnel_stall_timeout", syntax: "<duration>|off",
		doc:         "resets a tunnel when one end has read nothing for this long although data from the other end is waiting; an end that reads slowly is not stalled",
		optionValue: durationOrOff(func(h *Handler) *caddy.Duration { return &h.TunnelStallTimeout }, time.Minute),
	},
	{
		name: "tunnel_max_duration", inPolicy: true, syntax: "<duration>|off",
		doc:         "closes tunnels open for longer than this",
		optionValue: durationOrOff(func(h *Handler) *caddy.Duration { return &h.TunnelMaxDuration }, 0),
	},
	{
		name: "stream_close_delay", syntax: "<duration>",
		doc: "closes tunnels this long after a reload has replaced their config; 0: at once",
		optionValue: optionValue{
			expected: "a duration such as 5m, or 0 for immediately",
			set: func(h *Handler, s string) (ok bool) {
				h.StreamCloseDelay = new(caddy.Duration)
				*h.StreamCloseDelay, ok = parseDuration(s)
				return ok
			},
			isSet: func(h *Handler) bool { return h.StreamCloseDelay != nil },
			invalid: func(h *Handler) (string, bool) {
				return time.Duration(*h.StreamCloseDelay).String(), *h.StreamCloseDelay < 0 || *h.StreamCloseDelay > maxDuration
			},
			show: func(h *Handler) string {
				switch {
				case h.StreamCloseDelay == nil:
					return "never"
				case *h.StreamCloseDelay == 0:
					return "immediately"
				}
				return shortDuration(time.Duration(*h.StreamCloseDelay))
			},
		},
	},
	{
		name: "recheck_tunnels", syntax: "",
		doc: "when the config starts, closes open tunnels of the same site and zone that its rules forbid",
		optionValue: optionValue{
			expected: "no value",
			parse: func(p *caddyfileParser, h *Handler) error {
				h.RecheckTunnels = true
				_, err := p.values(0, 0)
				return err
			},
			show: func(h *Handler) string { return onOff(h.RecheckTunnels) },
		},
	},
	{
		name: "hosts", syntax: "<own_names...>",
		doc:         "the server's own names. Over HTTP/2 and HTTP/3, plain requests for other hosts are forwarded as `http://`, because the scheme in the client's URL is not visible",
		optionValue: list("names of this server, without ports", func(h *Handler) *[]string { return &h.Hosts }, hostport.CheckHost, "none"),
	},
	{
		name: "via", syntax: "<pseudonym>|off",
		doc: "the proxy's name in `Via` and `Proxy-Status`, also used to detect loops; `off` leaves `Via` unchanged", absent: "unique per process and site",
		optionValue: word("a pseudonym of letters, digits, dots and hyphens that starts with a letter, or off", func(h *Handler) *string { return &h.Via }, validPseudonym, "").shownAs((*policy).viaSettings),
	},
	{
		name: "forwarded_for", inPolicy: true, syntax: "auto|off",
		doc:         "`auto` sets `X-Forwarded-For` and `X-Real-IP`; `off` removes them",
		optionValue: choice(func(h *Handler) *string { return &h.ForwardedFor }, "auto", "off"),
	},
	{
		name: "header_up", inPolicy: true, syntax: "[+|-]<field> [<value|regexp> [<replacement>]]", doc: docHeaders, absent: "none",
		optionValue: optionValue{expected: expectedHeader, repeatable: true, parse: (*caddyfileParser).headerUp}.shownAs((*policy).headerSettings),
	},
	{
		name: "header_down", inPolicy: true, syntax: "[+|-]<field> [<value|regexp> [<replacement>]]", doc: docHeaders, absent: "none",
		optionValue: optionValue{expected: expectedHeader, repeatable: true, parse: (*caddyfileParser).headerDown},
	},
	{
		name: "serve_pac", syntax: "[<path>] {\n\tdirect <cidr|name|*.name...>\n}",
		doc: "the path of a [PAC script](#pac) for browsers, and further destinations that browsers reach directly", absent: "none; `/proxy.pac` without a value",
		optionValue: optionValue{
			expected: "a path that begins with /, or no value",
			parse:    (*caddyfileParser).servePAC,
			isSet:    func(h *Handler) bool { return h.ServePAC != "" },
			invalid:  invalidPACPath,
		}.shownAs((*policy).pacSettings),
	},
	{
		name: "policy", syntax: "<name> {\n\tusers     <patterns...>\n\tclients   <cidr|private_ranges...>\n\tmatch     <matchers>\n\tanonymous\n\t<option> ...\n}",
		doc: "[other options](#policies) for some of the clients; may be repeated", absent: "none",
		optionValue: optionValue{expected: "a name and a block of conditions and options", repeatable: true}, // parsed and shown apart
	},
}

// optionNamed returns the option with this name, if there is one.
func optionNamed(name string) (option, bool) {
	i := slices.IndexFunc(options, func(o option) bool { return o.name == name })
	if i < 0 {
		return option{}, false
	}
	return options[i], true
}

// optionNames returns the names of all options, sorted.
func optionNames() []string {
	var names []string
	for _, o := range options {
		names = append(names, o.name)
	}
	slices.Sort(names)
	return names
}

func (h *Handler) setDefaults() {
	for _, o := range options {
		if o.setDefault != nil {
			o.setDefault(h)
		}
	}
	h.clearUndone()
}

// check returns an error if the option's value in h is set and not valid.
func (o *option) check(h *Handler) error {
	if o.invalid == nil || o.isSet != nil && !o.isSet(h) {
		return nil
	}
	if text, invalid := o.invalid(h); invalid {
		return invalidValue(o.name, o.expected, text)
	}
	return nil
}

// Validate implements caddy.Validator. It checks each option alone, and then those that
// depend on others. Provision calls it before it uses the options. When Caddy calls it after
// that, it checks nothing again: Provision has emptied the options whose modules it loaded.
func (h *Handler) Validate() error {
	if h.validated {
		return nil
	}
	for _, o := range options {
		if err := o.check(h); err != nil {
			return err
		}
	}
	for i := range h.Rules {
		if err := h.Rules[i].check(); err != nil {
			return fmt.Errorf("rules[%d]: %w", i, err)
		}
	}
	if err := h.checkTogether(); err != nil {
		return err
	}
	if err := h.checkPolicies(); err != nil {
		return err
	}
	h.validated = true
	return nil
}

// combinationError reports options that are valid alone but not together.
type combinationError struct {
	options []string // the most likely place of the mistake first
	error
}

// checkTogether checks the options that depend on others.
func (h *Handler) checkTogether() *combinationError {
	full := *h
	full.setDefaults()
	switch {
	case len(h.ReportOnly) > 1 && slices.Contains(h.ReportOnly, off):
		return &combinationError{[]string{"report_only"}, errors.New("report_only: off is given together with other values; expected off alone")}
	case h.NoUpstream != nil && full.Upstream == nil:
		return &combinationError{[]string{"no_upstream"}, errors.New("no_upstream: no upstream is configured; expected the option upstream as well")}
	case h.LimitBy == "user" && !h.identifiesUsers():
		return &combinationError{[]string{"limit_by"}, errors.New("limit_by: clients have no user; expected the option basic_auth, users_file or user_from as well")}
	case len(h.PACDirect) > 0 && h.ServePAC == "":
		return &combinationError{[]string{"serve_pac"}, errors.New("pac_direct: expected serve_pac to be set as well")}
	}
	if err := full.limits(&full.Options).Validate(); err != nil {
		return &combinationError{[]string{"refill", "burst"}, err}
	}
	return nil
}

func (h *Handler) showFailedLogins() string {
	if h.FailedLogins < 0 {
		return "off"
	}
	return fmt.Sprintf("%d per %s", h.FailedLogins, shortDuration(time.Duration(h.FailedLoginsPer)))
}

func (h *Handler) invalidFailedLogins() (text string, invalid bool) {
	n, per := cmp.Or(h.FailedLogins, defaultFailedLogins), cmp.Or(h.FailedLoginsPer, defaultFailedLoginsPer)
	return fmt.Sprintf("%d per %s", n, shortDuration(time.Duration(per))),
		n < -1 || n > maxFailedLogins || per < caddy.Duration(time.Second) || per > maxFailedLoginsPer
}

func (h *Handler) invalidMaxTunnels() (text string, invalid bool) {
	for _, n := range []int{h.MaxTunnels, h.MaxTunnelsPerClient} {
		if n < 0 || n > maxCount {
			return fmt.Sprint(n), true
		}
	}
	return "", false
}

func invalidPACPath(h *Handler) (path string, invalid bool) {
	return h.ServePAC, !strings.HasPrefix(h.ServePAC, "/")
}

// words joins the values of an option.
func words(values []string, none string) string {
	if len(values) == 0 {
		return none
	}
	return strings.Join(values, " ")
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
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
