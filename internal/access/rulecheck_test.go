// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// repeatedNames returns rules of which the second denies the first n names again that the
// first allows. Both have them in a file.
func repeatedNames(tb testing.TB, n int) []Rule {
	tb.Helper()
	var list strings.Builder
	for i := range n {
		fmt.Fprintf(&list, "h%06d.example.com\n", i)
	}
	file := filepath.Join(tb.TempDir(), "list")
	if err := os.WriteFile(file, []byte(list.String()), 0o600); err != nil {
		tb.Fatal(err)
	}
	return []Rule{{Action: "allow", Files: []string{file}}, {Action: "deny", Files: []string{file}}}
}

// Names that can never match are grouped by rule and reason.
func TestNeverMatchGroups(t *testing.T) {
	check := &RuleCheck{Open: []PortRange{{1, 65535}}}
	rules := append([]Rule{{Action: "allow", Destinations: []string{"*.example.com"}}}, repeatedNames(t, 7)...)
	rules[1].Action = "deny"
	rules = append(rules, Rule{Action: "deny", Destinations: []string{"a.example.com", "a.example.com", "b.example.com"}})
	if _, err := NewRuleSets(rules, check); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range check.Never {
		got = append(got, fmt.Sprintf("%d: %d of %d: %s", n.Rule, len(n.Texts), n.Count, n.Why))
	}
	want := "1: 5 of 7: allow *.example.com before it decides first|2: 5 of 7: allow *.example.com before it decides first|3: 2 of 2: allow *.example.com before it decides first"
	if strings.Join(got, "|") != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// The time for each name must not depend on how many there are.
func BenchmarkNeverMatch(b *testing.B) {
	for _, n := range []int{1000, 10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			rules := repeatedNames(b, n)
			for b.Loop() {
				check := &RuleCheck{Open: []PortRange{{1, 65535}}}
				if _, err := NewRuleSets(rules, check); err != nil {
					b.Fatal(err)
				}
				if len(check.Never) != n {
					b.Fatalf("%d names are noted, want %d", len(check.Never), n)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/name")
		})
	}
}
