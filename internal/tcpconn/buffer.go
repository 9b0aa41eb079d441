// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tcpconn

import "sync"

// Buffer is a buffer for copying from one connection to another.
type Buffer [32 << 10]byte

var buffers = sync.Pool{New: func() any { return new(Buffer) }}

// GetBuffer returns a buffer from the pool of all copies. The caller calls Free when done.
func GetBuffer() *Buffer { return buffers.Get().(*Buffer) }

// Free puts the buffer back into the pool.
func (b *Buffer) Free() { buffers.Put(b) }
