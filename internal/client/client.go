// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package client identifies the clients that share limits: those of an address, of a network, of
// a user, or all those without an address. It offers Key, which is small, comparable and needs
// no allocation, and the way clients are shown, entered and masked. It never knows which limits
// there are, or where an address came from.
package client

import (
	"fmt"
	"net/netip"
	"strings"
)

// Key identifies the clients that share limits. Keys are comparable. The zero Key stands for
// all clients without an address, such as those on a Unix socket.
type Key struct {
	addr netip.Addr // the address or the network's first; of a user: with the name as its zone
}

// Address returns the key of an address. A v4-mapped address counts as IPv4.
func Address(addr netip.Addr) Key { return Key{addr.Unmap().WithZone("")} }

// Network returns the key of addr's network, which has v4 bits if the address is IPv4 and v6
// bits otherwise. A v4-mapped address counts as IPv4.
func Network(addr netip.Addr, v4, v6 int) Key {
	k := Address(addr)
	bits := v6
	if k.addr.Is4() {
		bits = v4
	}
	if bits < k.addr.BitLen() {
		p, _ := k.addr.Prefix(bits) // fails only for a negative number of bits
		return Key{p.Addr()}
	}
	return k
}

// User returns the key of a user, whatever address the user has. The name must not be empty.
func User(name string) Key { return Key{netip.IPv6Unspecified().WithZone(name)} }

// Parse parses a client as String formats it. It also accepts a network in CIDR notation.
func Parse(s string) (Key, error) {
	if s == "unix" {
		return Key{}, nil
	}
	if user, ok := strings.CutPrefix(s, "user "); ok && user != "" {
		return User(user), nil
	}
	if prefix, err := netip.ParsePrefix(s); err == nil {
		return Key{prefix.Addr()}, nil
	}
	addr, err := netip.ParseAddr(s)
	if err != nil || addr.Zone() != "" {
		return Key{}, fmt.Errorf("%q is not a client: expected an address, a network or a user as the list of clients shows it", s)
	}
	return Key{addr}, nil
}

// User returns the name of the user, or "" if k identifies addresses.
func (k Key) User() string { return k.addr.Zone() }

// Addr returns the address, or the first one of the network. It is not valid for users and
// for clients without an address.
func (k Key) Addr() netip.Addr {
	if k.User() != "" {
		return netip.Addr{}
	}
	return k.addr
}

// Variant returns another key of the same address or network, for a separate limit. Keys of
// users have no variants.
func (k Key) Variant(name string) Key { return Key{netip.AddrFrom16(k.addr.As16()).WithZone(name)} }

// String returns how k is shown: as an address without the size of its network, or as
// "user" and a name.
func (k Key) String() string {
	if user := k.User(); user != "" {
		return "user " + user
	}
	return Name(k.addr)
}

// Masked returns how k is shown where clients must not be identifiable: as a network that many
// share, or as "user" without a name.
func (k Key) Masked() string {
	switch {
	case k.User() != "":
		return "user"
	case !k.addr.IsValid():
		return k.String()
	}
	bits := 48
	if k.addr.Is4() {
		bits = 24
	}
	p, _ := k.addr.Prefix(bits) // cannot fail: bits is within the address length
	return p.String()
}

// Name returns how a client's address is shown. A client without one is connected over a Unix
// socket.
func Name(addr netip.Addr) string {
	if !addr.IsValid() {
		return "unix"
	}
	return addr.String()
}
