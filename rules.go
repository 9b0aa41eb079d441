// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"unicode"

	"golang.org/x/net/idna"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// policyRule is a rule that allows or denies destinations.
type policyRule struct {
	action       string // allow or deny
	destinations []string
	files        []string                     // of destinations, one per line; # starts a comment
	source       func() (*rangeSource, error) // loads a source of ranges; nil: none
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
	prefix, err := netip.ParsePrefix(s)
	if !strings.Contains(s, "/") {
		var addr netip.Addr
		addr, err = netip.ParseAddr(s)
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
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

// newRuleSets builds the sets for rules. It loads their sources, and records each
// destination in check.
func newRuleSets(rules []policyRule, check *ruleCheck) ([]*ruleSet, error) {
	var sets []*ruleSet
	first := 0 // the first set of the current run of rules with the same action
	for i := range rules {
		rule := &rules[i]
		if rule.action != "allow" && rule.action != "deny" {
			return nil, fmt.Errorf("rules[%d]: action %q: expected allow or deny", i, rule.action)
		}
		if len(rule.destinations) == 0 && len(rule.files) == 0 && rule.source == nil {
			return nil, errors.New(rule.action + ": missing destination")
		}
		deny := rule.action == "deny"
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
		for _, text := range rule.destinations {
			if err := note(text, false); err != nil {
				return nil, fmt.Errorf("%s: %w", rule.action, err)
			}
		}
		for _, file := range rule.files {
			err := readList(file, func(text string) error { return note(text, true) })
			if check.unreadable(err) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", rule.action, err)
			}
		}
		for j := range check.noted[before:] {
			l := &check.noted[before+j]
			l.set = set(l.dest.ports)
			l.set.add(l.dest)
		}
		if rule.source != nil {
			source, err := rule.source()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", rule.action, err)
			}
			s := set(portRange{})
			s.sources = append(s.sources, source)
		}
	}
	return sets, nil
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

// expandRanges returns the CIDR ranges of private_ranges, which are Caddy's, or else text
// itself.
func expandRanges(text string) []string {
	if text == "private_ranges" {
		return []string{"192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8", "127.0.0.0/8", "fd00::/8", "::1/128"}
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
