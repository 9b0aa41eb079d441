// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package tunnel

import (
	"io"
	"net"
)

// relaySocket has no special way to read from sockets here.
func relaySocket(dst io.Writer, src *net.TCPConn, copied *flow) (readErr, writeErr error) {
	return relayReader(dst, src, copied)
}
