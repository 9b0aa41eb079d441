// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"strings"
	"unicode/utf8"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// warningLines returns what is wrong now as lines that fit a terminal of the given width, followed
// by an empty one. A width of 0 is unknown: each warning is one line.
func (s *statusReport) warningLines(width int) (lines []string) {
	for _, w := range s.Stats.Warnings {
		text := "! " + w.Text
		if w.Site != "" {
			text = "! " + w.Site + ": " + w.Text
		}
		lines = append(lines, wrapWords(text, width)...)
	}
	if len(lines) > 0 {
		lines = append(lines, "")
	}
	return lines
}

// wrapWords breaks text between words, which it makes printable, into lines shorter than width, if no
// word is longer. All but the first are indented.
func wrapWords(text string, width int) (lines []string) {
	line := ""
	for word := range strings.FieldsSeq(text) {
		word = printable.Text(word)
		if line != "" && width > 0 && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) >= width-1 {
			lines, line = append(lines, line), " "
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}
