// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"context"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v4"
)

// Some logins apply to a connection rather than to a request: after an NTLM or Negotiate
// login (RFC 4559), many origins treat every later request on the connection as that
// user's. So a connection to an origin is bound once a request on it has carried such
// credentials, or a response such a challenge. A bound connection serves only the client
// connection that it was used for, and on that only the same client address and user. It is
// closed when the client connection ends. While idle, it is in the pool of its origin like
// all others, under a key of its own.

// connectionSchemes are the authentication schemes whose logins apply to a connection.
var connectionSchemes = [...]string{"NTLM", "Negotiate", "Kerberos"}

// connectionLogin reports whether an Authorization or WWW-Authenticate field contains
// credentials or a challenge of a scheme whose logins apply to a connection, and whether
// they include a token.
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

// binding determines which bound connections a request may use, and whether it binds one.
type binding struct {
	client  any        // identifies the client connection; nil: unknown or irrelevant
	addr    netip.Addr // with user: the client, among those that share that connection
	user    string
	target  string // the origin's authority, even if there is a parent proxy in between
	login   bool   // a login of the connection has begun or is complete
	pending bool   // the next request answers the origin's challenge, on the same connection
}

// newBinding returns the binding of a request that is about to be sent.
func newBinding(out *Request) binding {
	b := binding{target: out.Authority, addr: out.ClientAddr, user: out.User}
	b.login, _ = connectionLogin(out.Header["Authorization"])
	if b.login || boundClientCount.Load() > 0 {
		b.client = out.ClientConn
	}
	return b
}

// challenged updates the binding if the response contains a challenge.
func (b *binding) challenged(out *Request, res *http.Response) {
	found, token := connectionLogin(res.Header["Www-Authenticate"])
	if !found {
		return
	}
	b.login, b.pending = true, token && res.StatusCode == http.StatusUnauthorized
	if b.client == nil {
		b.client = out.ClientConn
	}
}

// boundClient is a client connection to which connections to origins are bound.
type boundClient struct {
	id    string // used in pool keys
	mu    sync.Mutex
	pools []*connPool
	gone  bool
	timer *time.Timer // releases the client if its disconnect is not reported
}

// boundClientMap maps what identifies a client connection to its boundClient.
var (
	boundClientMap   = xsync.NewMap[any, *boundClient]()
	boundClientCount atomic.Int64
	lastBoundID      atomic.Uint64
)

// key returns the pool key of idle connections that are bound to c, for the request's
// target, client address and user. Connections that wait for the next step of a login have
// a different key.
func (b *binding) key(c *boundClient, pending bool) string {
	client := c.id + " " + b.addr.String() + " " + b.user
	if pending {
		return b.target + " pending " + client
	}
	return b.target + " " + client
}

// reuse returns an idle connection that is bound to the client, or nil if there is none. A
// login continues on the connection that its challenge came from. Other requests do not
// use that connection, as they would disturb the login.
func (b *binding) reuse(ctx context.Context, pool *connPool) (*pooledConn, error) {
	c, ok := boundClientMap.Load(b.client)
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

// has reports whether the pool has an idle connection that is bound to the client.
func (b *binding) has(pool *connPool) bool {
	c, ok := boundClientMap.Load(b.client)
	return ok && (pool.has(b.key(c, false)) || pool.has(b.key(c, true)))
}

// keep binds a connection to the client and puts it into the pool, or closes it if the
// client is not known. ctx is the context of the client's request.
func (b *binding) keep(ctx context.Context, pool *connPool, conn *pooledConn) {
	if b.client == nil {
		conn.discard()
		return
	}
	c, loaded := boundClientMap.LoadOrCompute(b.client, func() (*boundClient, bool) {
		return &boundClient{id: strconv.FormatUint(lastBoundID.Add(1), 10)}, false
	})
	if !loaded {
		boundClientCount.Add(1)
	}
	c.uses(pool, b.client)
	conn.bound, conn.key = c, b.key(c, b.pending)
	pool.put(conn)
	if ctx.Err() != nil { // the client may have disconnected before it was in the map
		ReleaseClient(b.client)
	} else if c.isGone() {
		c.closeConnections([]*connPool{pool})
	}
}

// uses records that a pool has, or will have, a connection that is bound to c.
func (c *boundClient) uses(pool *connPool, client any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pools = slices.DeleteFunc(c.pools, func(other *connPool) bool { return other == pool || other.closed.Load() })
	c.pools = append(c.pools, pool)
	if c.gone {
		return
	}
	if c.timer == nil {
		c.timer = time.AfterFunc(maxIdleTime, func() { ReleaseClient(client) })
	} else {
		c.timer.Reset(maxIdleTime)
	}
}

func (c *boundClient) isGone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

func (c *boundClient) closeConnections(pools []*connPool) {
	for _, pool := range pools {
		pool.closeIdle(func(conn *pooledConn) bool { return conn.bound == c })
	}
}

// ReleaseClient closes the connections that are bound to a client connection, which has
// ended or has not used them for long.
func ReleaseClient(client any) {
	if boundClientCount.Load() == 0 {
		return
	}
	c, ok := boundClientMap.LoadAndDelete(client)
	if !ok {
		return
	}
	boundClientCount.Add(-1)
	c.mu.Lock()
	c.gone = true
	if c.timer != nil { // nil if the client disconnects before uses has recorded a pool
		c.timer.Stop()
	}
	pools := c.pools
	c.mu.Unlock()
	c.closeConnections(pools)
}
