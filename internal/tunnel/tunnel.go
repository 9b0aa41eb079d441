// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package tunnel copies bytes between a client and a target until both have finished. It
// offers tunnels, the registry that bounds, lists and closes them, and relays that use
// splice(2) where the system has it. It does not know which request a tunnel is for, nor
// where it is logged and counted.
package tunnel

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
	ReasonClient      = "client closed" // the client was the first to half-close
	ReasonTarget      = "target closed"
	ReasonClientError = "client error" // such as a reset
	ReasonTargetError = "target error"
	ReasonIdle        = "idle"         // tunnel_idle_timeout
	ReasonStalled     = "stalled"      // tunnel_stall_timeout
	ReasonMaxDuration = "max duration" // tunnel_max_duration
	ReasonReload      = "reload"       // stream_close_delay, or no config has a proxy left
	ReasonForbidden   = "forbidden"    // recheck_tunnels
	ReasonOperator    = "operator"     // closed by the admin API or on the status page
	ReasonShutdown    = "shutdown"     // Caddy exits
)

// Owner holds what a tunnel needs to know about the proxy that opened it. A reload may have
// replaced the proxy since. A timeout that is not positive means no limit.
type Owner struct {
	Name         string // of the proxy
	Zone         string // tunnels are counted by zone and policy
	Policy       string // in the zone; "": the zone's own
	IdleTimeout  time.Duration
	StallTimeout time.Duration
	MaxDuration  time.Duration
	Observer     tunnelObserver
}

// tunnelObserver is told when tunnels open and close.
type tunnelObserver interface {
	Opened(*Tunnel)
	Closed(*Tunnel)
}

// Tunnel relays bytes between a client and a target in both directions, until both have
// half-closed or one has failed.
type Tunnel struct {
	ID       uint64
	Client   netip.Addr
	User     string
	LimitKey client.Key // the limiter's key for the client
	Target   string     // host and port as requested
	Proto    string     // of the client's request, or what it upgraded to
	Start    time.Time

	Owner     *Owner
	Scope     int            // the scope of the client, for the owner
	Address   netip.AddrPort // the target's address
	LocalAddr netip.AddrPort // the proxy's end of that connection
	Registry  *Registry

	Near, Far    End       // the client and the target
	stream       streamEnd // Near, if it is a stream; else nil
	ResponseHead []byte    // sent to the client before any bytes from the target
	ClientPrefix []byte    // bytes that the client sent after its request, before the tunnel was open
	TargetPrefix []byte    // of an upgrade: bytes that the target sent after its 101

	up, down        flow         // bytes from and to the client
	lastActive      atomic.Int64 // when bytes were last seen to have passed, since epoch
	ticksSinceAbort int          // ticks since its stream was aborted; only for tick
	keepAliveOn     bool         // tick has run before; only for tick

	mu                  sync.Mutex // guards the following
	nearWatch, farWatch endWatch

	halfClosed atomic.Int32           // directions that have half-closed, if both ends are connections
	wasReset   atomic.Bool            // the proxy resets both ends
	reason     atomic.Pointer[string] // why it ended; nil while it is open
}

// DrainTimeout limits how long a client's last bytes may take to reach the target after the target
// has half-closed or the client has disconnected. It is needed over HTTP/2 and HTTP/3, where the
// client's stream ends only when the handler returns.
const DrainTimeout = 5 * time.Second

// Run relays until the tunnel has ended. The calling goroutine relays to the client, and one
// more relays from the client.
func (t *Tunnel) Run() {
	t.stream, _ = t.Near.(streamEnd)
	t.Registry.add(t)
	defer t.Registry.remove(t)
	t.Owner.Observer.Opened(t)
	_, err := t.send(t.Near, &t.down, t.ResponseHead)
	t.ResponseHead = nil
	upDone := make(chan struct{})
	go t.relayUp(upDone)
	if t.stream != nil {
		defer context.AfterFunc(t.stream.Context(), func() { t.clientLeft(upDone) })()
	}
	t.relayDown(err)
	if t.stream != nil {
		// The client's stream ends when the handler returns. A target that has ended and no
		// longer reads must not delay that.
		defer time.AfterFunc(t.Registry.drainTimeout, func() { _ = t.Far.Abort() }).Stop()
	}
	<-upDone
	t.setReason(ReasonClient) // if there is no other reason, the client has left
	if t.wasReset.Load() {
		t.reset() // another goroutine may still be in the middle of its reset
	}
	_ = t.Near.Close()
	_ = t.Far.Close()
	t.Owner.Observer.Closed(t)
}

