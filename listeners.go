// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// ownListeners knows the listeners of this very process at which no client of
// the proxy has any business: Caddy's admin endpoint, whose only protection is
// that strangers cannot reach it, the proxy itself, and listeners of other Caddy
// apps. Other sites of this Caddy are destinations like all others.
type ownListeners struct {
	ctx     caddy.Context
	self    *caddyhttp.Server
	running *atomic.Bool // all servers listen
}

// at reports whether a connection to an address would arrive at one of them.
// That of another machine, as most are, is told without looking for sockets.
func (o *ownListeners) at(to netip.AddrPort) bool {
	if ip := to.Addr(); !ip.IsLoopback() && !ip.IsUnspecified() && !isOwnAddress(ip) {
		return false
	}
	return o.have(to, func(ln netip.AddrPort) bool { return arrives(to, ln) })
}

// atPort reports whether one of them has the port.
func (o *ownListeners) atPort(port uint16) bool {
	return o.have(netip.AddrPortFrom(loopback4, port), func(netip.AddrPort) bool { return true })
}

// have reports whether the condition holds for one of the listeners that have
// the port of an address.
func (o *ownListeners) have(to netip.AddrPort, condition func(netip.AddrPort) bool) bool {
	return slices.ContainsFunc(listenersAt(to), func(ln netip.AddrPort) bool { return condition(ln) && !o.isSite(ln) })
}

// arrives reports whether a listener at ln gets connections to an address with
// the same port.
func arrives(to, ln netip.AddrPort) bool {
	ip, at := to.Addr(), ln.Addr()
	switch {
	case ip == at:
		return true
	case ip.IsUnspecified(): // the kernel takes it for loopback
		return at.IsLoopback() || at.IsUnspecified()
	}
	return at.IsUnspecified() && (ip.IsLoopback() || isOwnAddress(ip))
}

// isSite reports whether it is another HTTP server that listens at an address.
// Until all do, none is known.
func (o *ownListeners) isSite(ln netip.AddrPort) bool {
	app, err := o.ctx.AppIfConfigured("http")
	if err != nil || !o.running.Load() {
		return false
	}
	for _, server := range app.(*caddyhttp.App).Servers {
		if server != o.self && slices.ContainsFunc(server.Listeners(), func(l net.Listener) bool { return addrPort(l.Addr()) == ln }) {
			return true
		}
	}
	return false
}

// usedListeners returns where Caddy listens for connections to an address, so
// far as the ways are known in which a config may spell that.
func usedListeners(to netip.AddrPort) (found []netip.AddrPort) {
	port := strconv.Itoa(int(to.Port()))
	for _, ln := range [...]struct {
		host string
		addr netip.Addr
	}{
		{"", netip.IPv6Unspecified()}, {"::", netip.IPv6Unspecified()}, {"0.0.0.0", netip.IPv4Unspecified()},
		{"localhost", loopback4}, {"localhost", netip.IPv6Loopback()},
		{"127.0.0.1", loopback4}, {"::1", netip.IPv6Loopback()}, {to.Addr().String(), to.Addr()},
	} {
		for _, network := range [...]string{"tcp", "tcp4", "tcp6"} {
			if caddy.ListenerUsage(network, net.JoinHostPort(ln.host, port)) > 0 {
				found = append(found, netip.AddrPortFrom(ln.addr, to.Port()))
			}
		}
	}
	return found
}

// lookInterval is how long what the system has told of addresses and sockets is
// taken to be so: to ask costs too much to do it for each connection.
const lookInterval = time.Second

// addresses are this machine's, as they were when it was asked.
type addresses struct {
	own    map[netip.Addr]bool
	looked time.Time
}

var knownAddresses atomic.Pointer[addresses]

// isOwnAddress reports whether ip is one of this machine's.
func isOwnAddress(ip netip.Addr) bool {
	known := knownAddresses.Load()
	if known == nil || time.Since(known.looked) >= lookInterval {
		list, err := net.InterfaceAddrs()
		if err != nil {
			return true // rather refuse too much
		}
		known = &addresses{make(map[netip.Addr]bool), time.Now()}
		for _, addr := range list {
			if ipnet, ok := addr.(*net.IPNet); ok {
				own, _ := netip.AddrFromSlice(ipnet.IP)
				known.own[own.Unmap()] = true
			}
		}
		knownAddresses.Store(known)
	}
	return known.own[ip]
}
