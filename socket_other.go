// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package asyncproxy

import (
	"io"
	"net"
	"net/http"
	"sync/atomic"
)

// relaySocket has no cheaper way here than any other source.
func relaySocket(dst io.Writer, src *net.TCPConn, copied *atomic.Int64) (readErr, writeErr error) {
	return relayReader(dst, src, copied)
}

func closePipes() {}

// splice leaves the body to be copied.
func (b *originBody) splice(http.ResponseWriter, func(int64)) (done bool, err error) {
	return false, nil
}

// bytesTaken is not known.
func bytesTaken(*net.TCPConn) uint64 { return 0 }

// waitWritable leaves the wait to the next write.
func waitWritable(*net.TCPConn) error { return nil }

// limitUnsent leaves it to the system how much waits for the other side.
func limitUnsent(*net.TCPConn) {}
