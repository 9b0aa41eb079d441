// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import "strings"

// maxProxyStatus is the maximum length in bytes of a Proxy-Status that is passed on.
const maxProxyStatus = 1 << 10

// proxyStatusMembers returns the members of a received Proxy-Status field as one
// list, to put in front of our own (RFC 9209 §2). It returns "" if the field is absent, too
// long, or not a list of tokens and strings with parameters (RFC 8941).
func proxyStatusMembers(values []string) string {
	s := strings.Join(values, ", ")
	if len(s) > maxProxyStatus {
		return ""
	}
	for rest := s; ; {
		var ok bool
		if rest, ok = cutMember(strings.TrimLeft(rest, " \t")); !ok {
			return ""
		}
		if rest = strings.TrimLeft(rest, " \t"); rest == "" {
			return s
		}
		if rest[0] != ',' {
			return ""
		}
		rest = rest[1:]
	}
}

// cutMember cuts a token or a string and its parameters from the front of s.
func cutMember(s string) (rest string, ok bool) {
	if s == "" || s[0] != '"' && s[0] != '*' && !isAlpha(s[0]) {
		return s, false
	}
	if s, ok = cutBareItem(s); !ok {
		return s, false
	}
	for strings.HasPrefix(s, ";") {
		s = strings.TrimLeft(s[1:], " ")
		n := 0
		for n < len(s) && (s[n]|0x20 >= 'a' && s[n]|0x20 <= 'z' || s[n] >= '0' && s[n] <= '9' || strings.IndexByte("_-.*", s[n]) >= 0) {
			n++
		}
		if n == 0 {
			return s, false
		}
		if s = s[n:]; strings.HasPrefix(s, "=") {
			if s, ok = cutBareItem(s[1:]); !ok {
				return s, false
			}
		}
	}
	return s, true
}

// cutBareItem cuts a string, or a token, number, boolean or byte sequence, from the front
// of s. It does not check the syntax of the latter any further: none of their characters
// can end a member.
func cutBareItem(s string) (rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		n := 0
		for n < len(s) && s[n] > ' ' && s[n] < 0x7f && strings.IndexByte(`";,()<>[]{}\@`, s[n]) < 0 {
			n++
		}
		return s[n:], n > 0
	}
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return s[i+1:], true
		case c < ' ' || c >= 0x7f:
			return s, false
		case c == '\\':
			if i++; i == len(s) || s[i] != '"' && s[i] != '\\' {
				return s, false
			}
		}
	}
	return s, false
}

func isAlpha(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }
