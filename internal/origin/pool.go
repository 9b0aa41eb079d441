// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// Limits for idle connections to origins: their number, and how long each may be idle.
const (
	maxIdleOrigins = 4096
	maxIdleTime    = 90 * time.Second
	sweepInterval  = 15 * time.Second
)

const handshakeTimeout = 10 * time.Second

// connPool is a pool of connections to HTTP/1 origins. It opens connections and keeps idle
// ones: as many per origin as were busy at once.
//
// All methods are safe for concurrent use.
type connPool struct {
	dial    dialFunc
	recheck recheckFunc // may be nil
	address string      // of the only server that it connects to; "": each request names one

	mu       sync.Mutex
	idle     map[string][]*pooledConn // under mu; by key; the most recently used last; may be empty until sweepIdle runs
	count    atomic.Int64
	sweeping atomic.Bool // sweepIdle is scheduled
	closed   atomic.Bool // close was called
}

// pooledConn is a connection to an origin. It serves one exchange at a time, and is owned
// by the exchange that it was given to.
type pooledConn struct {
	net.Conn
	r             *bufio.Reader // nil while idle
	authority     string
	key           string         // in connPool.idle; "": the authority
	bound         *boundClient   // the only client connection that may use it; nil: any
	to            netip.AddrPort // the remote address, if it is on this machine and its listener must be judged again
	opened        time.Time
	fresh         bool      // put in the pool unused
	reused        bool      // it was idle before
	unsentLimited bool      // limitUnsent has been called
	idleSince     time.Time // when it was put back
	clock         headClock // of the exchange
	deadline      tcpconn.ReadDeadline
}

// responseReaderPool is a pool of buffers for busy connections. A response that fits into one,
// including its head, takes a single system call to read.
var responseReaderPool = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 16<<10) }}

// dialFunc connects to an authority, a host and a port.
type dialFunc func(ctx context.Context, authority string) (net.Conn, error)

// recheckFunc checks a reused connection to an authority. to is the remote address if it is
// on this machine, and its listener must be judged again.
type recheckFunc func(ctx context.Context, authority string, conn net.Conn, to netip.AddrPort) error

func newPool(dial dialFunc) *connPool {
	return &connPool{dial: dial, idle: make(map[string][]*pooledConn)}
}

// get returns an idle connection to authority, a host and a port, or opens one. If fresh
// is set, it always opens one.
func (o *connPool) get(ctx context.Context, authority string, fresh bool) (*pooledConn, error) {
	authority = cmp.Or(o.address, authority)
	if !fresh {
		if c, err := o.reuse(ctx, authority); c != nil || err != nil {
			return c, err
		}
	}
	conn, err := o.dial(ctx, authority)
	if err != nil {
		return nil, asDialError(err)
	}
	c := newPooledConn(conn, authority)
	c.r = responseReaderPool.Get().(*bufio.Reader)
	c.r.Reset(conn)
	return c, nil
}

// newPooledConn wraps a new connection for a pool.
func newPooledConn(conn net.Conn, authority string) *pooledConn {
	return &pooledConn{Conn: conn, authority: authority, to: localPeer(conn), opened: time.Now()}
}

// localPeer returns the remote address of a connection if it is an address of this machine,
// and otherwise an invalid one.
func localPeer(conn net.Conn) netip.AddrPort {
	to := hostport.AddrPortOf(conn.RemoteAddr())
	if ip := to.Addr(); !ip.IsValid() || !ip.IsLoopback() && !access.IsOwnAddress(ip) {
		return netip.AddrPort{}
	}
	return to
}

// reuse returns an idle connection with the given key, or nil if there is none.
func (o *connPool) reuse(ctx context.Context, key string) (*pooledConn, error) {
	for {
		c := o.takeIdle(key)
		if c == nil {
			return nil, nil
		}
		// The origin may have closed the connection. If it has sent something
		// unasked, that would be mistaken for the response to this request.
		if time.Since(c.idleSince) < maxIdleTime && (c.fresh || c.quiet()) {
			c.r = responseReaderPool.Get().(*bufio.Reader)
			c.r.Reset(c.Conn)
			c.fresh, c.reused = false, true
			if err := o.check(ctx, c); err != nil {
				c.discard()
				return nil, &DialError{err}
			}
			return c, nil
		}
		_ = c.Close()
	}
}

// check checks a connection that is about to be reused.
func (o *connPool) check(ctx context.Context, c *pooledConn) error {
	if o.recheck == nil {
		return nil
	}
	err := o.recheck(ctx, c.authority, c.Conn, c.to)
	if c.to.IsValid() && time.Since(c.opened) > access.SystemCacheTTL {
		// This check knew every listener that was open when the connection was
		// made, so it need not be repeated.
		c.to = netip.AddrPort{}
	}
	return err
}

// handshakeError is an error of the TLS handshake, after the connection was established.
type handshakeError struct{ error }

// asDialError wraps an error of a dialFunc as a DialError, unless it is a handshakeError,
// which it unwraps.
func asDialError(err error) error {
	var failed *handshakeError
	if errors.As(err, &failed) {
		return failed.error
	}
	return &DialError{err}
}

