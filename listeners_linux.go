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

// Looking for sockets costs a system call for each descriptor, so the result is
// kept for lookInterval unless something shows that it is out of date.
var (
	knownSockets atomic.Pointer[sockets]
	lookingMu    sync.Mutex
)

// listenersAt returns where Caddy listens at the port of an address. It asks the
// system anew when its last answer is old or no longer true; with exact, also when Caddy
// counts more listeners than the answer has.
func listenersAt(to netip.AddrPort, exact bool) []netip.AddrPort {
	if found, complete := knownSockets.Load().listening(to, exact); complete {
		return found
	}
	lookingMu.Lock()
	defer lookingMu.Unlock()
	if found, complete := knownSockets.Load().listening(to, exact); complete {
		return found
	}
	known, err := lookForSockets()
	if err != nil {
		return usedListeners(to) // there is no /proc
	}
	knownSockets.Store(known)
	found, complete := known.listening(to, exact)
	if !complete { // a listener was opened while the descriptors were looked at
		found = append(found, usedListeners(to)...)
	}
	return found
}

// listening returns the sockets that still listen at the port of an address, and
// reports whether these are all of them. They are not if one has been closed or
// Caddy counts more: a reload opens the new listener of the admin endpoint and
// closes the old one long before the config has started, or failed to.
func (s *sockets) listening(to netip.AddrPort, exact bool) (found []netip.AddrPort, complete bool) {
	if s == nil || s.config != configLoaded.Load() || time.Since(s.looked) >= lookInterval {
		return nil, false
	}
	complete = true
	for _, known := range s.at[to.Port()] {
		if addr, ok := listensAt(known.fd); ok && addr == known.addr {
			found = append(found, addr)
		} else {
			complete = false
		}
	}
	return found, complete && (!exact || listenerCount(to) <= len(found))
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
		return 0, errors.New("/proc/self/status has no FDSize")
	}
	line, _, _ := strings.Cut(rest, "\n")
	return strconv.Atoi(strings.TrimSpace(line))
}
