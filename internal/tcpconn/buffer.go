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

// Copy reads into buf and writes what was read, until a read or a write fails or more returns false.
// more gets the number of bytes of each read. readErr is io.EOF if the source has ended in order.
// Every copy of bytes outside the kernel is made here.
func Copy(buf []byte, read func([]byte) (int, error), write func([]byte) error, more func(n int) bool) (readErr, writeErr error) {
	for {
		var n int
		if n, readErr = read(buf); n > 0 {
			writeErr = write(buf[:n])
		}
		if readErr != nil || writeErr != nil || !more(n) {
			return readErr, writeErr
		}
	}
}

// Always is for copies until the end of the source.
func Always(int) bool { return true }
