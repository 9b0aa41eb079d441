// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/metrics"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// acquireTable returns the table of pool with these limits, which must be valid. The caller
// must delete the limits from pool once for each call that succeeds.
func acquireTable(pool *caddy.UsagePool, limits bucket.Limits) (*bucket.Table, error) {
	pooled, _, err := pool.LoadOrNew(limits, func() (caddy.Destructor, error) {
		return bucket.New(limits, eventInterval, program.metrics.Evictions()), nil
	})
	if err != nil {
		return nil, err
	}
	return pooled.(*bucket.Table), nil
}

// eachTable calls yield with the tables of the limiters in use, until it returns false.
func (p *process) eachTable(yield func(*bucket.Table) bool) {
	p.limiters.Range(func(_, t any) bool { return yield(t.(*bucket.Table)) })
}

// limits returns the limits on the handler's clients that have these options.
func (h *Handler) limits(o *Options) bucket.Limits {
	return bucket.Limits{
		Zone: h.Zone, Burst: o.Burst, Refill: o.Refill,
		IPv4Prefix: h.IPv4Prefix, IPv6Prefix: h.IPv6Prefix, MaxClients: h.MaxClients,
	}
}

// charge takes a token for v. Without one it returns errRateLimited, and the transaction's
// verdict says why.
func (p *proxy) charge(r *http.Request, v *transaction) error {
	if v.verdict = p.takeToken(r, v); !v.verdict.Allowed {
		return errRateLimited
	}
	return nil
}

// takeToken takes a token for v and returns the limiter's verdict. Requests for this server
// itself, such as health checks, are not limited: a client without tokens can still
// fetch the PAC script.
func (p *proxy) takeToken(r *http.Request, v *transaction) bucket.Decision {
	now := monotime.Of(v.start)
	if verdict, blocked := p.refuseBlocked(v, now); blocked {
		return verdict
	}
	if v.kind == metrics.Other || p.exempt.Contains(v.addr) {
		return bucket.Decision{Allowed: true}
	}
	return p.applyReportOnly(r, v, v.policy.chargeBuckets(r.Context(), v.limitKey, now))
}

// refuseBlocked returns the verdict for v if an operator has blocked its client or its user.
func (p *proxy) refuseBlocked(v *transaction, now int64) (verdict bucket.Decision, blocked bool) {
	key, wait := p.blockOf(v, now)
	if wait <= 0 {
		return verdict, false
	}
	v.limitKey = key
	return v.policy.limiter.Block(key, now, wait, errBlocked), true
}

// blockOf returns the key of v's client or of its user, whichever is blocked, and for how long it
// remains so; 0 if neither is.
func (p *proxy) blockOf(v *transaction, now int64) (key client.Key, wait time.Duration) {
	if p.process.blocks.Size() == 0 {
		return key, 0
	}
	keys := []client.Key{v.policy.limiter.Key(v.addr)}
	if v.user != "" {
		keys = append(keys, client.User(v.user))
	}
	for _, key := range keys {
		if wait := p.process.blockedFor(key, now); wait > 0 {
			return key, wait
		}
	}
	return key, 0
}

// chargeBuckets charges one token to the client: from its local bucket, and then from the
// shared one, if there is one.
func (y *policy) chargeBuckets(ctx context.Context, key client.Key, now int64) bucket.Decision {
	if y.proxy.shared != nil && y.proxy.shared.Suspended() {
		return bucket.Decision{Allowed: true}
	}
	local := y.limiter.Take(key, now)
	if y.proxy.shared == nil || !local.Allowed {
		return local
	}
	downstream.Keep(ctx)
	wait, err := y.proxy.shared.Take(ctx, sharedBucket(y.limiter, key))
	switch {
	case err != nil:
		y.limiter.Refund(key, now) // the request is refused for another reason
		return y.limiter.Deny(key, now, 0, err)
	case wait > 0:
		y.limiter.Drain(key, now, wait)
		return y.limiter.Deny(key, now, wait, nil)
	}
	return local
}

// applyReportOnly turns a denial into an allow, and reports it, if limits are report-only.
func (p *proxy) applyReportOnly(r *http.Request, v *transaction, verdict bucket.Decision) bucket.Decision {
	if !verdict.Allowed && slices.Contains(v.policy.options.ReportOnly, "limits") {
		if !v.reportedOnly {
			program.metrics.Reported(reportedLimits)
			v.reportedOnly = true
		}
		if verdict.LogCount > 0 {
			p.logLimited(r, v, verdict, true)
		}
		verdict.Allowed = true
	}
	return verdict
}

