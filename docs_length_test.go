// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

const (
	docColumns   = 120 // in a line of the documentation
	docParagraph = 5   // lines in a paragraph
	readmeLines  = 200
)

// TestDocumentsAreShort checks that README and the paragraphs of all pages stay short enough to be
// read.
func TestDocumentsAreShort(t *testing.T) {
	for file, text := range readFiles(t, "README.md", "docs/*.md") {
		if n := strings.Count(text, "\n"); file == "README.md" && n > readmeLines {
			t.Errorf("%s has %d lines, and may have %d", file, n, readmeLines)
		}
		for _, paragraph := range paragraphs(text) {
			if n := wrappedLines(paragraph); n > docParagraph {
				t.Errorf("%s has a paragraph of %d lines: %s", file, n, paragraph)
			}
		}
	}
}

var (
	codeBlock = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	listItem  = regexp.MustCompile(`(?m)^ *(- |\d+\. )`)
)

// paragraphs returns the paragraphs and list items of a Markdown text, without its headings, tables
// and code.
func paragraphs(text string) (list []string) {
	text = listItem.ReplaceAllString(codeBlock.ReplaceAllString(text, ""), "\n$0")
	for block := range strings.SplitSeq(text, "\n\n") {
		if block = strings.TrimSpace(block); block != "" && !strings.HasPrefix(block, "#") && !strings.HasPrefix(block, "|") {
			list = append(list, block)
		}
	}
	return list
}

// wrappedLines returns how many lines a paragraph has at a width of docColumns.
func wrappedLines(paragraph string) int {
	lines, column := 1, -1
	for word := range strings.FieldsSeq(paragraph) {
		width := utf8.RuneCountInString(word)
		if column >= 0 && column+1+width > docColumns {
			lines, column = lines+1, -1
		}
		column += 1 + width
	}
	return lines
}
