// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"context"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// muxDials is how many connections are tried for a tunnel before it fails: other tunnels may
// fill a new connection first, or it may end at once.
const muxDials = 4

// muxPool distributes tunnels over connections to a parent: up to 16 on each, all of one
// client, so that clients cannot block each other. A connection can serve another client
// when it has no tunnels left.
//
// All methods are safe for concurrent use.
type muxPool struct {
	// dial opens a connection. It has its own timeout instead of a context, because
	// several tunnels may wait for it. It calls connected when TLS begins.
	dial func(connected func()) (net.Conn, error)

	growth atomic.Int64 // by how much the receive windows of tunnels may still grow

	mu    sync.Mutex
	conns []*muxConn
	dials []*muxDial
}

// muxDial is a connection that is being opened, and the tunnels that wait for it.
type muxDial struct {
	owner     client.Key
	waiting   int
	connected atomic.Bool
	done      chan struct{}
	err       error // valid after done
}

// muxGrowth is how many bytes all tunnels through a parent may buffer in addition to
// muxWindow each.
const muxGrowth = 64 << 20

func newMuxPool(dial func(connected func()) (net.Conn, error)) *muxPool {
	p := &muxPool{dial: dial}
	p.growth.Store(muxGrowth)
	return p
}

// open opens a stream for owner's tunnel to address, and sends the CONNECT with fields.
func (p *muxPool) open(ctx context.Context, owner client.Key, address string, fields http.Header) (*streamConn, error) {
	for range muxDials {
		s, d := p.openOrDial(owner, address, fields)
		if s != nil {
			return s, nil
		}
		select {
		case <-d.done:
			if d.err != nil {
				return nil, d.err
			}
		case <-ctx.Done():
			phase := parentConnecting
			if d.connected.Load() {
				phase = parentHandshaking
			}
			return nil, &ParentError{Phase: phase, Err: context.Cause(ctx)}
		}
	}
	return nil, &ParentError{Phase: ParentAnswering, Err: errUnprocessed}
}

// openOrDial opens a stream on an existing connection, or returns a dial to wait for.
func (p *muxPool) openOrDial(owner client.Key, address string, fields http.Header) (*streamConn, *muxDial) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, idle := range []bool{false, true} {
		for _, c := range p.conns {
			if s := c.open(owner, idle, address, fields); s != nil {
				return s, nil
			}
		}
	}
	for _, d := range p.dials {
		if d.owner == owner && d.waiting < muxStreams {
			d.waiting++
			return nil, d
		}
	}
	d := &muxDial{owner: owner, waiting: 1, done: make(chan struct{})}
	p.dials = append(p.dials, d)
	go p.run(d)
	return nil, d
}

func (p *muxPool) run(d *muxDial) {
	conn, err := p.dial(func() { d.connected.Store(true) })
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		p.conns = append(p.conns, newMuxConn(conn, &p.growth, p.remove))
	}
	p.dials = slices.DeleteFunc(p.dials, func(other *muxDial) bool { return other == d })
	d.err = err
	close(d.done)
}

// remove removes a connection that has ended.
func (p *muxPool) remove(c *muxConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = slices.DeleteFunc(p.conns, func(other *muxConn) bool { return other == c })
}

// close closes idle connections, and the others when their last tunnel ends.
func (p *muxPool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.close()
	}
}
