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

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// Reasons for the end of a tunnel, as in its closing log line.
const (
	reasonClient      = "client closed" // the client was the first to half-close
	reasonTarget      = "target closed"
	reasonClientError = "client error" // such as a reset
	reasonTargetError = "target error"
	reasonIdle        = "idle"         // tunnel_idle_timeout
	reasonStalled     = "stalled"      // tunnel_stall_timeout
	reasonMaxDuration = "max duration" // tunnel_max_duration
	reasonReload      = "reload"       // stream_close_delay, or no config has a proxy left
	reasonForbidden   = "forbidden"    // recheck_tunnels
	reasonOperator    = "operator"     // closed by the admin API or on the status page
	reasonShutdown    = "shutdown"     // Caddy exits
)

// tunnelOwner is what a tunnel needs of the proxy that opened it. A reload may have replaced
// the proxy since. A timeout that is not positive is none.
type tunnelOwner struct {
	name         string // of the proxy
	idleTimeout  time.Duration
	stallTimeout time.Duration
	maxDuration  time.Duration
	observer     tunnelObserver
}

// tunnelObserver is told when tunnels open and close.
type tunnelObserver interface {
	Opened(*tunnel)
	Closed(*tunnel)
}

// tunnel relays bytes between a client and a target in both directions, until both have
// half-closed or one has failed.
type tunnel struct {
	id       uint64
	client   netip.Addr
	user     string
	limitKey client.Key // the limiter's key for the client
	target   string     // host and port as requested
	proto    string     // of the client's request, or what it upgraded to
	start    time.Time

	owner     *tunnelOwner
	scope     int            // the scope of the client, for the owner
	address   netip.AddrPort // the target's address
	localAddr netip.AddrPort // the proxy's end of that connection
	registry  *registry

	near, far    peer      // the client and the target
	stream       streamEnd // near, if it is a stream; else nil
	responseHead []byte    // sent to the client before any bytes from the target
	clientPrefix []byte    // bytes that the client sent after its request, before the greeting

	targetPrefix []byte // of an upgrade: bytes that the target sent after its 101

	up, down        flow         // bytes from and to the client
	lastActive      atomic.Int64 // when bytes were last seen to have passed, since epoch
	ticksSinceAbort int          // ticks since its stream was aborted; only for look
	keepAliveOn     bool         // has seen a tick before; only for look

	mu                  sync.Mutex // guards the following
	nearWatch, farWatch endWatch

	halfClosed atomic.Int32           // directions that have half-closed, if both ends are connections
	wasReset   atomic.Bool            // the proxy resets both ends
	reason     atomic.Pointer[string] // why it ended; nil while it is open
}

// drainTimeout limits how long a client's last bytes may take to reach a target that has ended,
// or whose client has left. It is needed over HTTP/2 and HTTP/3, where the client's stream
// ends only when the handler returns.
const drainTimeout = 5 * time.Second

// run relays until the tunnel has ended. The calling goroutine relays to the client, and one
// more relays from the client.
func (t *tunnel) run() {
	t.stream, _ = t.near.(streamEnd)
	t.registry.add(t)
	defer t.registry.remove(t)
	t.owner.observer.Opened(t)
	_, err := t.send(t.near, &t.down, t.responseHead)
	t.responseHead = nil
	upDone := make(chan struct{})
	go t.relayUp(upDone)
	if t.stream != nil {
		defer context.AfterFunc(t.stream.Context(), func() { t.clientLeft(upDone) })()
	}
	t.relayDown(err)
	if t.stream != nil {
		// The client's stream ends when the handler returns. A target that has ended and no
		// longer reads must not delay that.
		defer time.AfterFunc(t.registry.lastWords, func() { _ = t.far.Abort() }).Stop()
	}
	<-upDone
	t.setReason(reasonClient) // if there is no other reason, the client has left
	if t.wasReset.Load() {
		t.reset() // another goroutine may still be in the middle of its reset
	}
	_ = t.near.Close()
	_ = t.far.Close()
	t.owner.observer.Closed(t)
}

