// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"io"
	"net/http"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
)

// probeBody reports whether a request over HTTP/3 without Content-Length has content, which
// quic-go does not say. For methods that rarely have content, it waits for the first byte
// or the end. Without this, such requests would reach origins with an empty chunked body,
// which some do not expect. For other methods it assumes content without waiting: their
// clients may wait for a response before they send any.
func probeBody(out *origin.Request) bool {
	switch out.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodDelete:
	default:
		return true
	}
	start := &probedBody{rest: out.Body.Reader, read: make(chan struct{})}
	out.Body.Reader = start
	go start.readFirst()
	timer := time.NewTimer(probeBodyTimeout)
	defer timer.Stop()
	select {
	case <-start.read:
		return start.n > 0 || start.err != io.EOF
	case <-timer.C:
		return true
	}
}

// probeBodyTimeout is how long probeBody waits for the first byte or the end of a request.
const probeBodyTimeout = time.Second

// probedBody is a body whose first byte is read ahead.
type probedBody struct {
	rest      io.Reader
	read      chan struct{} // closed when first, n and err are valid
	first     [1]byte
	n         int
	err       error
	delivered bool
}

func (b *probedBody) readFirst() {
	defer close(b.read)
	b.n, b.err = io.ReadFull(b.rest, b.first[:])
}

// Read implements io.Reader.
func (b *probedBody) Read(p []byte) (int, error) {
	if b.delivered || len(p) == 0 {
		return b.rest.Read(p)
	}
	<-b.read
	b.delivered = true
	return copy(p, b.first[:b.n]), b.err
}
