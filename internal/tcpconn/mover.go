// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import "net"

// Mover is content that a Splicer can move from its socket to another one, without reading it.
type Mover interface {
	// Socket returns the socket that carries the rest of the content as it is. It returns nil if
	// the content must be read, because it is chunked or part of it has been read ahead.
	Socket() *net.TCPConn

	// Move calls fill, which takes up to most bytes from the socket, in place of a read. It
	// returns what fill returns, and io.EOF with the last bytes of the content.
	Move(fill func(most int64) (int, error)) (int, error)
}
