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
		n := prefixLen(s, func(c byte) bool { return isKeyStart(c) || isDigit(c) || strings.IndexByte("_-.", c) >= 0 })
		if n == 0 || !isKeyStart(s[0]) {
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

// cutBareItem cuts a string, number, boolean, byte sequence or token from the front of s.
func cutBareItem(s string) (rest string, ok bool) {
	switch {
	case s == "":
		return s, false
	case s[0] == '"':
		return cutString(s)
	case s[0] == ':':
		n := prefixLen(s[1:], func(c byte) bool { return isAlpha(c) || isDigit(c) || strings.IndexByte("+/=", c) >= 0 })
		return strings.CutPrefix(s[1+n:], ":")
	case strings.HasPrefix(s, "?0"), strings.HasPrefix(s, "?1"):
		return s[2:], true
	case s[0] == '-' || isDigit(s[0]):
		return cutNumber(strings.TrimPrefix(s, "-"))
	case s[0] == '*' || isAlpha(s[0]):
		return s[prefixLen(s, isTokenChar):], true
	}
	return s, false
}

// cutNumber cuts an integer of up to 15 digits, or a decimal of up to 12 and 3 digits, from the
// front of s.
func cutNumber(s string) (rest string, ok bool) {
	n := prefixLen(s, isDigit)
	rest, isDecimal := strings.CutPrefix(s[n:], ".")
	if !isDecimal {
		return rest, n >= 1 && n <= 15
	}
	decimals := prefixLen(rest, isDigit)
	return rest[decimals:], n >= 1 && n <= 12 && decimals >= 1 && decimals <= 3
}

// cutString cuts a string from the front of s, which begins with its quote.
func cutString(s string) (rest string, ok bool) {
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

// prefixLen returns how many bytes at the front of s satisfy is.
func prefixLen(s string, is func(byte) bool) int {
	n := 0
	for n < len(s) && is(s[n]) {
		n++
	}
	return n
}

func isAlpha(c byte) bool    { return c|0x20 >= 'a' && c|0x20 <= 'z' }
func isDigit(c byte) bool    { return c >= '0' && c <= '9' }
func isKeyStart(c byte) bool { return c >= 'a' && c <= 'z' || c == '*' }

func isTokenChar(c byte) bool {
	return isAlpha(c) || isDigit(c) || strings.IndexByte("!#$%&'*+-.^_`|~:/", c) >= 0
}
