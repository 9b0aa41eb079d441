// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// controlOf returns the control with these rules, one per line.
func controlOf(t *testing.T, rules string) *Control {
	t.Helper()
	var list []Rule
	for line := range strings.Lines(rules) {
		fields := strings.Fields(line)
		list = append(list, Rule{Action: fields[0], Destinations: fields[1:]})
	}
	sets, err := NewRuleSets(list, new(RuleCheck))
	if err != nil {
		t.Fatal(err)
	}
	return &Control{Sets: sets}
}

// TestAllowLine checks the line for a denied target: that it allows the target if it stands before
// the other rules, and that there is none where it would allow anything else.
func TestAllowLine(t *testing.T) {
	for _, row := range []struct{ rules, target, address, want string }{
		{"", "a.example:80", "10.0.0.1", "allow 10.0.0.1"},
		{"", "[64:ff9b::a00:1]:80", "64:ff9b::a00:1", "allow 10.0.0.1"}, // NAT64 of a private address
		{"", "[::808:808]:80", "::808:808", "allow ::808:808"},          // embeds a public one
		{"", "169.254.169.254:80", "169.254.169.254", "allow 169.254.169.254"},
		{"deny 8.8.0.0/16", "a.example:80", "8.8.8.8", "allow 8.8.8.8"},
		{"deny public", "a.example:80", "8.8.8.8", "allow 8.8.8.8"},
		{"deny *.example", "A.Example.:80", "8.8.8.8", "allow a.example"},
		{"deny all", "a_b-c.example:80", "8.8.8.8", "allow a_b-c.example"},
		{"deny all", "8.8.8.8:80", "8.8.8.8", "allow 8.8.8.8"},
		{"deny all", "all:80", "8.8.8.8", ""},
		{"deny all", "ALL.:80", "8.8.8.8", ""},
		{"deny all", "public:80", "8.8.8.8", ""},
		{"deny all", "private:80", "8.8.8.8", ""},
		{"deny all", "private_ranges:80", "8.8.8.8", ""},
		{"deny all", "*.com:80", "8.8.8.8", ""},
		{"deny all", "{$HOME}.example:80", "8.8.8.8", ""},
		{"deny all", "a b:80", "8.8.8.8", ""},
		{"", "a.example:25", "8.8.8.8", "ports 1-65535"},
	} {
		target, address := hostport.TargetOf(row.target), netip.MustParseAddr(row.address)
		judge := func(c *Control) *DeniedError {
			if v := c.CheckName(t.Context(), PublicScope, target, true); v.Denied != nil {
				return v.Denied
			}
			return c.Check(t.Context(), PublicScope, target, netip.AddrPortFrom(address, target.Port)).Denied
		}
		denied := judge(controlOf(t, row.rules))
		if denied == nil || denied.AllowLine() != row.want {
			t.Errorf("%q, %s: %v, the line %q, want %q", row.rules, row.target, denied, denied.AllowLine(), row.want)
			continue
		}
		if strings.HasPrefix(row.want, "allow") {
			if denied := judge(controlOf(t, row.want+"\n"+row.rules)); denied != nil {
				t.Errorf("%q, %s: with the line %q: %v", row.rules, row.target, row.want, denied)
			}
		}
	}
	if line := (*DeniedError)(nil).AllowLine(); line != "" {
		t.Errorf("no denial has the line %q", line)
	}
	ports := &Control{Ports: []PortRange{{80, 80}, {8000, 8999}}, Connect: []PortRange{{443, 443}}}
	if got := ports.CheckPort(t.Context(), 81).AllowLine(); got != "ports 80 8000-8999 81" {
		t.Errorf("the line is %q", got)
	}
	if got := ports.CheckPort(ports.WithConnect(t.Context()), 81).AllowLine(); got != "connect_ports 443 81" {
		t.Errorf("the line is %q", got)
	}
}
