// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"net"
	"net/netip"
	"syscall"
	"testing"
)

// The system may write an IPv4 network with a mask of 128 bits. A network of 0 bits would be the whole
// Internet.
func TestNetworksOfInterfaces(t *testing.T) {
	known := newInterfaces([]net.Addr{
		&net.IPNet{IP: net.IPv4(10, 1, 2, 3), Mask: net.CIDRMask(96+24, 128)},
		&net.IPNet{IP: net.IPv4(10, 2, 2, 3).To4(), Mask: net.CIDRMask(16, 32)},
		&net.IPNet{IP: net.ParseIP("fd00::1"), Mask: net.CIDRMask(64, 128)},
		&net.IPNet{IP: net.IPv4(10, 3, 0, 1).To4(), Mask: net.CIDRMask(0, 32)},
		&net.UnixAddr{},
	})
	for text, want := range map[string]struct{ own, nearby bool }{
		"10.1.2.3": {true, true}, "10.1.2.9": {false, true}, "10.1.3.1": {false, false},
		"10.2.2.3": {true, true}, "10.2.255.1": {false, true}, "10.4.0.1": {false, false},
		"fd00::1": {true, true}, "fd00::9": {false, true}, "fd00:1::1": {false, false},
		"10.3.0.1": {true, false},
	} {
		ip := netip.MustParseAddr(text)
		if own, nearby := known.addresses[ip], known.networks.Contains(ip); own != want.own || nearby != want.nearby {
			t.Errorf("%s: own %t, nearby %t; want %v", text, own, nearby, want)
		}
	}
}

// While the system cannot be asked, every address counts as this machine's.
func TestUnknownInterfaces(t *testing.T) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	known := knownInterfaces.Swap(nil)
	defer knownInterfaces.Store(known)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("198.51.100.1")
	own, nearby := IsOwnAddress(ip), isNearby(ip)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !own || !nearby {
		t.Errorf("without descriptors: own %t, nearby %t; want true", own, nearby)
	}
	if IsOwnAddress(ip) || isNearby(ip) {
		t.Error("with descriptors, the address is still this machine's")
	}
}
