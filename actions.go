// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"context"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// closeTunnel closes a tunnel and reports whether the id exists. It waits up to a second
// until the tunnel has disappeared from all lists.
func (p *process) closeTunnel(id uint64) (found bool) {
	t := p.tunnels.Get(id)
	if t == nil {
		return false
	}
	t.Close(tunnel.ReasonOperator)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	waitUntil(ctx, func() bool { return p.tunnels.Get(id) == nil })
	return true
}

// refillClient refills a client's buckets of tokens in a policy of a zone, and of failed logins in
// the zone, which count in all its policies. If zone is "", it does so in all zones, and if policy
// is "", in all policies; if both are, it also ends a block. It reports whether the client was
// known or blocked.
func (p *process) refillClient(key client.Key, zone, policy string) (found bool) {
	found = p.refillShared(key, zone, policy) // first, so that no local bucket learns the old state again
	refill := func(t *bucket.Table) {
		if (zone == "" || zone == t.Limits.Zone) && t.Fill(t.KeyOf(key)) {
			found = true
		}
	}
	for t := range p.eachTable {
		if isPolicy(policy, t.Limits.Policy) {
			refill(t)
		}
	}
	p.failedLogins.Range(func(_, t any) bool { refill(t.(*bucket.Table)); return true })
	return zone == "" && policy == "" && p.unblock(key) || found
}

// isPolicy reports whether asked, a parameter of an operator, stands for the policy with this name.
func isPolicy(asked, name string) bool { return asked == "" || asked == cmp.Or(name, directivePolicy) }

// refillShared refills the client's buckets in the shared limiters that implement Refiller.
func (p *process) refillShared(key client.Key, zone, policy string) (found bool) {
	for each := range p.proxies.All() {
		shared, ok := each.shared.(Refiller)
		if !ok || zone != "" && zone != each.config.Zone {
			continue
		}
		for y := range each.eachPolicy {
			if !isPolicy(policy, y.name) {
				continue
			}
			key := y.limiter.KeyOf(key)
			done, err := shared.Refill(context.Background(), sharedBucket(y.limiter, key))
			if err != nil {
				each.logger.Warn("failed to refill a shared bucket", textField("client", y.limiter.Name(key)), policyField(y.name), errorField(err))
			}
			found = found || done
		}
	}
	return found
}

// blockClient blocks all requests of a client for d; 0 ends the block. It reports whether
// it changed anything.
func (p *process) blockClient(key client.Key, d time.Duration) (done bool) {
	if d <= 0 {
		return p.unblock(key)
	}
	for _, key := range p.limiterKeys(key) {
		p.blocks.Store(key, monotime.Of(time.Now().Add(d)))
		done = true
	}
	return done
}

func (p *process) unblock(key client.Key) (found bool) {
	for _, key := range p.limiterKeys(key) {
		if _, ok := p.blocks.LoadAndDelete(key); ok {
			found = true
		}
	}
	return found
}

// limiterKeys returns the client's key in each limiter. The keys differ where limiters have
// different prefix lengths.
func (p *process) limiterKeys(key client.Key) (keys []client.Key) {
	for t := range p.eachTable {
		keys = append(keys, t.KeyOf(key))
	}
	return keys
}

// blockedFor returns how long the client with this key remains blocked; 0 if it is not.
func (p *process) blockedFor(key client.Key, now int64) time.Duration {
	if p.blocks.Size() == 0 {
		return 0
	}
	until, ok := p.blocks.Load(key)
	if !ok {
		return 0
	}
	if until <= now {
		p.blocks.Delete(key)
		return 0
	}
	return time.Duration(until - now)
}
