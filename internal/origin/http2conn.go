// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//lint:file-ignore SA1019 net/http offers no way to ping an HTTP/2 connection, or to ask for its state

package origin

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// http2Conn is an HTTP/2 connection to a server that detects when the server has silently
// died. While a request waits (see watch), it pings a silent server. If the ping is not
// answered, it closes the connection, which fails all its streams.
//
// All methods are safe for concurrent use.
type http2Conn struct {
	*http2.ClientConn
	conn    *observedConn
	socket  *net.TCPConn // below TLS; nil if unknown
	times   PingTimes
	pinging sync.Mutex  // held while a ping is outstanding
	lost    atomic.Bool // the connection was closed because a ping was not answered
	single  bool        // for one request only, which closes it
}

// PingTimes are the delays after which an HTTP/2 server counts as dead.
type PingTimes struct {
	Silence time.Duration // how long a request waits without a frame before a ping
	Answer  time.Duration // how long to wait for the answer to a ping
}

// DefaultPings are the delays for servers on the internet.
var DefaultPings = PingTimes{Silence: time.Second, Answer: 2 * time.Second}

// A server that answers pings, but not the request, is pinged less and less often, because
// some servers close connections with more than a few pings in five minutes.
const (
	pingBackoff     = 30
	maxPingInterval = 5 * time.Minute
)

// uploadProgress is how many bytes the server's kernel must acknowledge during a ping for
// the server to count as alive but slow to read an upload. Pings and request heads are
// smaller than this.
const uploadProgress = 16 << 10

// newHTTP2Transport returns a transport for the connections of pool. It takes its settings,
// such as window sizes, from settings, which it modifies.
func newHTTP2Transport(pool http2.ClientConnPool, settings *http.Transport) (*http2.Transport, error) {
	t, err := http2.ConfigureTransports(settings) //nolint:staticcheck // nothing else gives a pool's connections a size of their windows
	if err != nil {
		return nil, err
	}
	t.ConnPool = pool
	return t, nil
}

// newHTTP2Conn starts HTTP/2 on observed, which has negotiated it. conn is observed, or a connection
// that reads from it. It closes observed on failure.
func newHTTP2Conn(t *http2.Transport, observed *observedConn, conn net.Conn, times PingTimes) (*http2Conn, error) {
	c := &http2Conn{conn: observed, socket: tcpconn.Of(observed.Conn), times: times}
	var err error
	if c.ClientConn, err = t.NewClientConn(conn); err != nil {
		_ = observed.Close()
		return nil, err
	}
	return c, nil
}

// errSilent reports that a connection was closed because the server did not answer.
const errSilent = egress.SilentError("the server has stopped responding on its connection")

// observedConn records when something was last read.
type observedConn struct {
	*tls.Conn
	lastRead atomic.Int64 // since epoch
}

func (c *observedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.lastRead.Store(monotime.Of(time.Now()))
	}
	return n, err
}

// silentFor returns the time since something last arrived from the server.
func (c *http2Conn) silentFor() time.Duration {
	return time.Duration(monotime.Of(time.Now()) - c.conn.lastRead.Load())
}

// watch starts watching for a dead server while a request waits. The caller calls stop when
// the response has arrived or the request has failed.
func (c *http2Conn) watch() (stop func()) {
	w := &silenceWatch{conn: c, start: monotime.Of(time.Now()), wait: c.times.Silence}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(w.wait, w.onTimer)
	return w.stop
}

// silenceWatch pings the server while a request waits.
type silenceWatch struct {
	conn  *http2Conn
	start int64         // since epoch
	wait  time.Duration // how long the server may be silent before the next ping; used by onTimer only

	mu      sync.Mutex
	timer   *time.Timer
	stopped bool
}

func (w *silenceWatch) onTimer() {
	silent := w.conn.silentFor()
	if silent >= w.wait {
		if !w.conn.pingAnswered() {
			return
		}
		w.wait, silent = min(w.wait*pingBackoff, maxPingInterval), 0
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.stopped {
		w.timer.Reset(w.wait - silent)
	}
}

// stop stops the watch. If nothing has arrived since the request was sent, it leaves the
// timer for one last check: clients that give up early must not hide a dead connection.
func (w *silenceWatch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	if w.conn.conn.lastRead.Load() >= w.start {
		w.timer.Stop()
	}
}

// pingAnswered pings the server, and closes the connection if there is no answer in time.
func (c *http2Conn) pingAnswered() bool {
	c.pinging.Lock()
	defer c.pinging.Unlock()
	if c.silentFor() < c.times.Silence {
		return true // another request's ping has been answered meanwhile
	}
	for taken := uint64(0); ; {
		start := monotime.Of(time.Now())
		if c.socket != nil {
			taken = tcpconn.BytesAcked(c.socket)
		}
		ctx, cancel := context.WithTimeout(context.Background(), c.times.Answer)
		err := c.Ping(ctx)
		cancel()
		if err == nil || c.conn.lastRead.Load() >= start {
			return true
		}
		if c.socket == nil || tcpconn.BytesAcked(c.socket) < taken+uploadProgress {
			break
		}
	}
	c.lost.Store(true)
	_ = c.Close()
	return false
}
