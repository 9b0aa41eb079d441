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

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// Limiter is what a module of the namespace http.async_proxy.limiters has to
// be: a place where several processes count the same clients together.
//
// It is a second opinion. A request that this process's own bucket refuses is
// refused without asking; a refusal by the Limiter empties the own bucket for
// as long, so that a client that does not wait is not asked about again.
//
// Both methods are called concurrently, and before anything else is done for a
// request: neither may take long, whatever happens to what is behind them.
type Limiter interface {
	// Take takes a token from the bucket and returns 0, or takes none and
	// returns how long until there is one. An error says that the request
	// cannot be counted and is to be refused for that: it is answered with 503.
	Take(context.Context, Bucket) (wait time.Duration, err error)

	// Suspended reports whether nobody is to be limited for now. Then neither
	// this process's buckets are looked at, nor is Take called.
	Suspended() bool
}

// Refiller is a Limiter whose buckets the operator can fill.
type Refiller interface {
	// Refill fills the bucket, and reports whether it was not full.
	Refill(context.Context, Bucket) (done bool, err error)
}

// Bucket names the token bucket of one client, and says how large it is. Equal
// Buckets are the same bucket, whichever process asks.
type Bucket struct {
	Zone     string
	Client   netip.Prefix  // zero for clients without an address, on Unix sockets, and for users
	User     string        // with limit_by user: who it is; else ""
	Burst    int64         // tokens in a full bucket
	Interval time.Duration // from one token to the next
}

const limiterNamespace = "http.async_proxy.limiters"

// loadLimiter provisions the module that the config names, if it names one.
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

// ask takes one of the client's tokens: from its bucket here, and then from the
// shared one, if there is one.
func (h *Handler) ask(ctx context.Context, client netip.Addr, now int64) verdict {
	if h.shared != nil && h.shared.Suspended() {
		return verdict{ok: true}
	}
	own := h.limiter.take(client, now)
	if h.shared == nil || !own.ok {
		return own
	}
	wait, err := h.shared.Take(ctx, h.limiter.shared(client))
	switch {
	case err != nil:
		return h.limiter.giveBack(client, now).refuse(0, now, err)
	case wait > 0:
		return h.limiter.learn(client, now, wait).refuse(int64(wait), now, nil)
	}
	return own
}

// shared is the client's bucket as others know it.
func (l *limiter) shared(client netip.Addr) Bucket {
	b := Bucket{Zone: l.key.zone, Burst: l.key.burst, Interval: time.Duration(l.interval)}
	if b.User = client.Zone(); b.User == "" {
		b.Client = netip.PrefixFrom(client, l.key.bits(client))
	}
	return b
}

// giveBack returns a token to the client's bucket: the request was refused for
// another reason, or the login did not fail.
func (l *limiter) giveBack(client netip.Addr, now int64) *bucket {
	b := l.bucket(client, now)
	b.full.Add(-l.interval)
	return b
}

// learn makes the client's bucket what the shared one is, which has no token for
// as long as wait, for a request that is refused after all. now is when the
// request came: a wait that began a little later is over a little later than the
// one that is learned, and never before it.
func (l *limiter) learn(client netip.Addr, now int64, wait time.Duration) *bucket {
	b := l.bucket(client, now)
	b.full.Store(now + l.fill - l.interval + int64(wait))
	return b
}

// errBlocked is why a client of whom the operator has had enough is refused.
var errBlocked = errors.New("the client is blocked")

// refuseUncounted answers a request that is refused for another reason than want
// of a token: the shared limiter cannot count it, its client is blocked, or its
// login is not checked. As with refuseLimited, a line stands for many.
func (h *Handler) refuseUncounted(w http.ResponseWriter, r *http.Request, v *visit, verdict verdict) error {
	var f *refusal
	seconds := ceilSeconds(verdict.wait)
	switch verdict.err {
	case errFailedLogins:
		f = causeFailedLogins.refusal(errFailedLogins, seconds)
	case errLoginsBusy:
		f = causeLoginsBusy.refusal(errLoginsBusy, seconds)
	case errBlocked:
		who := "your address"
		if v.bucket.Zone() != "" {
			who = "this user"
		}
		f = causeBlocked.refusal(errBlocked, who, seconds)
	default:
		f = causeUncounted.refusal(verdict.err)
	}
	v.refusedBy(f)
	v.count(f)
	if verdict.refused > 0 {
		v.addRecent(f)
		h.logRequest(r, v, f.err, zap.Int64("refused", verdict.refused))
	}
	w.Header()["Retry-After"] = []string{strconv.FormatInt(seconds, 10)}
	return h.answer(w, r, f)
}