// relayUp relays from the client to the target. Like relayDown, it is a method and not a
// closure, so that goroutine dumps show its name.
func (t *tunnel) relayUp(done chan<- struct{}) {
	defer close(done)
	if len(t.clientPrefix) > 0 {
		n, err := t.send(t.far, &t.up, t.clientPrefix)
		t.clientPrefix = nil
		t.up.Add(int64(n))
		if err != nil {
			t.directionEnded(t.far, t.near, nil, err)
			return
		}
	}
	readErr, writeErr := relay(t.far.Writer(), t.near.Reader(), &t.up)
	t.directionEnded(t.far, t.near, readErr, writeErr)
}

// relayDown relays from the target to the client. err is the error of writing the greeting.
func (t *tunnel) relayDown(err error) {
	if err == nil && len(t.targetPrefix) > 0 {
		var n int
		n, err = t.send(t.near, &t.down, t.targetPrefix)
		t.targetPrefix = nil
		t.down.Add(int64(n))
	}
	if err != nil {
		t.directionEnded(t.near, t.far, nil, err)
		return
	}
	readErr, writeErr := relay(t.near.Writer(), t.far.Reader(), &t.down)
	t.directionEnded(t.near, t.far, readErr, writeErr)
}

// send writes bytes that the proxy holds for dst before the relay begins.
func (t *tunnel) send(dst peer, f *flow, b []byte) (int, error) {
	f.writing.Store(true)
	defer f.writing.Store(false)
	return dst.Write(b)
}

// clientLeft ends the tunnel when the client has reset its stream, or its connection has
// ended. A silent target would not reveal that. The target still gets the bytes that the
// client had sent, if it reads them within drainTimeout.
func (t *tunnel) clientLeft(upDone <-chan struct{}) {
	t.stream.StopReading()
	timer := time.NewTimer(t.registry.lastWords)
	defer timer.Stop()
	select {
	case <-upDone:
		_ = t.far.Close()
	case <-timer.C:
		t.setReason(reasonClient)
		_ = t.far.Abort()
	}
}

// directionEnded passes the end of one direction on to the other side. If src has
// half-closed, the other direction stays open. If src or dst has failed, the other side sees
// a failure, so that it does not take the bytes before it for complete (RFC 9110 §9.3.6, RFC
// 9113 §8.5).
func (t *tunnel) directionEnded(dst, src peer, readErr, writeErr error) {
	end, srcError, dstError := reasonClient, t.clientErrorReason(readErr), reasonTargetError
	if src == t.far {
		end, srcError, dstError = reasonTarget, reasonTargetError, reasonClientError
	}
	switch {
	case t.wasReset.Load(): // a half-close now would look like an orderly end
	case writeErr != nil && t.isStream(dst) && t.stream.Context().Err() != nil: // clientLeft ends the tunnel
	case writeErr != nil:
		t.setReason(dstError)
		_ = src.Abort()
		_ = dst.Close()
	case readErr == io.EOF, t.reason.Load() != nil && errors.Is(readErr, net.ErrClosed): // we closed it
		t.setReason(end)
		if !t.isStream(dst) && t.halfClosed.Add(1) == 2 {
			return // both sides have half-closed: run closes the connections
		}
		_ = dst.CloseWrite()
	default:
		t.setReason(srcError)
		_ = dst.Abort()
		_ = src.Close()
	}
}

// isStream reports whether an end is the client's stream.
func (t *tunnel) isStream(p peer) bool { return t.stream != nil && p == t.near }

// clientErrorReason returns the reason for a read error of the client. Browsers cancel the streams
// of tunnels that they no longer need, which is not an error.
func (t *tunnel) clientErrorReason(err error) string {
	if s := t.stream; s != nil && (s.WasCanceled(err) || s.Context().Err() != nil && t.isAtRest(restTime)) {
		return reasonClient
	}
	return reasonClientError
}

// setReason records why the tunnel ended. Only the first reason counts: the later ones follow
// from it.
func (t *tunnel) setReason(reason string) {
	if t.reason.Load() == nil {
		first := reason // taking the parameter's address would heap-allocate it on every call
		t.reason.CompareAndSwap(nil, &first)
	}
}

