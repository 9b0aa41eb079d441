// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"io"
	"iter"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v4"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// WatchInterval is how often the timeouts of tunnels are checked, and so their precision.
const WatchInterval = time.Second

// AbortGrace is how long an aborted stream may take to end before its whole connection is
// closed, with all other streams on it. When Caddy exits, AbortGraceOnExit applies instead.
const (
	AbortGrace       = 10 * time.Second
	AbortGraceOnExit = time.Second
)

// Registry tracks the open tunnels of the process.
//
// All methods are safe for concurrent use.
type Registry struct {
	tunnels     *xsync.Map[uint64, *Tunnel]
	accounts    *xsync.Map[account, int] // admitted tunnels of each account
	sources     *xsync.Map[loopKey, struct{}]
	admitted    atomic.Int64 // all tunnels, including those being dialled
	lastID      atomic.Uint64
	endReason   atomic.Pointer[string] // why no tunnel may be open; nil: tunnels may be open
	open        context.Context        // canceled when no tunnel may be open any longer
	cancelDials context.CancelFunc
	Stop        func()

	Interval     time.Duration // WatchInterval, but shorter in some tests
	drainTimeout time.Duration // DrainTimeout, but shorter in some tests
}

// NewRegistry returns an empty registry.
func NewRegistry() *Registry { return NewPacedRegistry(WatchInterval, DrainTimeout) }

// NewPacedRegistry returns a registry with the given intervals, for tests.
func NewPacedRegistry(interval, drainTimeout time.Duration) *Registry {
	r := &Registry{
		Interval: interval, drainTimeout: drainTimeout,
		tunnels:  xsync.NewMap[uint64, *Tunnel](),
		accounts: xsync.NewMap[account, int](),
		sources:  xsync.NewMap[loopKey, struct{}](),
	}
	r.open, r.cancelDials = context.WithCancel(context.Background())
	stop := make(chan struct{})
	r.Stop = sync.OnceFunc(func() { close(stop) })
	go r.watch(stop)
	return r
}

// Limits are the maximum numbers of open tunnels. 0 means no limit.
type Limits struct {
	Process int // of this process
	Policy  int // of a policy
	Client  int // of a client in a policy
}

// LimitError reports that one of the Limits is reached.
type LimitError struct {
	PerPolicy bool // the policy's limit
	PerClient bool // the client's own limit
}

// Error implements error.
func (e *LimitError) Error() string {
	switch {
	case e.PerClient:
		return "the client's limit on open tunnels is reached"
	case e.PerPolicy:
		return "the policy's limit on open tunnels is reached"
	}
	return "the limit on open tunnels is reached"
}

// account identifies tunnels that are counted together: those of one client in a policy, or those
// of all clients in it.
type account struct {
	zone, policy string
	all          bool       // of all clients
	client       client.Key // zero if all is set
}

// Admit reserves a tunnel of owner for a client, which the caller must release with Release, or
// returns an error if a limit is reached. key is the limiter's key for the client.
func (r *Registry) Admit(owner *Owner, key client.Key, limits Limits) *LimitError {
	if n := r.admitted.Add(1); limits.Process > 0 && n > int64(limits.Process) {
		r.admitted.Add(-1)
		return &LimitError{}
	}
	if owner.Policy != "" && !r.reserve(owner.account(), limits.Policy) {
		r.admitted.Add(-1)
		return &LimitError{PerPolicy: true}
	}
	if !r.reserve(owner.accountOf(key), limits.Client) {
		if owner.Policy != "" {
			r.release(owner.account())
		}
		r.admitted.Add(-1)
		return &LimitError{PerClient: true}
	}
	return nil
}

// Release releases what Admit reserved.
func (r *Registry) Release(owner *Owner, key client.Key) {
	r.release(owner.accountOf(key))
	if owner.Policy != "" {
		r.release(owner.account())
	}
	if r.admitted.Add(-1) == 0 {
		tcpconn.ClosePipes()
	}
}

// Counts returns the numbers of tunnels that Admit compares with its limits.
func (r *Registry) Counts(owner *Owner, key client.Key) Limits {
	policy, _ := r.accounts.Load(owner.account())
	client, _ := r.accounts.Load(owner.accountOf(key))
	return Limits{Process: r.Reserved(), Policy: policy, Client: client}
}

// account returns the account of all clients in the owner's policy.
func (o *Owner) account() account { return account{zone: o.Zone, policy: o.Policy, all: true} }

// accountOf returns the account of a client in the owner's policy.
func (o *Owner) accountOf(key client.Key) account {
	return account{zone: o.Zone, policy: o.Policy, client: key}
}

// reserve counts a tunnel for an account, and reports whether the limit allows it.
func (r *Registry) reserve(a account, limit int) (ok bool) {
	r.accounts.Compute(a, func(n int, _ bool) (int, xsync.ComputeOp) {
		if limit > 0 && n >= limit {
			return n, xsync.CancelOp
		}
		ok = true
		return n + 1, xsync.UpdateOp
	})
	return ok
}

// release ends what reserve has counted.
func (r *Registry) release(a account) {
	r.accounts.Compute(a, func(n int, _ bool) (int, xsync.ComputeOp) {
		if n <= 1 {
			return 0, xsync.DeleteOp
		}
		return n - 1, xsync.UpdateOp
	})
}

// dialWatchDelay is how long a dial runs before it watches for the end of its request.
const dialWatchDelay = 20 * time.Millisecond

