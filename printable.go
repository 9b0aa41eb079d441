// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxShown is the length in bytes at which printable cuts a text.
const maxShown = 256

// printable returns a text that a client or an origin has chosen in a form that
// is safe to keep and to show in lists, log lines and terminals: at most maxShown
// bytes, with U+FFFD in the place of control characters, of characters that
// change the direction or are invisible, and of what is not UTF-8. A longer text
// ends with an ellipsis. A text that is harmless already is returned as it is.
func printable(s string) string {
	if isHarmless(s) {
		return s
	}
	var b strings.Builder
	for rest := s; rest != ""; {
		c, size := utf8.DecodeRuneInString(rest)
		if !unicode.IsPrint(c) {
			c = utf8.RuneError
		}
		if n := utf8.RuneLen(c); b.Len()+n > maxShown-len("…") && b.Len()+n+len(rest)-size > maxShown {
			b.WriteString("…")
			break
		}
		b.WriteRune(c)
		rest = rest[size:]
	}
	return b.String()
}

// isHarmless reports whether s is short and consists of printable ASCII.
func isHarmless(s string) bool {
	if len(s) > maxShown {
		return false
	}
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
