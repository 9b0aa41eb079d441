// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"net/http"
	"sync"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
)

// Limits on the large response heads that are held for one client at a time. A head is held
// until its response has been sent, which takes as long as the client likes.
const (
	largeHead    = 16 << 10 // smaller heads are not counted
	maxHeldHeads = 4 << 20
)

var errHeldHeads = errors.New("the response head is large, and too many such responses to this client are in progress already")

// heldHeads counts the bytes of the large heads that are held for each client.
type heldHeads struct {
	mu    sync.Mutex
	bytes map[client.Key]int
}

// hold counts a head of the given size for a client until release is called. It returns nil
// if the client's limit is reached.
func (h *heldHeads) hold(key client.Key, size int) (release func()) {
	if size < largeHead {
		return func() {}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bytes[key]+size > maxHeldHeads {
		return nil
	}
	if h.bytes == nil {
		h.bytes = make(map[client.Key]int)
	}
	h.bytes[key] += size
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.bytes[key] -= size; h.bytes[key] == 0 {
			delete(h.bytes, key)
		}
	}
}

// headSize returns the approximate size of a response head in bytes.
func headSize(res *http.Response) (size int) {
	if body, ok := res.Body.(*origin.ResponseBody); ok {
		return body.Head
	}
	for name, values := range res.Header {
		for _, value := range values {
			size += len(name) + len(value) + len(": \r\n")
		}
	}
	return size
}
