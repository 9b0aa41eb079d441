// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"errors"
	"net/http"
	"sync"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// Limits on the large response heads that are held for one client at a time. A head is held
// until its response has been sent, which takes as long as the client likes.
const (
	largeHead    = 16 << 10 // smaller heads are not counted
	maxHeldHeads = 4 << 20
)

var errHeldHeads = errors.New("the response head is large, and too many such responses to this client are in progress already")

// HeldHeads counts the bytes of the large heads that are held for each client. The zero value
// counts none yet.
//
// All methods are safe for concurrent use.
type HeldHeads struct {
	mu    sync.Mutex
	bytes map[client.Key]int
}

// HoldHead counts the head of the response, which the exchange holds until it ends. It returns
// an error if the head is large and the client's limit is reached.
func (x *Exchange) HoldHead() error {
	size := headSize(x.Response)
	if size < largeHead {
		return nil
	}
	if !x.limits.Heads.hold(x.Request.LimitKey, size) {
		return errHeldHeads
	}
	x.heldHead = size
	return nil
}

// releaseHead stops counting the head that the exchange holds, if there is one.
func (x *Exchange) releaseHead() {
	if x.heldHead > 0 {
		x.limits.Heads.release(x.Request.LimitKey, x.heldHead)
		x.heldHead = 0
	}
}

// hold counts a head of the given size for a client, unless the client's limit is reached.
func (h *HeldHeads) hold(key client.Key, size int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bytes[key]+size > maxHeldHeads {
		return false
	}
	if h.bytes == nil {
		h.bytes = make(map[client.Key]int)
	}
	h.bytes[key] += size
	return true
}

func (h *HeldHeads) release(key client.Key, size int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bytes[key] -= size; h.bytes[key] == 0 {
		delete(h.bytes, key)
	}
}

// headSize returns the approximate size of a response head in bytes.
func headSize(res *http.Response) (size int) {
	if body, ok := res.Body.(*ResponseBody); ok {
		return body.Head
	}
	for name, values := range res.Header {
		for _, value := range values {
			size += len(name) + len(value) + len(": \r\n")
		}
	}
	return size
}
