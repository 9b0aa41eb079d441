// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package hostport

import (
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
)

func TestParseAuthority(t *testing.T) {
	label63 := strings.Repeat("a", 63)
	name253 := strings.Repeat("a.", 126) + "a"

	// Valid authorities are left unchanged.
	for _, authority := range []string{
		"example.com:443",
		"EXAMPLE.com:443",
		"localhost:1",
		"a:65535",
		"example.com.:443",
		"_dmarc.example.com:443",
		"my_host-2:8080",
		"xn--bcher-kva.example:443",
		"192.0.2.1:80",
		"[2001:db8::1]:443",
		"[::1]:443",
		"[::]:443",
		"[::ffff:192.0.2.1]:443",
		"[2001:DB8:0:0:0:0:0:1]:443",
		label63 + ".example:443",
		name253 + ":443",
		name253 + ".:443",
	} {
		got, err := Parse(authority)
		if got != authority || err != nil {
			t.Errorf("parseAuthority(%q) = %q, %v, want it unchanged", authority, got, err)
		}
	}

	const noPort, noHost = "the port is missing", "the host is missing"
	const tooLong = "the host name is too long"
	badPort := func(port string) string {
		return "the port " + strconv.Quote(port) + " is not a number from 1 to 65535"
	}
	badName := func(host string) string { return strconv.Quote(host) + " is not a host name" }
	badAddr := func(host string) string { return strconv.Quote(host) + " is not an IPv6 address" }
	for _, tc := range []struct{ authority, want string }{
		{"", noPort},
		{"example.com", noPort},
		{"[::1]", noPort},
		{"192.0.2.1", noPort},
		{"example.com:", badPort("")},
		{"example.com:0", badPort("0")},
		{"example.com:65536", badPort("65536")},
		{"example.com:+443", badPort("+443")},
		{"example.com:-1", badPort("-1")},
		{"example.com:443 ", badPort("443 ")},
		{"example.com: 443", badPort(" 443")},
		{"example.com:4_43", badPort("4_43")},
		{"example.com:0x1bb", badPort("0x1bb")},
		{"example.com:https", badPort("https")},
		{"example.com:99999999999999999999", badPort("99999999999999999999")},
		{"example.com:443/", badPort("443/")},
		{"example.com:443/path", badPort("443/path")},
		{"example.com:443?query", badPort("443?query")},
		{"example.com:443#fragment", badPort("443#fragment")},
		{"example.com:443\r\nHost: a", badName("example.com:443\r\nHost")},
		{"example.com:４４３", badPort("４４３")},
		{"[::1]:0", badPort("0")},

		{":443", noHost},
		{"::443", badName(":")},
		{".:443", badName(".")},
		{"..:443", badName("..")},
		{"example..com:443", badName("example..com")},
		{".example.com:443", badName(".example.com")},
		{"example.com..:443", badName("example.com..")},
		{"user@example.com:443", "user names and passwords do not belong in a request target"},
		{"user:password@example.com:443", "user names and passwords do not belong in a request target"},
		{"http://example.com:443", badName("http://example.com")},
		{"//example.com:443", badName("//example.com")},
		{"/path:443", badName("/path")},
		{"example.com/path:443", badName("example.com/path")},
		{"example.com?a:443", badName("example.com?a")},
		{"example.com#a:443", badName("example.com#a")},
		{" example.com:443", badName(" example.com")},
		{"example.com :443", badName("example.com ")},
		{"exa mple.com:443", badName("exa mple.com")},
		{"example.com\t:443", badName("example.com\t")},
		{"example.com\x00:443", badName("example.com\x00")},
		{"example.com\x7f:443", badName("example.com\x7f")},
		{"example.com\n:443", badName("example.com\n")},
		{"bücher.example:443", badName("bücher.example")},
		{"b\xfccher.example:443", badName("b\xfccher.example")},
		{"example。com:443", badName("example。com")},
		{"*.example.com:443", badName("*.example.com")},
		{"example%2ecom:443", badName("example%2ecom")},
		{"example.com,a:443", badName("example.com,a")},
		{"*:443", badName("*")},
		{strings.Repeat("a", 64) + ".example:443", badName(strings.Repeat("a", 64) + ".example")},
		{name253 + "b:443", tooLong},
		{name253 + "b.:443", tooLong},

		{"::1:443", badName("::1")},
		{"2001:db8::1:443", badName("2001:db8::1")},
		{"[::1:443", badAddr("[::1")},
		{"::1]:443", badName("::1]")},
		{"[]:443", badAddr("[]")},
		{"[:443", badAddr("[")},
		{"]:443", badName("]")},
		{"[::1]]:443", badAddr("[::1]]")},
		{"[[::1]]:443", badAddr("[[::1]]")},
		{"[::1]a:443", badAddr("[::1]a")},
		{"a[::1]:443", badName("a[::1]")},
		{"[127.0.0.1]:443", badAddr("[127.0.0.1]")},
		{"[example.com]:443", badAddr("[example.com]")},
		{"[fe80::1%eth0]:443", badAddr("[fe80::1%eth0]")},
		{"[fe80::1%25eth0]:443", badAddr("[fe80::1%25eth0]")},
		{"[fe80::1%]:443", badAddr("[fe80::1%]")},
		{"[::1 ]:443", badAddr("[::1 ]")},
		{"[12345::]:443", badAddr("[12345::]")},
		{"[v1.a]:443", badAddr("[v1.a]")},
	} {
		got, err := Parse(tc.authority)
		if got != "" || err == nil || err.Error() != tc.want {
			t.Errorf("parseAuthority(%q) = %q, %v, want the error %q", tc.authority, got, err, tc.want)
		}
	}
}