// relayUp relays from the client to the target. Like relayDown, it is a method and not a
// closure, so that goroutine dumps show its name.
func (t *Tunnel) relayUp(done chan<- struct{}) {
	defer close(done)
	if len(t.ClientPrefix) > 0 {
		n, err := t.send(t.Far, &t.up, t.ClientPrefix)
		t.ClientPrefix = nil
		t.up.Add(int64(n))
		if err != nil {
			t.directionEnded(t.Far, t.Near, nil, err)
			return
		}
	}
	readErr, writeErr := relay(t.Far.Writer(), t.Near.Reader(), &t.up)
	t.directionEnded(t.Far, t.Near, readErr, writeErr)
}

// relayDown relays from the target to the client. err is the error of writing ResponseHead.
func (t *Tunnel) relayDown(err error) {
	if err == nil && len(t.TargetPrefix) > 0 {
		var n int
		n, err = t.send(t.Near, &t.down, t.TargetPrefix)
		t.TargetPrefix = nil
		t.down.Add(int64(n))
	}
	if err != nil {
		t.directionEnded(t.Near, t.Far, nil, err)
		return
	}
	readErr, writeErr := relay(t.Near.Writer(), t.Far.Reader(), &t.down)
	t.directionEnded(t.Near, t.Far, readErr, writeErr)
}

// send writes bytes that the proxy holds for dst before the relay begins.
func (t *Tunnel) send(dst End, f *flow, b []byte) (int, error) {
	f.writing.Store(true)
	defer f.writing.Store(false)
	return dst.Write(b)
}

// clientLeft ends the tunnel when the client has reset its stream, or its connection has
// ended. A silent target would not reveal that. The target still gets the bytes that the
// client had sent, if it reads them within DrainTimeout.
//
// The stream may also have ended because reset has aborted it, and has yet to abort the target's
// connection.
func (t *Tunnel) clientLeft(upDone <-chan struct{}) {
	t.stream.StopReading()
	timer := time.NewTimer(t.Registry.drainTimeout)
	defer timer.Stop()
	select {
	case <-upDone:
		if t.wasReset.Load() {
			_ = t.Far.Abort()
		}
		_ = t.Far.Close()
	case <-timer.C:
		t.setReason(ReasonClient)
		_ = t.Far.Abort()
	}
}

// directionEnded passes the end of one direction on to the other side. If src has
// half-closed, the other direction stays open. If src or dst has failed, the other side sees
// a failure, so that it does not take the bytes before it for complete (RFC 9110 §9.3.6, RFC
// 9113 §8.5).
func (t *Tunnel) directionEnded(dst, src End, readErr, writeErr error) {
	end, srcError, dstError := ReasonClient, t.clientErrorReason(readErr), ReasonTargetError
	if src == t.Far {
		end, srcError, dstError = ReasonTarget, ReasonTargetError, ReasonClientError
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
			return // both sides have half-closed: Run closes the connections
		}
		_ = dst.CloseWrite()
	default:
		t.setReason(srcError)
		_ = dst.Abort()
		_ = src.Close()
	}
}

// isStream reports whether an end is the client's stream.
func (t *Tunnel) isStream(p End) bool { return t.stream != nil && p == t.Near }

// clientErrorReason returns the reason for a read error of the client. Browsers cancel the streams
// of tunnels that they no longer need, which is not an error.
func (t *Tunnel) clientErrorReason(err error) string {
	if s := t.stream; s != nil && (s.WasCanceled(err) || s.Context().Err() != nil && t.isAtRest(restTime)) {
		return ReasonClient
	}
	return ReasonClientError
}

// setReason records why the tunnel ended. Only the first reason counts: the later ones follow
// from it.
func (t *Tunnel) setReason(reason string) {
	if t.reason.Load() == nil {
		first := reason // taking the parameter's address would heap-allocate it on every call
		t.reason.CompareAndSwap(nil, &first)
	}
}

