// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package wire is what the load maker and the origin agree on: the content of messages, the
// commands in tunnels, and that both use the loopback interface only.
package wire

import (
	"bytes"
	"fmt"
	"net/netip"
)

// The first byte that the origin receives through a tunnel says what the tunnel is for.
const (
	Download = 'd' // the origin sends until the connection ends
	Upload   = 'u' // the origin reads and counts
	Echo     = 'e' // the origin returns what it receives
)

// period is the number of bytes after which content repeats. It is prime, so that content
// in the wrong place differs from what belongs there.
const period = 251

// Content returns the first n bytes of the content of every message.
func Content(n int) []byte {
	content := make([]byte, n)
	for i := range content {
		content[i] = byte(i % period)
	}
	return content
}

// Whole returns the largest length up to n that is a whole number of periods. Content of this
// length may be sent over and over.
func Whole(n int) int { return n - n%period }

// sample is longer than a period. Same compares no more than this many bytes.
var sample = Content(2 * period)

// Same reports whether b is what content has at offset. It looks at the first bytes of b
// only, since a load maker that reads gigabytes must be cheap.
func Same(b []byte, offset int64) bool {
	b = b[:min(len(b), period)]
	return bytes.Equal(b, sample[offset%period:][:len(b)])
}

// Loopback parses an address and port, and refuses what is not on the loopback interface.
func Loopback(address string) (netip.AddrPort, error) {
	parsed, err := netip.ParseAddrPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if !parsed.Addr().Unmap().IsLoopback() {
		return netip.AddrPort{}, fmt.Errorf("%s is not on the loopback interface", address)
	}
	return parsed, nil
}
