// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package selection

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
)

func conditions(users, clients, match string) Conditions {
	c := Conditions{Users: strings.Fields(users), Match: match}
	for _, text := range strings.Fields(clients) {
		c.Clients = append(c.Clients, netip.MustParsePrefix(text))
	}
	return c
}

func TestFirst(t *testing.T) {
	s := New([]Conditions{
		conditions("alice ci-1", "", ""),
		conditions("ci-*", "10.0.0.0/8 2001:db8::/32", ""),
		conditions("*-bot *x*", "", ""),
		conditions("", "10.1.0.0/16", "post"),
		conditions("", "10.0.0.0/8", ""),
		conditions("*", "", "post"),
		conditions("", "192.0.2.0/24 10.1.2.0/24", ""),
		conditions("", "", "post"),
	})
	for _, test := range []struct {
		user, addr string
		post       bool
		want       int
	}{
		{"alice", "192.0.2.1", false, 0},
		{"ci-1", "10.0.0.1", false, 0},
		{"ci-2", "10.0.0.1", false, 1},
		{"ci-2", "2001:db8::1", false, 1},
		{"ci-2", "192.0.2.1", false, 6},
		{"ci-2", "", false, -1},
		{"ci-", "10.0.0.1", false, 1},
		{"ci", "10.0.0.1", false, 4},
		{"a-bot", "10.0.0.1", false, 2},
		{"-bot", "10.0.0.1", false, 2},
		{"bot", "10.0.0.1", false, 4},
		{"axb", "", false, 2},
		{"x", "", false, 2},
		{"bob", "10.1.2.3", true, 3},
		{"bob", "10.1.2.3", false, 4},
		{"bob", "10.2.0.0", true, 4},
		{"bob", "", true, 5},
		{"bob", "", false, -1},
		{"", "", true, 7},
		{"", "192.0.2.1", true, 6},
		{"", "198.51.100.1", false, -1},
		{"Alice", "198.51.100.1", false, -1}, // names are case-sensitive
	} {
		var addr netip.Addr
		if test.addr != "" {
			addr = netip.MustParseAddr(test.addr)
		}
		if got := s.First(test.user, addr, func(int) bool { return test.post }); got != test.want {
			t.Errorf("%q from %q, post %v: %d, want %d", test.user, test.addr, test.post, got, test.want)
		}
	}
}

// TestFirstAgainstLoop compares the lookup with a loop over all policies.
func TestFirstAgainstLoop(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	pick := func(words ...string) string { return words[r.IntN(len(words))] }
	for range 2000 {
		var all []Conditions
		for range 1 + r.IntN(8) {
			all = append(all, conditions(
				pick("", "", "a", "ab b", "a*", "*b", "*a*", "*", "ab* c"),
				pick("", "", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.1/32 192.0.2.0/24", "0.0.0.0/0", "::/0"),
				pick("", "", "post")))
		}
		s := New(all)
		user, addr, post := pick("", "a", "ab", "ba", "b", "abc", "c"), netip.MustParseAddr(pick("10.0.0.1", "10.1.0.1", "10.1.1.1", "192.0.2.1", "::1")), r.IntN(2)
		match := func(int) bool { return post == 1 }
		want := -1
		for i := range all {
			if meets(&all[i], user, addr) && (all[i].Match == "" || match(i)) {
				want = i
				break
			}
		}
		if got := s.First(user, addr, match); got != want {
			t.Fatalf("%+v\n%q from %v: %d, want %d", all, user, addr, got, want)
		}
		if by := Shadowing(all, len(all)-1); by >= 0 && want == len(all)-1 {
			t.Fatalf("%+v\n%d is said to shadow %d, which %q from %v meets", all, by, want, user, addr)
		}
	}
}

// meets reports whether a client meets conditions, but for Match.
func meets(c *Conditions, user string, addr netip.Addr) bool {
	users, clients := len(c.Users) == 0, len(c.Clients) == 0
	for _, pattern := range c.Users {
		text := strings.Trim(pattern, "*")
		before, after := strings.HasPrefix(pattern, "*"), strings.HasSuffix(pattern, "*")
		switch {
		case user == "":
		case before && after:
			users = users || strings.Contains(user, text)
		case after:
			users = users || strings.HasPrefix(user, text)
		case before:
			users = users || strings.HasSuffix(user, text)
		default:
			users = users || user == text
		}
	}
	for _, prefix := range c.Clients {
		clients = clients || prefix.Contains(addr)
	}
	return users && clients
}

func TestShadowing(t *testing.T) {
	for _, test := range []struct {
		wider, narrower Conditions
		want            bool
	}{
		{conditions("", "", ""), conditions("a", "10.0.0.0/8", "x"), true},
		{conditions("a b", "", ""), conditions("a", "", ""), true},
		{conditions("a", "", ""), conditions("a b", "", ""), false},
		{conditions("a*", "", ""), conditions("ab abc*", "", ""), true},
		{conditions("a*", "", ""), conditions("*a", "", ""), false},
		{conditions("*a", "", ""), conditions("ba *ba", "", ""), true},
		{conditions("*a*", "", ""), conditions("*bab* cab a*", "", ""), true},
		{conditions("*", "", ""), conditions("a *b*", "", ""), true},
		{conditions("*", "", ""), conditions("", "", ""), false}, // the second also holds without a user
		{conditions("", "10.0.0.0/8", ""), conditions("", "10.1.0.0/16", ""), true},
		{conditions("", "10.0.0.0/8", ""), conditions("", "10.1.0.0/16 192.0.2.0/24", ""), false},
		{conditions("", "10.0.0.0/8", ""), conditions("a", "", ""), false},
		{conditions("", "10.0.0.0/8", "x"), conditions("", "10.1.0.0/16", "x"), true},
		{conditions("", "10.0.0.0/8", "x"), conditions("", "10.1.0.0/16", ""), false},
		{conditions("", "10.0.0.0/8", ""), conditions("", "10.1.0.0/16", "x"), true},
	} {
		if got := Shadowing([]Conditions{test.wider, test.narrower}, 1) == 0; got != test.want {
			t.Errorf("%+v shadows %+v: %v", test.wider, test.narrower, got)
		}
	}
}

func TestValidPattern(t *testing.T) {
	for pattern, want := range map[string]bool{"": false, "a": true, "*": true, "a*": true, "*a": true, "*a*": true, "**": true, "a*b": false, "***": false} {
		if ValidPattern(pattern) != want {
			t.Errorf("%q: %v", pattern, !want)
		}
	}
}

// thousand returns a set of a thousand policies, each for a user pattern, and a client of the last.
func thousand() (*Set, string, netip.Addr) {
	var all []Conditions
	for i := range 1000 {
		all = append(all, conditions(fmt.Sprintf("team%d-* lead%d", i, i), "10.0.0.0/8", ""))
	}
	return New(all), "team999-alice", netip.MustParseAddr("10.1.2.3")
}

func TestFirstAllocatesNothing(t *testing.T) {
	s, user, addr := thousand()
	if n := testing.AllocsPerRun(100, func() {
		if s.First(user, addr, func(int) bool { return false }) != 999 {
			t.Fatal("another policy")
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkFirst(b *testing.B) {
	s, user, addr := thousand()
	for b.Loop() {
		s.First(user, addr, func(int) bool { return false })
	}
}
