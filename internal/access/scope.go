// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"net/netip"

	"github.com/gaissmai/bart"
)

// Scope says which addresses a client may reach by default: those that it could reach
// without the proxy.
type Scope int

// The scopes, from narrow to wide.
const (
	PublicScope Scope = iota // public unicast addresses outside this machine's networks: for any client
	LocalScope               // this machine and its networks as well: for clients on this machine
	ScopeCount               // the number of scopes
)

// includes reports whether an address is in the scope. ip is not v4-mapped and has no zone;
// inner is the IPv4 address that ip embeds, or else ip. Both must be in the scope, except
// that for the public NAT64 prefix only inner counts.
func (r Scope) includes(ip, inner netip.Addr) bool {
	return r.reaches(inner) && (ip == inner || nat64.Contains(ip) || r.reaches(ip))
}

// reaches is includes for an address alone, whatever it embeds.
func (r Scope) reaches(ip netip.Addr) bool {
	if r == LocalScope {
		return !neverReachable.Contains(ip) && !isMetadata(ip)
	}
	return !notPublic.Contains(ip) && !isNearby(ip)
}

// notPublic contains the addresses that are not public unicast: those in IANA's special-purpose
// registries (RFC 6890), all of IPv6 outside global unicast (2000::/3), and Azure's
// 168.63.129.16, which belongs to the host of the virtual machine. neverReachable contains the
// addresses that even a client on this machine may not reach by default: link-local, multicast
// and broadcast ones, and unspecified ones, which are aliases of this machine.
var (
	notPublic = prefixes("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
		"172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
		"168.63.129.16/32", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
		"::/3", "4000::/2", "8000::/1", "2001::/23", "2001:db8::/32", "3fff::/20")
	neverReachable = prefixes("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32",
		"::/128", "fe80::/10", "ff00::/8", "2001::/32")

	// The metadata services that hand a machine its cloud credentials: AWS (also ECS
	// and EKS), Google, Azure, Oracle, OpenStack, Alibaba, Tencent and Scaleway.
	metadata = addressSet("169.254.169.254", "169.254.170.2", "169.254.170.23", "169.254.0.23", "169.254.42.42",
		"168.63.129.16", "192.0.0.192", "100.100.100.200",
		"fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fd00:42::42", "fe80::a9fe:a9fe")

	nat64          = netip.MustParsePrefix("64:ff9b::/96")    // RFC 6052
	localNAT64     = netip.MustParsePrefix("64:ff9b:1::/48")  // RFC 8215
	sixToFour      = netip.MustParsePrefix("2002::/16")       // RFC 3056
	ipv4Compatible = netip.MustParsePrefix("::/96")           // RFC 4291 §2.5.5.1
	ipv4Translated = netip.MustParsePrefix("::ffff:0:0:0/96") // RFC 2765
)

// EmbeddedIPv4 returns the IPv4 address that is embedded in an IPv6 address for a
// translator, relay or tunnel, in current or obsolete use, or else ip itself.
func EmbeddedIPv4(ip netip.Addr) netip.Addr {
	if ip.Is4() {
		return ip
	}
	b := ip.As16()
	last := netip.AddrFrom4([4]byte(b[12:]))
	switch {
	case nat64.Contains(ip), ipv4Translated.Contains(ip), ipv4Compatible.Contains(ip) && b[12] != 0:
		return last
	case sixToFour.Contains(ip):
		return netip.AddrFrom4([4]byte(b[2:6]))
	case localNAT64.Contains(ip) && [5]byte(b[11:]) == [5]byte{}: // the prefix has 48 bits
		return netip.AddrFrom4([4]byte{b[6], b[7], b[9], b[10]})
	case localNAT64.Contains(ip): // the prefix has 96 bits
		return last
	case b[8]&^2 == 0 && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe: // ISATAP, RFC 5214
		return last
	}
	return ip
}

// isMetadata reports whether addr is that of a cloud's metadata service.
func isMetadata(addr netip.Addr) bool { return metadata[addr] }

func addressSet(list ...string) map[netip.Addr]bool {
	set := make(map[netip.Addr]bool)
	for _, addr := range list {
		set[netip.MustParseAddr(addr)] = true
	}
	return set
}

func prefixes(cidrs ...string) *bart.Lite {
	table := new(bart.Lite)
	for _, c := range cidrs {
		table.Insert(netip.MustParsePrefix(c))
	}
	return table
}
