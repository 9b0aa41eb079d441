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
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
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
	// this process's buckets are looked at, nor is Take called. look says that
	// no token is to be taken yet: the same request is asked about once more.
	Suspended(look bool) bool
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
// shared one, if there is one. If it is only to look, it looks here alone.
func (h *Handler) ask(ctx context.Context, client netip.Addr, now int64, look bool) verdict {
	switch {
	case h.shared != nil && h.shared.Suspended(look):
		return verdict{ok: true}
	case look:
		return h.limiter.look(client, now)
	}
	own := h.limiter.take(client, now)
	if h.shared == nil || !own.ok {
		return own
	}
	wait, err := h.shared.Take(ctx, h.limiter.shared(client))
	switch {
	case err != nil:
		h.limiter.giveBack(client, now)
		return verdict{err: err}
	case wait > 0:
		return h.limiter.learn(client, now, wait)
	}
	return own
}

// shared is the client's bucket as others know it.
func (l *limiter) shared(client netip.Addr) Bucket {
	b := Bucket{Zone: l.key.zone, Burst: l.key.burst, Interval: time.Duration(l.interval)}
	bits := l.key.v6
	if client.Is4() {
		bits = l.key.v4
	}
	if b.User = client.Zone(); b.User == "" {
		b.Client = netip.PrefixFrom(client, bits)
	}
	return b
}

// giveBack returns a token that was taken for a request that is refused for
// another reason.
func (l *limiter) giveBack(client netip.Addr, now int64) {
	l.bucket(client, now).full.Add(-l.interval)
}

// learn makes the client's bucket what the shared one is, which has no token for
// as long as wait, for a request that is refused after all. now is when the
// request came: a wait that began a little later is over a little later than the
// one that is learned, and never before it.
func (l *limiter) learn(client netip.Addr, now int64, wait time.Duration) verdict {
	b := l.bucket(client, now)
	b.full.Store(now + l.fill - l.interval + int64(wait))
	return b.refuse(int64(wait), now)
}

// errBlocked is why a client of whom the operator has had enough is refused.
var errBlocked = errors.New("the client is blocked")

// refuseUncounted answers a request that the shared limiter cannot count, or
// that is not even to be counted.
func (h *Handler) refuseUncounted(w http.ResponseWriter, r *http.Request, v *visit, verdict verdict) error {
	f := refuse(http.StatusServiceUnavailable, "proxy_internal_error", verdict.err, "The proxy cannot count this request, as it has to; try again in a moment.")
	if verdict.err == errBlocked {
		f = refuse(http.StatusTooManyRequests, deniedRequest, errBlocked, "The operator of this proxy has blocked your address; try again in %d s.", ceilSeconds(verdict.wait))
	}
	v.status, v.reason = f.status, f.kind
	v.count(f)
	v.refused(f.status, f.kind, f.text)
	h.logRequest(r, v, f.err)
	w.Header()["Retry-After"] = []string{strconv.FormatInt(ceilSeconds(verdict.wait), 10)}
	return h.answer(w, r, f)
}

// limiter reads the option of that name, whose first argument is a module and
// whose rest is that module's.
func (p caddyfileParser) limiter(h *Handler, name string) error {
	if err := p.once(name); err != nil {
		return err
	}
	if !p.NextArg() {
		return p.Errf("%s: there is no value; expected %s", name, expectations[name])
	}
	value := p.Val()
	if _, err := caddy.GetModule(limiterNamespace + "." + value); err != nil {
		return p.Errf("%s: the value '%s' is not valid; expected %s", name, value, expectations[name])
	}
	module, err := caddyfile.UnmarshalModule(p.Dispenser, limiterNamespace+"."+value)
	if err != nil {
		return err
	}
	h.LimiterRaw = caddyconfig.JSONModuleObject(module, "module", value, nil)
	return nil
}
