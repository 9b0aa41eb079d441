// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"

	"github.com/gaissmai/bart"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// RuleSet merges the destinations of adjacent rules that have the same action and port
// range. The order among such rules makes no difference.
type RuleSet struct {
	deny  bool
	ports PortRange // zero: all of them

	all             bool
	private, public bool
	names           map[string]bool // in lower case, without a trailing dot
	domains         map[string]bool // match their subdomains; spelled like names
	prefixes        bart.Lite
	count           int // of prefixes
	Sources         []*RangeSource
}

// MatchAddress returns which entry of the set matches an address. inner is the IPv4
// address that ip embeds, or else ip. Allowing a range of IPv6 addresses such as
// 2000::/3 does not allow private IPv4 addresses embedded in them: a rule must allow
// those themselves.
func (s *RuleSet) MatchAddress(ctx context.Context, ip, inner netip.Addr) (string, bool) {
	entry, matches := s.matchRange(ctx, inner)
	if !matches && ip != inner && (s.deny || PublicScope.includes(inner, inner)) {
		entry, matches = s.matchRange(ctx, ip)
	}
	if matches || !s.public && !s.private {
		return entry, matches
	}
	isPublic := PublicScope.includes(ip, inner)
	switch {
	case s.public && isPublic:
		return "public", true
	case s.private && !isPublic && (s.deny || LocalScope.includes(ip, inner)):
		return "private", true
	}
	return "", false
}

// matchRange returns which range of the set contains an address. A metadata service is
// only allowed by an entry for its exact address, not by a range around it.
func (s *RuleSet) matchRange(ctx context.Context, addr netip.Addr) (string, bool) {
	if !s.deny && isMetadata(addr) {
		return "", s.count > 0 && s.prefixes.Get(netip.PrefixFrom(addr, addr.BitLen()))
	}
	if s.count > 0 && s.prefixes.Contains(addr) {
		if !s.deny {
			return "", true
		}
		return s.rangeOf(addr), true
	}
	for _, source := range s.Sources {
		if source.contains(ctx, addr) {
			return source.Name, true
		}
	}
	return "", false
}

// rangeOf returns the smallest range of the set that contains an address, which is not a range
// of a source; "": none does.
func (s *RuleSet) rangeOf(addr netip.Addr) string {
	if prefix, ok := s.prefixes.LookupPrefixLPM(netip.PrefixFrom(addr, addr.BitLen())); ok {
		return prefix.String()
	}
	return ""
}

// MatchName returns which entry of the set matches a target's name. The entry all also
// matches addresses.
func (s *RuleSet) MatchName(t hostport.Target) (string, bool) {
	if s.all {
		return "all", true
	}
	if t.Name == "" {
		return "", false
	}
	if s.names[t.Name] {
		return t.Name, true
	}
	if len(s.domains) > 0 {
		for rest, found := t.Name, true; ; {
			if _, rest, found = strings.Cut(rest, "."); !found {
				break
			}
			if s.domains[rest] {
				return "*." + rest, true
			}
		}
	}
	return "", false
}

// aboutAddresses reports whether the set has entries for addresses.
func (s *RuleSet) aboutAddresses() bool {
	return s.count > 0 || len(s.Sources) > 0 || s.private || s.public
}

// denied returns the error for a target that matches an entry of a deny set.
func (s *RuleSet) denied(entry string) *DeniedError {
	return &DeniedError{Rule: s.rule(entry), Hint: "put an allow rule before it"}
}

// rule returns the rule that an entry of the set is.
func (s *RuleSet) rule(entry string) string {
	if s.ports.High > 0 {
		entry += ":" + s.ports.String()
	}
	return s.action() + " " + entry
}

// NewDirectSet returns a set of the destinations in texts, which must not have ports.
func NewDirectSet(texts []string) (*RuleSet, error) {
	s := NewRuleSet(false, PortRange{})
	for _, text := range texts {
		for _, text := range ExpandRanges(text) {
			d, err := ParseDestination(text)
			if err == nil && d.Ports.High > 0 {
				err = fmt.Errorf("%q has a port; expected none", text)
			}
			if err != nil {
				return nil, err
			}
			s.Add(d)
		}
	}
	return s, nil
}

// NewRuleSet returns an empty set for the given ports; a zero range means all.
func NewRuleSet(deny bool, ports PortRange) *RuleSet {
	return &RuleSet{deny: deny, ports: ports, names: make(map[string]bool), domains: make(map[string]bool)}
}

// Add adds a destination. The set ignores its ports.
func (s *RuleSet) Add(d Destination) {
	switch {
	case d.Prefix.IsValid():
		s.prefixes.Insert(d.Prefix)
		s.count++
	case d.is("all"):
		s.all = true
	case d.is("public"):
		s.public = true
	case d.is("private"):
		s.private = true
	case d.Subdomains:
		s.domains[d.Text] = true
	default:
		s.names[d.Text] = true
	}
}

func (s *RuleSet) action() string {
	if s.deny {
		return "deny"
	}
	return "allow"
}

// RangeSource is a list of CIDR ranges that may change while the config runs.
type RangeSource struct {
	Name  string                               // the module's ID
	List  func(context.Context) []netip.Prefix // the ranges for the request of a context
	built atomic.Pointer[builtRanges]
}

// builtRanges is a list and the lookup table built from it.
type builtRanges struct {
	list  []netip.Prefix
	table bart.Lite
}

func (s *RangeSource) contains(ctx context.Context, addr netip.Addr) bool {
	list := s.List(ctx)
	if len(list) == 0 {
		return false
	}
	b := s.built.Load()
	if b == nil || len(b.list) != len(list) || &b.list[0] != &list[0] {
		b = &builtRanges{list: list}
		for _, prefix := range list {
			b.table.Insert(prefix.Masked())
		}
		s.built.Store(b)
	}
	return b.table.Contains(addr)
}
