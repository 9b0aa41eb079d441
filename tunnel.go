// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// Why a tunnel ended, as it stands in its closing line.
const (
	reasonClient      = "client closed" // the client was the first to say that it was done
	reasonTarget      = "target closed"
	reasonClientError = "client error" // such as a reset
	reasonTargetError = "target error"
	reasonIdle        = "idle"         // tunnel_idle_timeout
	reasonStalled     = "stalled"      // tunnel_stall_timeout
	reasonMaxDuration = "max duration" // tunnel_max_duration
	reasonReload      = "reload"       // stream_close_delay, or no config has a proxy any more
	reasonForbidden   = "forbidden"    // recheck_tunnels
	reasonOperator    = "operator"     // by the admin API or the status page
	reasonShutdown    = "shutdown"     // Caddy exits
)

// tunnel joins a client and a target: what one of them writes the other reads,
// until both are done or one fails.
type tunnel struct {
	id     uint64
	client netip.Addr
	user   string
	bucket netip.Addr // what the client shares its limits with
	target string     // as the client named it
	proto  string     // of the client's request, or what it upgraded to
	start  time.Time

	owner    *Handler // which opened it; a reload may have replaced it since
	reach    reach
	address  netip.AddrPort // the target that was connected to
	source   netip.AddrPort // our end of that connection
	registry *registry
	logger   *zap.Logger

	near, far peer   // the client and the target
	greeting  []byte // goes to the client before anything from the target
	early     []byte // what the client sent before it was greeted

	fromTarget []byte // of an upgrade: what the target sent behind its 101

	up, down flow         // bytes from the client and to it
	active   atomic.Int64 // when some were last seen to have been, since epoch
	stuck    int          // looks since its stream was aborted; look's own
	lasting  bool         // has been looked at before; look's own

	mu                  sync.Mutex // guards the following
	nearWatch, farWatch endWatch

	countedUp, countedDown atomic.Int64 // bytes that are in the metrics already

	halves atomic.Int32           // directions that have ended orderly, of connections
	broken atomic.Bool            // the proxy has reset both ends
	reason atomic.Pointer[string] // why it ended; nil: it has not
}

// lastWords is how long what a client has sent may take to get to a target that
// has ended, where the client's stream cannot be ended before.
const lastWords = 5 * time.Second

// newTunnel prepares a tunnel to far, the connection that was dialled.
func (h *Handler) newTunnel(from caller, target, proto string, far net.Conn) *tunnel {
	return &tunnel{
		client: from.addr, user: from.user, bucket: from.bucket, target: target, proto: proto, start: time.Now(),
		owner: h, reach: from.reach, registry: h.tunnels, logger: h.logger,
		far: newConnPeer(far), address: addrPort(far.RemoteAddr()), source: addrPort(far.LocalAddr()),
	}
}

