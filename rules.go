// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"unicode"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/idna"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// Rule allows or denies destinations. The first rule that matches a destination decides.
type Rule struct {
	// What to do with the destinations: "allow" or "deny".
	Action string `json:"action"`

	// The destinations: an address (192.0.2.1), a CIDR range (10.0.0.0/8), a host name
	// (example.com), all names below one (*.example.com), `public` addresses, `private`
	// addresses (those that by default only a client on this machine may reach), or
	// `all`. Each may be followed by a colon and a port or a range of ports
	// (example.com:443, all:8000-8999, [2001:db8::]:443). Default: all ports.
	//
	// A name is compared with the name that the client asks for; it is not resolved, and
	// this machine's DNS search list does not apply. An address is compared with the
	// address that the proxy is about to connect to. Allowing a name, or `all`, does not
	// allow addresses that are denied otherwise. Allowing a range of IPv6 addresses does
	// not allow private IPv4 addresses embedded in them.
	Destinations []string `json:"destinations,omitempty"`

	// Files that list destinations, one per line; # starts a comment. They are read when
	// the config is loaded.
	Files []string `json:"files,omitempty"`

	// A hash of the contents of Files. The Caddyfile adapter sets it, because Caddy does
	// not load a config that equals the running one: with the hash, a changed file makes
	// a different config. Nothing else depends on it.
	FilesHash string `json:"files_hash,omitempty"`

	// A source of CIDR ranges: a module as for trusted_proxies.
	SourceRaw json.RawMessage `json:"source,omitempty" caddy:"namespace=http.ip_sources inline_key=source"`
}

// hashFiles returns a hash of the contents of files, or "" if one of them cannot
// be read.
func hashFiles(paths []string) string {
	all := sha256.New()
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return ""
		}
		sum := sha256.Sum256(data)
		all.Write(sum[:])
	}
	return hex.EncodeToString(all.Sum(nil)[:16])
}

// destination is one destination of a rule.
type destination struct {
	text       string // a name, or all, public or private
	subdomains bool   // matches *.text, the names below text
	prefix     netip.Prefix
	ports      portRange
}

// parseDestination parses a destination of a rule.
func parseDestination(s string) (destination, error) {
	host, ports, hasPorts := s, "", false
	if rest, ok := strings.CutPrefix(s, "["); ok {
		var closed bool
		if host, ports, closed = strings.Cut(rest, "]"); !closed {
			return destination{}, fmt.Errorf("%q has no closing bracket", s)
		}
		if ports, hasPorts = strings.CutPrefix(ports, ":"); !hasPorts && ports != "" {
			return destination{}, fmt.Errorf("%q has something other than a port after its bracket", s)
		}
	} else if strings.Count(s, ":") == 1 {
		host, ports, hasPorts = strings.Cut(s, ":")
	}
	var d destination
	if hasPorts {
		var err error
		if d.ports, err = parsePorts(ports); err != nil {
			return destination{}, err
		}
	}
	switch host {
	case "all", "public", "private":
		d.text = host
		return d, nil
	}
	if name, ok := strings.CutPrefix(s, "."); ok {
		return destination{}, fmt.Errorf("%q is not a name; for the name and everything below it, write %s *.%s", s, name, name)
	}
	if strings.Contains(host, "%") {
		return destination{}, fmt.Errorf("%q has a zone; expected an address without one", s)
	}
	if prefix, err := parsePrefix(strings.TrimSuffix(host, ".")); err == nil {
		d.prefix = prefix
		return d, checkHostBits(strings.TrimSuffix(host, "."))
	}
	name, below := strings.CutPrefix(host, "*.")
	ascii, err := name, error(nil)
	if strings.ContainsFunc(name, func(c rune) bool { return c > unicode.MaxASCII }) {
		ascii, err = idna.Lookup.ToASCII(name) // rejects _, which service names contain
	}
	// ToASCII maps other full stops to a dot. One trailing dot is removed; a second one
	// makes the name invalid.
	d.text, d.subdomains = strings.TrimSuffix(strings.ToLower(ascii), "."), below
	_, isAddress := parsePrefix(d.text) // an address in other than ASCII digits
	if err != nil || isAddress == nil || hostport.CheckHost(d.text) != nil || strings.ContainsAny(host, "/[]") || strings.HasSuffix(d.text, ".") {
		return destination{}, fmt.Errorf("%q is not an address, a CIDR range or a name", s)
	}
	return d, nil
}

// parsePrefix parses an address or a CIDR range, and converts v4-mapped ones to IPv4.
func parsePrefix(s string) (netip.Prefix, error) {
	prefix, err := caddyhttp.CIDRExpressionToPrefix(s)
	if err == nil && prefix.Addr().Is4In6() && prefix.Bits() >= 96 {
		prefix = netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-96)
	}
	return prefix.Masked(), err
}

// hostBitsError reports that a range has bits set beyond its prefix length, so that it is
// unclear whether the range or the address is meant.
type hostBitsError struct {
	text    string
	network netip.Prefix
}