// overTLS returns a dialFunc that dials and then performs a TLS handshake, in which it offers
// the given protocols.
func overTLS(dial dialFunc, protocols ...string) dialFunc {
	return func(ctx context.Context, authority string) (net.Conn, error) {
		conn, err := dial(ctx, authority)
		if err != nil {
			return nil, err
		}
		host, _, _ := hostport.Split(authority)
		ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
		defer cancel()
		secure, err := egress.Handshake(ctx, conn, &tls.Config{ServerName: strings.Trim(host, "[]")}, protocols...)
		if err != nil {
			return nil, &handshakeError{err}
		}
		return secure, nil
	}
}

// has reports whether there is an idle connection with the given key.
func (o *connPool) has(key string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.idle[key]) > 0
}

// takeIdle takes the connection with the given key that was used last, or returns nil.
func (o *connPool) takeIdle(key string) (c *pooledConn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	conns := o.idle[key]
	last := len(conns) - 1
	if last < 0 {
		return nil
	}
	c, conns[last] = conns[last], nil
	o.idle[key] = conns[:last]
	o.count.Add(-1)
	return c
}

// put returns a connection to the pool. Its last response must have been read completely.
func (o *connPool) put(c *pooledConn) {
	if c.r.Buffered() > 0 || o.closed.Load() {
		c.discard() // closed pool, or the origin sent something unasked
		return
	}
	c.releaseReader()
	o.keep(c)
}

// keep puts a connection without a reader into the pool.
func (o *connPool) keep(c *pooledConn) {
	c.idleSince = time.Now()
	if o.count.Add(1) > maxIdleOrigins {
		o.count.Add(-1)
		_ = c.Close()
		return
	}
	key := cmp.Or(c.key, c.authority)
	o.mu.Lock()
	o.idle[key] = append(o.idle[key], c)
	o.mu.Unlock()
	o.sweepLater()
	if o.closed.Load() {
		o.close()
	}
}

// sweepLater schedules sweepIdle, unless it is already scheduled.
func (o *connPool) sweepLater() {
	if !o.sweeping.Swap(true) {
		time.AfterFunc(sweepInterval, o.sweepIdle)
	}
}

// sweepIdle closes connections that have been idle for too long or that the origin has
// closed. It reschedules itself while any are left.
func (o *connPool) sweepIdle() {
	now := time.Now()
	o.closeIdle(func(c *pooledConn) bool { return now.Sub(c.idleSince) >= maxIdleTime || !c.quiet() })
	o.sweeping.Store(false)
	if o.count.Load() > 0 {
		o.sweepLater()
	}
}

// closeIdle closes the idle connections for which condition holds. It lets others use the pool after
// each key, because condition may need a system call.
func (o *connPool) closeIdle(condition func(*pooledConn) bool) {
	o.mu.Lock()
	keys := slices.Collect(maps.Keys(o.idle))
	o.mu.Unlock()
	for _, key := range keys {
		for _, c := range o.takeIdleIf(key, condition) {
			_ = c.Close() // ending TLS may block
		}
	}
}

// takeIdleIf takes the connections with the given key for which condition holds.
func (o *connPool) takeIdleIf(key string, condition func(*pooledConn) bool) (taken []*pooledConn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	kept := slices.DeleteFunc(o.idle[key], func(c *pooledConn) bool {
		if !condition(c) {
			return false
		}
		taken = append(taken, c)
		return true
	})
	o.count.Add(-int64(len(taken)))
	if len(kept) == 0 {
		delete(o.idle, key)
	} else {
		o.idle[key] = kept
	}
	return taken
}

// close closes all idle connections, and makes put and keep close those that become idle.
func (o *connPool) close() {
	o.closed.Store(true)
	o.closeIdle(func(*pooledConn) bool { return true })
}

// limitUnsent limits how much of a request may wait in the kernel: the origin's time for a response
// starts when it has the request.
func (c *pooledConn) limitUnsent() {
	if socket := tcpconn.Of(c.Conn); socket != nil && !c.unsentLimited {
		tcpconn.LimitUnsent(socket)
		c.unsentLimited = true
	}
}

// discard closes a busy connection and releases its reader.
func (c *pooledConn) discard() {
	_ = c.Close()
	c.releaseReader()
}

func (c *pooledConn) releaseReader() {
	c.r.Reset(nil)
	responseReaderPool.Put(c.r)
	c.r = nil
}

// quiet reports whether an idle connection is still open and nothing has arrived on it.
func (c *pooledConn) quiet() bool {
	switch conn := c.Conn.(type) {
	case *net.TCPConn:
		return tcpconn.IsQuiet(conn)
	case *tls.Conn:
		socket, ok := conn.NetConn().(*net.TCPConn)
		if !ok || !tcpconn.IsQuiet(socket) {
			return false
		}
		// TLS may have buffered bytes. Read returns those before it checks the
		// deadline, which has passed, so it does not block.
		c.deadline.Interrupt(conn)
		_, err := conn.Read(make([]byte, 1))
		c.deadline.Clear(conn)
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	return false
}
