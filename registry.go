// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/puzpuzpuz/xsync/v4"
	"github.com/quic-go/quic-go/http3"
)

// registries holds the one registry of the process, by registryKey, for as long
// as any config has a proxy. Tunnels are the process's and not a config's, so
// that a reload has no effect on those that are open.
var registries = caddy.NewUsagePool()

const registryKey = "tunnels"

// watchInterval is how often tunnels are looked at for their timeouts, which
// are that exact.
const watchInterval = time.Second

// stuckTime is how long a client may keep a stream that was aborted from ending
// before its connection is closed, with whatever else goes over it; lastMoment
// is the same for when Caddy exits.
const (
	stuckTime  = 10 * time.Second
	lastMoment = time.Second
)

// registry knows the tunnels that are open.
//
// All methods are safe for concurrent use.
type registry struct {
	tunnels  *xsync.Map[uint64, *tunnel]
	clients  *xsync.Map[netip.Addr, int] // tunnels admitted, of each client
	sources  *xsync.Map[source, struct{}]
	handlers *xsync.Map[*Handler, struct{}] // those that are provisioned
	blocks   *xsync.Map[netip.Addr, int64]  // clients that the operator has blocked, and until when, since epoch
	admitted atomic.Int64                   // all of them, those still being dialled too
	lastID   atomic.Uint64
	config   atomic.Value           // that of the handlers that started last
	ended    atomic.Pointer[string] // the reason for which no tunnel may be open any more
	open     context.Context        // ends when no tunnel may be open any more
	end      context.CancelFunc
	stop     func()

	heads     heldHeads // of responses that are passed on
	lingering lingering // connections of clients that are being closed
}

// acquireRegistry returns the registry. Each call is to be followed by one of
// releaseRegistry.
func acquireRegistry() (*registry, error) {
	r, _, err := registries.LoadOrNew(registryKey, func() (caddy.Destructor, error) { return newRegistry(), nil })
	if err != nil {
		return nil, err
	}
	return r.(*registry), nil
}

func releaseRegistry() error {
	_, err := registries.Delete(registryKey)
	return err
}

func newRegistry() *registry {
	r := &registry{
		tunnels: xsync.NewMap[uint64, *tunnel](),
		clients: xsync.NewMap[netip.Addr, int](),
		sources: xsync.NewMap[source, struct{}](), handlers: xsync.NewMap[*Handler, struct{}](), blocks: xsync.NewMap[netip.Addr, int64](),
	}
	r.open, r.end = context.WithCancel(context.Background())
	stop := make(chan struct{})
	r.stop = sync.OnceFunc(func() { close(stop) })
	go r.watch(stop)
	return r
}

// Destruct implements caddy.Destructor: no config has a proxy any more.
func (r *registry) Destruct() error {
	reason := reasonReload
	if caddy.Exiting() {
		reason = reasonShutdown
	}
	r.closeAll(reason)
	r.stop()
	return nil
}

// admit lets a client open one more tunnel, to be followed by leave, or says
// why not. Limits of 0 are none. client is what shares a bucket of the limiter.
func (r *registry) admit(client netip.Addr, limit, perClient int) *refusal {
	if n := r.admitted.Add(1); limit > 0 && n > int64(limit) {
		r.admitted.Add(-1)
		return causeTunnels.refusal(&deniedError{rule: "max_tunnels", why: "all tunnels are in use", hint: "raise max_tunnels"})
	}
	refused := false
	r.clients.Compute(client, func(n int, _ bool) (int, xsync.ComputeOp) {
		if perClient > 0 && n >= perClient {
			refused = true
			return n, xsync.CancelOp
		}
		return n + 1, xsync.UpdateOp
	})
	if refused {
		r.admitted.Add(-1)
		return causeTunnelsPerClient.refusal(&deniedError{rule: "max_tunnels per_client", why: "the client has all of its tunnels in use", hint: "raise max_tunnels per_client"})
	}
	return nil
}

// leave takes back what admit did.
func (r *registry) leave(client netip.Addr) {
	r.clients.Compute(client, func(n int, _ bool) (int, xsync.ComputeOp) {
		if n <= 1 {
			return 0, xsync.DeleteOp
		}
		return n - 1, xsync.UpdateOp
	})
	if r.admitted.Add(-1) == 0 {
		closePipes()
	}
}

// whileOpen returns the context of a tunnel's dial, which ends with ctx, after
// timeout, and when all tunnels are closed: then it is for nothing. done is to be
// called. A dial with a deadline makes no context of its own for one. That ctx
// ends is looked out for only when the dial takes longer than most, as a look at
// the client's connection costs more than the dial of an address nearby.
func (r *registry) whileOpen(ctx context.Context, timeout time.Duration) (open context.Context, done func()) {
	open, cancel := context.WithTimeout(dialContext{r.open, ctx}, timeout)
	watch := time.AfterFunc(promptly, func() { context.AfterFunc(ctx, cancel) })
	return open, func() { watch.Stop(); cancel() }
}

// dialContext ends like one context, which has no values, and has the values of
// another.
type dialContext struct {
	context.Context
	values context.Context
}

