// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// ClosedConditions returns the conditions for destinations that are closed by default, as
// far as a browser can tell. It omits classes of which a rule allows a part.
func ClosedConditions(sets []*RuleSet) (list []string) {
	allowed := func(condition func(*RuleSet) bool) bool {
		return slices.ContainsFunc(sets, func(s *RuleSet) bool { return !s.deny && condition(s) })
	}
	for _, class := range slices.Concat(slices.Collect(notPublic.AllSorted4()), closedIPv6) {
		if !allowed(func(s *RuleSet) bool {
			return len(s.Sources) > 0 || s.prefixes.OverlapsPrefix(class) || s.private && !neverReachable.LookupPrefix(class)
		}) {
			list = append(list, prefixCondition(class))
		}
	}
	named := func(condition func(name string) bool) bool {
		return allowed(func(s *RuleSet) bool {
			for name := range s.names {
				if condition(name) {
					return true
				}
			}
			for name := range s.domains {
				if condition("*." + name) {
					return true
				}
			}
			return false
		})
	}
	for _, class := range [...]struct {
		condition string
		contains  func(name string) bool
	}{
		{`is("localhost")`, func(name string) bool { return name == "localhost" }},
		{`!ip4 && !ip6 && !is("localhost") && host.indexOf(".") < 0`, func(name string) bool { return name != "localhost" && !strings.Contains(name, ".") }},
		{`below("localhost")`, func(name string) bool { return strings.HasSuffix(name, ".localhost") }},
		{`below("local")`, func(name string) bool { return strings.HasSuffix(name, ".local") }},
	} {
		if !named(class.contains) {
			list = append(list, class.condition)
		}
	}
	return list
}

// closedIPv6 lists the IPv6 ranges that are commonly regarded as private.
var closedIPv6 = []netip.Prefix{
	netip.MustParsePrefix("::/128"), netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("2001:db8::/32"),
	netip.MustParsePrefix("fc00::/7"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("fec0::/10"), netip.MustParsePrefix("ff00::/8"),
}

// QuoteJS returns a string as a JavaScript literal.
func QuoteJS(s string) string {
	b, _ := json.Marshal(s) // never fails
	return string(b)
}

// Conditions returns the script's conditions for the destinations in the set, which must
// not have ports.
func (s *RuleSet) Conditions() (list []string) {
	for name := range s.names {
		list = append(list, "is("+QuoteJS(name)+")")
	}
	for name := range s.domains {
		list = append(list, "below("+QuoteJS(name)+")")
	}
	for prefix := range s.prefixes.All() {
		list = append(list, prefixCondition(prefix))
	}
	slices.Sort(list)
	return list
}

// prefixCondition returns the script's condition for an address in a range.
func prefixCondition(prefix netip.Prefix) string {
	if prefix.Addr().Is6() {
		return fmt.Sprintf("within6(%q, %d)", prefix.Addr(), prefix.Bits())
	}
	mask := uint32(0xffffffff) << (32 - prefix.Bits())
	return fmt.Sprintf("within(%q, \"%d.%d.%d.%d\")", prefix.Addr(), byte(mask>>24), byte(mask>>16), byte(mask>>8), byte(mask))
}

// NewPACDirect parses the destinations that browsers reach directly.
func NewPACDirect(texts []string) (*RuleSet, error) {
	s, err := NewDirectSet(texts)
	if err == nil && (s.all || s.public || s.private) {
		err = errors.New("all, public and private are not allowed")
	}
	return s, err
}
