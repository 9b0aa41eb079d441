// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package printable makes texts that a client or an origin has chosen safe to store and to
// show in lists, log lines and terminals. It offers Text for a text from a peer, and Long and
// Error for a text and an error that may quote some. It never knows where a text comes from or is shown.
package printable

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// The maximum lengths in bytes of what Text and Error return. An error may quote several
// texts.
const (
	MaxText  = 256
	MaxError = 1024
)

// Text replaces control characters, invisible characters, characters that change the text
// direction and invalid UTF-8 by U+FFFD. It shortens texts beyond MaxText bytes and ends them
// with an ellipsis. A harmless text is returned unchanged.
func Text(s string) string { return upTo(MaxText, s) }

// Long is Text for a text that may quote several others. It has MaxError bytes at most.
func Long(s string) string { return upTo(MaxError, s) }

// Error returns the text of an error, treated as Long does.
func Error(err error) string { return Long(err.Error()) }

func upTo(limit int, s string) string {
	if isHarmless(limit, s) {
		return s
	}
	var b strings.Builder
	for rest := s; rest != "" && b.Len() <= limit; {
		c, size := utf8.DecodeRuneInString(rest)
		if !unicode.IsPrint(c) {
			c = utf8.RuneError
		}
		b.WriteRune(c)
		rest = rest[size:]
	}
	out := b.String()
	if len(out) <= limit {
		return out
	}
	end := limit - len("…")
	for !utf8.RuneStart(out[end]) {
		end--
	}
	return out[:end] + "…"
}

// isHarmless reports whether s is within the limit and consists of printable
// ASCII.
func isHarmless(limit int, s string) bool {
	if len(s) > limit {
		return false
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
