// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v4"
)

// Bounds on idle connections to origins: in all, and in time.
const (
	maxIdleOrigins = 4096
	maxIdleTime    = 90 * time.Second
	sweepInterval  = 15 * time.Second
)

const handshakeTimeout = 10 * time.Second

// origins opens connections to HTTP/1 origins and keeps those that are idle: as
// many for an origin as were busy at once. It is for clients of one reach, since
// a connection that was opened for one is used for others later.
//
// All methods are safe for concurrent use.
type origins struct {
	dial    dialFunc
	recheck func(context.Context, *originConn) error // judges a connection that is used again; may be nil

	idle     *xsync.Map[string, []*originConn] // by key; the last used last
	count    atomic.Int64
	sweeping atomic.Bool // sweepIdle will be called
	over     atomic.Bool // close was called
}

// originConn is a connection to an origin that serves one exchange after the
// other. It belongs to whoever got it.
type originConn struct {
	net.Conn
	r         *bufio.Reader // nil while it is idle
	authority string
	key       string         // under which it is kept while it is idle; "": its authority
	bound     *boundClient   // the client's connection that alone may use it; nil: any
	to        netip.AddrPort // the other end, if it is this machine
	fresh     bool           // it has served none yet
	reused    bool           // it was idle before
	idleSince time.Time      // when it was put back
	deadline  time.Time      // that is set for reading
}

// readers are the buffers of busy connections. A response that fits into one,
// head and all, takes a single system call to read.
var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 16<<10) }}

// dialFunc connects to an authority, a host and a port.
type dialFunc func(ctx context.Context, authority string) (net.Conn, error)

func newOrigins(dial dialFunc) *origins {
	return &origins{dial: dial, idle: xsync.NewMap[string, []*originConn]()}
}

// get returns an idle connection to authority, a host and a port, or opens one.
// With fresh it opens one in any case.
func (o *origins) get(ctx context.Context, authority string, fresh bool) (*originConn, error) {
	if !fresh {
		if c, err := o.reuse(ctx, authority); c != nil || err != nil {
			return c, err
		}
	}
	conn, err := o.dial(ctx, authority)
	if err != nil {
		return nil, asDialError(err)
	}
	c := newOriginConn(conn, authority)
	c.r = readers.Get().(*bufio.Reader)
	c.r.Reset(conn)
	return c, nil
}

// newOriginConn makes a connection that was dialled one of a pool.
func newOriginConn(conn net.Conn, authority string) *originConn {
	return &originConn{Conn: conn, authority: authority, to: endHere(conn)}
}

// endHere returns the other end of a connection to this machine, and nothing valid for
// one to another machine.
func endHere(conn net.Conn) netip.AddrPort {
	to := addrPort(conn.RemoteAddr())
	if ip := to.Addr(); !ip.IsValid() || !ip.IsLoopback() && !isOwnAddress(ip) {
		return netip.AddrPort{}
	}
	return to
}

// reuse returns an idle connection that is kept under key; nil if there is none.
func (o *origins) reuse(ctx context.Context, key string) (*originConn, error) {
	for {
		c := o.takeIdle(key)
		if c == nil {
			return nil, nil
		}
		// An origin closes idle connections when it likes, and one that has sent
		// something since would have it taken for the answer to this request.
		if time.Since(c.idleSince) < maxIdleTime && (c.fresh || c.quiet()) {
			c.r = readers.Get().(*bufio.Reader)
			c.r.Reset(c.Conn)
			c.fresh, c.reused = false, true
			if o.recheck != nil {
				if err := o.recheck(ctx, c); err != nil {
					c.discard()
					return nil, &dialError{err}
				}
			}
			return c, nil
		}
		_ = c.Close()
	}
}

// handshakeError is an error after there was a connection.
type handshakeError struct{ error }

// asDialError tells an error of a dialFunc from what may fail later.
func asDialError(err error) error {
	var failed *handshakeError
	if errors.As(err, &failed) {
		return failed.error
	}
	return &dialError{err}
}

// overTLS returns a dial that begins TLS for one of the given protocols on what
// dial connects to.
func overTLS(dial dialFunc, protocols ...string) dialFunc {
	return func(ctx context.Context, authority string) (net.Conn, error) {
		conn, err := dial(ctx, authority)
		if err != nil {
			return nil, err
		}
		host, _, _ := cutPort(authority)
		ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
		defer cancel()
		secure, err := handshakeWith(ctx, conn, &tls.Config{ServerName: strings.Trim(host, "[]")}, protocols...)
		if err != nil {
			return nil, &handshakeError{err}
		}
		return secure, nil
	}
}

