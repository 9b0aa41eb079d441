// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package client

import (
	"net/netip"
	"testing"
)

func TestNetwork(t *testing.T) {
	for _, tc := range []struct {
		v4, v6     int
		addr, want string
	}{
		{32, 64, "192.0.2.1", "192.0.2.1"},
		{24, 64, "192.0.2.129", "192.0.2.0"},
		{25, 64, "192.0.2.129", "192.0.2.128"},
		{1, 64, "192.0.2.129", "128.0.0.0"},
		{32, 64, "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"},
		{32, 128, "2001:db8:1:2:3:4:5:6", "2001:db8:1:2:3:4:5:6"},
		{32, 48, "2001:db8:1:2:3:4:5:6", "2001:db8:1::"},
		{32, 1, "ffff::1", "8000::"},
		{32, 64, "::1", "::"},
		{32, 64, "::ffff:192.0.2.1", "192.0.2.1"},
		{24, 64, "::ffff:192.0.2.129", "192.0.2.0"},
		{32, 64, "fe80::1:2:3:4%eth0", "fe80::"},
		{32, 128, "fe80::1%eth0", "fe80::1"},
	} {
		addr, want := netip.MustParseAddr(tc.addr), Address(netip.MustParseAddr(tc.want))
		if got := Network(addr, tc.v4, tc.v6); got != want {
			t.Errorf("Network(%v, %d, %d) = %v, want %v", addr, tc.v4, tc.v6, got, want)
		}
	}
	if got := Network(netip.Addr{}, 24, 64); got != (Key{}) {
		t.Errorf("without an address: %v, want the zero Key", got)
	}
}

// TestUsersAreNoAddresses checks that the key of a user equals that of no address, though it
// is stored as one.
func TestUsersAreNoAddresses(t *testing.T) {
	alice := User("alice")
	if alice.User() != "alice" || alice.Addr().IsValid() {
		t.Errorf("alice has name %q and address %v, want her name and no address", alice.User(), alice.Addr())
	}
	for _, s := range []string{"::", "::%alice", "::1%alice"} {
		addr := netip.MustParseAddr(s)
		for _, k := range []Key{Address(addr), Network(addr, 32, 128), Network(addr, 32, 64)} {
			if k == alice || k.User() != "" || !k.Addr().IsValid() {
				t.Errorf("%s: the key is %v, want an address", s, k)
			}
		}
	}
	if alice == User("bob") || alice != User("ali"+"ce") {
		t.Error("users are not told apart by their names")
	}
}

func TestVariant(t *testing.T) {
	seen := map[Key]bool{}
	for _, k := range []Key{{}, Address(netip.MustParseAddr("192.0.2.1")), Address(netip.MustParseAddr("2001:db8::1"))} {
		for _, k := range []Key{k, k.Variant("a"), k.Variant("b")} {
			if seen[k] {
				t.Errorf("%v is the key of two clients or variants", k)
			}
			seen[k] = true
		}
	}
}

func TestParse(t *testing.T) {
	for s, want := range map[string]struct{ name, masked string }{
		"192.0.2.77":           {"192.0.2.77", "192.0.2.0/24"},
		"192.0.2.0/25":         {"192.0.2.0", "192.0.2.0/24"},
		"2001:db8:1:2::/64":    {"2001:db8:1:2::", "2001:db8:1::/48"},
		"2001:db8:1:2:3:4:5:6": {"2001:db8:1:2:3:4:5:6", "2001:db8:1::/48"},
		"::1":                  {"::1", "::/48"},
		"unix":                 {"unix", "unix"},
		"user alice":           {"user alice", "user"},
		"user 192.0.2.1":       {"user 192.0.2.1", "user"},
	} {
		k, err := Parse(s)
		if err != nil || k.String() != want.name || k.Masked() != want.masked {
			t.Errorf("Parse(%q) = %v, masked %s, %v; want %s, masked %s", s, k, k.Masked(), err, want.name, want.masked)
		}
		if again, err := Parse(k.String()); err != nil || again != k {
			t.Errorf("Parse(%q) = %v, %v; want %v", k.String(), again, err, k)
		}
	}
	for _, s := range []string{"", "user ", "alice", "fe80::1%eth0", "192.0.2.0/33", "Unix"} {
		if k, err := Parse(s); err == nil {
			t.Errorf("Parse(%q) = %v, want an error", s, k)
		}
	}
}

func TestKeysAllocateNothing(t *testing.T) {
	addr := netip.MustParseAddr("2001:db8::1")
	if n := testing.AllocsPerRun(100, func() {
		if Network(addr, 32, 64).User() != "" {
			t.Error("a user")
		}
	}); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}
