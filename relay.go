// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// Buffers of the relay. A message that fits into small is copied with two
// system calls; more than that is worth a large one, or splice(2).
const (
	smallBuffer = 4 << 10
	largeBuffer = 32 << 10
)

var (
	smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}
)

// flow is one direction of a tunnel.
type flow struct {
	atomic.Int64             // bytes that the destination has taken
	waiting      atomic.Bool // a write to the destination is under way
}

// relay copies from src to dst until src ends, and counts what dst has taken.
// readErr is the end on src's side, io.EOF if it ended as it should; writeErr
// is dst's failure to take it.
//
// While src is silent it holds no buffer and no pipe, which is what makes an
// idle tunnel cheap. Where the source is a socket, that is waited for until it
// has something; anything else, TLS or a stream of HTTP/2, can only be read
// with a buffer at hand, so that one is kept small until it runs full.
func relay(dst io.Writer, src io.Reader, copied *flow) (readErr, writeErr error) {
	if socket, ok := src.(*net.TCPConn); ok {
		return relaySocket(dst, socket, copied)
	}
	return relayReader(dst, src, copied)
}

// relayReader reads with a small buffer and, while those come back full, with
// a large one.
func relayReader(dst io.Writer, src io.Reader, copied *flow) (readErr, writeErr error) {
	small := make([]byte, smallBuffer/4)
	for {
		n, err := src.Read(small)
		if n > 0 {
			writeErr = writeCounted(dst, small[:n], copied)
		}
		if err == nil && writeErr == nil && n == len(small) {
			err, writeErr = relayBurst(dst, src, copied)
		}
		if err != nil || writeErr != nil {
			return err, writeErr
		}
	}
}

// relayBurst copies through a large buffer until a read does not fill half of
// it: then src has run dry. It returns no errors if src goes on.
func relayBurst(dst io.Writer, src io.Reader, copied *flow) (readErr, writeErr error) {
	large := largeBuffers.Get().(*[largeBuffer]byte)
	defer largeBuffers.Put(large)
	for {
		n, err := src.Read(large[:])
		if n > 0 {
			writeErr = writeCounted(dst, large[:n], copied)
		}
		if err != nil || writeErr != nil || n < largeBuffer/2 {
			return err, writeErr
		}
	}
}

// writeCounted writes b and counts what dst has taken of it.
func writeCounted(dst io.Writer, b []byte, copied *flow) error {
	copied.waiting.Store(true)
	n, err := dst.Write(b)
	copied.Add(int64(n))
	copied.waiting.Store(false)
	return err
}
