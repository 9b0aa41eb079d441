// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"bufio"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// A head reads the same wherever the buffer's end cuts it, even between CR and LF.
func TestReadHeadThroughSmallBuffer(t *testing.T) {
	const size = 16 // bufio's minimum
	for n := range 3 * size {
		value := strings.Repeat("x", n)
		for _, end := range []string{"\r\n", "\n"} {
			r := bufio.NewReaderSize(strings.NewReader("A: "+value+end+"B: 2"+end+end+"rest"), size)
			head, _, err := readHead(r)
			if want := "A: " + value + end + "B: 2" + end; head != want || err != nil {
				t.Errorf("%d bytes, %q: %q, %v", n, end, head, err)
			}
			if rest, _ := r.Peek(4); string(rest) != "rest" {
				t.Errorf("%d bytes, %q: after the head: %q", n, end, rest)
			}
		}
		// A bare CR is preserved.
		head, _, err := readHead(bufio.NewReaderSize(strings.NewReader(value+"\rB\r\n\r\n"), size))
		if want := value + "\rB\r\n"; head != want || err != nil {
			t.Errorf("%d bytes and a bare CR: %q, %v", n, head, err)
		}
	}
}

// A head ends at its first empty line, and is read alike whether it arrives as a whole or byte by
// byte.
func TestReadHeadEnd(t *testing.T) {
	for _, text := range []string{
		"a\r\n\r\nrest", "a\n\nrest", "a\n\r\nrest", "a\r\n\nb\r\n\r\n", "a\n\nb\r\n\r\n", "\r\na\r\n\r\n", "\na\r\n\r\n",
		"a\r\r\n\r\n", "a\r\n b\r\n\r\n", "a", "", "a\r\n", "a\r\n\r", "\r\n\r\n", "\n\n",
	} {
		whole := bufio.NewReader(strings.NewReader(text))
		_, _ = whole.Peek(1) // reads all of it
		slow := bufio.NewReader(iotest.OneByteReader(strings.NewReader(text)))
		head, end, err := readHead(whole)
		want, wantEnd, err2 := readHead(slow)
		rest, _ := io.ReadAll(whole)
		wantRest, _ := io.ReadAll(slow)
		if head != want || end != wantEnd || err != err2 || string(rest) != string(wantRest) {
			t.Errorf("%q: %q, %q, %v; byte by byte %q, %q, %v", text, head, rest, err, want, wantRest, err2)
		}
	}
}
