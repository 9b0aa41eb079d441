// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// policyOf makes a policy from options, one per line. It adds a rule about a port that no test
// uses, because an allow rule without a deny rule has no effect.
func policyOf(t testing.TB, options string) *Control {
	t.Helper()
	p := new(Control)
	var rules []Rule
	var err error
	for line := range strings.Lines(options + "\ndeny all:1") {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		switch option, values := fields[0], fields[1:]; option {
		case "ports":
			p.Ports, err = ParsePortList(option, values)
		case "report_only":
			p.ReportOnly = true
		default:
			rules = append(rules, Rule{Action: option, Destinations: values})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if p.Sets, err = NewRuleSets(rules, &RuleCheck{Open: p.OpenPorts()}); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestAccessCheck lists addresses and the clients that may reach them.
func TestAccessCheck(t *testing.T) {
	for _, rows := range []struct {
		local, public bool
		addresses     string
	}{
		// Unspecified, link-local (including cloud metadata), multicast, broadcast, Teredo,
		// and addresses that embed these.
		{false, false, `0.0.0.0 0.0.0.1 0.255.255.255 169.254.0.0 169.254.169.254 169.254.255.255
			224.0.0.0 224.0.0.1 239.255.255.255 255.255.255.255
			:: fe80:: fe80::1 fe80::1%eth0 fe80::1%1 febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff
			ff00:: ff02::1 ff02::1%eth0 ff0e::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
			2001:: 2001::1 2001:0:7f00:1::1 2001:0:ffff:ffff:ffff:ffff:ffff:ffff
			::ffff:0.0.0.0 ::ffff:169.254.169.254 ::ffff:224.0.0.1 ::ffff:255.255.255.255
			64:ff9b::0.0.0.0 64:ff9b::169.254.169.254 64:ff9b::a9fe:1 64:ff9b::224.0.0.1 64:ff9b::255.255.255.255
			2002::1 2002:a9fe:a9fe:: 2002:a9fe:1::1 2002:e000:1:: 2002:ffff:ffff::1
			64:ff9b:1::a9fe:a9fe 64:ff9b:1:2:3::a9fe:a9fe 64:ff9b:1:a9fe:a9:fe00:: 64:ff9b:1:: ::169.254.169.254 ::224.0.0.1
			::ffff:0:169.254.169.254 fd00::5efe:a9fe:a9fe 2606:4700::200:5efe:169.254.169.254 2606:4700::5efe:0.0.0.1`},

		// Loopback, private, CGNAT, protocol assignments, documentation, 6to4
		// anycast, benchmarking, class E.
		{true, false, `127.0.0.0 127.0.0.1 127.0.0.53 127.255.255.255
			10.0.0.0 10.0.0.1 10.255.255.255 172.16.0.0 172.16.0.1 172.31.255.255 192.168.0.0 192.168.1.1 192.168.255.255
			100.64.0.0 100.64.0.1 100.127.255.255 192.0.0.0 192.0.0.170 192.0.0.255
			192.0.2.0 192.0.2.1 192.0.2.255 198.51.100.0 198.51.100.255 203.0.113.0 203.0.113.255
			192.88.99.0 192.88.99.1 192.88.99.255 198.18.0.0 198.18.0.1 198.19.255.255
			240.0.0.0 240.0.0.1 255.255.255.254`},
		// Loopback, ULA, documentation, benchmarking, ORCHID, discard-only, segment
		// routing, former site-local, and all of IPv6 outside global unicast; also as IPv4
		// embedded in it.
		{true, false, `::1 ::1%lo fc00:: fc00::1 fd12:3456::1 fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
			2001:db8:: 2001:db8::1 2001:db8:ffff:ffff:ffff:ffff:ffff:ffff 3fff:: 3fff::1 3fff:fff:ffff::1
			2001:1:: 2001:2::1 2001:10::1 2001:20::1 2001:1ff:ffff::1 100::1 5f00::1 fec0::1 feff::1 fe7f:ffff::1
			fbff:ffff::1 fe00::1 1fff:ffff::1 4000::1 64:ff9a::808:808 64:ff9b::1:0:0 64:ff9b:1::7f00:1 64:ff9b:1::808:808
			64:ff9b:1:7f00:0:100:: 2606:4700::5efe:7f00:1 2606:4700::200:5efe:a00:1 fd00::5efe:8.8.8.8
			::127.0.0.1 ::8.8.8.8 ::2 ::fffe:808:808 ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8
			::ffff:127.0.0.1 ::ffff:7f00:1 ::ffff:10.0.0.1 ::ffff:192.168.0.1 ::ffff:100.64.0.1 ::ffff:240.0.0.1
			64:ff9b::127.0.0.1 64:ff9b::7f00:1 64:ff9b::10.0.0.1 64:ff9b::172.16.0.1 64:ff9b::192.168.0.1 64:ff9b::100.64.0.1 64:ff9b::192.0.2.1
			2002:7f00:1:: 2002:7f00:1::1 2002:a00:1:: 2002:ac10:1::1 2002:c0a8:101::1 2002:6440:1:: 2002:c000:201::`},

		// Public addresses, first of all the neighbors of the ranges above.
		{true, true, `1.0.0.0 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
			169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.1.255 192.0.3.0
			192.88.98.255 192.88.100.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0
			203.0.112.255 203.0.114.0 223.255.255.255 ::ffff:8.8.8.8 ::ffff:172.32.0.0
			2000:: 2000::1 2001:200:: 2001:4860:4860::8888 2001:db7:ffff::1 2001:db9::1 2001:ffff::1 2003::1 2606:4700::1111
			2606:4700::1111%eth0 3ffe:ffff::1 3fff:1000::1 3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
			64:ff9b::8.8.8.8 64:ff9b::ac20:0 64:ff9b::ac0f:ffff 2002:808:808:: 2002:808:808::1 2002:ac20:0:: 2002:9ff:ffff::1
			2606:4700::5efe:808:808 2606:4700::100:5efe:7f00:1`},
	} {
		for _, address := range strings.Fields(rows.addresses) {
			accessCheck(t, new(Control), LocalScope, address, 443, rows.local)
			accessCheck(t, new(Control), PublicScope, address, 443, rows.public)
			everything := policyOf(t, "allow 0.0.0.0/0 ::/0 169.254.169.254")
			for _, r := range []Scope{LocalScope, PublicScope} {
				accessCheck(t, everything, r, address, 443, true)
				accessCheck(t, everything, r, address, 24, true)
				accessCheck(t, everything, r, address, 25, false)
				accessCheck(t, new(Control), r, address, 25, false)
			}
		}
	}
}

func accessCheck(t *testing.T, p *Control, r Scope, address string, port uint16, want bool) {
	t.Helper()
	to := netip.AddrPortFrom(netip.MustParseAddr(address), port)
	err := p.Check(t.Context(), r, hostport.Target{Addr: to.Addr(), Port: port}, to).Denied
	if (err == nil) != want {
		t.Errorf("%s for %s: %v, want it open: %v", to, map[Scope]string{LocalScope: "local", PublicScope: "public"}[r], err, want)
	}
	if err != nil && (err.To != to || err.Hint == "" && err.Reason == "") {
		t.Errorf("%s: error %#v", to, err)
	}
}

// TestAccessTexts checks that a refusal gives its reason and nothing more.
func TestAccessTexts(t *testing.T) {
	for r, want := range map[Scope]string{LocalScope: "its address has a special purpose", PublicScope: "its address is private or local"} {
		to := netip.MustParseAddrPort("169.254.169.254:80")
		if denied := new(Control).Check(t.Context(), r, hostport.Target{Addr: to.Addr(), Port: 80}, to).Denied; denied == nil || denied.Reason != want || denied.Hint != "allow 169.254.169.254" {
			t.Errorf("%v, want %q", denied, want)
		}
	}
}

func TestAccessAllow(t *testing.T) {
	for _, row := range []struct{ allow, open, closed string }{
		{"10.0.0.0/8", "10.0.0.0 10.255.255.255 ::ffff:10.1.2.3 64:ff9b::10.1.2.3 2002:a01:203::1 8.8.8.8", "127.0.0.1 172.16.0.1 ::1 fd00::1 64:ff9b::192.168.0.1"},
		{"127.0.0.0/8", "127.0.0.1 ::ffff:127.0.0.1 64:ff9b::7f00:1", "10.0.0.1 ::1 0.0.0.0 ::ffff:0.0.0.0"},
		{"127.0.0.1/32", "127.0.0.1 ::127.0.0.1", "127.0.0.2 127.0.0.0 ::1"},
		{"::1/128", "::1", "127.0.0.1 ::2 ::"},
		{"169.254.169.254/32", "169.254.169.254 64:ff9b::169.254.169.254", "169.254.169.253 169.254.169.255"},
		{"fe80::/10", "fe80::1 fe80::1%eth0", "fec0::1 ff02::1%eth0"},
		{"fd00::/8 192.168.0.0/16", "fd00::1 192.168.0.1", "fc00::1 192.0.0.1 10.0.0.1"},
		// The outer range alone opens no private address embedded in it.
		{"64:ff9b::/96", "64:ff9b::8.8.8.8", "64:ff9b::10.0.0.1 10.0.0.1 2002:a00:1::"},
		{"64:ff9b:1::/48", "64:ff9b:1::8.8.8.8", "64:ff9b:1::10.0.0.1"},
		{"2002::/16", "2002:808:808::", "2002:a00:1:: 10.0.0.1 64:ff9b::10.0.0.1"},
		{"2002::/16 10.0.0.0/8", "2002:a00:1::", "2002:7f00:1::"},
		{"2000::/3", "2001:db8::1 2002:808:808::", "2002:7f00:1:: 2002:a9fe:a9fe:: 2001:db8::5efe:7f00:1"},
		{"224.0.0.0/4", "224.0.0.1 239.255.255.255", "240.0.0.0 ff02::1"},
		{"0.0.0.0/0", "10.0.0.1 127.0.0.1 0.0.0.0 64:ff9b::10.0.0.1", "::1 fd00::1 fe80::1 ::"},
		{"::/0", "::1 fd00::1 fe80::1 ::", "10.0.0.1 127.0.0.1 ::ffff:127.0.0.1"},
	} {
		d := policyOf(t, "allow "+row.allow)
		for _, address := range strings.Fields(row.open) {
			accessCheck(t, d, PublicScope, address, 80, true)
			accessCheck(t, d, LocalScope, address, 80, true)
			accessCheck(t, d, PublicScope, address, PortSMTP, false)
		}
		for _, address := range strings.Fields(row.closed) {
			accessCheck(t, d, PublicScope, address, 80, false)
		}
	}
}

// TestAccessOwnAddresses checks that the proxy's own addresses stay closed, whatever is allowed and
// however they are written.
func TestAccessOwnAddresses(t *testing.T) {
	d := policyOf(t, "allow 0.0.0.0/0 ::/0")
	d.IsSelf = func(to netip.AddrPort, _ bool) bool {
		return to == netip.MustParseAddrPort("127.0.0.1:2019") || to == netip.MustParseAddrPort("[2002:909:909:1::5]:2019")
	}
	for _, address := range strings.Fields("127.0.0.1 ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2002:909:909:1::5") {
		for _, r := range []Scope{LocalScope, PublicScope} {
			accessCheck(t, d, r, address, 2019, false)
			accessCheck(t, d, r, address, 2020, true)
		}
	}
}

func TestRulesOfDestinations(t *testing.T) {
	const opens, byDefault = "opens", "default"
	for _, tc := range []struct {
		rules string
		scope Scope
		name  string // "": the address itself
		to    string
		want  string // opens, or the rule that denies
	}{
		// The first matching rule decides.
		{"deny 192.0.2.0/24\nallow 192.0.2.1", LocalScope, "", "192.0.2.1:80", "deny 192.0.2.0/24"},
		{"allow 192.0.2.1\ndeny 192.0.2.0/24", PublicScope, "", "192.0.2.1:80", opens},
		{"allow 192.0.2.1\ndeny 192.0.2.0/24", PublicScope, "", "192.0.2.2:80", "deny 192.0.2.0/24"},
		{"deny 8.8.8.8 1.1.1.1", PublicScope, "", "1.1.1.1:80", "deny 1.1.1.1/32"},
		{"deny 8.8.8.8", PublicScope, "", "1.1.1.1:80", opens},
		{"", PublicScope, "", "1.1.1.1:80", opens},
		{"", PublicScope, "", "10.0.0.1:80", byDefault},
		{"", LocalScope, "", "10.0.0.1:80", opens},

		// Names.
		{"deny ads.example", PublicScope, "ads.example", "1.1.1.1:80", "deny ads.example"},
		{"deny ads.example", PublicScope, "www.ads.example", "1.1.1.1:80", opens},
		{"deny ads.example", PublicScope, "", "1.1.1.1:80", opens},
		{"deny ADS.Example.", PublicScope, "ads.example", "1.1.1.1:80", "deny ads.example"},
		{"deny *.ads.example", PublicScope, "ads.example", "1.1.1.1:80", opens},
		{"deny *.ads.example", PublicScope, "a.ads.example", "1.1.1.1:80", "deny *.ads.example"},
		{"deny *.ads.example", PublicScope, "a.b.ads.example", "1.1.1.1:80", "deny *.ads.example"},
		{"deny *.ads.example", PublicScope, "bads.example", "1.1.1.1:80", opens},
		{"deny *.example", PublicScope, "a.b.ads.example", "1.1.1.1:80", "deny *.example"},
		{"deny münchen.example", PublicScope, "xn--mnchen-3ya.example", "1.1.1.1:80", "deny xn--mnchen-3ya.example"},
		{"allow www.ads.example\ndeny *.ads.example", PublicScope, "www.ads.example", "1.1.1.1:80", opens},
		{"allow www.ads.example\ndeny *.ads.example", PublicScope, "ftp.ads.example", "1.1.1.1:80", "deny *.ads.example"},

		// Allowing a name opens no address that is otherwise closed.
		{"allow wiki.example", PublicScope, "wiki.example", "10.0.0.1:80", byDefault},
		{"allow wiki.example", LocalScope, "wiki.example", "10.0.0.1:80", opens},
		{"allow wiki.example", LocalScope, "wiki.example", "169.254.169.254:80", byDefault},
		{"allow wiki.example 10.0.0.0/8", PublicScope, "wiki.example", "10.0.0.1:80", opens},
		{"allow wiki.example\nallow 10.0.0.0/8", PublicScope, "wiki.example", "10.0.0.1:80", opens},
		{"allow wiki.example\ndeny 1.1.1.0/24", PublicScope, "wiki.example", "1.1.1.1:80", "deny 1.1.1.0/24"},
		{"allow wiki.example\ndeny all", PublicScope, "wiki.example", "1.1.1.1:80", opens},
		{"allow wiki.example\ndeny all", PublicScope, "wiki.example", "10.0.0.1:80", byDefault},
		{"allow wiki.example 10.0.0.0/8\ndeny all", PublicScope, "wiki.example", "10.0.0.1:80", opens},
		{"allow wiki.example 10.0.0.0/8\ndeny all", PublicScope, "other.example", "10.0.0.1:80", opens},
		{"allow wiki.example\ndeny all", PublicScope, "other.example", "1.1.1.1:80", "deny all"},
		{"allow wiki.example\ndeny all", PublicScope, "", "1.1.1.1:80", "deny all"},
		{"allow 1.1.1.1\ndeny all", PublicScope, "other.example", "1.1.1.1:80", opens},
		{"allow 1.1.1.1\ndeny all", PublicScope, "", "8.8.8.8:80", "deny all"},

		// Classes.
		{"allow all", PublicScope, "", "10.0.0.1:80", byDefault},
		{"allow all", PublicScope, "x.example", "10.0.0.1:80", byDefault},
		{"allow all", PublicScope, "x.example", "1.1.1.1:80", opens},
		{"allow private", PublicScope, "", "10.0.0.1:80", opens},
		{"allow private", PublicScope, "", "127.0.0.1:80", opens},
		{"allow private", PublicScope, "", "[fd00::1]:80", opens},
		{"allow private", PublicScope, "", "169.254.169.254:80", byDefault},
		{"allow private", LocalScope, "", "0.0.0.0:80", byDefault},
		{"allow private\ndeny all", PublicScope, "", "1.1.1.1:80", "deny all"},
		{"allow public\ndeny all", LocalScope, "", "1.1.1.1:80", opens},
		{"allow public\ndeny all", LocalScope, "", "127.0.0.1:80", "deny all"},
		{"deny private", LocalScope, "", "127.0.0.1:80", "deny private"},
		{"deny private", LocalScope, "x.example", "[64:ff9b::a00:1]:80", "deny private"},
		{"deny private", LocalScope, "", "1.1.1.1:80", opens},
		{"deny public", LocalScope, "", "1.1.1.1:80", "deny public"},
		{"deny public", LocalScope, "", "127.0.0.1:80", opens},
		{"allow private_ranges", PublicScope, "", "192.168.1.1:80", opens},

		// Metadata services.
		{"allow private", PublicScope, "", "[fd00:ec2::254]:80", byDefault},
		{"allow private_ranges", PublicScope, "", "[fd00:ec2::254]:80", byDefault},
		{"allow private", PublicScope, "", "100.100.100.200:80", byDefault},
		{"allow 100.64.0.0/10", PublicScope, "", "100.100.100.200:80", byDefault},
		{"allow 100.64.0.0/10", PublicScope, "", "100.100.100.201:80", opens},
		{"allow 0.0.0.0/0 ::/0", PublicScope, "", "168.63.129.16:80", byDefault},
		{"allow 0.0.0.0/0 ::/0", PublicScope, "", "169.254.169.254:80", byDefault},
		{"allow 0.0.0.0/0 ::/0", PublicScope, "", "[64:ff9b::a9fe:a9fe]:80", byDefault},
		{"allow 168.63.129.16", PublicScope, "", "168.63.129.16:80", opens},
		{"allow 169.254.0.0/16 169.254.169.254", PublicScope, "", "169.254.169.254:80", opens},
		{"allow 169.254.169.254", PublicScope, "metadata.example", "169.254.169.254:80", opens},
		{"allow 169.254.169.254", PublicScope, "", "[64:ff9b::a9fe:a9fe]:80", opens},
		{"allow all", LocalScope, "metadata.example", "192.0.0.192:80", byDefault},
		{"", LocalScope, "", "192.0.0.192:80", byDefault},
		{"", LocalScope, "", "[fd20:ce::254]:80", byDefault},
		{"deny 100.64.0.0/10", LocalScope, "", "100.100.100.200:80", "deny 100.64.0.0/10"},
		{"deny private", LocalScope, "", "100.100.100.200:80", "deny private"},

		// Addresses embedded in others.
		{"deny 1.1.1.0/24", PublicScope, "", "[64:ff9b::101:101]:80", "deny 1.1.1.0/24"},
		{"deny 1.1.1.0/24", PublicScope, "", "[2002:101:101::]:80", "deny 1.1.1.0/24"},
		{"deny 1.1.1.0/24", PublicScope, "", "[::ffff:1.1.1.1]:80", "deny 1.1.1.0/24"},
		{"deny ::ffff:1.1.1.1", PublicScope, "", "1.1.1.1:80", "deny 1.1.1.1/32"},
		{"deny ::ffff:1.1.1.0/120", PublicScope, "", "1.1.1.1:80", "deny 1.1.1.0/24"},
		{"deny 64:ff9b::/96", PublicScope, "", "[64:ff9b::101:101]:80", "deny 64:ff9b::/96"},

		// Ports.
		{"deny x.example:80", PublicScope, "x.example", "1.1.1.1:80", "deny x.example:80"},
		{"deny x.example:80", PublicScope, "x.example", "1.1.1.1:443", opens},
		{"deny all:1-1023\nallow all", PublicScope, "", "1.1.1.1:1023", "deny all:1-1023"},
		{"deny all:1-1023\nallow all", PublicScope, "", "1.1.1.1:1024", opens},
		{"allow all:443\ndeny all", PublicScope, "x.example", "1.1.1.1:443", opens},
		{"allow all:443\ndeny all", PublicScope, "x.example", "1.1.1.1:80", "deny all"},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", PublicScope, "", "10.0.0.1:443", opens},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", PublicScope, "", "[fd00::1]:443", opens},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", PublicScope, "", "[fd00::]:85", opens},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", PublicScope, "", "[fd00::]:91", byDefault},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", PublicScope, "", "10.0.0.1:80", byDefault},
		{"", PublicScope, "", "1.1.1.1:25", "ports"},
		{"allow all 1.1.1.1:25", PublicScope, "", "1.1.1.1:25", "ports"},
		{"ports 25", PublicScope, "", "1.1.1.1:25", opens},
		{"ports 80 8000-8999", PublicScope, "", "1.1.1.1:8500", opens},
		{"ports 80 8000-8999", PublicScope, "", "1.1.1.1:443", "ports"},
		{"ports 80 8000-8999\nallow 1.1.1.1:443", PublicScope, "", "1.1.1.1:443", "ports"},
	} {
		p := policyOf(t, tc.rules)
		to := netip.MustParseAddrPort(tc.to)
		asked := hostport.Target{Name: tc.name, Port: to.Port()}
		if tc.name == "" {
			asked.Addr = to.Addr()
		}
		got := opens
		if denied := p.Check(t.Context(), tc.scope, asked, to).Denied; denied != nil {
			if got = denied.Rule; got == "" {
				got = byDefault
			}
		}
		if got != tc.want {
			t.Errorf("%q: %q at %s for scope %d: %s, want %s", tc.rules, tc.name, tc.to, tc.scope, got, tc.want)
		}
		// Checking the name alone may save a lookup but must not change the outcome.
		if early := p.CheckName(t.Context(), tc.scope, asked, true).Denied; early != nil && got == opens {
			t.Errorf("%q: the name %q is denied by %s, its address is not", tc.rules, tc.name, early.Rule)
		}
	}
}

// TestRulesWithoutResolving covers names that a parent proxy resolves.
func TestRulesWithoutResolving(t *testing.T) {
	for _, tc := range []struct {
		rules, address string
		scope          Scope
		open           bool
	}{
		{"", "x.example:80", PublicScope, true},
		{"", "x.example:25", PublicScope, false},
		{"", "10.0.0.1:80", PublicScope, false},
		{"", "10.0.0.1:80", LocalScope, true},
		{"", "169.254.169.254:80", LocalScope, false},
		{"", "[::ffff:10.0.0.1]:80", PublicScope, false},
		{"", "localhost:80", PublicScope, false},
		{"", "LOCALHOST.:80", PublicScope, false},
		{"", "x.localhost:80", PublicScope, false},
		{"", "localhost:80", LocalScope, true},
		{"deny x.example", "X.example.:80", PublicScope, false},
		{"deny x.example", "y.example:80", PublicScope, true},
		{"deny all", "y.example:80", PublicScope, false},
		{"allow *.example\ndeny all", "y.example:80", PublicScope, true},
		{"allow *.example\ndeny all", "y.test:80", PublicScope, false},
		{"allow 1.1.1.1\ndeny all", "y.test:80", PublicScope, false}, // unknown: the address would decide
		{"allow 1.1.1.1\ndeny all", "1.1.1.1:80", PublicScope, true},
		{"deny 1.1.1.1", "y.test:80", PublicScope, true}, // likewise unknown
		{"deny 1.1.1.1", "1.1.1.1:80", PublicScope, false},
		{"allow private", "10.0.0.1:80", PublicScope, true},
	} {
		p := policyOf(t, tc.rules)
		if denied := p.CheckName(t.Context(), tc.scope, hostport.TargetOf(tc.address), false).Denied; (denied == nil) != tc.open {
			t.Errorf("%q: %s for scope %d: %v, want it open: %v", tc.rules, tc.address, tc.scope, denied, tc.open)
		}
	}
}

// TestRulesReportOnly checks that denials by rules and ports are reported, and that
// checking continues as if those rules did not exist.
func TestRulesReportOnly(t *testing.T) {
	for _, tc := range []struct {
		rules, name, to, reported string
		open                      bool
	}{
		{"deny all", "x.example", "1.1.1.1:80", "deny all", true},
		{"deny all", "x.example", "10.0.0.1:80", "", false}, // closed by default
		{"deny 1.1.1.1\ndeny all", "", "1.1.1.1:80", "deny 1.1.1.1/32", true},
		{"ports 443", "", "1.1.1.1:80", "ports", true},
		{"", "", "1.1.1.1:80", "", true},
		{"deny 10.0.0.1\nallow 10.0.0.0/8", "", "10.0.0.1:80", "deny 10.0.0.1/32", true},
	} {
		p := policyOf(t, "report_only rules\n"+tc.rules)
		to := netip.MustParseAddrPort(tc.to)
		v := p.Check(t.Context(), PublicScope, hostport.Target{Name: tc.name, Port: to.Port()}, to)
		rule := ""
		if v.Reported != nil {
			rule = v.Reported.Rule
		}
		if (v.Denied == nil) != tc.open || rule != tc.reported {
			t.Errorf("%q: %s: %v, reported %q; want open %v, reported %q", tc.rules, tc.to, v.Denied, rule, tc.open, tc.reported)
		}
		if early := p.CheckName(t.Context(), PublicScope, hostport.Target{Name: tc.name, Port: to.Port()}, true).Denied; early != nil {
			t.Errorf("%q: the name alone is denied: %v", tc.rules, early)
		}
	}
}

// TestVerdictRule checks which rule a verdict names, by the target's name alone and by its address.
func TestVerdictRule(t *testing.T) {
	for _, tc := range []struct{ rules, name, to, byName, byAddress string }{
		{"allow *.example.com:443\ndeny all", "a.example.com", "1.1.1.1:443", "allow *.example.com:443", "allow *.example.com:443"},
		{"allow a.example.com\ndeny all", "A.example.com", "1.1.1.1:443", "allow a.example.com", "allow a.example.com"},
		{"allow a.example.com\ndeny 1.1.0.0/16\ndeny all", "a.example.com", "1.1.1.1:443", "allow a.example.com", "deny 1.1.0.0/16"},
		{"allow 10.0.0.0/8\nallow 10.1.0.0/16:443\ndeny all", "x.example", "10.1.2.3:443", "", "allow 10.0.0.0/8"},
		{"allow 10.0.0.0/8 10.1.0.0/16\ndeny all", "x.example", "10.1.2.3:443", "", "allow 10.1.0.0/16"},
		{"allow 10.0.0.0/8\ndeny all", "x.example", "[64:ff9b::a00:1]:443", "", "allow 10.0.0.0/8"},
		{"allow [fd00::/8]:443\ndeny all", "x.example", "[fd00::1]:443", "", "allow fd00::/8:443"},
		{"allow 169.254.169.254\ndeny all", "", "169.254.169.254:80", "", "allow 169.254.169.254/32"},
		{"allow public\ndeny all", "x.example", "1.1.1.1:443", "", "allow public"},
		{"deny ads.example", "ads.example", "1.1.1.1:443", "deny ads.example", "deny ads.example"},
		{"deny ads.example", "x.example", "1.1.1.1:443", "", ""},
		{"ports 443", "x.example", "1.1.1.1:80", "ports", "ports"},
	} {
		p := policyOf(t, tc.rules)
		to := netip.MustParseAddrPort(tc.to)
		asked := hostport.Target{Name: strings.ToLower(tc.name), Port: to.Port()}
		if tc.name == "" {
			asked.Addr = to.Addr()
		}
		early, late := p.CheckName(t.Context(), PublicScope, asked, true), p.Check(t.Context(), PublicScope, asked, to)
		if early.Rule() != tc.byName || late.Rule() != tc.byAddress {
			t.Errorf("%q: %s %s: by name %q, by address %q; want %q, %q", tc.rules, tc.name, tc.to, early.Rule(), late.Rule(), tc.byName, tc.byAddress)
		}
	}
}

// TestRulesLookup checks that thousands of entries cost no memory per check and hardly any
// time.
func TestRulesLookup(t *testing.T) {
	p := manyRules(t)
	to := netip.MustParseAddrPort("1.2.3.4:443")
	asked := hostport.Target{Name: "a.b.c.example.com", Port: 443}
	ctx := context.Background()
	if n := testing.AllocsPerRun(100, func() { _ = p.Check(ctx, PublicScope, asked, to) }); n > 0 {
		t.Errorf("%v allocations for a check, want none", n)
	}
}

func manyRules(t testing.TB) *Control {
	var b strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&b, "deny 20.%d.%d.0/24\n", i/256, i%256)
	}
	for i := range 1000 {
		fmt.Fprintf(&b, "deny *.d%d.example\n", i)
	}
	return policyOf(t, b.String())
}

func BenchmarkRules(b *testing.B) {
	p := manyRules(b)
	ctx := context.Background()
	asked := hostport.Target{Name: "www.d999.example.com", Port: 443}
	for name, address := range map[string]string{"IPv4": "30.2.3.4:443", "IPv6": "[2606:4700::1]:443"} {
		to := netip.MustParseAddrPort(address)
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if denied := p.Check(ctx, PublicScope, asked, to).Denied; denied != nil {
					b.Fatal(denied)
				}
			}
		})
	}
}
