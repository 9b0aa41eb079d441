// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package hostport reads and checks the host and port that a client asks for. It offers the
// grammar of an authority, the checked text that net.Dial takes, and its parts as a Target.
// It knows neither URL schemes nor HTTP.
package hostport

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Parse returns the host and port of a CONNECT target in the form that net.Dial
// takes. The port is required.
func Parse(authority string) (string, error) {
	if strings.Contains(authority, "@") { // do not echo it: it may contain a password
		return "", errors.New("user names and passwords do not belong in a request target")
	}
	host, port, found := Split(authority)
	if !found {
		return "", errors.New("the port is missing")
	}
	return Join(host, port)
}

// Split splits an authority into host and port. The host keeps its brackets.
func Split(authority string) (host, port string, found bool) {
	if i := strings.LastIndexByte(authority, ':'); i >= 0 && i > strings.LastIndexByte(authority, ']') {
		return authority[:i], authority[i+1:], true
	}
	return authority, "", false
}

// Join checks a host, in the form that it has in an authority, and a port, and joins
// them.
func Join(host, port string) (string, error) {
	if err := CheckHost(host); err != nil {
		return "", err
	}
	number, err := checkPort(port)
	if err != nil {
		return "", err
	}
	return host + ":" + number, nil
}

// WithPort checks an authority as Join does, and adds a port if it has none.
func WithPort(authority, usual string) (string, error) {
	host, port, _ := Split(authority)
	if number, err := checkPort(port); err == nil && number == port {
		return authority, CheckHost(host)
	}
	return Join(host, cmp.Or(port, usual))
}

// checkPort checks a port and returns it without leading zeros. They have no meaning (RFC 3986
// §3.2.3), and everything from here on compares the text.
func checkPort(port string) (string, error) {
	number := strings.TrimLeft(port, "0")
	if n, err := strconv.ParseUint(number, 10, 16); err != nil || n == 0 || number[0] == '+' {
		return "", fmt.Errorf("the port %q is not a number from 1 to 65535", port)
	}
	return number, nil
}

// CheckHost accepts a DNS name, an IPv4 address, or an IPv6 address in brackets. A zone is
// refused, because it only has a meaning on this machine (RFC 9110 §4.2, RFC 3986 §3.2.2).
// An internationalised name must be in its ASCII form.
func CheckHost(host string) error {
	if host == "" {
		return errors.New("the host is missing")
	}
	if host[0] == '[' {
		addr, err := netip.ParseAddr(strings.TrimSuffix(host[1:], "]"))
		if err != nil || !addr.Is6() || addr.Zone() != "" || host[len(host)-1] != ']' {
			return fmt.Errorf("%q is not an IPv6 address", host)
		}
		return nil
	}
	name := strings.TrimSuffix(host, ".")
	if len(name) > 253 {
		return errors.New("the host name is too long")
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return fmt.Errorf("%q is not a host name", host)
		}
		for _, c := range []byte(label) {
			if c != '-' && c != '_' && (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z') {
				return fmt.Errorf("%q is not a host name", host)
			}
		}
	}
	// A name that ends in a number is an IPv4 address (WHATWG URL §3.5). Some resolvers
	// accept 127.1, 0x7f.1 and 2130706433 as such, so only the dotted decimal form is
	// allowed.
	if endsInNumber(name) {
		if addr, err := netip.ParseAddr(name); err != nil || !addr.Is4() {
			return fmt.Errorf("%q is not an IPv4 address in dotted decimal", host)
		}
	}
	return nil
}

// endsInNumber reports whether the last label of a name is a decimal, octal or
// hexadecimal number.
func endsInNumber(name string) bool {
	last := name[strings.LastIndexByte(name, '.')+1:]
	if rest, ok := strings.CutPrefix(strings.ToLower(last), "0x"); ok {
		return !strings.ContainsFunc(rest, func(c rune) bool { return (c < '0' || c > '9') && (c < 'a' || c > 'f') })
	}
	return last != "" && !strings.ContainsFunc(last, func(c rune) bool { return c < '0' || c > '9' })
}

// IsPlain reports whether an authority has a host and a port, and nothing that
// net/http or Caddy might read differently.
func IsPlain(authority string) bool {
	host, port, found := Split(authority)
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		if addr, err := netip.ParseAddr(inner); !ok || err != nil || addr.Is4() || addr.Zone() != "" {
			return false
		}
	} else if strings.ContainsFunc(host, func(c rune) bool {
		return c != '-' && c != '.' && c != '_' && (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z')
	}) {
		return false
	}
	return found && strings.Trim(host, ".") != "" && port != "" && strings.Trim(port, "0123456789") == ""
}

// WithoutUser returns an authority without the user name and password before it.
func WithoutUser(authority string) string { return authority[strings.LastIndexByte(authority, '@')+1:] }

// Target is the host and port that a client asks for.
type Target struct {
	Name string     // in lower case, without a trailing dot; "" for an address
	Addr netip.Addr // if the host is an address
	Port uint16
}

// TargetOf parses an address that Join has built.
func TargetOf(address string) Target {
	host, port, _ := Split(address)
	n, _ := strconv.ParseUint(port, 10, 16)
	t := Target{Port: uint16(n)}
	host = strings.TrimSuffix(strings.ToLower(strings.Trim(host, "[]")), ".")
	if addr, err := netip.ParseAddr(host); err == nil {
		t.Addr = addr
	} else {
		t.Name = host
	}
	return t
}

// AddrPortOf returns the address and port of a TCP address, with a v4-mapped address as
// IPv4. It returns an invalid one for other networks.
func AddrPortOf(addr net.Addr) netip.AddrPort {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		ap := tcp.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
