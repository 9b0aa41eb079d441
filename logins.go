// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v4"
	"github.com/quic-go/quic-go/http3"
)

// Some logins belong to a connection rather than to a request: after an NTLM or
// Negotiate login (RFC 4559) many origins take whatever follows on the connection for
// that user's. So a connection to an origin on which a request had such credentials, or
// a response such a challenge, is bound: it serves only the client's connection that it
// was used for, there only the same client address and user, and is closed with that. While it is idle, it is in the pool of its
// origins like all others, under a key of its own.

// connectionSchemes are the authentication schemes whose logins belong to a connection.
var connectionSchemes = [...]string{"NTLM", "Negotiate", "Kerberos"}

// connectionLogin reports whether an Authorization or WWW-Authenticate field has
// credentials or a challenge of a login that belongs to the connection, and whether
// there is a token with it.
func connectionLogin(values []string) (found, token bool) {
	for _, value := range values {
		for part := range strings.SplitSeq(value, ",") {
			scheme, rest := strings.Trim(part, " \t"), ""
			if i := strings.IndexAny(scheme, " \t"); i >= 0 {
				scheme, rest = scheme[:i], scheme[i+1:]
			}
			if slices.ContainsFunc(connectionSchemes[:], func(s string) bool { return strings.EqualFold(s, scheme) }) {
				found, token = true, token || strings.Trim(rest, " \t") != ""
			}
		}
	}
	return found, token
}

// binding is what a request has to do with bound connections.
type binding struct {
	client  any        // identifies the client's connection; nil: it is not known, or does not matter
	addr    netip.Addr // with user: who, of those that share that connection
	user    string
	target  string // the origin's authority, also if there is a parent proxy in between
	login   bool   // a login of the connection has begun, or is done
	pending bool   // the next request answers the origin's challenge, on the same connection
}

// newBinding looks at a request that is about to be sent.
func newBinding(w http.ResponseWriter, r *http.Request, out *outgoing, from caller) binding {
	b := binding{target: out.authority, addr: from.addr, user: from.user}
	b.login, _ = connectionLogin(out.header["Authorization"])
	if b.login || boundClientCount.Load() > 0 {
		b.client = clientConnection(w, r)
	}
	return b
}

// challenged looks at the response.
func (b *binding) challenged(w http.ResponseWriter, r *http.Request, res *http.Response) {
	found, token := connectionLogin(res.Header["Www-Authenticate"])
	if !found {
		return
	}
	b.login, b.pending = true, token && res.StatusCode == http.StatusUnauthorized
	if b.client == nil {
		b.client = clientConnection(w, r)
	}
}

// socketKey is for the context of a client's connection, in which its requests find
// what identifies it.
type socketKey struct{}

func withSocket(ctx context.Context, conn net.Conn) context.Context {
	if ctx.Value(socketKey{}) != nil { // set by another handler of the server
		return ctx
	}
	return context.WithValue(ctx, socketKey{}, socketOf(conn))
}

// socketOf returns the socket below all wrappers of a connection.
func socketOf(conn net.Conn) any {
	if tcp := newConnPeer(conn).tcp; tcp != nil {
		return tcp
	}
	return conn
}

// clientConnection returns what identifies the client's connection that a request came
// on; nil if that is not known.
func clientConnection(w http.ResponseWriter, r *http.Request) any {
	if own, ok := innermost(w).(*responseWriter); ok {
		return own.client.TCPConn
	}
	if r.ProtoMajor == 3 {
		return r.Context().Value(http3.RemoteAddrContextKey) // a pointer, of which each connection has its own
	}
	return r.Context().Value(socketKey{})
}

// boundClient is a client's connection to which connections to origins are bound.
type boundClient struct {
	id    string // in the keys of the pools
	mu    sync.Mutex
	pools []*origins
	gone  bool
	timer *time.Timer // forgets the client if nobody tells that it has left
}

// boundClients has the client connections to which others are bound, by what
// identifies them.
var (
	boundClients     = xsync.NewMap[any, *boundClient]()
	boundClientCount atomic.Int64
	lastBoundID      atomic.Uint64
)

// key is where a pool keeps idle connections that are bound to c for the request's
// target, client address and user: those that wait for the next step of a login, or the
// others.
func (b *binding) key(c *boundClient, pending bool) string {
	who := c.id + " " + b.addr.String() + " " + b.user
	if pending {
		return b.target + " pending " + who
	}
	return b.target + " " + who
}

// reuse returns an idle connection that is bound to the client; nil if there is none.
// A login goes on where the challenge came from; other requests would disturb it there.
func (b *binding) reuse(ctx context.Context, pool *origins) (*originConn, error) {
	c, ok := boundClients.Load(b.client)
	if !ok {
		return nil, nil
	}
	if b.login {
		if conn, err := pool.reuse(ctx, b.key(c, true)); conn != nil || err != nil {
			return conn, err
		}
	}
	return pool.reuse(ctx, b.key(c, false))
}

// has reports whether the client has an idle connection of its own in the pool.
func (b *binding) has(pool *origins) bool {
	c, ok := boundClients.Load(b.client)
	return ok && (pool.has(b.key(c, false)) || pool.has(b.key(c, true)))
}

// keep keeps a connection for further requests of the client, whose request's context
// is ctx, or closes it if the client is not known.
func (b *binding) keep(ctx context.Context, pool *origins, conn *originConn) {
	if b.client == nil {
		conn.discard()
		return
	}
	c, loaded := boundClients.LoadOrCompute(b.client, func() (*boundClient, bool) {
		return &boundClient{id: strconv.FormatUint(lastBoundID.Add(1), 10)}, false
	})
	if !loaded {
		boundClientCount.Add(1)
	}
	c.uses(pool, b.client)
	conn.bound, conn.key = c, b.key(c, b.pending)
	pool.put(conn)
	if ctx.Err() != nil { // the client may have left before it was in the map
		releaseClient(b.client)
	} else if c.isGone() {
		c.closeConnections([]*origins{pool})
	}
}

// uses notes that a pool has, or is about to have, a connection that is bound to c.
func (c *boundClient) uses(pool *origins, client any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pools = slices.DeleteFunc(c.pools, func(other *origins) bool { return other == pool || other.over.Load() })
	c.pools = append(c.pools, pool)
	if c.gone {
		return
	}
	if c.timer == nil {
		c.timer = time.AfterFunc(maxIdleTime, func() { releaseClient(client) })
	} else {
		c.timer.Reset(maxIdleTime)
	}
}

func (c *boundClient) isGone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

func (c *boundClient) closeConnections(pools []*origins) {
	for _, pool := range pools {
		pool.closeIdle(func(conn *originConn) bool { return conn.bound == c })
	}
}

// releaseClient closes what is bound to a client's connection that has ended, or that
// has not used it for long.
func releaseClient(client any) {
	if boundClientCount.Load() == 0 {
		return
	}
	c, ok := boundClients.LoadAndDelete(client)
	if !ok {
		return
	}
	boundClientCount.Add(-1)
	c.mu.Lock()
	c.gone = true
	if c.timer != nil { // nil if the client leaves before uses has noted its first pool
		c.timer.Stop()
	}
	pools := c.pools
	c.mu.Unlock()
	c.closeConnections(pools)
}

// connState is told what becomes of the connections of Caddy's HTTP server.
func connState(conn net.Conn, state http.ConnState) {
	if own, ok := conn.(*readConn); ok && state == http.StateIdle {
		own.answered.Store(false)
	}
	if (state == http.StateClosed || state == http.StateHijacked) && boundClientCount.Load() > 0 {
		releaseClient(socketOf(conn))
	}
}
