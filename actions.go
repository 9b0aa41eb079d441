// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"net/netip"
	"time"
)

// closeTunnel closes a tunnel, and reports whether there is one of that id. No
// list has the tunnel when it returns, unless its client keeps it from ending.
func closeTunnel(id uint64) (found bool) {
	var in *registry
	eachRegistry(func(r *registry) {
		if t, ok := r.tunnels.Load(id); ok {
			t.close(reasonOperator)
			in = r
		}
	})
	if in == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	waitUntil(ctx, func() bool {
		_, open := in.tunnels.Load(id)
		return !open
	})
	return true
}

// refillClient gives a client a full bucket in a zone, of tokens and of failed
// logins; or in all zones, for "", and then it ends a block as well. It reports whether there was something to do
// it to.
func refillClient(addr netip.Addr, zone string) (found bool) {
	found = refillShared(addr, zone) // first, as what it says is learned
	refill := func(_, value any) bool {
		l := value.(*limiter)
		if zone != "" && zone != l.key.zone {
			return true
		}
		g := l.gens.Load()
		for _, buckets := range []*buckets{g.cur, g.old} {
			if b, ok := buckets.Load(l.keyOf(addr)); ok {
				b.full.Store(0)
				found = true
			}
		}
		return true
	}
	limiters.Range(refill)
	failedLogins.Range(refill)
	return zone == "" && unblock(addr) || found
}

// refillShared does so in the shared limiters that can.
func refillShared(addr netip.Addr, zone string) (found bool) {
	var handlers []*Handler
	eachRegistry(func(r *registry) {
		r.handlers.Range(func(h *Handler, _ struct{}) bool {
			handlers = append(handlers, h)
			return true
		})
	})
	for _, h := range handlers {
		shared, ok := h.shared.(Refiller)
		if !ok || zone != "" && zone != h.Zone {
			continue
		}
		key := h.limiter.keyOf(addr)
		done, err := shared.Refill(context.Background(), h.limiter.shared(key))
		if err != nil {
			h.logger.Warn("failed to refill a shared bucket", textField("client", h.limiter.name(key)), errorField(err))
		}
		found = found || done
	}
	return found
}

// blockClient has all requests of a client refused for a while; 0 ends that. It
// reports whether it was done: there must be a proxy.
func blockClient(addr netip.Addr, d time.Duration) (done bool) {
	if d <= 0 {
		return unblock(addr)
	}
	eachRegistry(func(r *registry) {
		for _, key := range keysOf(addr) {
			r.blocks.Store(key, sinceEpoch(time.Now().Add(d)))
			done = true
		}
	})
	return done
}

func unblock(addr netip.Addr) (found bool) {
	eachRegistry(func(r *registry) {
		for _, key := range keysOf(addr) {
			if _, ok := r.blocks.LoadAndDelete(key); ok {
				found = true
			}
		}
	})
	return found
}

// keysOf returns what a client is to the limiters, of which each may make it
// part of another network.
func keysOf(addr netip.Addr) (keys []netip.Addr) {
	limiters.Range(func(_, l any) bool {
		keys = append(keys, l.(*limiter).keyOf(addr))
		return true
	})
	return keys
}

// keyOf is client for a user as well.
func (l *limiter) keyOf(addr netip.Addr) netip.Addr {
	if addr.Zone() != "" {
		return addr
	}
	return l.client(addr)
}

// blocked returns how long the client whose limits are those of key stays
// blocked, or 0.
func (r *registry) blocked(key netip.Addr, now int64) time.Duration {
	if r.blocks.Size() == 0 {
		return 0
	}
	until, ok := r.blocks.Load(key)
	if !ok {
		return 0
	}
	if until <= now {
		r.blocks.Delete(key)
		return 0
	}
	return time.Duration(until - now)
}
