// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// closeTunnel closes a tunnel and reports whether the id exists. It waits up to a second
// until the tunnel has disappeared from all lists.
func closeTunnel(id uint64) (found bool) {
	var tunnels *tunnel.Registry
	withProcess(func(p *process) {
		if t := p.tunnels.Get(id); t != nil {
			t.Close(tunnel.ReasonOperator)
			tunnels = p.tunnels
		}
	})
	if tunnels == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	waitUntil(ctx, func() bool { return tunnels.Get(id) == nil })
	return true
}

// refillClient refills a client's buckets of tokens and of failed logins in a zone. If zone
// is "", it does so in all zones and also ends a block. It reports whether the client was
// known or blocked.
func refillClient(key client.Key, zone string) (found bool) {
	found = refillShared(key, zone) // first, so that no local bucket learns the old state again
	refill := func(_, value any) bool {
		t := value.(*bucket.Table)
		if (zone == "" || zone == t.Limits.Zone) && t.Fill(t.KeyOf(key)) {
			found = true
		}
		return true
	}
	limiters.Range(refill)
	failedLogins.Range(refill)
	return zone == "" && unblock(key) || found
}

// refillShared refills the client's buckets in the shared limiters that implement Refiller.
func refillShared(key client.Key, zone string) (found bool) {
	var proxies []*proxy
	withProcess(func(p *process) {
		for each := range p.proxies.All() {
			proxies = append(proxies, each)
		}
	})
	for _, each := range proxies {
		shared, ok := each.shared.(Refiller)
		if !ok || zone != "" && zone != each.config.Zone {
			continue
		}
		key := each.limiter.KeyOf(key)
		done, err := shared.Refill(context.Background(), sharedBucket(each.limiter, key))
		if err != nil {
			each.logger.Warn("failed to refill a shared bucket", textField("client", each.limiter.Name(key)), errorField(err))
		}
		found = found || done
	}
	return found
}

// blockClient blocks all requests of a client for d; 0 ends the block. It reports whether
// it changed anything: without an async_proxy there is nothing to block.
func blockClient(key client.Key, d time.Duration) (done bool) {
	if d <= 0 {
		return unblock(key)
	}
	withProcess(func(p *process) {
		for _, key := range limiterKeys(key) {
			p.blocks.Store(key, monotime.Of(time.Now().Add(d)))
			done = true
		}
	})
	return done
}

func unblock(key client.Key) (found bool) {
	withProcess(func(p *process) {
		for _, key := range limiterKeys(key) {
			if _, ok := p.blocks.LoadAndDelete(key); ok {
				found = true
			}
		}
	})
	return found
}

// limiterKeys returns the client's key in each limiter. The keys differ where limiters have
// different prefix lengths.
func limiterKeys(key client.Key) (keys []client.Key) {
	for t := range eachTable {
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
