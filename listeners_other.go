// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import "net/netip"

// socketCache is empty: this system does not tell on which sockets Caddy listens.
type socketCache struct{}

// listenersAt returns the addresses on which Caddy listens for connections to an address.
// On this system it misses listeners that the config names by an unusual spelling of their
// address, by a host name or by a file descriptor.
func (*socketCache) listenersAt(to netip.AddrPort, _ bool) []netip.AddrPort { return usedListeners(to) }
