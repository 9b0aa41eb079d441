// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// manualText returns a text of the table of options as a manual page has it: without links, and in
// bold what is code.
func manualText(text string) string {
	text = strings.ReplaceAll(text, `\`, `\e`)
	text = regexp.MustCompile(`\[([^]]*)\]\(([^)]*)\)`).ReplaceAllString(text, "$1")
	text = regexp.MustCompile("`([^`]*)`").ReplaceAllStringFunc(text, func(code string) string {
		return `\fB` + strings.ReplaceAll(strings.Trim(code, "`"), "-", `\-`) + `\fR`
	})
	return text
}

// manualCode returns a line of a Caddyfile as a manual page has it.
func manualCode(line string) string {
	return strings.ReplaceAll(strings.ReplaceAll(line, `\`, `\e`), "-", `\-`)
}

// manualLines returns text for a manual page, where a line that begins with a dot or a quote would
// be a request.
func manualLines(text string) string {
	return regexp.MustCompile(`(?m)^[.']`).ReplaceAllString(text, `\&$0`)
}

// optionsManual returns the manual page of the directive.
func optionsManual() string {
	var b strings.Builder
	b.WriteString(`.\" Written by go test -run TestManual . -update
.TH ASYNC\-PROXY 5 "" "async_proxy" "File Formats Manual"
.ad l
.SH NAME
async\-proxy \- the directive async_proxy of a Caddyfile
.SH SYNOPSIS
.nf
async_proxy [<matcher>] [burst <tokens>] [refill <tokens_per_second>] {
    <option> ...
}
.fi
.SH DESCRIPTION
The directive makes its site a forward proxy.
The site's address must have no host name, as in \fB:8080\fR, because a proxy request carries the
host name of its destination.
\fBcaddy\fR in this page is the program
.BR async\-proxy (8).
.SH OPTIONS
`)
	for i := 0; i < len(options); {
		same := i + 1
		for same < len(options) && options[same].doc == options[i].doc {
			same++
		}
		var defaults []string
		for j, o := range options[i:same] {
			if j > 0 {
				b.WriteString(".TQ\n")
			} else {
				b.WriteString(".TP\n")
			}
			first, block, _ := strings.Cut(o.syntax, "\n")
			b.WriteString(strings.TrimRight("\\fB"+o.name+"\\fR "+manualCode(first), " ") + "\n")
			for line := range strings.Lines(block) {
				b.WriteString(".TQ\n" + strings.ReplaceAll(manualCode(strings.TrimSuffix(line, "\n")), "\t", `\ \ \ \ `) + "\n")
			}
			defaults = append(defaults, defaultOf(o))
		}
		text := strings.TrimLeft(manualText(options[i].doc), " ")
		byDefault := strings.ReplaceAll(strings.Join(slices.Compact(defaults), ", "), "see there", "see the reference, which explains destinations")
		b.WriteString(manualLines(strings.ToUpper(text[:1])+text[1:]+".\nDefault: "+manualText(byDefault)+".") + "\n")
		i = same
	}
	b.WriteString(`.SH EXAMPLES
.nf
:8080 {
    async_proxy {
        clients 10.0.0.0/8
        burst 200
        refill 20
        deny *.ads.example.com
    }
}
.fi
.SH SEE ALSO
.BR async\-proxy (8)
.PP
https://github.com/asyncproxy/caddy\-async\-proxy/blob/main/docs/reference.md explains the options with
examples.
`)
	return b.String()
}

// The manual page lists the options as the table of options describes them. To update it, run
// `go test -run TestManual . -update`.
func TestManual(t *testing.T) {
	const file = "packaging/async-proxy.5"
	if *update {
		if err := os.WriteFile(file, []byte(optionsManual()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(data); got != optionsManual() {
		t.Errorf("%s has\n%swant\n%s", file, got, optionsManual())
	}
}