// DialContext returns the context for dialing a tunnel's target. It ends when ctx ends, after
// timeout, and when all tunnels are closed. The caller must call done.
//
// The deadline is set here because net.Dialer then allocates no context of its own. DialContext
// watches for the end of ctx only after a delay, because watching the client's connection costs
// more than dialing a nearby host.
func (r *Registry) DialContext(ctx context.Context, timeout time.Duration) (open context.Context, done func()) {
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
func (r *Registry) add(t *Tunnel) {
	t.ID = r.lastID.Add(1)
	t.lastActive.Store(monotime.Of(t.Start))
	r.tunnels.Store(t.ID, t)
	if t.LocalAddr.IsValid() {
		r.sources.Store(t.loopKey(), struct{}{})
	}
	if reason := r.endReason.Load(); reason != nil {
		t.Close(*reason)
	}
}

// remove removes a tunnel that has ended, and releases what Admit reserved.
func (r *Registry) remove(t *Tunnel) {
	r.tunnels.Delete(t.ID)
	if t.LocalAddr.IsValid() {
		r.sources.Delete(t.loopKey())
	}
	r.Release(t.Owner, t.LimitKey)
}

// loopKey identifies a connection to a target: the proxy that opened it and both ends. Both
// are needed, because the kernel may use one local port for several connections.
type loopKey struct {
	proxy    string
	from, to netip.AddrPort
}

func (t *Tunnel) loopKey() loopKey { return loopKey{t.Owner.Name, t.LocalAddr, t.Address} }

// Loops reports whether a request from peer, received at local, arrived over a connection
// that the proxy of the given name has opened itself, which means that it loops. A CONNECT
// carries no Via that could tell.
func (r *Registry) Loops(proxy string, peer netip.AddrPort, local net.Addr) bool {
	_, ok := r.sources.Load(loopKey{proxy, peer, hostport.AddrPortOf(local)})
	return ok
}

// CloseIf closes the tunnels for which condition holds.
func (r *Registry) CloseIf(reason string, condition func(*Tunnel) bool) {
	r.tunnels.Range(func(_ uint64, t *Tunnel) bool {
		if condition(t) {
			t.Close(reason)
		}
		return true
	})
}

// CloseAll closes all tunnels, and those that are still being opened once they are open.
// Later it closes the connections of clients whose aborted streams do not end.
//
// Over HTTP/3 a stream always ends, but on exit Caddy waits for clients to close their
// connections, and a client that leaves bytes unread does not. So on exit all connections of
// the servers that had tunnels are closed.
func (r *Registry) CloseAll(reason string) {
	r.endReason.Store(&reason)
	r.cancelDials()
	// All get the reason first: when Caddy exits, it may close the connection of a tunnel before
	// that tunnel's turn.
	for t := range r.All() {
		t.setReason(reason)
	}
	servers := make(map[io.Closer]struct{})
	r.CloseIf(reason, func(t *Tunnel) bool {
		if t.stream == nil {
			return true
		}
		if server := t.stream.Server(); server != nil {
			servers[server] = struct{}{}
		}
		return true
	})
	if reason != ReasonShutdown {
		time.AfterFunc(AbortGrace, r.closeStuck)
		return
	}
	time.AfterFunc(AbortGraceOnExit, func() {
		r.closeStuck()
		for server := range servers {
			_ = server.Close()
		}
	})
}

// closeStuck closes the connections of all streams that have not ended.
func (r *Registry) closeStuck() {
	for _, t := range r.tunnels.All() {
		if t.stream != nil {
			t.stream.CloseConnection()
		}
	}
}

// watch checks the timeouts of all tunnels once per interval. It reads their counters,
// so that relaying needs no timers.
func (r *Registry) watch(stop <-chan struct{}) {
	ticker := time.NewTicker(r.Interval)
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

func (r *Registry) tick(now time.Time) {
	r.tunnels.Range(func(_ uint64, t *Tunnel) bool {
		t.tick(now)
		return true
	})
}

// Drain ends all tunnels when Caddy exits: at once, or at the deadline of ctx, the end of
// the grace period, if there is one. It returns when the tunnels have ended and their log
// lines are written.
func (r *Registry) Drain(ctx context.Context) {
	if _, ok := ctx.Deadline(); ok {
		r.wait(ctx)
	}
	r.CloseAll(ReasonShutdown)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	r.wait(ctx)
}

// wait waits until there are no tunnels, or ctx ends.
func (r *Registry) wait(ctx context.Context) {
	for r.tunnels.Size() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// All iterates over the open tunnels.
func (r *Registry) All() iter.Seq[*Tunnel] {
	return func(yield func(*Tunnel) bool) {
		r.tunnels.Range(func(_ uint64, t *Tunnel) bool { return yield(t) })
	}
}

// Get returns the open tunnel with an ID, or nil.
func (r *Registry) Get(id uint64) *Tunnel {
	t, _ := r.tunnels.Load(id)
	return t
}

// Size returns the number of open tunnels.
func (r *Registry) Size() int { return r.tunnels.Size() }

// Reserved returns the number of tunnels that are open or being opened.
func (r *Registry) Reserved() int { return int(r.admitted.Load()) }

// Context returns the context that is canceled when no tunnel may be open any longer.
func (r *Registry) Context() context.Context { return r.open }

// IsClosed reports whether no tunnel may be open any longer.
func (r *Registry) IsClosed() bool { return r.endReason.Load() != nil }

// IsEmpty reports whether nothing is left of any tunnel.
func (r *Registry) IsEmpty() bool {
	return r.tunnels.Size() == 0 && r.admitted.Load() == 0 && r.accounts.Size() == 0 && r.sources.Size() == 0
}
