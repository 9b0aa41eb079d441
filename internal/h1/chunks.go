// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"bufio"
	"bytes"
	"io"
	"math"
	"strings"
)

// MaxChunkLine is the maximum length of a line with a chunk's size and extensions.
const MaxChunkLine = 4 << 10

const errChunkLine = ProtocolError("a chunk does not begin with a valid size line")

// ChunkReader reads chunked content (RFC 9112 §7.1) up to the trailers, which it does not
// read. Unlike net/http's, it never blocks when it has content to return.
type ChunkReader struct {
	R            *bufio.Reader
	remaining    int64 // bytes left in the current chunk
	needsLineEnd bool  // the line end after the last chunk has not been read yet
	ended        bool
}

// Read implements io.Reader. It returns io.EOF only without content.
func (c *ChunkReader) Read(p []byte) (n int, err error) {
	if c.ended {
		return 0, io.EOF
	}
	for n < len(p) && (n == 0 || c.ready()) {
		if c.remaining == 0 {
			if err = c.nextChunk(); err == nil && c.remaining == 0 {
				c.ended = true
			}
			if c.ended || err != nil {
				break
			}
		}
		var m int
		m, err = c.R.Read(p[n:][:min(int64(len(p)-n), c.remaining)])
		n += m
		if c.remaining -= int64(m); c.remaining == 0 {
			c.needsLineEnd = true
		}
		if err != nil {
			break
		}
	}
	switch {
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	case err == nil && n == 0 && c.ended:
		err = io.EOF
	}
	return n, err
}

// nextChunk reads up to the content of the next chunk: the line end of the previous one and
// the size line.
func (c *ChunkReader) nextChunk() error {
	if c.needsLineEnd {
		end, err := c.R.Peek(2)
		if err != nil {
			return err
		}
		if string(end) != "\r\n" {
			return ProtocolError("a chunk is longer than its size")
		}
		_, _ = c.R.Discard(2) // cannot fail: they are buffered
		c.needsLineEnd = false
	}
	line, err := c.R.ReadSlice('\n')
	if len(line) > MaxChunkLine || err == bufio.ErrBufferFull {
		return errChunkLine
	}
	if err != nil {
		return err
	}
	size, err := parseChunkLine(line)
	c.remaining = size
	return err
}

// checkStart returns an error if the buffered first size line is malformed, or if it is
// that of the last chunk and the buffered trailers are malformed.
func (c *ChunkReader) checkStart() error {
	input, _ := c.R.Peek(c.R.Buffered())
	end := bytes.IndexByte(input, '\n') + 1
	if end > MaxChunkLine || end == 0 && len(input) > MaxChunkLine {
		return errChunkLine
	}
	if end == 0 {
		return nil
	}
	size, err := parseChunkLine(input[:end])
	if err != nil || size > 0 {
		return err
	}
	lines, _, found := strings.Cut(strings.ReplaceAll(string(input[end-1:]), "\r\n", "\n"), "\n\n")
	if !found || lines == "" {
		return nil
	}
	_, err = parseFields(lines[1:] + "\n")
	return err
}

// parseChunkLine returns the chunk size in a line, and ignores extensions.
func parseChunkLine(line []byte) (int64, error) {
	var size uint64
	digits := 0
	for ; digits < len(line); digits++ {
		digit := hexDigits[line[digits]]
		if digit == 0 {
			break
		}
		size = size<<4 | uint64(digit-1)
	}
	if digits == 0 || digits > 16 || size > math.MaxInt64 {
		return 0, errChunkLine
	}
	if rest := line[digits:]; string(rest) != "\r\n" {
		rest, found := bytes.CutSuffix(rest, []byte("\r\n"))
		rest = bytes.TrimLeft(rest, " \t")
		if !found || bytes.IndexByte(rest, '\r') >= 0 || len(rest) > 0 && rest[0] != ';' {
			return 0, errChunkLine
		}
	}
	return int64(size), nil
}

// hexDigits has the value of each hexadecimal digit plus 1, and 0 for other bytes.
var hexDigits = func() (values [256]byte) {
	for i, digit := range "0123456789abcdef" {
		values[digit] = byte(i + 1)
	}
	for i, digit := range "ABCDEF" {
		values[digit] = byte(10 + i + 1)
	}
	return values
}()

// ready reports whether the next read returns without blocking.
func (c *ChunkReader) ready() bool {
	input, _ := c.R.Peek(c.R.Buffered())
	if c.remaining > 0 || c.ended {
		return len(input) > 0 || c.ended
	}
	if c.needsLineEnd {
		if len(input) < 2 {
			return false
		}
		if string(input[:2]) != "\r\n" {
			return true // the next read returns the error
		}
		input = input[2:]
	}
	end := bytes.IndexByte(input, '\n') + 1
	if end == 0 {
		return len(input) > MaxChunkLine
	}
	size, err := parseChunkLine(input[:end])
	if size == 0 && err == nil { // the last chunk: the trailers must be there too
		lines := input[end-1:]
		return bytes.Contains(lines, []byte("\n\r\n")) || bytes.Contains(lines, []byte("\n\n"))
	}
	return len(input) > end || err != nil
}