func FuzzParseAuthority(f *testing.F) {
	for _, authority := range []string{
		"example.com:443", "192.0.2.1:80", "[::1]:443", "[fe80::1%eth0]:443", "user@example.com:443", "a..b:1", "[::1", "::1]:443",
		"example.com:00443", ":443", "", "[", "]:", "[]:1", "bücher.example:443", "a\x00:1", "[127.0.0.1]:443", "http://example.com:80/",
	} {
		f.Add(authority)
	}
	f.Fuzz(func(t *testing.T, authority string) {
		got, err := Parse(authority)
		if err != nil {
			if got != "" {
				t.Fatalf("parseAuthority(%q) = %q, %v, want nothing with an error", authority, got, err)
			}
			return
		}
		zeros := strings.LastIndexByte(authority, ':') + 1 // the port may begin with zeros
		if got != authority[:zeros]+strings.TrimLeft(authority[zeros:], "0") {
			t.Fatalf("parseAuthority(%q) = %q, want it unchanged but for zeros before the port", authority, got)
		}
		host, port, err := net.SplitHostPort(got)
		if err != nil {
			t.Fatalf("net.SplitHostPort(%q): %v", got, err)
		}
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 || strconv.Itoa(n) != port {
			t.Errorf("parseAuthority(%q) accepts the port %q", authority, port)
		}
		if strings.HasPrefix(got, "[") {
			if addr, err := netip.ParseAddr(host); err != nil || !addr.Is6() || addr.Zone() != "" {
				t.Errorf("parseAuthority(%q) accepts the address %q", authority, host)
			}
			return
		}
		const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
		if host == "" || len(host) > 254 {
			t.Errorf("parseAuthority(%q) accepts the host %q", authority, host)
		}
		for i := range len(host) {
			if strings.IndexByte(allowed, host[i]) < 0 {
				t.Errorf("parseAuthority(%q) accepts the byte %q", authority, host[i])
			}
		}
	})
}

func TestWithPort(t *testing.T) {
	for _, row := range []struct{ authority, want string }{
		{"a.example", "a.example:80"}, {"a.example:", "a.example:80"}, {"a.example:8080", "a.example:8080"},
		{"a.example:080", "a.example:80"}, {"[::1]", "[::1]:80"}, {"[::1]:81", "[::1]:81"}, {"127.0.0.1:81", "127.0.0.1:81"},
		{"", ""}, {":80", ""}, {"a.example:0", ""}, {"a.example:x", ""}, {"a.example:65536", ""}, {"a b:80", ""}, {"1.2:80", ""},
	} {
		if got, err := WithPort(row.authority, "80"); err == nil && got != row.want || (err != nil) != (row.want == "") {
			t.Errorf("%q: %q, %v", row.authority, got, err)
		}
	}
}
