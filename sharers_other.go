// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import "net/netip"

// otherListeners returns nil: other systems do not let processes share a port, or have no way to
// find out.
func otherListeners(netip.AddrPort) []string { return nil }
