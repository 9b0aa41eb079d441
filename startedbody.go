// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"io"
	"net/http"
	"time"
)

// begins reports whether a request over HTTP/3 has content, as far as it is to be known:
// quic-go does not tell it of one that announces no length. With the methods that seldom
// have any, its first byte or its end is waited for. Else they would come with empty
// content in chunks to origins that may not expect any. Clients of other methods may
// themselves wait for a response first.
func begins(out *outgoing) bool {
	switch out.method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodDelete:
	default:
		return true
	}
	start := &startedBody{rest: out.body.r, read: make(chan struct{})}
	out.body.r = start
	go start.begin()
	timer := time.NewTimer(beginTimeout)
	defer timer.Stop()
	select {
	case <-start.read:
		return start.n > 0 || start.err != io.EOF
	case <-timer.C:
		return true
	}
}

// beginTimeout is how long the end of a request may come behind its head.
const beginTimeout = time.Second

// startedBody is a body of which the first byte is read before it is asked for.
type startedBody struct {
	rest  io.Reader
	read  chan struct{} // closed when first, n and err are there
	first [1]byte
	n     int
	err   error
	given bool
}

func (b *startedBody) begin() {
	defer close(b.read)
	b.n, b.err = io.ReadFull(b.rest, b.first[:])
}

// Read implements io.Reader.
func (b *startedBody) Read(p []byte) (int, error) {
	if b.given || len(p) == 0 {
		return b.rest.Read(p)
	}
	<-b.read
	b.given = true
	return copy(p, b.first[:b.n]), b.err
}
