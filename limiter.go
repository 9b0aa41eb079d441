// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net/netip"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// Limiter is the interface of modules in the namespace http.async_proxy.limiters. A Limiter
// counts clients across several processes.
//
// It is a second stage. A request that this process's own bucket denies is denied without
// asking the Limiter. If the Limiter denies a request, the local bucket is empty for as long, so
// that the Limiter is not asked again about a client that does not wait.
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

// Troubled is a Limiter that knows whether it can count clients now.
type Troubled interface {
	// Trouble returns "" if it can. Otherwise it says why not, what happens to requests
	// meanwhile and what to do, in a sentence that begins in lower case and has no full stop.
	// It must return at once.
	Trouble() string
}

// Bucket identifies a client's token bucket and gives its size. Equal Buckets are the same
// bucket, whichever process asks.
type Bucket struct {
	Zone     string
	Policy   string        // in the zone; "" for the zone's own bucket
	Client   netip.Prefix  // zero for users and for clients on Unix sockets
	User     string        // with limit_by user: the user; else ""
	Burst    int64         // tokens in a full bucket
	Interval time.Duration // time to gain one token
}

const limiterNamespace = "http.async_proxy.limiters"

// loadLimiter provisions the configured limiter module, if there is one.
func (p *proxy) loadLimiter(ctx caddy.Context) error {
	if p.config.LimiterRaw == nil {
		return nil
	}
	module, err := ctx.LoadModule(p.config, "LimiterRaw")
	if err != nil {
		return err
	}
	p.shared = module.(Limiter)
	return nil
}

// sharedBucket returns the client's bucket as the shared limiter identifies it.
func sharedBucket(t *bucket.Table, key client.Key) Bucket {
	b := Bucket{Zone: t.Limits.Zone, Policy: t.Limits.Policy, Burst: t.Limits.Burst, Interval: t.Limits.Interval()}
	if b.User = key.User(); b.User == "" {
		b.Client = netip.PrefixFrom(key.Addr(), t.Bits(key))
	}
	return b
}
