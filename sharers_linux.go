// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// otherListeners returns the other processes that listen on an address, as far as this one has
// permission to see them. Linux lets processes of one user share a port, and distributes
// the connections among them.
func otherListeners(at netip.AddrPort) (processes []string) {
	ours := socketsOf("self")
	for _, inode := range listeningInodes(at) {
		if !slices.Contains(ours, inode) {
			processes = append(processes, processOf(inode))
		}
	}
	return processes
}

// listeningInodes returns the inodes of the sockets that listen on an address.
func listeningInodes(at netip.AddrPort) (inodes []string) {
	file, ip := "/proc/net/tcp6", at.Addr().AsSlice()
	if at.Addr().Is4() {
		file = "/proc/net/tcp"
	}
	for word := range slices.Chunk(ip, 4) {
		slices.Reverse(word) // the kernel prints words in host byte order
	}
	local := fmt.Sprintf("%s:%04X", strings.ToUpper(hex.EncodeToString(ip)), at.Port())
	sockets, err := os.Open(file)
	if err != nil {
		return nil
	}
	defer sockets.Close()
	lines := bufio.NewScanner(sockets)
	lines.Scan() // the headings
	for lines.Scan() {
		const listening = "0A"
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || fields[3] != listening {
			break // after the listeners the kernel lists connections, of which there may be many
		}
		if fields[1] == local {
			inodes = append(inodes, fields[9])
		}
	}
	return inodes
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

// processOf returns the name and pid of a process that has a socket open, or "unknown".
func processOf(inode string) string {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		if _, err := strconv.Atoi(entry.Name()); err != nil || !slices.Contains(socketsOf(entry.Name()), inode) {
			continue
		}
		name, _ := os.ReadFile("/proc/" + entry.Name() + "/comm")
		return fmt.Sprintf("%s, pid %s", printable.Text(strings.TrimSpace(string(name))), entry.Name())
	}
	return "unknown"
}
