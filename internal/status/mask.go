// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// maskClient returns the network of a client, or "user" for a user.
func maskClient(name string) string {
	key, err := client.Parse(name)
	if err != nil {
		return name
	}
	return key.Masked()
}

func (s *Snapshot) mask() {
	s.Clients.mask()
	s.Tunnels.mask()
	s.Refusals.mask()
}

func (l ClientList) mask() {
	for i := range l.Clients {
		l.Clients[i].Client = maskClient(l.Clients[i].Client)
	}
}

func (l TunnelList) mask() {
	for i := range l.Tunnels {
		l.Tunnels[i].Client, l.Tunnels[i].User = maskClient(l.Tunnels[i].Client), ""
	}
}
