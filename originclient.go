// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"net"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// originConfig says how an originClient connects to origins, and what it tells of them.
type originConfig struct {
	dial    dialFunc
	recheck recheckFunc // may be nil
	limits  *originLimits

	// address is the host and port of the only server that the client connects to, such as
	// a parent proxy. If it is "", each request names an origin.
	address string
	// explain returns what a failed exchange with that server is to be reported as. unread
	// is what it sent. explain may be nil.
	explain func(err error, unread *bufio.Reader) error
}

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

// originClient sends requests to origins, over HTTP/2 to those that speak it over TLS and
// over HTTP/1 to all others. It keeps idle connections for later requests. A client serves
// requests that may go to the same destinations, because they share its connections.
//
// All methods are safe for concurrent use.
type originClient struct {
	plain   *originPool
	secure  *originPool // https origins without HTTP/2, and upgrades
	http2   *http2OriginPool
	limits  *originLimits
	explain func(err error, unread *bufio.Reader) error
}

func newOriginClient(config originConfig) (*originClient, error) {
	c := &originClient{
		plain: newOriginPool(config.dial), secure: newOriginPool(overTLS(config.dial, "http/1.1")),
		limits: config.limits, explain: config.explain,
	}
	var err error
	if c.http2, err = newHTTP2OriginPool(config.dial, c.secure); err != nil {
		return nil, err
	}
	c.plain.address, c.http2.times = config.address, &config.limits.pings
	c.plain.recheck, c.secure.recheck, c.http2.recheck = config.recheck, config.recheck, config.recheck
	return c, nil
}

// exchange returns an exchange with the origin of a request, which begins with do. It ends
// early when ctx ends.
func (c *originClient) exchange(ctx context.Context, request *outgoing) *exchange {
	return &exchange{request: request, client: c, ctx: ctx, limits: c.limits} // inlined, so that it need not be on the heap
}

// idle returns the number of idle connections.
func (c *originClient) idle() int {
	return int(c.plain.count.Load()+c.secure.count.Load()) + c.http2.count()
}

// idleTo returns the idle connections without TLS to an authority.
func (c *originClient) idleTo(authority string) (conns []net.Conn) {
	idle, _ := c.plain.idle.Load(authority)
	for _, conn := range idle {
		conns = append(conns, conn.Conn)
	}
	return conns
}

// close closes all idle connections, and makes those that become idle close.
func (c *originClient) close() {
	c.plain.close()
	c.secure.close()
	c.http2.close()
}
