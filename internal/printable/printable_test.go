// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package printable

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestText(t *testing.T) {
	long := strings.Repeat("a", MaxText)
	for in, want := range map[string]string{
		"":                                "",
		"example.com:443":                 "example.com:443",
		"Jürgen":                          "Jürgen",
		"\x1b]0;owned\a\x1b[2J":           "\ufffd]0;owned\ufffd\ufffd[2J",
		"a\tb\nc\rd\x00e\x7f":             "a\ufffdb\ufffdc\ufffdd\ufffde\ufffd",
		"\u202etxt.exe":                   "\ufffdtxt.exe",
		"zero\u200bwidth":                 "zero\ufffdwidth",
		"\xff\xfe":                        "\ufffd\ufffd",
		long:                              long,
		long + "b":                        long[:MaxText-3] + "…",
		strings.Repeat("ü", MaxText/2):    strings.Repeat("ü", MaxText/2),
		strings.Repeat("ü", MaxText/2+1):  strings.Repeat("ü", (MaxText-3)/2) + "…",
		strings.Repeat("\x00", MaxText/3): strings.Repeat("\ufffd", MaxText/3),
		strings.Repeat("\x00", MaxText):   strings.Repeat("\ufffd", MaxText/3-1) + "…",
		strings.Repeat("a", 10*MaxText):   long[:MaxText-3] + "…",
	} {
		if got := Text(in); got != want {
			t.Errorf("%.40q: %q, want %q", in, got, want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { Text("example.com:443") }); n != 0 {
		t.Errorf("%v allocations for a harmless text", n)
	}
}

func FuzzText(f *testing.F) {
	f.Add("example.com")
	f.Add("\x1b[2J\u202e\xff")
	f.Add(strings.Repeat("ü", 200))
	f.Add(strings.Repeat("a", MaxText-2) + "\xff") // longer once the last byte is replaced
	f.Fuzz(func(t *testing.T, in string) {
		out := Text(in)
		if len(out) > MaxText || !utf8.ValidString(out) {
			t.Fatalf("%q becomes %q, %d bytes", in, out, len(out))
		}
		if strings.ContainsFunc(out, func(c rune) bool { return !unicode.IsPrint(c) && c != utf8.RuneError }) {
			t.Fatalf("%q becomes %q", in, out)
		}
		if twice := Text(out); twice != out {
			t.Fatalf("%q becomes %q, and that %q", in, out, twice)
		}
	})
}
