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

// TestTakeBackGivesUpHTTP2 checks that a connection that speaks HTTP/2 is not followed: its frames
// are read on a goroutine of their own.
func TestTakeBackGivesUpHTTP2(t *testing.T) {
	for _, test := range []struct {
		name string
		read []string // what each read of net/http returns
		kept bool     // net/http keeps the connection
	}{
		{"the preface", []string{"PRI * HTTP/2.0\r\n\r\n"}, true},
		{"the preface in parts", []string{"P", "RI * HT", "TP/2.0\r\n\r\n"}, true},
		{"a method like it", []string{"PRI", "NT * HTTP/2.0\r\n\r\n"}, false},
		{"a later preface", []string{"GET / HTTP/1.1\r\n", "PRI * HTTP/2.0\r\n\r\n"}, false},
		{"a request", []string{"GET / HTTP/1.1\r\nHost: a\r\n\r\n"}, false},
	} {
		back := takeBack{listener: new(Listener)}
		for _, read := range test.read {
			back.note([]byte(read))
		}
		if back.becameIdle(); back.idle.Load() == test.kept {
			t.Errorf("%s: idle is %v", test.name, back.idle.Load())
		}
	}
}