func (c dialContext) Value(key any) any {
	if own := c.Context.Value(key); own != nil { // how contexts find one another
		return own
	}
	return c.values.Value(key)
}

// add makes an admitted tunnel known, whose two ends are there.
func (r *registry) add(t *tunnel) {
	t.id = r.lastID.Add(1)
	t.active.Store(sinceEpoch(t.start))
	r.tunnels.Store(t.id, t)
	if t.source.IsValid() {
		r.sources.Store(t.origin(), struct{}{})
	}
	if reason := r.ended.Load(); reason != nil {
		t.close(*reason)
	} else if current := r.config.Load(); current != any(t.owner.config) {
		r.addLate(t, current)
	}
}

// addLate does with a tunnel what was done with the others of its owner when
// that was replaced, since it was still being dialled then.
func (r *registry) addLate(t *tunnel, current any) {
	for h := range r.handlers.All() {
		if h.RecheckTunnels && current == any(h.config) && h.running.Load() && h.succeeds(t.owner) && h.dialer.forbids(t) {
			t.close(reasonForbidden)
		}
	}
	select {
	case <-t.owner.config:
		t.owner.closeTunnelsLater()
	default: // will be called yet
	}
}

// remove forgets a tunnel that has ended, and lets its client open another.
func (r *registry) remove(t *tunnel) {
	r.tunnels.Delete(t.id)
	if t.source.IsValid() {
		r.sources.Delete(t.origin())
	}
	r.leave(t.bucket)
}

// source is a connection to a target: the proxy that opened it, and both ends,
// since the kernel gives one port to several connections.
type source struct {
	proxy    string
	from, to netip.AddrPort
}

func (t *tunnel) origin() source { return source{t.owner.name, t.source, t.address} }

// loops reports whether a request from peer, which the proxy of the given name
// got at local, comes over that proxy's own connection to a target: it has been
// here before. A CONNECT carries no Via that could tell.
func (r *registry) loops(proxy string, peer netip.AddrPort, local net.Addr) bool {
	_, ok := r.sources.Load(source{proxy, peer, addrPort(local)})
	return ok
}

// closeWhere closes the tunnels for which condition holds.
func (r *registry) closeWhere(reason string, condition func(*tunnel) bool) {
	r.tunnels.Range(func(_ uint64, t *tunnel) bool {
		if condition(t) {
			t.close(reason)
		}
		return true
	})
}

// closeAll closes all tunnels, and those that are still being opened as soon
// as they are; then the connections of clients that keep theirs. Over HTTP/3 a
// stream always ends, but Caddy waits for clients to close their connections,
// which those do not that leave something unread. When it exits, all
// connections of the servers that had tunnels are closed.
func (r *registry) closeAll(reason string) {
	r.ended.Store(&reason)
	r.end()
	servers := make(map[*http3.Server]struct{})
	r.closeWhere(reason, func(t *tunnel) bool {
		if stream, ok := t.near.(*streamPeer); ok && stream.server != nil {
			servers[stream.server] = struct{}{}
		}
		return true
	})
	if reason != reasonShutdown {
		time.AfterFunc(stuckTime, r.closeStuck)
		return
	}
	time.AfterFunc(lastMoment, func() {
		r.closeStuck()
		for server := range servers {
			_ = server.Close()
		}
	})
}

// closeStuck closes the connections of all streams that have not ended.
func (r *registry) closeStuck() {
	for _, t := range r.tunnels.All() {
		if stream, ok := t.near.(*streamPeer); ok {
			stream.closeConnection()
		}
	}
}

// watch closes tunnels that have been silent or open for too long. What a
// tunnel does is seen from its counters, so that its bytes pay nothing for it.
func (r *registry) watch(stop <-chan struct{}) {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case now := <-ticker.C:
			r.look(now)
		}
	}
}

func (r *registry) look(now time.Time) {
	r.tunnels.Range(func(_ uint64, t *tunnel) bool {
		t.look(now)
		return true
	})
}

// drain ends all tunnels when Caddy exits: at once, or, if ctx has a deadline,
// which is the end of the grace period, when that comes. It returns when the
// tunnels have ended and their lines are written.
func (r *registry) drain(ctx context.Context) {
	if _, ok := ctx.Deadline(); ok {
		r.wait(ctx)
	}
	r.closeAll(reasonShutdown)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	r.wait(ctx)
}

// wait returns when there are no tunnels, or ctx ends.
func (r *registry) wait(ctx context.Context) {
	waitUntil(ctx, func() bool { return r.tunnels.Size() == 0 })
}

// waitUntil returns when condition holds, or ctx ends.
func waitUntil(ctx context.Context, condition func() bool) {
	for !condition() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// limit returns the least max_tunnels of the handlers, or 0 if none has one.
func (r *registry) limit() int {
	limit := 0
	r.handlers.Range(func(h *Handler, _ struct{}) bool {
		if h.MaxTunnels > 0 && (limit == 0 || h.MaxTunnels < limit) {
			limit = h.MaxTunnels
		}
		return true
	})
	return limit
}

// countBytes has the metrics know what has gone through open tunnels.
func (r *registry) countBytes() {
	r.tunnels.Range(func(_ uint64, t *tunnel) bool {
		t.countBytes()
		return true
	})
}