// has reports whether there is an idle connection under key.
func (o *origins) has(key string) bool {
	_, ok := o.idle.Load(key)
	return ok
}

func (o *origins) takeIdle(key string) (c *originConn) {
	o.idle.Compute(key, func(conns []*originConn, _ bool) ([]*originConn, xsync.ComputeOp) {
		if len(conns) == 0 {
			return nil, xsync.CancelOp
		}
		last := len(conns) - 1
		c, conns[last] = conns[last], nil
		if last == 0 {
			return nil, xsync.DeleteOp
		}
		return conns[:last], xsync.UpdateOp
	})
	if c != nil {
		o.count.Add(-1)
	}
	return c
}

// put keeps a connection for another exchange. The caller has read all of the
// last one.
func (o *origins) put(c *originConn) {
	if c.r.Buffered() > 0 || o.over.Load() {
		c.discard() // it talks without being asked
		return
	}
	c.releaseReader()
	o.keep(c)
}

// keep is put for a connection that nobody is reading from.
func (o *origins) keep(c *originConn) {
	c.idleSince = time.Now()
	if o.count.Add(1) > maxIdleOrigins {
		o.count.Add(-1)
		_ = c.Close()
		return
	}
	o.idle.Compute(cmp.Or(c.key, c.authority), func(conns []*originConn, _ bool) ([]*originConn, xsync.ComputeOp) {
		return append(conns, c), xsync.UpdateOp
	})
	o.sweepLater()
	if o.over.Load() {
		o.close()
	}
}

// sweepLater has idle connections looked at in a while, if that is not so
// already.
func (o *origins) sweepLater() {
	if !o.sweeping.Swap(true) {
		time.AfterFunc(sweepInterval, o.sweepIdle)
	}
}

// sweepIdle closes what has been idle for too long or was closed by the origin,
// and comes again while there is more.
func (o *origins) sweepIdle() {
	now := time.Now()
	o.closeIdle(func(c *originConn) bool { return now.Sub(c.idleSince) >= maxIdleTime || !c.quiet() })
	o.sweeping.Store(false)
	if o.count.Load() > 0 {
		o.sweepLater()
	}
}

func (o *origins) closeIdle(condition func(*originConn) bool) {
	var closing []*originConn // outside of the map, as the end of TLS may take a while
	o.idle.Range(func(key string, _ []*originConn) bool {
		o.idle.Compute(key, func(conns []*originConn, _ bool) ([]*originConn, xsync.ComputeOp) {
			before := len(closing)
			conns = slices.DeleteFunc(slices.Clone(conns), func(c *originConn) bool {
				if !condition(c) {
					return false
				}
				closing = append(closing, c)
				return true
			})
			o.count.Add(int64(before - len(closing)))
			if len(conns) == 0 {
				return nil, xsync.DeleteOp
			}
			return conns, xsync.UpdateOp
		})
		return true
	})
	for _, c := range closing {
		_ = c.Close()
	}
}

// close closes all idle connections, and from now on those that become idle.
func (o *origins) close() {
	o.over.Store(true)
	o.closeIdle(func(*originConn) bool { return true })
}

// discard ends a connection that is not to be used again.
func (c *originConn) discard() {
	_ = c.Close()
	c.releaseReader()
}

func (c *originConn) releaseReader() {
	c.r.Reset(nil)
	readers.Put(c.r)
	c.r = nil
}

// quiet reports whether an idle connection is still open and the origin has
// said nothing on it.
func (c *originConn) quiet() bool {
	switch conn := c.Conn.(type) {
	case *net.TCPConn:
		return socketQuiet(conn)
	case *tls.Conn:
		socket, ok := conn.NetConn().(*net.TCPConn)
		if !ok || !socketQuiet(socket) {
			return false
		}
		// TLS may have read more than it has given out. It tries that before it
		// finds the deadline passed.
		c.deadline = time.Unix(1, 0)
		_ = conn.SetReadDeadline(c.deadline)
		_, err := conn.Read(make([]byte, 1))
		c.expectNone()
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	return false
}

// expectBy limits how long the next read may take, to least at least and to most
// at most. Deadlines cost a timer each, so that one which fits is left.
func (c *originConn) expectBy(least, most time.Duration) {
	now := time.Now()
	if left := c.deadline.Sub(now); left >= least && left <= most {
		return
	}
	c.deadline = now.Add(most)
	_ = c.SetReadDeadline(c.deadline)
}

// expectNone lifts the limit.
func (c *originConn) expectNone() {
	if !c.deadline.IsZero() {
		c.deadline = time.Time{}
		_ = c.SetReadDeadline(time.Time{})
	}
}
