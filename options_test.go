// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// optionsSyntax returns the directive's syntax as docs/reference.md and the comment of
// UnmarshalCaddyfile show it.
func optionsSyntax() string {
	var b strings.Builder
	b.WriteString("async_proxy [<matcher>] [burst <tokens>] [refill <tokens_per_second>] {\n")
	for _, o := range options {
		first, block, _ := strings.Cut(o.syntax, "\n")
		b.WriteString(strings.TrimRight(fmt.Sprintf("\t%-23s %s", o.name, first), " ") + "\n")
		for line := range strings.Lines(block) {
			b.WriteString("\t" + strings.TrimSuffix(line, "\n") + "\n")
		}
	}
	return b.String() + "}\n"
}

// defaultOf returns the default of an option as documentation names it.
func defaultOf(o option) string {
	var byDefault Handler
	byDefault.setDefaults()
	switch {
	case o.absent != "":
		return o.absent
	case o.name == "zone" || o.name == "limit_by" || o.name == "forwarded_for" || o.name == "failed_logins":
		return "`" + o.show(&byDefault) + "`"
	}
	return o.show(&byDefault)
}

// optionsTable returns the table of options in docs/reference.md.
func optionsTable() string {
	var b strings.Builder
	b.WriteString("| option | meaning | default |\n|---|---|---|\n")
	for i := 0; i < len(options); {
		same := i + 1
		for same < len(options) && options[same].doc == options[i].doc {
			same++
		}
		var names, defaults []string
		for _, o := range options[i:same] {
			names = append(names, "`"+o.name+"`")
			defaults = append(defaults, defaultOf(o))
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", strings.Join(names, ", "), options[i].doc, strings.Join(slices.Compact(defaults), ", "))
		i = same
	}
	return b.String()
}

// The reference and the comment of UnmarshalCaddyfile show the options as the table of options
// describes them. To update both, run `go test -run TestOptionsInDocs . -update`.
func TestOptionsInDocs(t *testing.T) {
	comment := "//	" + strings.ReplaceAll(strings.TrimSuffix(optionsSyntax(), "\n"), "\n", "\n//	") + "\n"
	for _, part := range []struct{ file, from, to, want string }{
		{"docs/reference.md", "```text\nasync_proxy [", "```\n", optionsSyntax()},
		{"docs/reference.md", "| option | meaning |", "\n", optionsTable()},
		{"caddyfile.go", "//	async_proxy [", "//\n", comment},
	} {
		data, err := os.ReadFile(part.file)
		if err != nil {
			t.Fatal(err)
		}
		text := string(data)
		start := strings.Index(text, part.from)
		if start < 0 {
			t.Errorf("%s does not contain %q", part.file, part.from)
			continue
		}
		if strings.HasPrefix(part.from, "```") {
			start += len("```text\n")
		}
		length := strings.Index(text[start:], "\n"+part.to) + 1
		if got := text[start : start+length]; got == part.want {
			continue
		} else if !*update {
			t.Errorf("%s has\n%swant\n%s", part.file, got, part.want)
		} else if err := os.WriteFile(part.file, []byte(text[:start]+part.want+text[start+length:]), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPolicyOptionsInDocs checks that docs/reference.md lists the options that a policy may set.
func TestPolicyOptionsInDocs(t *testing.T) {
	text, err := os.ReadFile("docs/reference.md")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, o := range options {
		if o.inPolicy {
			names = append(names, "`"+o.name+"`")
		}
	}
	last := len(names) - 1
	want := "A policy may set " + strings.Join(names[:last], ", ") + " and " + names[last] + "."
	if !strings.Contains(strings.Join(strings.Fields(string(text)), " "), want) {
		t.Errorf("docs/reference.md does not say: %s", want)
	}
}

// Each option but policy, which has a parser of its own, has a value that can be parsed, documentation and, if it can be invalid in JSON, a
// check.
func TestOptionsAreComplete(t *testing.T) {
	names := make(map[string]bool)
	for _, o := range options {
		if names[o.name] {
			t.Errorf("%s is listed twice", o.name)
		}
		names[o.name] = true
		if o.doc == "" || o.expected == "" || o.name != "policy" && (o.set == nil) == (o.parse == nil) {
			t.Errorf("%s is incomplete", o.name)
		}
		var byDefault Handler
		byDefault.setDefaults()
		if err := o.check(&byDefault); err != nil {
			t.Errorf("the default: %v", err)
		}
	}
}
