// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// RuleCheck finds rules that do not do what the operator expects: destinations that can
// never match, and allow rules that have no effect.
type RuleCheck struct {
	Open       []PortRange // the ports that clients may connect to
	SkipFiles  bool        // ignore files that this process has no permission to read
	incomplete bool        // such a file was ignored, so not all rules are known
	noted      []listedDestination
	Never      []neverMatch
	neverAt    map[neverKey]int // indexes in Never
	Inexact    []string         // ranges in files that have bits set beyond their length
}

// listedDestination is a destination of a rule.
type listedDestination struct {
	rule int    // the rule's index
	text string // as in the config
	dest Destination
	file bool     // it is from a file
	dead bool     // it can never match
	set  *RuleSet // the set that contains it
}

// neverMatch lists destinations of a rule that can never match, all for the same reason.
type neverMatch struct {
	Rule  int
	Texts []string // the first MaxRuleTexts of them
	Count int
	Why   string
}

// neverKey is what the destinations of a neverMatch have in common.
type neverKey struct {
	rule int
	why  string
}

// MaxRuleTexts is the maximum number of destinations of a rule that a log line lists.
const MaxRuleTexts = 5

// note checks a destination against the sets of the earlier rules, and records it.
func (c *RuleCheck) note(sets []*RuleSet, l listedDestination, deny bool) {
	ports := c.openOf(l.dest.Ports)
	by, byDeny := covering(sets, l.dest, ports)
	switch {
	case len(ports) == 0:
		l.dead = true
		c.addNeverMatch(l.rule, l.text, fmt.Sprintf("port %s is closed", l.dest.Ports))
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
func (c *RuleCheck) unreadable(err error) bool {
	skip := c.SkipFiles && errors.Is(err, fs.ErrPermission)
	c.incomplete = c.incomplete || skip
	return skip
}

func (c *RuleCheck) addNeverMatch(rule int, text, why string) {
	// A file may repeat many entries of an earlier rule, each of which is a reason of its own.
	i, ok := c.neverAt[neverKey{rule, why}]
	if !ok {
		if c.neverAt == nil {
			c.neverAt = make(map[neverKey]int)
		}
		i = len(c.Never)
		c.neverAt[neverKey{rule, why}] = i
		c.Never = append(c.Never, neverMatch{Rule: rule, Why: why})
	}
	n := &c.Never[i]
	if slices.Contains(n.Texts, text) {
		return // private_ranges expands to several destinations with the same text
	}
	if n.Count++; len(n.Texts) < MaxRuleTexts {
		n.Texts = append(n.Texts, text)
	}
}

// openOf returns the part of ports that clients may connect to.
func (c *RuleCheck) openOf(ports PortRange) (open []PortRange) {
	for _, p := range c.Open {
		if both := (PortRange{max(p.Low, ports.Low), min(p.High, ports.High)}); ports.High == 0 {
			open = append(open, p)
		} else if both.Low <= both.High {
			open = append(open, both)
		}
	}
	return open
}

// covering returns an entry of the sets that already decides everything that d matches,
// and whether it denies. d comes after the sets.
func covering(sets []*RuleSet, d Destination, ports []PortRange) (by string, deny bool) {
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
			return s.rule(entry), s.deny
		}
		// deny all does not decide for a name that an earlier rule allows: its
		// addresses are still checked against later rules.
		namesAllowed = namesAllowed || !s.deny && s.aboutNames()
	}
	return "", false
}

func (d Destination) isName() bool {
	return !d.Prefix.IsValid() && !d.is("public") && !d.is("private")
}

// aboutNames reports whether the set has entries for names.
func (s *RuleSet) aboutNames() bool { return s.all || len(s.names) > 0 || len(s.domains) > 0 }

func (s *RuleSet) coversPorts(ports []PortRange) bool {
	return !slices.ContainsFunc(ports, func(p PortRange) bool {
		return s.ports.High > 0 && (p.Low < s.ports.Low || p.High > s.ports.High)
	})
}

// coversName returns the entry of the set that matches everything that d matches. d is a
// name, all names below one, or all.
func (s *RuleSet) coversName(d Destination) (string, bool) {
	switch {
	case s.all:
		return "all", true
	case d.is("all"):
		return "", false
	case d.Subdomains:
		return s.MatchName(hostport.Target{Name: "*." + d.Text}) // the * stands for any label
	}
	return s.MatchName(hostport.Target{Name: d.Text})
}