// tick is called on every tick. It closes the tunnel if it has been idle, stalled or open
// for too long. If its stream was aborted but does not end, it closes the connection below.
// It turns keep-alive on at the first tick, so that short-lived tunnels do not pay for it.
func (t *Tunnel) tick(now time.Time) {
	if far, ok := t.Far.(*ConnEnd); ok && !t.keepAliveOn && far.socket != nil {
		tcpconn.EnableKeepAlive(far.socket)
	}
	t.keepAliveOn = true
	if t.stream != nil && t.stream.IsAborted() {
		if t.ticksSinceAbort++; t.ticksSinceAbort > int(AbortGrace/t.Registry.Interval) {
			t.stream.CloseConnection()
		}
		return
	}
	stalled := t.watchEnds(now)
	idle := time.Duration(monotime.Of(now) - t.lastActive.Load())
	switch {
	case t.Owner.StallTimeout > 0 && stalled >= t.Owner.StallTimeout:
		t.setReason(ReasonStalled)
		t.reset()
	case t.Owner.IdleTimeout > 0 && idle >= t.Owner.IdleTimeout:
		t.Close(ReasonIdle)
	case t.Owner.MaxDuration > 0 && now.Sub(t.Start) >= t.Owner.MaxDuration:
		t.Close(ReasonMaxDuration)
	}
}

// watchEnds records what both ends have taken, and returns how long one of them has taken
// nothing although bytes wait for it.
func (t *Tunnel) watchEnds(now time.Time) (stalled time.Duration) {
	interval := max(t.Registry.Interval, shorterTimeout(t.Owner.StallTimeout, t.Owner.IdleTimeout)/4)
	t.mu.Lock()
	defer t.mu.Unlock()
	at := monotime.Of(now)
	tookNear := t.nearWatch.update(at, &t.down, t.Near, interval)
	tookFar := t.farWatch.update(at, &t.up, t.Far, interval)
	if tookNear || tookFar {
		t.lastActive.Store(at)
	}
	return max(t.nearWatch.stalledFor(at), t.farWatch.stalledFor(at))
}

// shorterTimeout returns the shorter of two timeouts. A timeout that is not positive means no limit.
func shorterTimeout(a, b time.Duration) time.Duration {
	if a <= 0 || b > 0 && b < a {
		return b
	}
	return a
}

// restTime is how long a tunnel must have been silent for the proxy to close it in order
// instead of resetting it.
const restTime = 3 * time.Second

// Close ends the tunnel for a reason of the proxy. It resets both ends unless the tunnel is
// at rest, because a transfer that was cut short must not look complete.
func (t *Tunnel) Close(reason string) {
	atRest := restTime
	if reason == ReasonIdle {
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
		_ = t.Near.Close()
	}
	_ = t.Far.Close()
}

// reset resets both ends of the tunnel.
func (t *Tunnel) reset() {
	t.wasReset.Store(true)
	_ = t.Near.Abort()
	_ = t.Far.Abort()
}

// isAtRest reports whether no bytes have passed for at least that long, and no bytes wait for
// either end.
func (t *Tunnel) isAtRest(atLeast time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Duration(monotime.Of(time.Now())-t.lastActive.Load()) >= atLeast &&
		t.nearWatch.isAtRest(&t.down, t.Near) && t.farWatch.isAtRest(&t.up, t.Far)
}

// Growth returns the bytes from and to the client since the last call.
func (t *Tunnel) Growth() (up, down int64) { return t.up.growth(), t.down.growth() }

// BytesUp returns how many bytes the client has sent to the target.
func (t *Tunnel) BytesUp() int64 { return t.up.Load() }

// BytesDown returns how many bytes the target has sent to the client.
func (t *Tunnel) BytesDown() int64 { return t.down.Load() }

// LastActivity returns when bytes were last seen to have passed, since monotime's epoch.
func (t *Tunnel) LastActivity() int64 { return t.lastActive.Load() }

// EndReason returns why the tunnel has ended, or "" while it is open.
func (t *Tunnel) EndReason() string {
	if reason := t.reason.Load(); reason != nil {
		return *reason
	}
	return ""
}
