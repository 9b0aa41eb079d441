// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gaissmai/bart"
)

// lookInterval is how long an answer of the system about its addresses and
// sockets is trusted: asking it for each connection would cost too much.
const lookInterval = time.Second

// interfaces is what the network interfaces of this machine looked like when
// the system was last asked.
type interfaces struct {
	addresses map[netip.Addr]bool
	networks  bart.Lite // the networks of these addresses
	asked     time.Time
}

var (
	knownInterfaces  atomic.Pointer[interfaces]
	askingInterfaces sync.Mutex
)

// currentInterfaces returns what is known of the interfaces, at most
// lookInterval old if the system tells, or nil if it never has. While one
// goroutine asks the system the others go on with the last answer.
func currentInterfaces() *interfaces {
	known := knownInterfaces.Load()
	if known != nil && (time.Since(known.asked) < lookInterval || !askingInterfaces.TryLock()) {
		return known
	}
	if known == nil {
		askingInterfaces.Lock()
	}
	defer askingInterfaces.Unlock()
	list, err := net.InterfaceAddrs()
	if err != nil { // such as for want of descriptors
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

// isOwnAddress reports whether ip is an address of this machine. If the system
// does not tell, every address is taken for one: then the proxy denies too much
// rather than too little.
func isOwnAddress(ip netip.Addr) bool {
	known := currentInterfaces()
	return known == nil || known.addresses[ip]
}

// isNearby reports whether ip is an address of this machine or of a network that
// one of its interfaces is in. The machine reaches such a host without passing
// the firewall that protects it from everybody else, even if the address itself
// is public.
func isNearby(ip netip.Addr) bool {
	known := currentInterfaces()
	return known == nil || known.networks.Contains(ip)
}
