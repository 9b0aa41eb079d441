// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import "net/netip"

// sharerSearch finds nothing: other systems do not let processes share a port, or have no way to
// find out.
type sharerSearch struct{}

func (*sharerSearch) reset() {}

func (*sharerSearch) find() []sharer { return nil }

func (*sharerSearch) twice() []netip.AddrPort { return nil }
