// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// sharerSearch finds sharers, as far as this process has permission to see them. Linux lets
// processes of one user share a port, and distributes the connections among them. The zero value
// is ready for use.
type sharerSearch struct {
	ours   map[netip.AddrPort]bool // addresses at which this process listens
	inodes map[string]bool         // of this process's listening sockets
	double []netip.AddrPort        // addresses at which this process has more than one socket
	owners map[string]sharer       // of other sockets, by inode
}

// reset makes the search look for the addresses of this process again.
func (s *sharerSearch) reset() { *s = sharerSearch{} }

// find returns the sharers. It costs no more than reading the system's list of listening sockets,
// unless that has one that is not known to be this process's.
func (s *sharerSearch) find() (found []sharer) {
	if s.ours == nil && !s.findOurs() {
		return nil
	}
	others := s.others()
	if len(others) > 0 {
		s.findOurs() // it may have opened one since
		others = s.others()
	}
	owners := make(map[string]sharer)
	for _, other := range others {
		owner, known := s.owners[other.inode]
		if !known {
			owner = ownerOf(other)
		}
		owners[other.inode] = owner
		if owner.pid != os.Getpid() { // a socket that Caddy has not opened
			found = append(found, owner)
		}
	}
	s.owners = owners
	return found
}

// findOurs finds the listening sockets of this process. It returns false if that is impossible.
func (s *sharerSearch) findOurs() bool {
	sockets, err := findSockets()
	if err != nil {
		return false
	}
	s.ours, s.inodes, s.double = make(map[netip.AddrPort]bool), make(map[string]bool), nil
	for _, at := range sockets.at {
		for _, socket := range at {
			var stat unix.Stat_t
			if unix.Fstat(socket.fd, &stat) == nil && !s.inodes[strconv.FormatUint(stat.Ino, 10)] {
				if s.ours[socket.addr] && !slices.Contains(s.double, socket.addr) {
					s.double = append(s.double, socket.addr)
				}
				s.ours[socket.addr] = true
				if socket.addr.Addr() == netip.IPv6Unspecified() && acceptsIPv4(socket.fd) {
					s.ours[netip.AddrPortFrom(netip.IPv4Unspecified(), socket.addr.Port())] = true
				}
				s.inodes[strconv.FormatUint(stat.Ino, 10)] = true
			}
		}
	}
	return true
}

// twice returns the addresses at which this process has more than one socket, after find. They are those of
// the config's start, as far as they are still so.
func (s *sharerSearch) twice() []netip.AddrPort {
	if len(s.double) > 0 {
		s.findOurs()
	}
	return s.double
}

// acceptsIPv4 reports whether a socket of IPv6 accepts connections of IPv4, too.
func acceptsIPv4(fd int) bool {
	only, err := unix.GetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
	return err == nil && only == 0
}

// others returns the sockets that get connections meant for this process and that are not known to
// be its own.
func (s *sharerSearch) others() (others []listeningSocket) {
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		for _, socket := range listeningSockets(file) {
			if !s.inodes[socket.inode] && s.loses(socket.at) {
				others = append(others, socket)
			}
		}
	}
	return others
}

// loses reports whether this process loses connections to another socket at an address. Of two
// sockets on a port, the kernel prefers the one with the more specific address.
func (s *sharerSearch) loses(at netip.AddrPort) bool {
	all := netip.IPv6Unspecified()
	if at.Addr().Is4() {
		all = netip.IPv4Unspecified()
	}
	return s.ours[at] || s.ours[netip.AddrPortFrom(all, at.Port())]
}

// listeningSocket is a row of the system's list of sockets.
type listeningSocket struct {
	at    netip.AddrPort
	inode string
}

// listeningSockets returns the listening sockets in a file of /proc/net.
func listeningSockets(file string) (sockets []listeningSocket) {
	f, err := os.Open(file)
	if err != nil {
		return nil
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Scan() // the headings
	for lines.Scan() {
		const listening = "0A"
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || fields[3] != listening {
			break // after the listeners the kernel lists connections, of which there may be many
		}
		if at, ok := parseLocal(fields[1]); ok {
			sockets = append(sockets, listeningSocket{at, fields[9]})
		}
	}
	return sockets
}

// parseLocal parses an address as the kernel lists it: words in host byte order, and the port.
func parseLocal(field string) (at netip.AddrPort, ok bool) {
	ip, port, _ := strings.Cut(field, ":")
	raw, err := hex.DecodeString(ip)
	number, portErr := strconv.ParseUint(port, 16, 16)
	if err != nil || portErr != nil || len(raw)%4 != 0 {
		return at, false
	}
	for word := range slices.Chunk(raw, 4) {
		binary.NativeEndian.PutUint32(word, binary.BigEndian.Uint32(word))
	}
	addr, ok := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(addr.Unmap(), uint16(number)), ok
}

// ownerOf returns the process that has a socket open.
func ownerOf(socket listeningSocket) sharer {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || !slices.Contains(socketsOf(entry.Name()), socket.inode) {
			continue
		}
		name, _ := os.ReadFile("/proc/" + entry.Name() + "/comm")
		return sharer{socket.at, printable.Text(strings.TrimSpace(string(name))), pid}
	}
	return sharer{at: socket.at}
}

// socketsOf returns the inodes of the sockets that a process has open.
func socketsOf(process string) (inodes []string) {
	links, _ := filepath.Glob("/proc/" + process + "/fd/*")
	for _, link := range links {
		target, _ := os.Readlink(link)
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			inodes = append(inodes, strings.TrimSuffix(inode, "]"))
		}
	}
	return inodes
}
