// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package linebuffer writes many short lines at once instead of each by itself. It offers Writer. It
// knows nothing of what the lines say and where they go.
package linebuffer

import (
	"errors"
	"io"
	"sync"
	"time"
)

// Writer collects lines and writes them to another writer when the next one does not fit into the
// buffer, some time after the first one, or when it is closed. Its methods may be called
// concurrently.
//
// Unlike zap's BufferedWriteSyncer, it goes on after a write that failed, syncs no files, and does
// nothing while there are no lines.
type Writer struct {
	mu     sync.Mutex
	w      io.WriteCloser
	lines  []byte
	size   int
	delay  time.Duration
	timer  *time.Timer // flushes; it runs when there are lines in the buffer
	failed error       // an error that no method has returned yet
}

// New returns a Writer to w without a buffer.
func New(w io.WriteCloser) *Writer {
	b := &Writer{w: w}
	b.timer = time.AfterFunc(time.Hour, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.flush()
	})
	b.timer.Stop()
	return b
}

// SetBuffer writes the lines in the buffer, and makes its size that many bytes, in which lines stay for
// delay at most. With size 0, there is no buffer.
func (b *Writer) SetBuffer(size int, delay time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if size == b.size && delay == b.delay {
		return
	}
	b.flush()
	b.lines, b.size, b.delay = nil, size, delay
}

// Write takes one or more whole lines. It keeps them together, and writes them without delay if they do
// not fit into the buffer. If earlier lines could not be written, it returns their error once,
// although it has taken the new ones.
func (b *Writer) Write(lines []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(lines) > b.size-len(b.lines) {
		b.flush()
	}
	if len(lines) > b.size {
		b.write(lines)
		return len(lines), b.failure()
	}
	if len(b.lines) == 0 {
		if b.lines == nil {
			b.lines = make([]byte, 0, b.size)
		}
		b.timer.Reset(b.delay)
	}
	b.lines = append(b.lines, lines...)
	return len(lines), b.failure()
}

// flush writes the lines in the buffer. Lines that cannot be written are lost, so that the buffer
// never grows. The caller holds the lock.
func (b *Writer) flush() {
	if len(b.lines) == 0 {
		return
	}
	b.write(b.lines)
	b.lines = b.lines[:0]
}

func (b *Writer) write(lines []byte) {
	if _, err := b.w.Write(lines); err != nil {
		b.failed = err
	}
}

func (b *Writer) failure() error {
	err := b.failed
	b.failed = nil
	return err
}

// Close writes the lines in the buffer, and closes the other writer. Later lines are written to it
// without delay.
func (b *Writer) Close() error {
	b.SetBuffer(0, 0)
	b.mu.Lock()
	defer b.mu.Unlock()
	return errors.Join(b.failure(), b.w.Close())
}
