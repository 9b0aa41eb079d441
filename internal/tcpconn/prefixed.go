// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import "net"

// Prefixed is a connection from which bytes have been read already. Its first reads return
// them.
type Prefixed struct {
	net.Conn
	Prefix []byte // what reads have still to return
}

// Read implements io.Reader.
func (c *Prefixed) Read(p []byte) (int, error) {
	if len(c.Prefix) > 0 {
		n := copy(p, c.Prefix)
		c.Prefix = c.Prefix[n:]
		return n, nil
	}
	c.Prefix = nil
	return c.Conn.Read(p)
}

// CloseWrite half-closes the connection. A connection that cannot half-close is closed.
func (c *Prefixed) CloseWrite() error {
	if half, ok := c.Conn.(HalfCloser); ok {
		return half.CloseWrite()
	}
	return c.Close()
}
