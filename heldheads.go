// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"net/http"
	"net/netip"
	"sync"
)

// Bounds on the large heads of responses that a client has the proxy hold at once. A
// head is held until its response has been passed on, which takes as long as the client
// likes.
const (
	largeHead    = 16 << 10 // smaller heads are not counted
	maxHeldHeads = 4 << 20
)

var errHeldHeads = errors.New("the head of the response is large, and too many such responses are on their way to this client already")

// heldHeads counts the bytes of the large heads that are held for each client.
type heldHeads struct {
	mu    sync.Mutex
	bytes map[netip.Addr]int
}

// hold counts a head of the given size for a client until release is called. It returns
// nil if the client has too many already.
func (h *heldHeads) hold(client netip.Addr, size int) (release func()) {
	if size < largeHead {
		return func() {}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bytes[client]+size > maxHeldHeads {
		return nil
	}
	if h.bytes == nil {
		h.bytes = make(map[netip.Addr]int)
	}
	h.bytes[client] += size
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.bytes[client] -= size; h.bytes[client] == 0 {
			delete(h.bytes, client)
		}
	}
}

// headSize returns about how many bytes the head of a response has.
func headSize(res *http.Response) (size int) {
	if body, ok := res.Body.(*originBody); ok {
		return body.head
	}
	for name, values := range res.Header {
		for _, value := range values {
			size += len(name) + len(value) + len(": \r\n")
		}
	}
	return size
}
