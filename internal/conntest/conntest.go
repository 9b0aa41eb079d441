// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package conntest helps tests of connections. It offers pairs of sockets, bulk data that
// the other side can check, TLS servers that are trusted, and a kernel without splice(2). Only
// tests import it.
package conntest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"
)

// patience bounds every wait. Nothing should take that long: it turns a hang into a failure.
const patience = 20 * time.Second

// Pair returns the two ends of a loopback TCP connection. The end of the test closes them.
func Pair(t testing.TB) (inside, outside net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if outside, err = net.DialTimeout("tcp4", ln.Addr().String(), patience); err != nil {
		t.Fatal(err)
	}
	if inside, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inside.Close(); outside.Close() })
	return inside, outside
}

// OnOneGoroutine skips a test that uses only one goroutine if the race detector is on, which would
// make the test slow and cannot find anything.
func OnOneGoroutine(t testing.TB) {
	t.Helper()
	if Race {
		t.Skip("one goroutine has no races")
	}
}

// Eventually waits until condition holds, and fails the test if that takes too long.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	pause := 100 * time.Microsecond // Most conditions hold at once.
	for deadline := time.Now().Add(patience); !condition(); pause = min(2*pause, 5*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting for %s", what)
		}
		time.Sleep(pause)
	}
}

// blockSize is a prime, so that no buffer's size divides it.
const blockSize = 1<<20 - 3

// block returns the random bytes that bulk data consists of.
var block = sync.OnceValue(func() []byte {
	data := make([]byte, blockSize)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
	return data
})

// bulk reads the random block again and again, each time from another place in it: a byte
// that is missing, repeated or out of order changes the data.
type bulk struct {
	seed     byte
	at, size int64
}

// Bulk returns random bytes that depend on the seed alone.
func Bulk(seed byte, size int64) io.Reader { return &bulk{seed: seed, size: size} }

func (b *bulk) Read(p []byte) (int, error) {
	if b.at == b.size {
		return 0, io.EOF
	}
	number, offset := b.at/blockSize, b.at%blockSize
	from := (offset + number*7919 + int64(b.seed)*104729) % blockSize
	n := copy(p, block()[from:][:min(b.size-b.at, blockSize-offset, blockSize-from)])
	b.at += int64(n)
	return n, nil
}

// SendBulk writes the bytes of Bulk. end names the writer in errors.
func SendBulk(t testing.TB, end string, w io.Writer, seed byte, size int64) {
	t.Helper()
	if n, err := io.Copy(struct{ io.Writer }{w}, Bulk(seed, size)); err != nil {
		t.Errorf("%s sent %d bytes of %d and then failed: %v", end, n, size, err)
	}
}

// ReceiveBulk reads to the end and checks that it gets the bytes of Bulk. end names the reader in
// errors.
func ReceiveBulk(t testing.TB, end string, r io.Reader, seed byte, size int64) {
	t.Helper()
	n, err := io.Copy(&checker{want: Bulk(seed, size)}, r)
	switch {
	case errors.Is(err, errOther):
		t.Errorf("%s received %d bytes of %d and then others than were sent", end, n, size)
		_, _ = io.Copy(io.Discard, r) // the other side may wait for it
	case err != nil || n != size:
		t.Errorf("%s received %d bytes of %d and then %v", end, n, size, err)
	}
}

var errOther = errors.New("other bytes than were sent")

// checker is a Writer that fails for other bytes than those that it wants.
type checker struct {
	want io.Reader
	buf  []byte
}

func (c *checker) Write(p []byte) (int, error) {
	c.buf = slices.Grow(c.buf[:0], len(p))[:len(p)]
	if n, err := io.ReadFull(c.want, c.buf); err != nil || !bytes.Equal(c.buf[:n], p) {
		return 0, errOther
	}
	return len(p), nil
}