// refuseLimited responds to a request that the limiter has denied.
func (p *proxy) refuseLimited(w http.ResponseWriter, r *http.Request, v *transaction, verdict bucket.Decision) error {
	if verdict.Err != nil {
		return p.refuseUncounted(w, r, v, verdict)
	}
	a := v.policy.limitedAnswer(ceilSeconds(verdict.Wait))
	v.rateLimited = true
	v.setRefusal(&a.refusal)
	p.count(v, nil)
	v.countRefusal(&a.refusal)
	if verdict.LogCount > 0 {
		p.logLimited(r, v, verdict, false)
	}
	if verdict.Event {
		p.events.emitRateLimited(p.config.Zone, v, verdict)
	}
	header := w.Header()
	values := [...]string{a.retryAfter, v.policy.rateLimit, a.state} // one allocation for all three
	header["Retry-After"], header["Ratelimit-Policy"], header["Ratelimit"] = values[:1:1], values[1:2:2], values[2:]
	return p.writeRefusal(w, r, v, &a.refusal, a.proxyStatus, a.body)
}

// limitedAnswer is the response to a client that has to wait for some seconds. In a flood of
// refusals it is the same again and again, so the last one is cached.
type limitedAnswer struct {
	refusal
	seconds                        int64
	retryAfter, state, proxyStatus string
	body                           []byte
}

func (y *policy) limitedAnswer(seconds int64) *limitedAnswer {
	if a := y.limitedResponse.Load(); a != nil && a.seconds == seconds {
		return a
	}
	retry := strconv.FormatInt(seconds, 10)
	a := &limitedAnswer{
		refusal:    *causeRateLimited.refusal(nil, seconds),
		seconds:    seconds,
		retryAfter: retry,
		state:      rateLimitState(rateLimitName(y.limiter.Limits), seconds),
	}
	a.proxyStatus = y.proxy.proxyStatus(deniedRequest, a.text)
	a.body = []byte(a.text + "\n")
	y.limitedResponse.Store(a)
	return a
}

// refuseUncounted responds to a request that is refused for a reason other than an empty
// bucket: the shared limiter cannot count it, its client is blocked, or its login is not
// checked now. As in refuseLimited, one log line may stand for many refusals.
func (p *proxy) refuseUncounted(w http.ResponseWriter, r *http.Request, v *transaction, verdict bucket.Decision) error {
	var f *refusal
	retryAfter := ceilSeconds(verdict.Wait)
	switch verdict.Err {
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
		f = causeLimiterUnavailable.refusal(verdict.Err)
	}
	v.setRefusal(f)
	p.count(v, f)
	v.countRefusal(f)
	if verdict.LogCount > 0 {
		p.logRequest(r, v, f.err, zap.Int64("refused", verdict.LogCount))
	}
	w.Header()["Retry-After"] = []string{strconv.FormatInt(retryAfter, 10)}
	return p.sendRefusal(w, r, v, f)
}

// errBlocked reports that an operator has blocked the client.
var errBlocked = errors.New("the client is blocked")

// rateLimitPolicy returns the value of the RateLimit-Policy field
// (draft-ietf-httpapi-ratelimit-headers-10): the quota, and the seconds that it takes to
// refill.
func rateLimitPolicy(limits bucket.Limits) string {
	return fmt.Sprintf(`"%s";q=%d;w=%d`, rateLimitName(limits), limits.Burst, ceilSeconds(limits.Fill()))
}

// rateLimitName returns the name of a quota policy in the RateLimit fields.
func rateLimitName(limits bucket.Limits) string {
	if limits.Policy == "" {
		return limits.Zone
	}
	return limits.Zone + "/" + limits.Policy
}

// rateLimitState returns the value of the RateLimit field: no tokens remain, and the seconds
// until there is one.
func rateLimitState(name string, seconds int64) string {
	return `"` + name + `";r=0;t=` + strconv.FormatInt(seconds, 10)
}

// ceilSeconds rounds up to whole seconds, at least 1, so that a client that waits that long
// does not return too early.
func ceilSeconds(d time.Duration) int64 {
	return max(1, int64((d+time.Second-1)/time.Second))
}
