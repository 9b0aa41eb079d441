// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import (
	"io"
	"net"
	"net/http"
)

// relaySocket has no cheaper way here than any other source.
func relaySocket(dst io.Writer, src *net.TCPConn, copied *flow) (readErr, writeErr error) {
	return relayReader(dst, src, copied)
}

func closePipes() {}

// splice leaves the body to be copied.
func (b *originBody) splice(http.ResponseWriter, func(int64)) (done bool, err error) {
	return false, nil
}

// bytesTaken is not known.
func bytesTaken(*net.TCPConn) uint64 { return 0 }

// sendState is not known.
func sendState(*net.TCPConn) (taken uint64, queued bool) { return 0, false }

// hasRoom is not known.
func hasRoom(*net.TCPConn) bool { return true }

// waitWritable leaves the wait to the next write.
func waitWritable(*net.TCPConn) error { return nil }

// limitUnsent leaves it to the system how much waits for the other side.
func limitUnsent(*net.TCPConn) {}
