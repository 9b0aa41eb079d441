// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"strings"
	"unicode"
	"unicode/utf8"

	"go.uber.org/zap"
)

// The maximum lengths in bytes of texts that are stored or shown: of a text that a peer has
// chosen, and of an error, which may quote several such texts.
const (
	maxShown      = 256
	maxShownError = 1024
)

// printable makes a text that a client or an origin has chosen safe to store and to show in
// lists, log lines and terminals. It replaces control characters, invisible characters,
// characters that change the text direction and invalid UTF-8 by U+FFFD. It shortens texts
// beyond maxShown bytes and ends them with an ellipsis. A harmless text is returned
// unchanged.
func printable(s string) string { return printableUpTo(maxShown, s) }

// printableUpTo is printable with the given limit in bytes.
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

// textField returns a log field for a value that a client or an origin has chosen.
func textField(key, value string) zap.Field { return zap.String(key, printable(value)) }

// errorField returns the log field for an error, which may quote what a peer has sent.
func errorField(err error) zap.Field {
	return zap.String("error", printableUpTo(maxShownError, err.Error()))
}
