// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// originLimits limit how long an exchange with an origin may take.
type originLimits struct {
	headerTimeout  time.Duration // for the head of a response; <= 0: none
	contentTimeout time.Duration // how long a response may wait for content; <= 0: forever
	contentGrace   time.Duration // how long a response may wait before it counts as a tunnel
	pings          pingTimes

	admit   func(client.Key) bool // counts a response as a tunnel of the client, unless a limit forbids it
	release func(client.Key)      // ends that
	exit    context.Context       // ends when responses that wait have to end
}

// contentGrace is how long an origin may send nothing before the response counts as a
// tunnel.
const contentGrace = 10 * time.Second
