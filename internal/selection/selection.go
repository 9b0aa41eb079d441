// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package selection finds the first of many policies whose conditions a client meets. It offers
// a Set that looks users and addresses up, so that a thousand policies cost little more than one,
// and reports policies that can never be found. It knows neither what a policy allows nor how a
// client is identified.
package selection

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/gaissmai/bart"
)

// Conditions are the conditions of a policy. All that are given must hold.
type Conditions struct {
	Users   []string       // patterns, one of which the user's name must match; none: any client, also without a user
	Clients []netip.Prefix // one of which must contain the client's address; none: any
	Match   string         // identifies a further condition, which the caller evaluates; "": none
}

// IsEmpty reports whether every client meets the conditions.
func (c *Conditions) IsEmpty() bool {
	return len(c.Users) == 0 && len(c.Clients) == 0 && c.Match == ""
}

// Set is a list of policies. It is safe for concurrent use.
type Set struct {
	policies []compiled

	exact                map[string][]int // the policies that name a user
	prefixes, suffixes   patterns         // policies by the rest of a pattern that ends or begins with *
	parts                []part           // patterns that begin and end with *
	byClient             bart.Table[[]int]
	restOfUsers, anybody []int // policies with the pattern *; policies without users and clients
}

// compiled is a policy's conditions beyond those by which it is looked up.
type compiled struct {
	clients *bart.Lite // nil: any
	open    bool       // Match decides as well
}

// patterns are lists of policies by a part of a user's name, grouped by its length.
type patterns []struct {
	length   int
	policies map[string][]int
}

type part struct {
	text   string
	policy int
}

// New returns a set of the policies with these conditions, in their order. The patterns must be
// valid.
func New(all []Conditions) *Set {
	s := &Set{exact: make(map[string][]int)}
	var prefixes []netip.Prefix
	for i := range all {
		c := &all[i]
		each := compiled{open: c.Match != ""}
		if len(c.Clients) > 0 {
			each.clients = new(bart.Lite)
			for _, p := range c.Clients {
				each.clients.Insert(p)
			}
		}
		s.policies = append(s.policies, each)
		switch {
		case len(c.Users) > 0:
			for _, pattern := range c.Users {
				s.addPattern(pattern, i)
			}
		case len(c.Clients) > 0:
			prefixes = append(prefixes, c.Clients...)
		default:
			s.anybody = append(s.anybody, i)
		}
	}
	s.addClients(all, prefixes)
	return s
}

// addClients makes byClient: for each prefix, all policies without users that contain it.
func (s *Set) addClients(all []Conditions, prefixes []netip.Prefix) {
	for _, prefix := range prefixes {
		s.byClient.Insert(prefix, nil)
	}
	for i, c := range all {
		if len(c.Users) > 0 {
			continue
		}
		for _, prefix := range c.Clients {
			var within []netip.Prefix
			for p := range s.byClient.Subnets(prefix) {
				within = append(within, p)
			}
			for _, p := range within {
				s.byClient.Modify(p, func(list []int, _ bool) ([]int, bool) { return appendOnce(list, i), false })
			}
		}
	}
}

// appendOnce appends i to an ascending list that may end with it.
func appendOnce(list []int, i int) []int {
	if len(list) > 0 && list[len(list)-1] == i {
		return list
	}
	return append(list, i)
}

func (s *Set) addPattern(pattern string, i int) {
	rest, leading := strings.CutPrefix(pattern, "*")
	rest, trailing := strings.CutSuffix(rest, "*")
	switch {
	case rest == "":
		s.restOfUsers = appendOnce(s.restOfUsers, i)
	case leading && trailing:
		s.parts = append(s.parts, part{rest, i})
	case trailing:
		s.prefixes.add(rest, i)
	case leading:
		s.suffixes.add(rest, i)
	default:
		s.exact[rest] = appendOnce(s.exact[rest], i)
	}
}

func (p *patterns) add(text string, i int) {
	for _, group := range *p {
		if group.length == len(text) {
			group.policies[text] = appendOnce(group.policies[text], i)
			return
		}
	}
	*p = append(*p, struct {
		length   int
		policies map[string][]int
	}{len(text), map[string][]int{text: {i}}})
}

// ValidPattern reports whether a pattern of user names is valid: not empty, with * for any
// characters at its beginning, at its end, or at both.
func ValidPattern(pattern string) bool {
	inner := strings.TrimSuffix(strings.TrimPrefix(pattern, "*"), "*")
	return pattern != "" && !strings.Contains(inner, "*")
}

// First returns the index of the first policy whose conditions hold for a client, or -1 if there is
// none. user is "" for a client without a user, and addr is invalid for a client on a Unix socket.
// For a policy with a Match, First calls match, unless an earlier policy has been found already.
func (s *Set) First(user string, addr netip.Addr, match func(int) bool) int {
	found := len(s.policies)
	try := func(list []int) {
		for _, i := range list {
			if i >= found {
				return
			}
			p := &s.policies[i]
			if (p.clients == nil || addr.IsValid() && p.clients.Contains(addr)) && (!p.open || match(i)) {
				found = i
			}
		}
	}
	if user != "" {
		try(s.exact[user])
		for _, group := range s.prefixes {
			if len(user) >= group.length {
				try(group.policies[user[:group.length]])
			}
		}
		for _, group := range s.suffixes {
			if len(user) >= group.length {
				try(group.policies[user[len(user)-group.length:]])
			}
		}
		for i := range s.parts {
			if strings.Contains(user, s.parts[i].text) {
				try([]int{s.parts[i].policy})
			}
		}
		try(s.restOfUsers)
	}
	if addr.IsValid() {
		if list, ok := s.byClient.Lookup(addr); ok {
			try(list)
		}
	}
	try(s.anybody)
	if found == len(s.policies) {
		return -1
	}
	return found
}

// Shadowing returns the first policy before i whose conditions hold whenever those of i do, as
// far as that can be told, or -1.
func Shadowing(all []Conditions, i int) int {
	return slices.IndexFunc(all[:i], func(c Conditions) bool { return c.covers(&all[i]) })
}

// covers reports whether c holds whenever other does, as far as that can be told.
func (c *Conditions) covers(other *Conditions) bool {
	if c.Match != "" && c.Match != other.Match {
		return false
	}
	users := len(c.Users) == 0 || len(other.Users) > 0 && !slices.ContainsFunc(other.Users, func(pattern string) bool {
		return !slices.ContainsFunc(c.Users, func(wider string) bool { return coversPattern(wider, pattern) })
	})
	clients := len(c.Clients) == 0 || len(other.Clients) > 0 && !slices.ContainsFunc(other.Clients, func(p netip.Prefix) bool {
		return !slices.ContainsFunc(c.Clients, func(wider netip.Prefix) bool {
			return wider.Bits() <= p.Bits() && wider.Contains(p.Addr())
		})
	})
	return users && clients
}

// coversPattern reports whether all names that match a pattern match a wider one as well.
func coversPattern(wider, pattern string) bool {
	text, leading := strings.CutPrefix(wider, "*")
	text, trailing := strings.CutSuffix(text, "*")
	switch {
	case wider == "*":
		return true
	case !leading && !trailing:
		return wider == pattern
	case leading && trailing:
		return strings.Contains(pattern, text)
	case trailing:
		return strings.HasPrefix(pattern, text)
	}
	return strings.HasSuffix(pattern, text)
}
