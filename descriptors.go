// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"sync"
	"time"
)

// descriptorsInterval is how often the open descriptors are counted at most. Counting takes
// milliseconds with an old kernel and many connections.
const descriptorsInterval = 5 * time.Second

// descriptorCount knows whether the process is short of file descriptors. The zero value is ready
// for use.
type descriptorCount struct {
	mu    sync.Mutex
	at    time.Time // of the last count
	limit int       // if the count was near it; else 0
}

// nearLimit returns the limit on open descriptors if at least 90 % of them are open, and 0 if not or
// if the system does not tell.
func (c *descriptorCount) nearLimit() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.at) >= descriptorsInterval {
		c.at, c.limit = now, 0
		if open, limit := countDescriptors(); open >= limit-limit/10 {
			c.limit = limit
		}
	}
	return c.limit
}