func (e *hostBitsError) Error() string {
	address, _, _ := strings.Cut(e.text, "/")
	return fmt.Sprintf("%s has bits set beyond its length; write %s for the range, or %s for the address", e.text, e.network, address)
}

// checkHostBits returns a hostBitsError if text is a range with host bits set.
func checkHostBits(text string) error {
	if prefix, err := netip.ParsePrefix(text); err == nil && prefix != prefix.Masked() {
		return &hostBitsError{text, prefix.Masked()}
	}
	return nil
}

// newRuleSets builds the sets for rules. It calls load for rules with a source, and
// records each destination in check.
func newRuleSets(rules []Rule, load func(*Rule) (*rangeSource, error), check *ruleCheck) ([]*ruleSet, error) {
	var sets []*ruleSet
	first := 0 // the first set of the current run of rules with the same action
	for i := range rules {
		rule := &rules[i]
		if rule.Action != "allow" && rule.Action != "deny" {
			return nil, fmt.Errorf("rules[%d]: action %q: expected allow or deny", i, rule.Action)
		}
		if len(rule.Destinations) == 0 && len(rule.Files) == 0 && rule.SourceRaw == nil {
			return nil, errors.New(rule.Action + ": missing destination")
		}
		deny := rule.Action == "deny"
		if len(sets) > 0 && sets[len(sets)-1].deny != deny {
			first = len(sets)
		}
		set := func(ports portRange) *ruleSet {
			for _, s := range sets[first:] {
				if s.ports == ports {
					return s
				}
			}
			s := newRuleSet(deny, ports)
			sets = append(sets, s)
			return s
		}
		// Destinations are compared with earlier rules, not with each other: they join
		// the sets only after the whole rule has been read.
		before := len(check.noted)
		note := func(text string, file bool) error {
			for _, expanded := range expandRanges(text) {
				d, err := parseDestination(expanded)
				if bits := new(hostBitsError); file && errors.As(err, &bits) {
					check.inexact = append(check.inexact, text) // only a warning in a file
				} else if err != nil {
					return err
				}
				check.note(sets, listedDestination{rule: i, text: text, dest: d, file: file}, deny)
			}
			return nil
		}
		for _, text := range rule.Destinations {
			if err := note(text, false); err != nil {
				return nil, fmt.Errorf("%s: %w", rule.Action, err)
			}
		}
		for _, file := range rule.Files {
			err := readList(file, func(text string) error { return note(text, true) })
			if check.unreadable(err) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", rule.Action, err)
			}
		}
		for j := range check.noted[before:] {
			l := &check.noted[before+j]
			l.set = set(l.dest.ports)
			l.set.add(l.dest)
		}
		if rule.SourceRaw != nil {
			source, err := load(rule)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", rule.Action, err)
			}
			s := set(portRange{})
			s.sources = append(s.sources, source)
		}
	}
	return sets, nil
}

// loadSource returns a function that loads the source module of a rule.
func loadSource(ctx caddy.Context) func(*Rule) (*rangeSource, error) {
	return func(rule *Rule) (*rangeSource, error) {
		module, err := ctx.LoadModule(rule, "SourceRaw")
		if err != nil {
			return nil, err
		}
		return &rangeSource{name: string(module.(caddy.Module).CaddyModule().ID), source: module.(caddyhttp.IPRangeSource)}, nil
	}
}

// newDirectSet returns a set of the destinations in texts, which must not have ports.
func newDirectSet(texts []string) (*ruleSet, error) {
	s := newRuleSet(false, portRange{})
	for _, text := range texts {
		for _, text := range expandRanges(text) {
			d, err := parseDestination(text)
			if err == nil && d.ports.high > 0 {
				err = fmt.Errorf("%q has a port; expected none", text)
			}
			if err != nil {
				return nil, err
			}
			s.add(d)
		}
	}
	return s, nil
}

func newRuleSet(deny bool, ports portRange) *ruleSet {
	return &ruleSet{deny: deny, ports: ports, names: make(map[string]bool), domains: make(map[string]bool)}
}

func (s *ruleSet) add(d destination) {
	switch {
	case d.prefix.IsValid():
		s.prefixes.Insert(d.prefix)
		s.count++
	case d.text == "all":
		s.all = true
	case d.text == "public":
		s.public = true
	case d.text == "private":
		s.private = true
	case d.subdomains:
		s.domains[d.text] = true
	default:
		s.names[d.text] = true
	}
}

// expandRanges returns the CIDR ranges of private_ranges, or else text itself.
func expandRanges(text string) []string {
	if text == "private_ranges" {
		ranges := caddyhttp.PrivateRangesCIDR()
		for i, text := range ranges {
			if prefix, err := netip.ParsePrefix(text); err == nil {
				ranges[i] = prefix.Masked().String()
			}
		}
		return ranges
	}
	return []string{text}
}

// readList calls each for every line of a file, without comments and blank lines. It
// adds the file and line number to errors.
func readList(path string, each func(string) error) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if err := each(line); err != nil {
			return fmt.Errorf("%s:%d: %w", path, n, err)
		}
	}
	return nil
}