func addrPort(addr net.Addr) netip.AddrPort {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		ap := tcp.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

// run relays until the tunnel has ended. It takes the calling goroutine for
// what goes to the client and one more for what comes from there.
func (t *tunnel) run() {
	t.registry.add(t)
	defer t.registry.remove(t)
	t.logOpened()
	_, err := t.send(t.near, &t.down, t.greeting)
	t.greeting = nil
	upDone := make(chan struct{})
	go t.relayUp(upDone)
	stream, ok := t.near.(*streamPeer)
	if ok {
		defer context.AfterFunc(stream.ctx, func() { t.clientLeft(stream, upDone) })()
	}
	t.relayDown(err)
	if ok {
		// The client learns of the end when its handler returns. A target that
		// has ended and takes no more either must not keep it.
		defer time.AfterFunc(lastWords, func() { _ = t.far.Abort() }).Stop()
	}
	<-upDone
	t.ended(reasonClient) // unless there was another reason: the client has left
	if t.broken.Load() {
		t.reset() // may still be under way
	}
	_ = t.near.Close()
	_ = t.far.Close()
	t.count()
	t.logClosed()
}

// relayUp passes on what the client says. Like relayDown it has a name, so that
// it has one in a dump of goroutines.
func (t *tunnel) relayUp(done chan<- struct{}) {
	defer close(done)
	if len(t.early) > 0 {
		n, err := t.send(t.far, &t.up, t.early)
		t.early = nil
		t.up.Add(int64(n))
		if err != nil {
			t.directionEnded(t.far, t.near, nil, err)
			return
		}
	}
	readErr, writeErr := relay(t.far.writer(), t.near.reader(), &t.up)
	t.directionEnded(t.far, t.near, readErr, writeErr)
}

// relayDown passes on what the target says, unless the client could not be
// greeted.
func (t *tunnel) relayDown(err error) {
	if err == nil && len(t.fromTarget) > 0 {
		var n int
		n, err = t.send(t.near, &t.down, t.fromTarget)
		t.fromTarget = nil
		t.down.Add(int64(n))
	}
	if err != nil {
		t.directionEnded(t.near, t.far, nil, err)
		return
	}
	readErr, writeErr := relay(t.near.writer(), t.far.reader(), &t.down)
	t.directionEnded(t.near, t.far, readErr, writeErr)
}

// send writes what the proxy has for dst before the relay begins.
func (t *tunnel) send(dst peer, f *flow, b []byte) (int, error) {
	f.waiting.Store(true)
	defer f.waiting.Store(false)
	return dst.Write(b)
}

// clientLeft ends the tunnel when the client has reset its stream, or its connection
// has ended. The target may be silent, so that nothing else would notice. What the
// client had sent before still gets to the target if that takes it soon.
func (t *tunnel) clientLeft(near *streamPeer, upDone <-chan struct{}) {
	near.stopReading()
	timer := time.NewTimer(lastWords)
	defer timer.Stop()
	select {
	case <-upDone:
		_ = t.far.Close()
	case <-timer.C:
		t.ended(reasonClient)
		_ = t.far.Abort()
	}
}

// directionEnded passes the end of one direction on. An orderly end, src saying
// that it is done, leaves the other direction open. A failure of either side is
// made known to the other one as a failure, so that nobody takes what came
// before it for the whole (RFC 9110 §9.3.6, RFC 9113 §8.5).
func (t *tunnel) directionEnded(dst, src peer, readErr, writeErr error) {
	end, srcError, dstError := reasonClient, t.clientError(readErr), reasonTargetError
	if src == t.far {
		end, srcError, dstError = reasonTarget, reasonTargetError, reasonClientError
	}
	switch {
	case t.broken.Load(): // an end that was passed on now would look like one in order
	case writeErr != nil && hasLeft(dst): // clientLeft does the rest
	case writeErr != nil:
		t.ended(dstError)
		_ = src.Abort()
		_ = dst.Close()
	case readErr == io.EOF, t.reason.Load() != nil && errors.Is(readErr, net.ErrClosed): // closed by ourselves
		t.ended(end)
		if _, ok := dst.(*streamPeer); !ok && t.halves.Add(1) == 2 {
			return // both are done: closing says it all
		}
		_ = dst.CloseWrite()
	default:
		t.ended(srcError)
		_ = dst.Abort()
		_ = src.Close()
	}
}

// clientError tells a client that has given its tunnel up, as browsers do that need
// it no more, from one that failed.
func (t *tunnel) clientError(err error) string {
	stream, ok := t.near.(*streamPeer)
	if ok && (stream.wasGivenUp(err) || stream.ctx.Err() != nil && t.isAtRest(restTime)) {
		return reasonClient
	}
	return reasonClientError
}

// ended notes why the tunnel ended. What happens first is the reason; the rest
// follows from it.
func (t *tunnel) ended(reason string) {
	if t.reason.Load() == nil {
		first := reason // for which there is no room to be made each time
		t.reason.CompareAndSwap(nil, &first)
	}
}

// look closes the tunnel if it has been silent, stalled or open for too long, and the
// connection of one that is closed and does not end. One that has come to be
// looked at is kept alive from then on.
func (t *tunnel) look(now time.Time) {
	if far, ok := t.far.(*connPeer); ok && !t.lasting && far.tcp != nil {
		keepAlive(far.tcp)
	}
	t.lasting = true
	if stream, ok := t.near.(*streamPeer); ok && stream.state.Load() == streamAborted {
		if t.stuck++; t.stuck > int(stuckTime/watchInterval) {
			stream.closeConnection()
		}
		return
	}
	stalled := t.watchEnds(now)
	idle := time.Duration(sinceEpoch(now) - t.active.Load())
	switch {
	case t.owner.TunnelStallTimeout > 0 && stalled >= time.Duration(t.owner.TunnelStallTimeout):
		t.ended(reasonStalled)
		t.reset()
	case t.owner.TunnelIdleTimeout > 0 && idle >= time.Duration(t.owner.TunnelIdleTimeout):
		t.close(reasonIdle)
	case t.owner.TunnelMaxDuration > 0 && now.Sub(t.start) >= time.Duration(t.owner.TunnelMaxDuration):
		t.close(reasonMaxDuration)
	}
}

// watchEnds notes what both ends have taken, and returns how long one of them has
// taken nothing although there is something for it.
func (t *tunnel) watchEnds(now time.Time) (stalled time.Duration) {
	interval := max(watchInterval, least(t.owner.TunnelStallTimeout, t.owner.TunnelIdleTimeout)/4)
	t.mu.Lock()
	defer t.mu.Unlock()
	at := sinceEpoch(now)
	tookNear := t.nearWatch.look(at, &t.down, t.near, interval)
	tookFar := t.farWatch.look(at, &t.up, t.far, interval)
	if tookNear || tookFar {
		t.active.Store(at)
	}
	return max(t.nearWatch.stalledFor(at), t.farWatch.stalledFor(at))
}

// least returns the shorter of two timeouts, which are not positive if there are none.
func least(a, b caddy.Duration) time.Duration {
	if a <= 0 || b > 0 && b < a {
		return time.Duration(b)
	}
	return time.Duration(a)
}

// restTime is how long nothing has passed through a tunnel that may end in order,
// although it is the proxy that ends it.
const restTime = 3 * time.Second

// close ends the tunnel for a reason of the proxy's own. Something that was cut off
// must not look complete: unless the tunnel is at rest, both ends are reset.
func (t *tunnel) close(reason string) {
	atRest := restTime
	if reason == reasonIdle {
		atRest = 0 // it was idle for the timeout
	}
	t.ended(reason)
	if !t.isAtRest(atRest) {
		t.reset()
		return
	}
	if stream, ok := t.near.(*streamPeer); ok {
		_ = stream.CloseWrite()
	} else {
		_ = t.near.Close()
	}
	_ = t.far.Close()
}

// reset breaks the tunnel off at both ends.
func (t *tunnel) reset() {
	t.broken.Store(true)
	_ = t.near.Abort()
	_ = t.far.Abort()
}

// isAtRest reports whether nothing has passed for that long and nothing waits.
func (t *tunnel) isAtRest(atLeast time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Duration(sinceEpoch(time.Now())-t.active.Load()) >= atLeast &&
		t.nearWatch.isAtRest(&t.down, t.near) && t.farWatch.isAtRest(&t.up, t.far)
}
