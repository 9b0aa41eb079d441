// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"go.uber.org/zap"
)

// The lengths in bytes at which texts are cut before they are kept or shown: what
// a peer has chosen, and an error, which may quote several such texts.
const (
	maxShown      = 256
	maxShownError = 1024
)

// printable returns a text that a client or an origin has chosen in a form that
// is safe to keep and to show in lists, log lines and terminals: at most maxShown
// bytes, with U+FFFD in the place of control characters, of characters that
// change the direction or are invisible, and of what is not UTF-8. A longer text
// ends with an ellipsis. A text that is harmless already is returned as it is.
func printable(s string) string { return printableUpTo(maxShown, s) }

// printableUpTo is printable with another limit.
func printableUpTo(limit int, s string) string {
	if isHarmless(limit, s) {
		return s
	}
	var b strings.Builder
	for rest := s; rest != ""; {
		c, size := utf8.DecodeRuneInString(rest)
		if !unicode.IsPrint(c) {
			c = utf8.RuneError
		}
		if n := utf8.RuneLen(c); b.Len()+n > limit-len("…") && b.Len()+n+len(rest)-size > limit {
			b.WriteString("…")
			break
		}
		b.WriteRune(c)
		rest = rest[size:]
	}
	return b.String()
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

// textField is a field of a log line whose value a client or an origin has
// chosen.
func textField(key, value string) zap.Field { return zap.String(key, printable(value)) }

// errorField is the field of an error, which may quote what a peer has sent.
func errorField(err error) zap.Field {
	return zap.String("error", printableUpTo(maxShownError, err.Error()))
}
