// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// A write of much content is made in parts, each of which has its own deadline.
func TestWriterMaxWriteChunk(t *testing.T) {
	t.Parallel()
	near, far := tcpPair(t)
	l := unitListener(func(w http.ResponseWriter, _ *http.Request) {
		_ = http.NewResponseController(w).Flush()
		if n, err := io.WriteString(w, strings.Repeat("x", 25)); n != 25 || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
	})
	l.server.MaxWriteChunk = 10
	_, _ = io.WriteString(far, "GET http://a.example/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	l.serveConn(near, true)
	got, err := io.ReadAll(far)
	const ten = "a\r\nxxxxxxxxxx\r\n"
	if _, content, _ := strings.Cut(string(got), "\r\n\r\n"); err != nil || content != ten+ten+"5\r\nxxxxx\r\n0\r\n\r\n" {
		t.Errorf("got %q, %v", got, err)
	}
}
