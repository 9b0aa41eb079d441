// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// Limiter is the interface of modules in the namespace http.async_proxy.limiters. A Limiter
// counts clients across several processes.
//
// It is a second stage. A request that this process's own bucket denies is denied without
// asking the Limiter. If the Limiter denies a request, the local bucket is emptied for as
// long, so that a client that does not wait is not asked about again.
//
// Both methods are called concurrently, and before any other work for a request. They must
// return quickly, whatever state their backend is in.
type Limiter interface {
	// Take takes a token from the bucket and returns 0, or takes none and returns how long
	// until there is one. An error means that the request cannot be counted: it is refused
	// with status 503.
	Take(context.Context, Bucket) (wait time.Duration, err error)

	// Suspended reports whether rate limiting is suspended. While it is, neither this
	// process's buckets nor Take are used.
	Suspended() bool
}

// Refiller is a Limiter whose buckets can be refilled by an operator.
type Refiller interface {
	// Refill fills the bucket. done reports whether it was not full before.
	Refill(context.Context, Bucket) (done bool, err error)
}

// Bucket identifies a client's token bucket and gives its size. Equal Buckets are the same
// bucket, whichever process asks.
type Bucket struct {
	Zone     string
	Client   netip.Prefix  // zero for users and for clients on Unix sockets
	User     string        // with limit_by user: the user; else ""
	Burst    int64         // tokens in a full bucket
	Interval time.Duration // time to gain one token
}

const limiterNamespace = "http.async_proxy.limiters"

// loadLimiter provisions the configured limiter module, if there is one.
func (h *Handler) loadLimiter(ctx caddy.Context) error {
	if h.LimiterRaw == nil {
		return nil
	}
	module, err := ctx.LoadModule(h, "LimiterRaw")
	if err != nil {
		return err
	}
	h.shared = module.(Limiter)
	return nil
}

// chargeBuckets charges one token to the client: from its local bucket, and then from the shared one,
// if there is one.
func (h *Handler) chargeBuckets(ctx context.Context, key client.Key, now int64) decision {
	if h.shared != nil && h.shared.Suspended() {
		return decision{ok: true}
	}
	local := h.limiter.take(key, now)
	if h.shared == nil || !local.ok {
		return local
	}
	wait, err := h.shared.Take(ctx, h.limiter.sharedBucket(key))
	switch {
	case err != nil:
		return h.limiter.refund(key, now).refuse(0, now, err)
	case wait > 0:
		return h.limiter.drain(key, now, wait).refuse(int64(wait), now, nil)
	}
	return local
}

// sharedBucket returns the client's bucket as the shared limiter identifies it.
func (l *limiter) sharedBucket(key client.Key) Bucket {
	b := Bucket{Zone: l.key.zone, Burst: l.key.burst, Interval: time.Duration(l.interval)}
	if b.User = key.User(); b.User == "" {
		b.Client = netip.PrefixFrom(key.Addr(), l.key.bits(key))
	}
	return b
}

// refund refunds one token to the client's bucket: the request was refused for another
// reason, or the login did not fail.
func (l *limiter) refund(key client.Key, now int64) *bucket {
	b := l.bucket(key, now)
	b.fullAt.Add(-l.interval)
	return b
}

// drain sets the client's bucket to the state of the shared one, which has no token for the
// duration wait. now is when the request arrived, slightly before the wait began, so the
// local wait ends slightly early and never late.
func (l *limiter) drain(key client.Key, now int64, wait time.Duration) *bucket {
	b := l.bucket(key, now)
	b.fullAt.Store(now + l.fill - l.interval + int64(wait))
	return b
}

// errBlocked reports that an operator has blocked the client.
var errBlocked = errors.New("the client is blocked")

// refuseUncounted responds to a request that is refused for a reason other than an empty
// bucket: the shared limiter cannot count it, its client is blocked, or its login is not
// checked. As in refuseLimited, one log line stands for many refusals.
func (h *Handler) refuseUncounted(w http.ResponseWriter, r *http.Request, v *transaction, verdict decision) error {
	var f *refusal
	retryAfter := ceilSeconds(verdict.wait)
	switch verdict.err {
	case errFailedLogins:
		f = causeFailedLogins.refusal(errFailedLogins, retryAfter)
	case errLoginsBusy:
		f = causeLoginsBusy.refusal(errLoginsBusy, retryAfter)
	case errBlocked:
		subject := "your address"
		if v.limitKey.User() != "" {
			subject = "this user"
		}
		f = causeBlocked.refusal(errBlocked, subject, retryAfter)
	default:
		f = causeLimiterUnavailable.refusal(verdict.err)
	}
	v.setRefusal(f)
	v.count(f)
	if verdict.logCount > 0 {
		v.addRecent(f)
		h.logRequest(r, v, f.err, zap.Int64("refused", verdict.logCount))
	}
	w.Header()["Retry-After"] = []string{strconv.FormatInt(retryAfter, 10)}
	return h.sendRefusal(w, r, f)
}
