// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"io"
	"net"
	"sync"
	"sync/atomic"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// smallBuffer is the size of the relay's small buffers. A message that fits into one is
// copied with two system calls. Anything longer uses a tcpconn.Buffer, or splice(2).
const smallBuffer = 4 << 10

var smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}

// flow counts the bytes of one direction of a tunnel.
type flow struct {
	atomic.Int64              // bytes written to the destination
	writing      atomic.Bool  // a write to the destination is in progress
	counted      atomic.Int64 // bytes that growth has returned so far
}

// growth returns the growth since the last call. Concurrent callers get it only once.
func (f *flow) growth() int64 {
	was, now := f.counted.Load(), f.Load()
	if now > was && f.counted.CompareAndSwap(was, now) {
		return now - was
	}
	return 0
}

// relay copies from src to dst until src ends or dst fails, and counts the bytes that were
// written. readErr is src's error, io.EOF if it ended in order. writeErr is dst's error.
//
// While src is silent, relay holds no pooled buffer and no pipe, so that an idle tunnel is
// cheap. It waits until a socket is readable and only then takes a buffer. Any other source,
// such as TLS or an HTTP/2 stream, can only be read into a buffer that is there already:
// that one is small, and a large one replaces it while reads fill it.
func relay(dst io.Writer, src io.Reader, copied *flow) (readErr, writeErr error) {
	if socket, ok := src.(*net.TCPConn); ok {
		return relaySocket(dst, socket, copied)
	}
	return relayReader(dst, src, copied)
}

// relayReader reads into a small buffer, and into a large one while reads fill it.
func relayReader(dst io.Writer, src io.Reader, copied *flow) (readErr, writeErr error) {
	small := make([]byte, smallBuffer/4)
	write := func(p []byte) error { return writeCounted(dst, p, copied) }
	for readErr == nil && writeErr == nil {
		readErr, writeErr = tcpconn.Copy(small, src.Read, write, func(n int) bool { return n < len(small) })
		if readErr == nil && writeErr == nil {
			readErr, writeErr = relayBurst(dst, src, copied)
		}
	}
	return readErr, writeErr
}

// relayBurst copies through a large buffer until a read fills less than half of it, which
// means that src has no more for now. It returns no errors if src goes on.
func relayBurst(dst io.Writer, src io.Reader, copied *flow) (readErr, writeErr error) {
	large := tcpconn.GetBuffer()
	defer large.Free()
	write := func(p []byte) error { return writeCounted(dst, p, copied) }
	return tcpconn.Copy(large[:], src.Read, write, func(n int) bool { return n >= len(large)/2 })
}

// writeCounted writes b and counts the bytes that were written.
func writeCounted(dst io.Writer, b []byte, copied *flow) error {
	copied.writing.Store(true)
	n, err := dst.Write(b)
	copied.Add(int64(n))
	copied.writing.Store(false)
	return err
}
