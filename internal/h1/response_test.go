// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"bufio"
	"strings"
	"testing"
)

// A head reads the same wherever the buffer's end cuts it, even between CR and LF.
func TestReadHeadThroughSmallBuffer(t *testing.T) {
	const size = 16 // bufio's minimum
	for n := range 3 * size {
		value := strings.Repeat("x", n)
		for _, end := range []string{"\r\n", "\n"} {
			r := bufio.NewReaderSize(strings.NewReader("A: "+value+end+"B: 2"+end+end+"rest"), size)
			head, err := readHead(r)
			if want := "A: " + value + "\nB: 2\n"; head != want || err != nil {
				t.Errorf("%d bytes, %q: %q, %v", n, end, head, err)
			}
			if rest, _ := r.Peek(4); string(rest) != "rest" {
				t.Errorf("%d bytes, %q: after the head: %q", n, end, rest)
			}
		}
		// A bare CR is preserved.
		head, err := readHead(bufio.NewReaderSize(strings.NewReader(value+"\rB\r\n\r\n"), size))
		if want := value + "\rB\n"; head != want || err != nil {
			t.Errorf("%d bytes and a bare CR: %q, %v", n, head, err)
		}
	}
}
