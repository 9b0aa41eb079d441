// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"
)

// TestListenerBelowTLS guards against a change of the listener type in crypto/tls.
func TestListenerBelowTLS(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if listenerBelowTLS(ln).IsValid() {
		t.Error("a TCP listener counts as a TLS listener")
	}
	if over := tls.NewListener(ln, &tls.Config{}); !listenerBelowTLS(over).IsValid() {
		t.Error("a TLS listener is not recognized")
	}
}

// A connection reads the same however its bytes are split.
func TestReadConnFirst(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"\r\n\r\nGET /", "GET /\r\n", "\r\rGET", "\rG", "\r\n\n", "\n\r\n"} {
		for size := 1; size <= len(text); size++ {
			near, far := tcpPair(t)
			c := newReadConn(near, nil)
			c.isFirstRead, c.server = true, unitServer(nil)
			go func() {
				_, _ = io.WriteString(far, text[:size])
				_, _ = io.WriteString(far, text[size:])
				_ = far.CloseWrite()
			}()
			got, err := io.ReadAll(c)
			want := text
			for strings.HasPrefix(want, "\r\n") {
				want = want[2:]
			}
			if err != nil || !bytes.Equal(got, []byte(want)) {
				t.Errorf("%q in pieces of %d: %q, %v, want %q", text, size, got, err, want)
			}
		}
	}
}
