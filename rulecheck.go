// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// ruleCheck finds rules that do not do what the operator expects: destinations that can
// never match, and allow rules that have no effect.
type ruleCheck struct {
	open       []portRange // the ports that clients may connect to
	skipFiles  bool        // ignore files that this process has no permission to read
	incomplete bool        // such a file was ignored, so not all rules are known
	noted      []listedDestination
	never      []neverMatch
	inexact    []string // ranges in files that have bits set beyond their length
}

// listedDestination is a destination of a rule.
type listedDestination struct {
	rule int    // the rule's index
	text string // as in the config
	dest destination
	file bool     // it is from a file
	dead bool     // it can never match
	set  *ruleSet // the set that contains it
}

// neverMatch lists destinations of a rule that can never match, all for the same reason.
type neverMatch struct {
	rule  int
	texts []string // the first maxRuleTexts of them
	count int
	why   string
}

// maxRuleTexts is the maximum number of destinations of a rule that a log line lists.
const maxRuleTexts = 5

// openPorts returns the ports that clients may connect to.
func (p *policy) openPorts() []portRange {
	if p.ports == nil {
		return append([]portRange{{1, portSMTP - 1}, {portSMTP + 1, 65535}}, p.connect...)
	}
	return slices.Concat(p.ports, p.connect)
}

// note checks a destination against the sets of the earlier rules, and records it.
func (c *ruleCheck) note(sets []*ruleSet, l listedDestination, deny bool) {
	ports := c.reachable(l.dest.ports)
	by, byDeny := covering(sets, l.dest, ports)
	switch {
	case len(ports) == 0:
		l.dead = true
		c.addNeverMatch(l.rule, l.text, fmt.Sprintf("port %s is closed", l.dest.ports))
	case by != "":
		l.dead = true
		if !l.file || byDeny != deny { // redundant entries of a third-party list are harmless
			c.addNeverMatch(l.rule, l.text, by+" before it decides first")
		}
	}
	c.noted = append(c.noted, l)
}

// unreadable reports whether err says that this process has no permission to read a file,
// and the check ignores such files.
func (c *ruleCheck) unreadable(err error) bool {
	skip := c.skipFiles && errors.Is(err, fs.ErrPermission)
	c.incomplete = c.incomplete || skip
	return skip
}

func (c *ruleCheck) addNeverMatch(rule int, text, why string) {
	i := slices.IndexFunc(c.never, func(n neverMatch) bool { return n.rule == rule && n.why == why })
	if i < 0 {
		i = len(c.never)
		c.never = append(c.never, neverMatch{rule: rule, why: why})
	}
	n := &c.never[i]
	if slices.Contains(n.texts, text) {
		return // private_ranges expands to several destinations with the same text
	}
	if n.count++; len(n.texts) < maxRuleTexts {
		n.texts = append(n.texts, text)
	}
}

// reachable returns the part of ports that clients may connect to.
func (c *ruleCheck) reachable(ports portRange) (open []portRange) {
	for _, p := range c.open {
		if both := (portRange{max(p.low, ports.low), min(p.high, ports.high)}); ports.high == 0 {
			open = append(open, p)
		} else if both.low <= both.high {
			open = append(open, both)
		}
	}
	return open
}

// covering returns an entry of the sets that already decides everything that d matches,
// and whether it denies. d comes after the sets.
func covering(sets []*ruleSet, d destination, ports []portRange) (by string, deny bool) {
	namesAllowed := false
	for _, s := range sets {
		entry, matches := "", false
		if s.coversPorts(ports) {
			if d.isName() {
				entry, matches = s.coversName(d)
			} else if s.deny && s.all && !namesAllowed {
				entry, matches = "all", true
			} else {
				entry, matches = s.coversAddresses(d)
			}
		}
		if matches {
			if s.ports.high > 0 {
				entry += ":" + s.ports.String()
			}
			return s.action() + " " + entry, s.deny
		}
		// deny all does not decide for a name that an earlier rule allows: its
		// addresses are still checked against later rules.
		namesAllowed = namesAllowed || !s.deny && s.aboutNames()
	}
	return "", false
}

func (d destination) isName() bool {
	return !d.prefix.IsValid() && d.text != "public" && d.text != "private"
}

func (s *ruleSet) action() string {
	if s.deny {
		return "deny"
	}
	return "allow"
}

// aboutNames reports whether the set has entries for names.
func (s *ruleSet) aboutNames() bool { return s.all || len(s.names) > 0 || len(s.domains) > 0 }

func (s *ruleSet) coversPorts(ports []portRange) bool {
	return !slices.ContainsFunc(ports, func(p portRange) bool {
		return s.ports.high > 0 && (p.low < s.ports.low || p.high > s.ports.high)
	})
}

