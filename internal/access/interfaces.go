// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gaissmai/bart"
)

// SystemCacheTTL is how long information from the system about its addresses and sockets is
// cached: asking for each connection would cost too much.
const SystemCacheTTL = time.Second

// interfaces is a snapshot of the addresses of this machine's network interfaces.
type interfaces struct {
	addresses map[netip.Addr]bool
	networks  bart.Lite // the networks of these addresses
	asked     time.Time
}

var (
	knownInterfaces  atomic.Pointer[interfaces]
	askingInterfaces sync.Mutex
)

// currentInterfaces returns a snapshot of the interfaces that is about SystemCacheTTL old at
// most, unless asking the system fails; then it returns the last snapshot, or nil if there
// is none. While one goroutine asks the system, the others use the last snapshot.
func currentInterfaces() *interfaces {
	known := knownInterfaces.Load()
	if known != nil && (time.Since(known.asked) < SystemCacheTTL || !askingInterfaces.TryLock()) {
		return known
	}
	if known == nil {
		askingInterfaces.Lock()
	}
	defer askingInterfaces.Unlock()
	list, err := net.InterfaceAddrs()
	if err != nil { // such as when there are no descriptors left
		return known
	}
	known = newInterfaces(list)
	knownInterfaces.Store(known)
	return known
}

func newInterfaces(list []net.Addr) *interfaces {
	known := &interfaces{addresses: make(map[netip.Addr]bool), asked: time.Now()}
	for _, addr := range list {
		ipnet, ok := addr.(*net.IPNet)
		if !ok {
			continue
		}
		ip, ok := netip.AddrFromSlice(ipnet.IP)
		if !ok {
			continue
		}
		ip = ip.Unmap()
		known.addresses[ip] = true
		bits, of := ipnet.Mask.Size()
		if of == 128 && ip.Is4() {
			bits -= 96
		}
		if bits > 0 { // 0 would make the whole Internet this machine's network
			known.networks.Insert(netip.PrefixFrom(ip, bits).Masked())
		}
	}
	return known
}

// IsOwnAddress reports whether ip is an address of this machine. If the system's addresses
// are unknown, it returns true, so that the proxy denies too much rather than too little.
func IsOwnAddress(ip netip.Addr) bool {
	known := currentInterfaces()
	return known == nil || known.addresses[ip]
}

// isNearby reports whether ip is in the network of one of this machine's interfaces. From
// here such a host is reached without passing the firewall that protects it from the rest
// of the Internet, even if its address is public.
func isNearby(ip netip.Addr) bool {
	known := currentInterfaces()
	return known == nil || known.networks.Contains(ip)
}