// tick is called on every tick. It closes the tunnel if it has been idle, stalled or open
// for too long. If its stream was aborted but does not end, it closes the connection below.
// It turns keep-alive on at the first tick, so that short-lived tunnels do not pay for it.
func (t *tunnel) tick(now time.Time) {
	if far, ok := t.far.(*connPeer); ok && !t.keepAliveOn && far.socket != nil {
		tcpconn.EnableKeepAlive(far.socket)
	}
	t.keepAliveOn = true
	if t.stream != nil && t.stream.IsAborted() {
		if t.ticksSinceAbort++; t.ticksSinceAbort > int(abortGrace/t.registry.interval) {
			t.stream.CloseConnection()
		}
		return
	}
	stalled := t.watchEnds(now)
	idle := time.Duration(monotime.Of(now) - t.lastActive.Load())
	switch {
	case t.owner.stallTimeout > 0 && stalled >= t.owner.stallTimeout:
		t.setReason(reasonStalled)
		t.reset()
	case t.owner.idleTimeout > 0 && idle >= t.owner.idleTimeout:
		t.close(reasonIdle)
	case t.owner.maxDuration > 0 && now.Sub(t.start) >= t.owner.maxDuration:
		t.close(reasonMaxDuration)
	}
}

// watchEnds records what both ends have taken, and returns how long one of them has taken
// nothing although bytes wait for it.
func (t *tunnel) watchEnds(now time.Time) (stalled time.Duration) {
	interval := max(t.registry.interval, shorterTimeout(t.owner.stallTimeout, t.owner.idleTimeout)/4)
	t.mu.Lock()
	defer t.mu.Unlock()
	at := monotime.Of(now)
	tookNear := t.nearWatch.update(at, &t.down, t.near, interval)
	tookFar := t.farWatch.update(at, &t.up, t.far, interval)
	if tookNear || tookFar {
		t.lastActive.Store(at)
	}
	return max(t.nearWatch.stalledFor(at), t.farWatch.stalledFor(at))
}

// shorterTimeout returns the shorter of two timeouts. A timeout that is not positive is none.
func shorterTimeout(a, b time.Duration) time.Duration {
	if a <= 0 || b > 0 && b < a {
		return b
	}
	return a
}

// restTime is how long a tunnel must have been silent for the proxy to close it in order
// instead of resetting it.
const restTime = 3 * time.Second

// close ends the tunnel for a reason of the proxy. It resets both ends unless the tunnel is
// at rest, because a transfer that was cut short must not look complete.
func (t *tunnel) close(reason string) {
	atRest := restTime
	if reason == reasonIdle {
		atRest = 0 // it was idle for the timeout
	}
	t.setReason(reason)
	if !t.isAtRest(atRest) {
		t.reset()
		return
	}
	if t.stream != nil {
		_ = t.stream.CloseWrite()
	} else {
		_ = t.near.Close()
	}
	_ = t.far.Close()
}

// reset resets both ends of the tunnel.
func (t *tunnel) reset() {
	t.wasReset.Store(true)
	_ = t.near.Abort()
	_ = t.far.Abort()
}

// isAtRest reports whether no bytes have passed for at least that long, and none wait.
func (t *tunnel) isAtRest(atLeast time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Duration(monotime.Of(time.Now())-t.lastActive.Load()) >= atLeast &&
		t.nearWatch.isAtRest(&t.down, t.near) && t.farWatch.isAtRest(&t.up, t.far)
}

// growth returns the bytes from and to the client since the last call.
func (t *tunnel) growth() (up, down int64) { return t.up.growth(), t.down.growth() }

// bytesUp returns how many bytes the client has sent to the target.
func (t *tunnel) bytesUp() int64 { return t.up.Load() }

// bytesDown returns how many bytes the target has sent to the client.
func (t *tunnel) bytesDown() int64 { return t.down.Load() }

// lastActivity returns when bytes were last seen to have passed, since monotime's epoch.
func (t *tunnel) lastActivity() int64 { return t.lastActive.Load() }

// endReason returns why the tunnel has ended, or "" while it is open.
func (t *tunnel) endReason() string {
	if reason := t.reason.Load(); reason != nil {
		return *reason
	}
	return ""
}
