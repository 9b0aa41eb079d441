// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"strings"
	"testing"
)

func TestProxyStatusMembers(t *testing.T) {
	for _, s := range []string{
		"a", "a;b", "a; error=dns_error; rcode=\"NXDOMAIN\"; info-code=5", `"a \"b\\"; c=?1;d=-1.5;e=:YWI=:`, "a , b", "*a; *b=c", "A-b.c:80/x, 	d", "a; b=-1; c=123456789012.345; d=123456789012345; e=?0", "a;b=::",
	} {
		if got := proxyStatusMembers([]string{s}); got != s {
			t.Errorf("%q: %q", s, got)
		}
	}
	for _, s := range []string{
		"", ",", "a,", ",a", "a,,b", "a b", "a;", "a;=b", "a; b=", "1", "(a b)", `"a`, `"a\`, `"a\b"`, "a\x00", "a;b=c\x7f", "a;B", "a;1b", "a;-b=1", "a;b=-", "a;b=1.", "a;b=1.2345", "a;b=1234567890123.4", "a;b=1234567890123456", "a;b=?2", "a;b=:x", "a;b=:!:", "a;b={c}", "a;b=@1", "a;b=(c)", "ä", "\"\xff\"", "a\nb", strings.Repeat("a", maxProxyStatus+1),
	} {
		if got := proxyStatusMembers([]string{s}); got != "" {
			t.Errorf("%q: %q", s, got)
		}
	}
	if got := proxyStatusMembers(nil); got != "" {
		t.Errorf("of no field: %q", got)
	}
	if got := proxyStatusMembers([]string{"a;x", "b"}); got != "a;x, b" {
		t.Errorf("of two fields: %q", got)
	}
}

// FuzzProxyStatusMembers checks that the members passed on are bounded and printable, with
// balanced quotes, and mean the same with our own member behind them.
func FuzzProxyStatusMembers(f *testing.F) {
	for _, s := range []string{"a; error=dns_error", `"a,\"b"; c="d", e`, "a;b=:x:", `a;b="`, "a,"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := proxyStatusMembers([]string{s})
		if len(got) > maxProxyStatus || strings.ContainsFunc(got, func(r rune) bool { return r < ' ' && r != '\t' || r >= 0x7f }) {
			t.Errorf("%q", got)
		}
		if got == "" {
			return
		}
		if with := got + ", own; error=x"; proxyStatusMembers([]string{with}) != with && len(with) <= maxProxyStatus {
			t.Errorf("%q with a member behind it is no list", got)
		}
	})
}
