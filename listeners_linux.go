// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"golang.org/x/sys/unix"
)

// sockets are those on which Caddy listens, by port, as the kernel knows them,
// however a config spells the address.
type sockets struct {
	at     map[uint16][]socket
	looked time.Time
	config *time.Time // that was running then
}

type socket struct {
	fd   int
	addr netip.AddrPort
}

// To look for sockets costs a system call for each descriptor. Those of a new
// config are known at once, those that a module opens later after lookInterval.
var (
	knownSockets atomic.Pointer[sockets]
	lookingMu    sync.Mutex
)

// listenersAt returns where Caddy listens at the port of an address.
func listenersAt(to netip.AddrPort) (found []netip.AddrPort) {
	known := knownSockets.Load()
	if !known.fresh() {
		lookingMu.Lock()
		defer lookingMu.Unlock()
		if known = knownSockets.Load(); !known.fresh() {
			var err error
			if known, err = lookForSockets(); err != nil {
				return usedListeners(to) // there is no /proc
			}
			knownSockets.Store(known)
		}
	}
	for _, s := range known.at[to.Port()] {
		if addr, ok := listensAt(s.fd); ok && addr == s.addr { // still
			found = append(found, addr)
		}
	}
	return found
}

func (s *sockets) fresh() bool {
	return s != nil && s.config == configLoaded.Load() && time.Since(s.looked) < lookInterval
}

func lookForSockets() (*sockets, error) {
	s := &sockets{at: make(map[uint16][]socket), looked: time.Now(), config: configLoaded.Load()}
	n, err := descriptorSlots()
	if err != nil {
		return nil, err
	}
	for fd := range n {
		if addr, ok := listensAt(fd); ok {
			s.at[addr.Port()] = append(s.at[addr.Port()], socket{fd, addr})
		}
	}
	return s, nil
}

// listensAt returns the address of a descriptor that is a listening socket of
// Caddy's: of those that it makes each can be shared with the next config, and
// those that it was given have their descriptor as their address.
func listensAt(fd int) (addr netip.AddrPort, ok bool) {
	if listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listening == 0 {
		return addr, false
	}
	if shared, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT); err != nil ||
		shared == 0 && caddy.ListenerUsage("fd", strconv.Itoa(fd)) == 0 {
		return addr, false
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return addr, false
	}
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(name.Addr), uint16(name.Port)), true
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(name.Addr).Unmap(), uint16(name.Port)), true
	}
	return addr, false
}

// descriptorSlots returns a number that is greater than all descriptors.
func descriptorSlots() (int, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, found := strings.Cut(string(status), "\nFDSize:")
	if !found {
		return 0, errors.New("the kernel does not tell")
	}
	line, _, _ := strings.Cut(rest, "\n")
	return strconv.Atoi(strings.TrimSpace(line))
}
