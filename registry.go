// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"io"
	"iter"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/puzpuzpuz/xsync/v4"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// watchInterval is how often the timeouts of tunnels are checked, and so their precision.
const watchInterval = time.Second

// abortGrace is how long an aborted stream may take to end before its whole connection is
// closed, with all other streams on it. When Caddy exits, abortGraceOnExit applies instead.
const (
	abortGrace       = 10 * time.Second
	abortGraceOnExit = time.Second
)

// registry tracks the open tunnels of the process.
//
// All methods are safe for concurrent use.
type registry struct {
	tunnels     *xsync.Map[uint64, *tunnel]
	clients     *xsync.Map[client.Key, int] // admitted tunnels of each client
	sources     *xsync.Map[loopKey, struct{}]
	admitted    atomic.Int64 // all tunnels, including those being dialled
	lastID      atomic.Uint64
	endReason   atomic.Pointer[string] // why no tunnel may be open; nil: tunnels may be open
	open        context.Context        // canceled when no tunnel may be open any longer
	cancelDials context.CancelFunc
	stop        func()

	interval  time.Duration // watchInterval, but shorter in some tests
	lastWords time.Duration // drainTimeout, but shorter in some tests
}

func newRegistry() *registry { return newPacedRegistry(watchInterval, drainTimeout) }

func newPacedRegistry(interval, lastWords time.Duration) *registry {
	r := &registry{
		interval: interval, lastWords: lastWords,
		tunnels: xsync.NewMap[uint64, *tunnel](),
		clients: xsync.NewMap[client.Key, int](),
		sources: xsync.NewMap[loopKey, struct{}](),
	}
	r.open, r.cancelDials = context.WithCancel(context.Background())
	stop := make(chan struct{})
	r.stop = sync.OnceFunc(func() { close(stop) })
	go r.watch(stop)
	return r
}

// limitError reports that a limit on open tunnels is reached.
type limitError struct {
	perClient bool // the client's own limit, not the one for all clients
}

// Error implements error.
func (e *limitError) Error() string {
	if e.perClient {
		return "the client's limit on open tunnels is reached"
	}
	return "the limit on open tunnels is reached"
}

// admit reserves a tunnel for a client, which the caller must release with release, or
// returns an error if a limit is reached. A limit of 0 means no limit. key is the
// limiter's key for the client.
func (r *registry) admit(key client.Key, limit, perClient int) *limitError {
	if n := r.admitted.Add(1); limit > 0 && n > int64(limit) {
		r.admitted.Add(-1)
		return &limitError{}
	}
	refused := false
	r.clients.Compute(key, func(n int, _ bool) (int, xsync.ComputeOp) {
		if perClient > 0 && n >= perClient {
			refused = true
			return n, xsync.CancelOp
		}
		return n + 1, xsync.UpdateOp
	})
	if refused {
		r.admitted.Add(-1)
		return &limitError{perClient: true}
	}
	return nil
}

// release releases what admit has reserved.
func (r *registry) release(key client.Key) {
	r.clients.Compute(key, func(n int, _ bool) (int, xsync.ComputeOp) {
		if n <= 1 {
			return 0, xsync.DeleteOp
		}
		return n - 1, xsync.UpdateOp
	})
	if r.admitted.Add(-1) == 0 {
		closePipes()
	}
}

// dialWatchDelay is how long a dial takes before the end of its request is watched for.
const dialWatchDelay = 20 * time.Millisecond

// dialContext returns the context for dialing a tunnel's target. It ends when ctx ends, after
// timeout, and when all tunnels are closed. The caller must call done.
//
// The deadline is set here because net.Dialer then allocates no context of its own. The end
// of ctx is only watched for after a delay: watching the client's connection
// costs more than dialing a nearby host.
func (r *registry) dialContext(ctx context.Context, timeout time.Duration) (open context.Context, done func()) {
	open, cancel := context.WithTimeout(dialContext{r.open, ctx}, timeout)
	watch := time.AfterFunc(dialWatchDelay, func() { context.AfterFunc(ctx, cancel) })
	return open, func() { watch.Stop(); cancel() }
}

// dialContext ends with the embedded context, and takes values from another one.
type dialContext struct {
	context.Context
	values context.Context
}

func (c dialContext) Value(key any) any {
	if value := c.Context.Value(key); value != nil { // package context looks up its own keys
		return value
	}
	return c.values.Value(key)
}

// add adds an admitted tunnel whose two ends are connected.
func (r *registry) add(t *tunnel) {
	t.id = r.lastID.Add(1)
	t.lastActive.Store(monotime.Of(t.start))
	r.tunnels.Store(t.id, t)
	if t.localAddr.IsValid() {
		r.sources.Store(t.loopKey(), struct{}{})
	}
	if reason := r.endReason.Load(); reason != nil {
		t.close(*reason)
	}
}

