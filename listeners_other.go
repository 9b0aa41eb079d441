// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import "net/netip"

// listenersAt returns where Caddy listens for connections to an address. Only
// what it tells of that is known here: not a listener that the config
// names by another spelling of its address, by the name of a host or by a file
// descriptor.
func listenersAt(to netip.AddrPort, _ bool) []netip.AddrPort { return usedListeners(to) }