// coversName returns the entry of the set that matches everything that d matches. d is a
// name, all names below one, or all.
func (s *ruleSet) coversName(d destination) (string, bool) {
	switch {
	case s.all:
		return "all", true
	case d.text == "all":
		return "", false
	case d.subdomains:
		return s.matchName(hostport.Target{Name: "*." + d.text}) // the * stands for any label
	}
	return s.matchName(hostport.Target{Name: d.text})
}

// coversAddresses returns the entry of the set that matches everything that d matches. d
// is a range of addresses, public or private.
func (s *ruleSet) coversAddresses(d destination) (string, bool) {
	if !d.prefix.IsValid() {
		return d.text, d.text == "public" && s.public || d.text == "private" && s.private && s.deny
	}
	if within, ok := s.prefixes.LookupPrefixLPM(d.prefix); ok {
		return within.String(), true
	}
	if s.public && !notPublic.OverlapsPrefix(d.prefix) && !sixToFour.Overlaps(d.prefix) {
		return "public", true
	}
	private := s.private && notPublic.LookupPrefix(d.prefix) && (s.deny || !neverReachable.OverlapsPrefix(d.prefix))
	return "private", private
}

// opens reports whether allowing d may allow what is denied by default.
func (d destination) opens() bool {
	return d.text == "private" || d.prefix.IsValid() && notPublic.OverlapsPrefix(d.prefix)
}

// overrides reports whether allowing the destination allows something that one of the
// later sets would deny. For destinations from files, which may be long, any later deny
// set counts.
func (l listedDestination) overrides(later []*ruleSet) bool {
	if l.file {
		return slices.ContainsFunc(later, func(s *ruleSet) bool { return s.deny })
	}
	return l.dest.overrides(later)
}

func (d destination) overrides(later []*ruleSet) bool {
	return slices.ContainsFunc(later, func(s *ruleSet) bool {
		if !s.deny || s.ports.high > 0 && d.ports.high > 0 && (s.ports.low > d.ports.high || d.ports.low > s.ports.high) {
			return false
		}
		switch {
		case s.all, d.text == "all" && s.aboutNames():
			return true
		case d.isName():
			// Allowing a name does not allow its addresses, so only names matter.
			return d.overlapsNames(s)
		case s.aboutNames(), len(s.sources) > 0:
			return true // a name may resolve to any address
		}
		return d.overlapsAddresses(s)
	})
}

func (d destination) overlapsNames(s *ruleSet) bool {
	if _, matches := s.coversName(d); matches || !d.subdomains {
		return matches
	}
	below := func(names map[string]bool) bool {
		for name := range names {
			if strings.HasSuffix(name, "."+d.text) {
				return true
			}
		}
		return false
	}
	return below(s.names) || below(s.domains)
}

func (d destination) overlapsAddresses(s *ruleSet) bool {
	if d.prefix.IsValid() {
		return s.prefixes.OverlapsPrefix(d.prefix) || s.private && notPublic.OverlapsPrefix(d.prefix) || s.public && !notPublic.LookupPrefix(d.prefix)
	}
	hasRanges := func(inside bool) bool {
		for p := range s.prefixes.All() {
			if notPublic.LookupPrefix(p) == inside {
				return true
			}
		}
		return false
	}
	if d.text == "private" {
		return s.private || hasRanges(true)
	}
	return s.public || hasRanges(false)
}

// useless is an allow rule with destinations that have no effect.
type useless struct {
	rule  int
	texts []string
	all   bool // the whole rule certainly has no effect
}

// useless returns the allow rules that have destinations without effect. It must be
// called when all sets are complete.
func (c *ruleCheck) useless(rules []policyRule, sets []*ruleSet) (found []useless) {
	effective := make(map[int]bool) // rules that have an effect, or may have one
	texts := make(map[int][]string)
	for _, l := range c.noted {
		switch {
		case l.set.deny || l.dead:
		case l.dest.opens() || l.overrides(sets[slices.Index(sets, l.set)+1:]):
			effective[l.rule] = true
		default:
			// A public address may be in one of this machine's networks, which are
			// denied by default.
			effective[l.rule] = effective[l.rule] || l.file || l.dest.prefix.IsValid()
			if list := texts[l.rule]; !slices.Contains(list, l.text) && len(list) < maxRuleTexts {
				texts[l.rule] = append(list, l.text)
			}
		}
	}
	for i := range rules {
		if len(texts[i]) > 0 && !c.incomplete {
			found = append(found, useless{i, texts[i], !effective[i] && rules[i].source == nil})
		}
	}
	return found
}

// text describes the problem and its remedy.
func (u useless) text() string {
	cure := "for an allow-list, add `deny all` after it; otherwise remove it"
	if slices.Equal(u.texts, []string{"all"}) || slices.Equal(u.texts, []string{"public"}) {
		cure = "remove it; to open private addresses, write `allow private`"
	}
	has := "has"
	if len(u.texts) > 1 {
		has = "have"
	}
	return fmt.Sprintf("%s %s no effect, because no later rule denies what it allows; %s", strings.Join(u.texts, " "), has, cure)
}