// remove removes a tunnel that has ended and releases what admit has reserved.
func (r *registry) remove(t *tunnel) {
	r.tunnels.Delete(t.id)
	if t.localAddr.IsValid() {
		r.sources.Delete(t.loopKey())
	}
	r.release(t.limitKey)
}

// loopKey identifies a connection to a target: the proxy that opened it and both ends. Both
// are needed, because the kernel may use one local port for several connections.
type loopKey struct {
	proxy    string
	from, to netip.AddrPort
}

func (t *tunnel) loopKey() loopKey { return loopKey{t.owner.name, t.localAddr, t.address} }

// loops reports whether a request from peer, received at local, arrived over a connection
// that the proxy of the given name has opened itself, which means that it loops. A CONNECT
// carries no Via that could tell.
func (r *registry) loops(proxy string, peer netip.AddrPort, local net.Addr) bool {
	_, ok := r.sources.Load(loopKey{proxy, peer, hostport.AddrPortOf(local)})
	return ok
}

// closeIf closes the tunnels for which condition holds.
func (r *registry) closeIf(reason string, condition func(*tunnel) bool) {
	r.tunnels.Range(func(_ uint64, t *tunnel) bool {
		if condition(t) {
			t.close(reason)
		}
		return true
	})
}

// closeAll closes all tunnels, and those that are still being opened once they are open.
// Later it closes the connections of clients whose aborted streams do not end.
//
// Over HTTP/3 a stream always ends, but on exit Caddy waits for clients to close their
// connections, and a client that leaves bytes unread does not. So on exit all connections of
// the servers that had tunnels are closed.
func (r *registry) closeAll(reason string) {
	r.endReason.Store(&reason)
	r.cancelDials()
	servers := make(map[io.Closer]struct{})
	r.closeIf(reason, func(t *tunnel) bool {
		if t.stream == nil {
			return true
		}
		if server := t.stream.Server(); server != nil {
			servers[server] = struct{}{}
		}
		return true
	})
	if reason != reasonShutdown {
		time.AfterFunc(abortGrace, r.closeStuck)
		return
	}
	time.AfterFunc(abortGraceOnExit, func() {
		r.closeStuck()
		for server := range servers {
			_ = server.Close()
		}
	})
}

// closeStuck closes the connections of all streams that have not ended.
func (r *registry) closeStuck() {
	for _, t := range r.tunnels.All() {
		if t.stream != nil {
			t.stream.CloseConnection()
		}
	}
}

// watch checks the timeouts of all tunnels once per interval. It reads their counters,
// so that relaying needs no timers.
func (r *registry) watch(stop <-chan struct{}) {
	ticker := time.NewTicker(r.interval)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case now := <-ticker.C:
			r.tick(now)
		}
	}
}

func (r *registry) tick(now time.Time) {
	r.tunnels.Range(func(_ uint64, t *tunnel) bool {
		t.tick(now)
		return true
	})
}

// drain ends all tunnels when Caddy exits: at once, or at the deadline of ctx, the end of
// the grace period, if there is one. It returns when the tunnels have ended and their log
// lines are written.
func (r *registry) drain(ctx context.Context) {
	if _, ok := ctx.Deadline(); ok {
		r.wait(ctx)
	}
	r.closeAll(reasonShutdown)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	r.wait(ctx)
}

// wait waits until there are no tunnels, or ctx ends.
func (r *registry) wait(ctx context.Context) {
	for r.tunnels.Size() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// all iterates over the open tunnels.
func (r *registry) all() iter.Seq[*tunnel] {
	return func(yield func(*tunnel) bool) {
		r.tunnels.Range(func(_ uint64, t *tunnel) bool { return yield(t) })
	}
}

// get returns the open tunnel with an ID, or nil.
func (r *registry) get(id uint64) *tunnel {
	t, _ := r.tunnels.Load(id)
	return t
}

// size returns the number of open tunnels.
func (r *registry) size() int { return r.tunnels.Size() }

// reserved returns the number of tunnels that are open or being opened.
func (r *registry) reserved() int { return int(r.admitted.Load()) }

// context returns the context that is canceled when no tunnel may be open any longer.
func (r *registry) context() context.Context { return r.open }

// egress.IsClosed reports whether no tunnel may be open any longer.
func (r *registry) isClosed() bool { return r.endReason.Load() != nil }

// isEmpty reports whether nothing is left of any tunnel.
func (r *registry) isEmpty() bool {
	return r.tunnels.Size() == 0 && r.admitted.Load() == 0 && r.clients.Size() == 0 && r.sources.Size() == 0
}
