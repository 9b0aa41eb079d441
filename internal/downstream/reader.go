// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bufio"
	"sync"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// readerPools hold readers of clients' requests by the sizes of their buffers: 4 KiB, in which
// nearly all heads fit, 16, 64 and 256 KiB.
var readerPools [4]sync.Pool

const smallReader = 4 << 10

// headSlop is how much longer than MaxHeaderBytes a head may be. net/http allows as much.
const headSlop = 4 << 10

// takeReader returns a reader that buffers at least size bytes. The caller must give it back with
// putReader.
func takeReader(size int) *bufio.Reader {
	n := smallReader
	for i := range readerPools {
		if n >= size {
			if r, ok := readerPools[i].Get().(*bufio.Reader); ok {
				return r
			}
			return bufio.NewReaderSize(nil, n)
		}
		n *= 4
	}
	return bufio.NewReaderSize(nil, size)
}

// putReader puts a reader back into its pool. Readers of other sizes than the pools' are dropped.
func putReader(r *bufio.Reader) {
	r.Reset(nil)
	n := smallReader
	for i := range readerPools {
		if r.Size() == n {
			readerPools[i].Put(r)
			return
		}
		n *= 4
	}
}

// resizeReader replaces the connection's reader with one that buffers at least size bytes and
// starts with what is in the buffer, which must fit.
func (c *clientConn) resizeReader(size int) {
	input, _ := c.r.Peek(c.r.Buffered())
	next := takeReader(size)
	next.Reset(&tcpconn.Prefixed{Conn: c.Conn, Prefix: input})
	_, _ = next.Peek(len(input)) // copies input, which is the old reader's
	putReader(c.r)
	c.r = next
}
