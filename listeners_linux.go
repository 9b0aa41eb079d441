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

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
)

// sockets are the sockets on which Caddy listens, by port. Their addresses come from the
// kernel, so it does not matter how a config spells them.
type sockets struct {
	at     map[uint16][]socket
	looked time.Time
	config *time.Time // identifies the config that was running at that time
}

type socket struct {
	fd   int
	addr netip.AddrPort
}

// socketCache keeps the sockets for access.SystemCacheTTL, unless something shows that they are
// stale, because looking for them costs a system call for each descriptor.
type socketCache struct {
	known atomic.Pointer[sockets]
	mu    sync.Mutex // held while looking for them
}

// listenersAt returns the addresses on which Caddy listens on the port of an address. It
// looks for sockets again when the cached result is old or stale. If exact is set, it also
// does so when Caddy counts more listeners than the result has.
func (c *socketCache) listenersAt(to netip.AddrPort, exact bool) []netip.AddrPort {
	if found, complete := c.known.Load().listening(to, exact); complete {
		return found
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if found, complete := c.known.Load().listening(to, exact); complete {
		return found
	}
	known, err := findSockets()
	if err != nil {
		return usedListeners(to) // there is no /proc
	}
	c.known.Store(known)
	found, complete := known.listening(to, exact)
	if !complete { // a listener was opened during the search
		found = append(found, usedListeners(to)...)
	}
	return found
}

// listening returns the addresses of the sockets that still listen on the port of an
// address, and reports whether these are all of them. They are not if one has been closed
// or, which only exact checks, Caddy counts more: a reload opens the new listener of the
// admin endpoint and closes the old one long before the new config has started or failed.
func (s *sockets) listening(to netip.AddrPort, exact bool) (found []netip.AddrPort, complete bool) {
	if s == nil || s.config != program.loaded.Load() || time.Since(s.looked) >= access.SystemCacheTTL {
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

func findSockets() (*sockets, error) {
	s := &sockets{at: make(map[uint16][]socket), looked: time.Now(), config: program.loaded.Load()}
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

// listensAt returns the address of a descriptor if that is a listening socket of Caddy's.
// Those that Caddy opens have SO_REUSEPORT set, so that the next config can share them;
// those that it inherits are counted as listeners with the descriptor as their address.
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

// descriptorSlots returns a number that is greater than any open descriptor.
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
