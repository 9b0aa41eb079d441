// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import "strings"

// maxPhrase is the maximum length of a reason phrase in bytes. Programs show it in one line, behind
// words of their own.
const maxPhrase = 100

// reasonPhrase returns a sentence as the reason phrase of a status line (RFC 9112 §4): printable
// ASCII without the full stop, maxPhrase bytes at most. If that is too little, the longest word, which
// is nearly always the name of the destination, loses its middle. Only if that is not enough, the
// sentence loses its end.
func reasonPhrase(sentence string) string {
	phrase := strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, strings.TrimSuffix(sentence, "."))
	if len(phrase) > maxPhrase {
		phrase = shortenWord(phrase, len(phrase)-maxPhrase)
	}
	if len(phrase) > maxPhrase {
		phrase = phrase[:maxPhrase-len(omission)] + omission
	}
	return phrase
}

const (
	omission = "..."
	minWord  = 24 // what is left of a word must still tell which it was
)

// shortenWord makes the longest word of a text so much shorter by leaving out its middle, but not
// shorter than minWord.
func shortenWord(text string, by int) string {
	start, length := 0, 0
	for at := 0; at < len(text); {
		n := len(text) - at
		if i := strings.IndexByte(text[at:], ' '); i >= 0 {
			n = i
		}
		if n > length {
			start, length = at, n
		}
		at += n + 1
	}
	keep := max(length-by, min(length, minWord)) - len(omission)
	if keep+len(omission) >= length {
		return text
	}
	return text[:start+keep/2] + omission + text[start+length-(keep-keep/2):]
}

// quoted returns a text of printable ASCII as a string of a structured field (RFC 9651 §3.3.3).
func quoted(text string) string {
	return `"` + quoteEscapes.Replace(text) + `"`
}

var quoteEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`)
