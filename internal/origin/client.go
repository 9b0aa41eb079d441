// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package origin sends requests to origins on connections that it keeps for later requests.
// It offers a Client, which picks HTTP/2 or HTTP/1 for each Exchange, retries requests that may
// be retried, and limits how long an origin may keep its client waiting. It knows nothing of the
// proxy's own responses, nor of parent proxies: a Client for a parent just has another dial
// function.
package origin

import (
	"bufio"
	"context"
	"net"
	"net/netip"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// Config says how a Client connects to origins, and how long it waits for them.
type Config struct {
	// Dial connects to an authority, a host and a port. For https origins, the client begins
	// TLS on the connection.
	Dial func(ctx context.Context, authority string) (net.Conn, error)
	// Recheck checks a connection to an authority that another request has opened. to is the
	// remote address if it is on this machine, and its listener must be judged again. Recheck
	// may be nil.
	Recheck func(ctx context.Context, authority string, conn net.Conn, to netip.AddrPort) error
	Limits  *Limits

	// Address is the host and port of the only server that the client connects to, such as
	// a parent proxy. If it is "", each request names an origin.
	Address string
	// Explain returns an error that names the cause of a failed exchange with that server. unread
	// holds what the server has sent. nil: errors stay as they are.
	Explain func(err error, unread *bufio.Reader) error
}

// Limits limit how long an exchange with an origin may take, and how much it may hold.
type Limits struct {
	HeaderTimeout  time.Duration // for the head of a response; <= 0: none
	ContentTimeout time.Duration // how long a response may wait for content; <= 0: forever
	ContentGrace   time.Duration // how long a response may wait before it counts as a tunnel
	Pings          PingTimes

	Admit   func(client.Key) bool // counts a response as a tunnel of the client, unless a limit forbids it
	Release func(client.Key)      // stops counting it
	Exit    context.Context       // ends when the process exits
	Heads   *HeldHeads            // of all clients; the limits of several proxies may share it
}

// ContentGrace is the ContentGrace of Limits outside of tests.
const ContentGrace = 10 * time.Second

// Client sends requests to origins, over HTTP/2 to those that speak it over TLS and
// over HTTP/1 to all others. It keeps idle connections for later requests. All requests of a
// client may go to the same destinations, because a connection that was opened for one is
// later used for others.
//
// All methods are safe for concurrent use.
type Client struct {
	plain   *connPool
	secure  *connPool // https origins without HTTP/2, and upgrades
	http2   *http2Pool
	limits  *Limits
	explain func(err error, unread *bufio.Reader) error
}

// NewClient returns a client without connections.
func NewClient(config Config) (*Client, error) {
	c := &Client{
		plain: newPool(config.Dial), secure: newPool(overTLS(config.Dial, "http/1.1")),
		limits: config.Limits, explain: config.Explain,
	}
	var err error
	if c.http2, err = newHTTP2Pool(config.Dial, c.secure); err != nil {
		return nil, err
	}
	c.plain.address, c.http2.times = config.Address, &config.Limits.Pings
	c.plain.recheck, c.secure.recheck, c.http2.recheck = config.Recheck, config.Recheck, config.Recheck
	return c, nil
}

// NewExchange returns an exchange with the origin of a request, which begins with Do. It ends
// early when ctx ends.
func (c *Client) NewExchange(ctx context.Context, request *Request) *Exchange {
	return &Exchange{Request: request, client: c, ctx: ctx, limits: c.limits} // this function is inlined, so the exchange need not be on the heap
}

// Idle returns the number of idle connections.
func (c *Client) Idle() int {
	return int(c.plain.count.Load()+c.secure.count.Load()) + c.http2.count()
}

// Close closes all idle connections, and makes those that become idle close.
func (c *Client) Close() {
	c.plain.close()
	c.secure.close()
	c.http2.close()
}
