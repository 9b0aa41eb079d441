// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// A rule that can match no destination is refused.
func TestUnmatchableRules(t *testing.T) {
	for _, text := range []string{"", ".", "*.", "..", "a..", "a..b", ".a", "*..a", "a.example..", "münchen.。", "münchen。.", "0A.。", "0.0.0.0..", "0.0.0.0。", "*.0.0.0.0"} {
		if d, err := ParseDestination(text); err == nil {
			t.Errorf("%q parses as %+v", text, d)
		}
	}
	for text, want := range map[string]string{"a.": "a", "A.Example": "a.example", "*.a.": "a", "münchen。": "xn--mnchen-3ya", "_dmarc.a": "_dmarc.a"} {
		if d, err := ParseDestination(text); err != nil || d.Text != want {
			t.Errorf("%q parses as %+v, %v", text, d, err)
		}
	}
}

// A name is not taken for the class of destinations of that name: *.private does not stand for all
// private addresses. A class may be in capitals.
func TestNamesOfClasses(t *testing.T) {
	private := netip.MustParseAddr("10.0.0.1")
	for _, class := range []string{"all", "public", "private"} {
		for _, text := range []string{class + ".", "*." + class, "*." + class + "."} {
			d, err := ParseDestination(text)
			if err != nil {
				t.Fatal(err)
			}
			set := NewRuleSet(false, PortRange{})
			set.Add(d)
			for _, addr := range []netip.Addr{private, netip.MustParseAddr("192.0.2.1")} {
				if entry, ok := set.MatchAddress(t.Context(), addr, addr); ok {
					t.Errorf("%s matches %s by %q", text, addr, entry)
				}
			}
			if entry, ok := set.MatchName(hostport.TargetOf("other.example:80")); ok {
				t.Errorf("%s matches other.example by %q", text, entry)
			}
			host := strings.TrimSuffix(strings.Replace(text, "*", "www", 1), ".")
			if _, ok := set.MatchName(hostport.TargetOf(host + ":80")); !ok {
				t.Errorf("%s does not match %s", text, host)
			}
			if d.opens() {
				t.Errorf("%s is taken for something that opens private addresses", text)
			}
		}
		if d, err := ParseDestination(strings.ToUpper(class)); err != nil || !d.is(class) {
			t.Errorf("%s in capitals parses as %+v, %v", class, d, err)
		}
	}
	if len(ExpandRanges("Private_Ranges")) == 1 {
		t.Error("private_ranges in capitals is not expanded")
	}
}

func FuzzDestination(f *testing.F) {
	for _, s := range strings.Fields("all public:80 10.0.0.0/8 [2001:db8::/32]:1-2 *.example.com:443 münchen.example ::1 1.2.3.4:99999 [::1 *.*.a a:b:c 0.0.0.0.. *.0.0.0.0 0.0.0.0。 a.example.. münchen.example.. münchen。 0A.。 a。. a..b .a *..a") {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := ParseDestination(s)
		if err != nil {
			return
		}
		if d.Text == "" && !d.Prefix.IsValid() || d.Ports.High < d.Ports.Low {
			t.Errorf("%q parses as %+v", s, d)
		}
		if d.Prefix.IsValid() && (d.Prefix.Addr().Is4In6() || d.Prefix != d.Prefix.Masked()) {
			t.Errorf("%q has the prefix %s", s, d.Prefix)
		}
		// A rule matches the destination that it names.
		set := NewRuleSet(true, d.Ports)
		set.Add(d)
		switch {
		case d.Prefix.IsValid():
			if _, ok := set.MatchAddress(t.Context(), d.Prefix.Addr(), d.Prefix.Addr()); !ok {
				t.Errorf("%q does not match %s", s, d.Prefix.Addr())
			}
		case d.Subdomains:
			if _, ok := set.MatchName(hostport.TargetOf("x." + d.Text + ":80")); !ok {
				t.Errorf("%q does not match a name below %s", s, d.Text)
			}
		case !d.is("public") && !d.is("private"):
			if _, ok := set.MatchName(hostport.TargetOf(d.Text + ":80")); !ok {
				t.Errorf("%q does not match %s", s, d.Text)
			}
		}
	})
}

// All v4-mapped addresses together are all IPv4 addresses. A wider range is one of IPv6.
func TestParsePrefix(t *testing.T) {
	for text, want := range map[string]string{
		"10.1.2.3": "10.1.2.3/32", "10.1.2.3/8": "10.0.0.0/8", "fd00::1": "fd00::1/128",
		"::ffff:10.1.2.3": "10.1.2.3/32", "::ffff:10.1.2.3/104": "10.0.0.0/8", "::ffff:0:0/96": "0.0.0.0/0", "::ffff:0:0/95": "::fffe:0:0/95",
	} {
		if got, err := ParsePrefix(text); err != nil || got.String() != want {
			t.Errorf("%s: %v, %v; want %s", text, got, err, want)
		}
	}
}

func TestParsePorts(t *testing.T) {
	for text, want := range map[string]string{
		"1": "1", "65535": "65535", "1-65535": "1-65535", "80-80": "80",
		"0": "", "0-5": "", "5-4": "", "65536": "", "1-65536": "", "": "", "-": "", "1-": "", "-1": "", "+1": "", "1-2-3": "",
	} {
		if got, err := ParsePorts(text); got.String() != want || (err == nil) != (want != "") {
			t.Errorf("%q: %v, %v; want %q", text, got, err, want)
		}
	}
}
