// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"bufio"
	"io"
	"net/http/httputil"
	"strings"
	"testing"
)

// BenchmarkTinyChunks reads content in chunks of one byte, the most costly input for each byte that
// a client sends. The reference is net/http's reader.
func BenchmarkTinyChunks(b *testing.B) {
	input := strings.Repeat("1\r\nx\r\n", 10_000) + "0\r\n"
	for name, open := range map[string]func(r *bufio.Reader) io.Reader{
		"ours":     func(r *bufio.Reader) io.Reader { return &ChunkReader{R: r} },
		"net-http": func(r *bufio.Reader) io.Reader { return httputil.NewChunkedReader(r) },
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(input)))
			b.ReportAllocs()
			buf := make([]byte, 32<<10)
			for b.Loop() {
				r := open(bufio.NewReader(strings.NewReader(input)))
				for {
					if _, err := r.Read(buf); err != nil {
						break
					}
				}
			}
		})
	}
}
