// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// protectedListeners knows the protected listeners of this process, to which the proxy connects
// no client: those of Caddy's admin endpoint and of the status page, which are often protected
// by nothing but their address, those of the proxy itself, and those of other Caddy apps. Other
// sites of this Caddy are destinations like any others.
type protectedListeners struct {
	ctx     caddy.Context
	self    *caddyhttp.Server
	running *atomic.Bool // all servers listen
}

// listensOn reports whether a connection to an address would arrive at a protected listener. For
// addresses of other machines, which most are, it needs no look at the sockets. Unless exact is set,
// it may miss a listener that was opened within the last access.SystemCacheTTL; that halves its cost.
func (o *protectedListeners) listensOn(to netip.AddrPort, exact bool) bool {
	if ip := to.Addr(); !ip.IsLoopback() && !ip.IsUnspecified() && !access.IsOwnAddress(ip) {
		return false
	}
	return o.anyListener(to, exact, func(ln netip.AddrPort) bool { return arrives(to, ln) })
}

// usesPort reports whether a protected listener has the port.
func (o *protectedListeners) usesPort(port uint16) bool {
	return o.anyListener(netip.AddrPortFrom(loopback4, port), true, func(netip.AddrPort) bool { return true })
}

// anyListener reports whether the condition holds for a protected listener with the port of an
// address.
func (o *protectedListeners) anyListener(to netip.AddrPort, exact bool, condition func(netip.AddrPort) bool) bool {
	return slices.ContainsFunc(program.sockets.listenersAt(to, exact), func(ln netip.AddrPort) bool { return condition(ln) && !o.isSite(ln) })
}

// arrives reports whether a listener at ln accepts connections to an address with the same
// port.
func arrives(to, ln netip.AddrPort) bool {
	ip, at := to.Addr(), ln.Addr()
	switch {
	case ip == at:
		return true
	case ip.IsUnspecified(): // the kernel connects to loopback
		return at.IsLoopback() || at.IsUnspecified()
	}
	return at.IsUnspecified() && (ip.IsLoopback() || access.IsOwnAddress(ip))
}

// isSite reports whether another HTTP server without a status page listens on an address.
// Until all servers listen, it returns false.
func (o *protectedListeners) isSite(ln netip.AddrPort) bool {
	app, err := o.ctx.AppIfConfigured("http")
	if err != nil || !o.running.Load() {
		return false
	}
	for _, server := range app.(*caddyhttp.App).Servers {
		if server != o.self && !servesStatus(server) && slices.ContainsFunc(server.Listeners(), func(l net.Listener) bool { return hostport.AddrPortOf(l.Addr()) == ln }) {
			return true
		}
	}
	return false
}

var loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// spellings are the usual ways in which a config may write the host of a listener that
// accepts connections to an address of this machine, and the address that it then listens
// on. In addition, the config may write the address itself.
var spellings = [...]struct {
	host string
	addr netip.Addr
}{
	{"", netip.IPv6Unspecified()}, {"::", netip.IPv6Unspecified()}, {"0.0.0.0", netip.IPv4Unspecified()},
	{"localhost", loopback4}, {"127.0.0.1", loopback4}, {"::1", netip.IPv6Loopback()},
}

// listenerCount returns how many listeners on the port of an address Caddy has counted
// under the usual spellings.
func listenerCount(to netip.AddrPort) (n int) {
	port := strconv.Itoa(int(to.Port()))
	for _, s := range spellings {
		n += caddy.ListenerUsage("tcp", net.JoinHostPort(s.host, port))
	}
	if ip := to.Addr(); ip != loopback4 && ip != netip.IPv6Loopback() && !ip.IsUnspecified() {
		n += caddy.ListenerUsage("tcp", net.JoinHostPort(ip.String(), port))
	}
	return n
}

// usedListeners returns the addresses on which Caddy listens for connections to an address.
// It finds only listeners that the config writes in one of the usual spellings.
func usedListeners(to netip.AddrPort) (found []netip.AddrPort) {
	port := strconv.Itoa(int(to.Port()))
	add := func(host string, addr netip.Addr) {
		for _, network := range [...]string{"tcp", "tcp4", "tcp6"} {
			if caddy.ListenerUsage(network, net.JoinHostPort(host, port)) > 0 {
				found = append(found, netip.AddrPortFrom(addr, to.Port()))
			}
		}
	}
	for _, s := range spellings {
		add(s.host, s.addr)
	}
	add("localhost", netip.IPv6Loopback())
	add(to.Addr().String(), to.Addr())
	return found
}
