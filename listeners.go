// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net"
	"net/netip"
	"strconv"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// ownListeners returns a function that reports whether a connection to an
// address would arrive at this very process where no client of the proxy has
// any business: at Caddy's admin endpoint, whose only protection is that
// strangers cannot reach it, at the proxy itself, or at a listener of another
// Caddy app. Other sites of this Caddy are destinations like all others.
func ownListeners(ctx caddy.Context, self *caddyhttp.Server) func(netip.AddrPort) bool {
	// The other servers are known when all are provisioned, hence at the
	// first request.
	sites := sync.OnceValue(func() map[string]bool { return siteAddresses(ctx, self) })

	return func(to netip.AddrPort) bool {
		port := strconv.Itoa(int(to.Port()))
		listening := func(hosts ...string) bool {
			for _, host := range hosts {
				for _, network := range [...]string{"tcp", "tcp4", "tcp6"} {
					address := net.JoinHostPort(host, port)
					if caddy.ListenerUsage(network, address) > 0 && !sites()[address] {
						return true
					}
				}
			}
			return false
		}
		ip := to.Addr()
		switch {
		case ip.IsLoopback():
			return listening(ip.String(), "localhost", "", "0.0.0.0", "::")
		case ip.IsUnspecified(): // the kernel takes it for loopback
			return listening("127.0.0.1", "::1", "localhost", "", "0.0.0.0", "::")
		default:
			return listening(ip.String()) || (listening("", "0.0.0.0", "::") && isOwnAddress(ip))
		}
	}
}

// siteAddresses returns the addresses on which HTTP servers other than self
// listen, as caddy.ListenerUsage spells them.
func siteAddresses(ctx caddy.Context, self *caddyhttp.Server) map[string]bool {
	sites := make(map[string]bool)
	app, err := ctx.AppIfConfigured("http")
	if err != nil {
		return sites
	}
	for _, server := range app.(*caddyhttp.App).Servers {
		if server == self {
			continue
		}
		for _, listen := range server.Listen {
			addr, err := caddy.ParseNetworkAddress(listen)
			if err != nil {
				continue
			}
			for offset := range addr.PortRangeSize() {
				sites[addr.JoinHostPort(offset)] = true
			}
		}
	}
	return sites
}

// isOwnAddress reports whether ip is one of this machine's.
func isOwnAddress(ip netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return true // rather refuse too much
	}
	for _, addr := range addrs {
		if ipnet, ok := addr.(*net.IPNet); ok {
			if own, ok := netip.AddrFromSlice(ipnet.IP); ok && own.Unmap() == ip {
				return true
			}
		}
	}
	return false
}
