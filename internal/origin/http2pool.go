// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//lint:file-ignore SA1019 net/http offers no way to ping an HTTP/2 connection, or to ask for its state

package origin

import (
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// http2Pool is a pool of connections to https origins that speak HTTP/2. Requests share
// its connections. If an origin turns out to speak HTTP/1, the connection is put into http1,
// and the request fails with errNoHTTP2, so that the caller sends it there.
//
// All methods are safe for concurrent use.
type http2Pool struct {
	dial      dialFunc // includes the TLS handshake
	http1     *connPool
	recheck   recheckFunc // may be nil
	transport *http2.Transport
	times     *PingTimes

	mu     sync.Mutex
	conns  map[string][]*http2PooledConn // by authority
	byTLS  map[*http2.ClientConn]*http2PooledConn
	dials  map[string]*http2Dial // dials in progress, by authority
	closed bool                  // close was called
}

// http2PooledConn is a connection to an origin.
type http2PooledConn struct {
	*http2Conn
	authority string
	to        netip.AddrPort // the remote address, if it is on this machine
}

// http2Dial is a dial that several requests may wait for.
type http2Dial struct {
	done      chan struct{}
	err       error // valid after done
	abandoned bool  // valid after done: the request that dialed gave up before there was a result
}

// streamWindow is the receive window of a stream: how much content of one response may be
// buffered for its client. A client that does not read costs no more memory than that, and
// with a round trip of 50 ms a response still arrives at 20 MB/s. The window of the
// connection, which several clients share, is net/http's 1 GiB, so that stalled streams
// cannot exhaust it.
const streamWindow = 1 << 20

func newHTTP2Pool(dial dialFunc, http1 *connPool) (*http2Pool, error) {
	o := &http2Pool{
		dial: overTLS(dial, "h2", "http/1.1"), http1: http1, times: &DefaultPings,
		conns: make(map[string][]*http2PooledConn), byTLS: make(map[*http2.ClientConn]*http2PooledConn), dials: make(map[string]*http2Dial),
	}
	var err error
	o.transport, err = newHTTP2Transport(o, &http.Transport{
		// Do not ask for compression that the client has not asked for.
		DisableCompression:     true,
		ExpectContinueTimeout:  continueTimeout,
		MaxResponseHeaderBytes: h1.MaxHead,
		IdleConnTimeout:        maxIdleTime,
		HTTP2:                  &http.HTTP2Config{MaxReceiveBufferPerStream: streamWindow, MaxReadFrameSize: maxFrame, WriteByteTimeout: time.Minute},
	})
	return o, err
}

// errNoHTTP2 reports that a server does not speak HTTP/2.
var errNoHTTP2 = errors.New("the server does not speak HTTP/2")

// GetClientConn implements http2.ClientConnPool. It returns a connection on which a stream
// is reserved for the request.
func (o *http2Pool) GetClientConn(r *http.Request, _ string) (*http2.ClientConn, error) {
	c, err := o.get(r.Context(), r.URL.Host)
	if err != nil {
		return nil, err
	}
	if wait, ok := r.Context().Value(headTimerKey{}).(*headTimer); ok {
		wait.watch(c.http2Conn)
	}
	return c.ClientConn, nil
}

// get returns a connection on which it has reserved a request: an existing one, or one that
// this or another request dials.
func (o *http2Pool) get(ctx context.Context, authority string) (*http2PooledConn, error) {
	for {
		c, call, waits := o.find(authority)
		switch {
		case c != nil && o.recheck != nil:
			if err := o.recheck(ctx, authority, c.conn.Conn, c.to); err != nil {
				return nil, &DialError{err}
			}
			fallthrough
		case c != nil:
			if c.ReserveNewRequest() {
				return c, nil
			}
			continue
		case !waits:
			return o.open(ctx, authority, call)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-call.done:
			if call.err != nil && !call.abandoned {
				return nil, call.err
			}
		}
	}
}

// find returns a connection that has room for a request, or else a dial. If waits is true,
// the dial is in progress; otherwise the caller must perform it.
func (o *http2Pool) find(authority string) (c *http2PooledConn, call *http2Dial, waits bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.conns[authority] {
		if c.CanTakeNewRequest() {
			return c, nil, false
		}
	}
	if call, waits = o.dials[authority]; !waits {
		call = &http2Dial{done: make(chan struct{})}
		o.dials[authority] = call
	}
	return nil, call, waits
}

// open performs a dial, for one request and any others that wait for call.
func (o *http2Pool) open(ctx context.Context, authority string, call *http2Dial) (c *http2PooledConn, err error) {
	defer func() {
		o.mu.Lock()
		delete(o.dials, authority)
		call.err, call.abandoned = err, err != nil && ctx.Err() != nil
		close(call.done)
		o.mu.Unlock()
	}()
	conn, err := o.dial(ctx, authority)
	if err != nil {
		return nil, asDialError(err)
	}
	secure := conn.(*tls.Conn)
	if secure.ConnectionState().NegotiatedProtocol != "h2" {
		kept := newPooledConn(conn, authority)
		kept.fresh = true
		o.http1.keep(kept)
		return nil, errNoHTTP2
	}
	observed := &observedConn{Conn: secure}
	client, err := newHTTP2Conn(o.transport, observed, newLengthGuard(observed), *o.times)
	if err != nil {
		return nil, err
	}
	c = &http2PooledConn{http2Conn: client, authority: authority, to: localPeer(conn)}
	o.add(c)
	return c, nil
}

// add reserves a request on a new connection, and puts it into the pool. If the pool is full
// or closed, the connection serves only this request.
func (o *http2Pool) add(c *http2PooledConn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c.ReserveNewRequest() // if this fails, so will the request
	if c.single = o.closed || len(o.byTLS) >= maxIdleOrigins; c.single {
		return
	}
	o.conns[c.authority] = append(o.conns[c.authority], c)
	o.byTLS[c.ClientConn] = c
}

// MarkDead implements http2.ClientConnPool.
func (o *http2Pool) MarkDead(conn *http2.ClientConn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.remove(conn)
}

func (o *http2Pool) remove(conn *http2.ClientConn) {
	c, ok := o.byTLS[conn]
	if !ok {
		return
	}
	delete(o.byTLS, conn)
	rest := slices.DeleteFunc(o.conns[c.authority], func(other *http2PooledConn) bool { return other == c })
	if o.conns[c.authority] = rest; len(rest) == 0 {
		delete(o.conns, c.authority)
	}
}

// count returns the number of idle connections.
func (o *http2Pool) count() (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for conn := range o.byTLS {
		if isIdle(conn) {
			n++
		}
	}
	return n
}

func isIdle(conn *http2.ClientConn) bool {
	state := conn.State()
	return state.StreamsActive+state.StreamsReserved+state.StreamsPending == 0
}

// close closes all idle connections, and makes the others close when they become idle.
func (o *http2Pool) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.closed = true
	for conn := range o.byTLS {
		o.remove(conn)
		if conn.SetDoNotReuse(); isIdle(conn) { // from here on no request can be reserved
			go conn.Close() // ending TLS may block
		}
	}
}
