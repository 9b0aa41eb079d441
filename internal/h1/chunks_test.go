// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"bufio"
	"bytes"
	"io"
	"net/http/httputil"
	"strings"
	"testing"
	"testing/iotest"
)

// Available data is returned at once, whatever part of the rest has arrived.
func TestChunksDoNotWait(t *testing.T) {
	for _, input := range []string{
		"3\r\none", "3\r\none\r", "3\r\none\r\n", "3\r\none\r\n1", "3\r\none\r\n10", "3\r\none\r\n10\r", "3\r\none\r\n10\r\n",
		"3\r\none\r\n0\r\n", "3\r\none\r\n0\r\n\r", "3\r\none\r\n0\r\nX-Sum: 1\r\n", "5\r\none", "2\r\non\r\n2\r\ne",
	} {
		r := bufio.NewReader(io.MultiReader(strings.NewReader(input), iotest.ErrReader(io.ErrNoProgress)))
		_, _ = r.Peek(len(input))
		chunks := &ChunkReader{R: r}
		var got []byte
		for len(got) < 3 {
			p := make([]byte, 100)
			n, err := chunks.Read(p)
			if err != nil {
				t.Fatalf("%q: %q, and then it waits for more (%v)", input, got, err)
			}
			got = append(got, p[:n]...)
		}
		if string(got) != "one" || chunks.ready() {
			t.Errorf("%q: got %q, and more = %v", input, got, chunks.ready())
		}
	}
}

// FuzzChunks compares ChunkReader with net/http's.
func FuzzChunks(f *testing.F) {
	for _, input := range []string{
		"3\r\none\r\n0\r\n\r\n", "3;a=b\r\none\r\n0\r\nX: 1\r\n\r\n", "03 \t\r\none\r\n00\r\n\r\n", "3\none\r\n0\r\n\r\n", "3\r\nonee\r\n0\r\n\r\n",
		"A\r\n0123456789\r\na;\r\n0123456789\r\n0\r\n", "+3\r\none\r\n0\r\n\r\n", "0x3\r\none\r\n", "-1\r\n", "ffffffffffffffff\r\nabc", "7fffffffffffffff\r\nabc",
		"00000000000000003\r\none\r\n0\r\n\r\n", "3\r;\r\none\r\n", "\r\n", ";\r\n", "3\r\non", "3_0\r\none",
	} {
		f.Add([]byte(input), uint8(7), uint8(1))
	}
	f.Fuzz(func(t *testing.T, input []byte, size, step uint8) {
		if bytes.Contains(input, []byte(" ;")) || bytes.Contains(input, []byte("\t;")) {
			return // net/http counts this white space as part of the size
		}
		theirs := bufio.NewReader(bytes.NewReader(input))
		want, wantErr := io.ReadAll(httputil.NewChunkedReader(theirs))
		if wantErr != nil && strings.Contains(wantErr.Error(), "non-data") {
			return // net/http counts the framing bytes, and limits them by a heuristic
		}
		var source io.Reader = bytes.NewReader(input)
		if step%2 == 1 {
			source = iotest.OneByteReader(source)
		}
		ours := bufio.NewReader(source)
		chunks := &ChunkReader{R: ours}
		var got []byte
		var err error
		for err == nil {
			var n int
			p := make([]byte, int(size)+1)
			more := chunks.ready()
			before := ours.Buffered()
			n, err = chunks.Read(p)
			got = append(got, p[:n]...)
			if more && err == nil && n > before {
				t.Fatalf("it had %d bytes, and read %d without waiting", before, n)
			}
		}
		if err == io.EOF {
			err = nil
		}
		if err != nil && bytes.HasPrefix(want, got) {
			want = got // a size that does not fit into an int64 is refused entirely
		}
		if !bytes.Equal(got, want) || (err == nil) != (wantErr == nil) {
			t.Fatalf("got %q, %v; net/http %q, %v", got, err, want, wantErr)
		}
		if err == nil {
			rest, _ := io.ReadAll(ours)
			if wanted, _ := io.ReadAll(theirs); !bytes.Equal(rest, wanted) {
				t.Fatalf("left %q; net/http %q", rest, wanted)
			}
		}
	})
}
