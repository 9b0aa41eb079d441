// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

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

// Rule is a rule that allows or denies destinations.
type Rule struct {
	Action       string // allow or deny
	Destinations []string
	Files        []string                     // of destinations, one per line; # starts a comment
	Source       func() (*RangeSource, error) // loads a source of ranges; nil: none
}

// Destination is one destination of a rule.
type Destination struct {
	Text       string // a name or a class
	IsClass    bool   // Text is all, public or private, and not a name of a host
	Subdomains bool   // matches *.text, the names below text
	Prefix     netip.Prefix
	Ports      PortRange
}

// is reports whether d is a class. A host may have the same name, as in all. or *.private.
func (d Destination) is(class string) bool { return d.IsClass && d.Text == class }

// ParseDestination parses a destination of a rule.
func ParseDestination(s string) (Destination, error) {
	host, ports, hasPorts := s, "", false
	if rest, ok := strings.CutPrefix(s, "["); ok {
		var closed bool
		if host, ports, closed = strings.Cut(rest, "]"); !closed {
			return Destination{}, fmt.Errorf("%q has no closing bracket", s)
		}
		if ports, hasPorts = strings.CutPrefix(ports, ":"); !hasPorts && ports != "" {
			return Destination{}, fmt.Errorf("%q has something other than a port after its bracket", s)
		}
	} else if strings.Count(s, ":") == 1 {
		host, ports, hasPorts = strings.Cut(s, ":")
	}
	var d Destination
	if hasPorts {
		var err error
		if d.Ports, err = ParsePorts(ports); err != nil {
			return Destination{}, err
		}
	}
	switch class := strings.ToLower(host); class {
	case "all", "public", "private":
		d.Text, d.IsClass = class, true
		return d, nil
	}
	if name, ok := strings.CutPrefix(s, "."); ok {
		return Destination{}, fmt.Errorf("%q is not a name; for the name and everything below it, write %s *.%s", s, name, name)
	}
	if strings.Contains(host, "%") {
		return Destination{}, fmt.Errorf("%q has a zone; expected an address without one", s)
	}
	if prefix, err := ParsePrefix(strings.TrimSuffix(host, ".")); err == nil {
		d.Prefix = prefix
		return d, CheckHostBits(strings.TrimSuffix(host, "."))
	}
	name, below := strings.CutPrefix(host, "*.")
	ascii, err := name, error(nil)
	if strings.ContainsFunc(name, func(c rune) bool { return c > unicode.MaxASCII }) {
		ascii, err = idna.Lookup.ToASCII(name) // rejects _, which service names contain
	}
	// ToASCII maps other full stops to a dot. One trailing dot is removed; a second one
	// makes the name invalid.
	d.Text, d.Subdomains = strings.TrimSuffix(strings.ToLower(ascii), "."), below
	_, isAddress := ParsePrefix(d.Text) // an address in other than ASCII digits
	if err != nil || isAddress == nil || hostport.CheckHost(d.Text) != nil || strings.ContainsAny(host, "/[]") || strings.HasSuffix(d.Text, ".") {
		return Destination{}, fmt.Errorf("%q is not an address, a CIDR range or a name", s)
	}
	return d, nil
}

// ParsePrefix parses an address or a CIDR range, and converts v4-mapped ones to IPv4.
func ParsePrefix(s string) (netip.Prefix, error) {
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

// HostBitsError reports that a range has bits set beyond its prefix length, so that it is
// unclear whether the range or the address is meant.
type HostBitsError struct {
	text    string
	network netip.Prefix
}

func (e *HostBitsError) Error() string {
	address, _, _ := strings.Cut(e.text, "/")
	return fmt.Sprintf("%s has bits set beyond its length; write %s for the range, or %s for the address", e.text, e.network, address)
}

// CheckHostBits returns a HostBitsError if text is a range with host bits set.
func CheckHostBits(text string) error {
	if prefix, err := netip.ParsePrefix(text); err == nil && prefix != prefix.Masked() {
		return &HostBitsError{text, prefix.Masked()}
	}
	return nil
}

// NewRuleSets builds the sets for rules. It loads their sources, and records each
// destination in check.
func NewRuleSets(rules []Rule, check *RuleCheck) ([]*RuleSet, error) {
	b := &setBuilder{check: check}
	for i := range rules {
		rule := &rules[i]
		if rule.Action != "allow" && rule.Action != "deny" {
			return nil, fmt.Errorf("rules[%d]: action: the value '%s' is not valid; expected allow or deny", i, rule.Action)
		}
		if len(rule.Destinations) == 0 && len(rule.Files) == 0 && rule.Source == nil {
			return nil, errors.New(rule.Action + ": missing destination")
		}
		if err := b.add(i, rule); err != nil {
			return nil, fmt.Errorf("%s: %w", rule.Action, err)
		}
	}
	return b.sets, nil
}

// setBuilder builds sets from rules.
type setBuilder struct {
	check *RuleCheck
	sets  []*RuleSet
	first int  // the first set of the current run of rules with the same action
	deny  bool // the action of that run
}

// add adds the destinations of the rule with the given index. Destinations are compared with
// earlier rules, not with each other: they join the sets only after the whole rule has been
// read.
func (b *setBuilder) add(index int, rule *Rule) error {
	if b.deny = rule.Action == "deny"; len(b.sets) > 0 && b.sets[len(b.sets)-1].deny != b.deny {
		b.first = len(b.sets)
	}
	before := len(b.check.noted)
	for _, text := range rule.Destinations {
		if err := b.note(index, text, false); err != nil {
			return err
		}
	}
	for _, file := range rule.Files {
		err := ReadList(file, func(text string) error { return b.note(index, text, true) })
		if err != nil && !b.check.unreadable(err) {
			return err
		}
	}
	for j := range b.check.noted[before:] {
		l := &b.check.noted[before+j]
		l.set = b.set(l.dest.Ports)
		l.set.Add(l.dest)
	}
	if rule.Source == nil {
		return nil
	}
	source, err := rule.Source()
	if err != nil {
		return err
	}
	s := b.set(PortRange{})
	s.Sources = append(s.Sources, source)
	return nil
}

// note records a destination of a rule.
func (b *setBuilder) note(index int, text string, file bool) error {
	for _, expanded := range ExpandRanges(text) {
		d, err := ParseDestination(expanded)
		if bits := new(HostBitsError); file && errors.As(err, &bits) {
			b.check.Inexact = append(b.check.Inexact, text) // only a warning in a file
		} else if err != nil {
			return err
		}
		b.check.note(b.sets, listedDestination{rule: index, text: text, dest: d, file: file}, b.deny)
	}
	return nil
}

// set returns the set of the current run for the given ports.
func (b *setBuilder) set(ports PortRange) *RuleSet {
	for _, s := range b.sets[b.first:] {
		if s.ports == ports {
			return s
		}
	}
	s := NewRuleSet(b.deny, ports)
	b.sets = append(b.sets, s)
	return s
}

// ExpandRanges returns the CIDR ranges of private_ranges, which are Caddy's, or else text
// itself.
func ExpandRanges(text string) []string {
	if strings.EqualFold(text, "private_ranges") {
		return []string{"192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8", "127.0.0.0/8", "fd00::/8", "::1/128"}
	}
	return []string{text}
}

// ReadList calls each for every line of a file, without comments and blank lines. It
// adds the file and line number to errors.
func ReadList(path string, each func(string) error) error {
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
