// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import "net/netip"

// sharers returns nothing: on other systems processes cannot share a port, or
// there is no way to see it.
func sharers(netip.AddrPort) []string { return nil }
