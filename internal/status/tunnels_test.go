// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"net/netip"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// The query "client" of the list of tunnels matches what the list of clients shows.
func TestTunnelsOfAClient(t *testing.T) {
	tn := &tunnel.Tunnel{Client: netip.MustParseAddr("2001:db8::1"), User: "Alice", LimitKey: client.User("Alice"), Target: "example.com:443"}
	for part, want := range map[string]bool{"": true, "2001:db8": true, "alice": true, "user alice": true, "example": false, "bob": false} {
		if got := isClientOf(tn, part); got != want {
			t.Errorf("%q: %v, want %v", part, got, want)
		}
	}
}