// coversAddresses returns the entry of the set that matches everything that d matches. d
// is a range of addresses, public or private.
func (s *RuleSet) coversAddresses(d Destination) (string, bool) {
	if !d.Prefix.IsValid() {
		return d.Text, d.is("public") && s.public || d.is("private") && s.private && s.deny
	}
	if within, ok := s.prefixes.LookupPrefixLPM(d.Prefix); ok {
		return within.String(), true
	}
	if s.public && !notPublic.OverlapsPrefix(d.Prefix) && !sixToFour.Overlaps(d.Prefix) {
		return "public", true
	}
	private := s.private && notPublic.LookupPrefix(d.Prefix) && (s.deny || !neverReachable.OverlapsPrefix(d.Prefix))
	return "private", private
}

// opens reports whether allowing d may allow what is denied by default.
func (d Destination) opens() bool {
	return d.is("private") || d.Prefix.IsValid() && notPublic.OverlapsPrefix(d.Prefix)
}

// overrides reports whether allowing the destination allows something that one of the
// later sets would deny. For destinations from files, which may be long, any later deny
// set counts.
func (l listedDestination) overrides(later []*RuleSet) bool {
	if l.file {
		return slices.ContainsFunc(later, func(s *RuleSet) bool { return s.deny })
	}
	return l.dest.overrides(later)
}

func (d Destination) overrides(later []*RuleSet) bool {
	return slices.ContainsFunc(later, func(s *RuleSet) bool {
		if !s.deny || s.ports.High > 0 && d.Ports.High > 0 && (s.ports.Low > d.Ports.High || d.Ports.Low > s.ports.High) {
			return false
		}
		switch {
		case s.all, d.is("all") && s.aboutNames():
			return true
		case d.isName():
			// Allowing a name does not allow its addresses, so only names matter.
			return d.overlapsNames(s)
		case s.aboutNames(), len(s.Sources) > 0:
			return true // a name may resolve to any address
		}
		return d.overlapsAddresses(s)
	})
}

func (d Destination) overlapsNames(s *RuleSet) bool {
	if _, matches := s.coversName(d); matches || !d.Subdomains {
		return matches
	}
	below := func(names map[string]bool) bool {
		for name := range names {
			if strings.HasSuffix(name, "."+d.Text) {
				return true
			}
		}
		return false
	}
	return below(s.names) || below(s.domains)
}

func (d Destination) overlapsAddresses(s *RuleSet) bool {
	if d.Prefix.IsValid() {
		return s.prefixes.OverlapsPrefix(d.Prefix) || s.private && notPublic.OverlapsPrefix(d.Prefix) || s.public && !notPublic.LookupPrefix(d.Prefix)
	}
	hasRanges := func(inside bool) bool {
		for p := range s.prefixes.All() {
			if notPublic.LookupPrefix(p) == inside {
				return true
			}
		}
		return false
	}
	if d.is("private") {
		return s.private || hasRanges(true)
	}
	return s.public || hasRanges(false)
}

// Useless is an allow rule with destinations that have no effect.
type Useless struct {
	Rule  int
	Texts []string
	All   bool // the whole rule certainly has no effect
}

// Useless returns the allow rules that have destinations without effect. It must be
// called when all sets are complete.
func (c *RuleCheck) Useless(rules []Rule, sets []*RuleSet) (found []Useless) {
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
			effective[l.rule] = effective[l.rule] || l.file || l.dest.Prefix.IsValid()
			if list := texts[l.rule]; !slices.Contains(list, l.text) && len(list) < MaxRuleTexts {
				texts[l.rule] = append(list, l.text)
			}
		}
	}
	for i := range rules {
		if len(texts[i]) > 0 && !c.incomplete {
			found = append(found, Useless{i, texts[i], !effective[i] && rules[i].Source == nil})
		}
	}
	return found
}

// Text describes the problem and its remedy.
func (u Useless) Text() string {
	has, they, it := "has", "it allows", "it"
	if len(u.Texts) > 1 {
		has, they, it = "have", "they allow", "them"
	}
	cure := "for an allow-list, add `deny all` after " + it + "; otherwise remove " + it
	if slices.Equal(u.Texts, []string{"all"}) || slices.Equal(u.Texts, []string{"public"}) {
		cure = "remove it; to open private addresses, write `allow private`"
	}
	return fmt.Sprintf("%s %s no effect, because no later rule denies what %s; %s", strings.Join(u.Texts, " "), has, they, cure)
}
