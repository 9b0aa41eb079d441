// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package linebuffer writes many short lines at once instead of each by itself. It offers Writer. It
// knows nothing of what the lines say and where they go.
package linebuffer

import (
	"bytes"
	"io"
	"sync"
	"time"
)

// Writer collects lines and writes them to another writer when the next one does not fit into the
// buffer, some time after the first one, or when it is closed. Its methods may be called
// concurrently. Lines that cannot be written are lost, so that the buffer never grows.
//
// Unlike zap's BufferedWriteSyncer, it goes on after a write that failed, syncs no files, and does
// nothing while there are no lines.
type Writer struct {
	mu       sync.Mutex
	w        io.WriteCloser
	report   func(err error, lost int)
	lines    []byte
	size     int
	delay    time.Duration
	timer    *time.Timer // flushes; it runs when there are lines in the buffer
	err      error       // of the last write
	lost     int         // lines that have not been written since it fails
	reported int         // how many of them have been reported
	isCut    bool        // the last write ended in the middle of a line
}

// New returns a Writer to w without a buffer. It calls report with an error when writing begins to fail, and
// without one when it works again. If more lines are lost before the buffer changes or ends, it also calls report
// then, because there may be no write that works later. lost is how many lines have been lost since writing began
// to fail. report must not call the Writer.
func New(w io.WriteCloser, report func(err error, lost int)) *Writer {
	b := &Writer{w: w, report: report}
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
	b.setBuffer(size, delay)
}

// setBuffer is SetBuffer for a caller that holds the lock.
func (b *Writer) setBuffer(size int, delay time.Duration) {
	b.flush()
	if b.lost > b.reported {
		b.report(b.err, b.lost)
		b.reported = b.lost
	}
	b.lines, b.size, b.delay = nil, size, delay
}

// Write takes one or more whole lines. It keeps them together, and writes them without delay if they do
// not fit into the buffer. It returns no errors, because it may write other lines than it has got.
func (b *Writer) Write(lines []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(lines) > b.size-len(b.lines) {
		b.flush()
	}
	if len(lines) > b.size {
		b.write(lines)
		return len(lines), nil
	}
	if len(b.lines) == 0 {
		if b.lines == nil {
			b.lines = make([]byte, 0, b.size)
		}
		b.timer.Reset(b.delay)
	}
	b.lines = append(b.lines, lines...)
	return len(lines), nil
}

// flush writes the lines in the buffer. The caller holds the lock.
func (b *Writer) flush() {
	if len(b.lines) == 0 {
		return
	}
	b.write(b.lines)
	b.lines = b.lines[:0]
}

func (b *Writer) write(lines []byte) {
	start := 0 // of the first line
	if b.isCut {
		lines = append([]byte("\n"), lines...) // or the first line would continue the one that is cut
		start = 1
	}
	n, err := b.w.Write(lines)
	if err == nil && n < len(lines) {
		err = io.ErrShortWrite
	}
	if err == nil {
		if b.err != nil {
			b.report(nil, b.lost)
		}
		b.err, b.lost, b.reported, b.isCut = nil, 0, 0, false
		return
	}
	if n > 0 {
		b.isCut = lines[n-1] != '\n'
	}
	b.lost += bytes.Count(lines[max(n, start):], []byte("\n"))
	if b.err == nil {
		b.report(err, b.lost)
		b.reported = b.lost
	}
	b.err = err
}

// Close writes the lines in the buffer, and closes the other writer. Later lines are written to it
// without delay.
func (b *Writer) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.setBuffer(0, 0)
	return b.w.Close()
}
