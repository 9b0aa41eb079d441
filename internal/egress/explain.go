// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"cmp"
	"context"
	"net/netip"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// Explanation says how Dial decides about a destination.
type Explanation struct {
	ThroughParent bool
	Name          access.Verdict     // before the name is resolved; through a parent, the only one
	Addresses     []ExplainedAddress // in the order in which they are tried; none if Name is a denial
	Err           error              // why there are no addresses
}

// ExplainedAddress is an address of a destination, and the verdict about it.
type ExplainedAddress struct {
	netip.AddrPort
	access.Verdict
}

// Explain decides about a destination as Dial does, but does not connect to it. It reports
// nothing to d.Report.
func (d *Dialer) Explain(ctx context.Context, r access.Scope, address string) (e Explanation) {
	t := hostport.TargetOf(address)
	if e.ThroughParent = d.UsesParent(address); e.ThroughParent {
		e.Name = d.checkForParent(ctx, r, t)
		return e
	}
	if e.Name = d.Access.CheckName(ctx, r, t, true); e.Name.Denied != nil {
		return e
	}
	var addrs []netip.Addr
	addrs, e.Err = d.addressesOf(ctx, t)
	for _, addr := range addrs {
		to := netip.AddrPortFrom(addr, t.Port)
		e.Addresses = append(e.Addresses, ExplainedAddress{to, d.checkConnected(ctx, r, t, to)})
	}
	return e
}

// addressesOf returns the addresses of a target that Dial tries, in their order. Dial would try
// addresses that recently did not answer last; addressesOf does not take that into account.
func (d *Dialer) addressesOf(ctx context.Context, t hostport.Target) (addrs []netip.Addr, err error) {
	if t.Addr.IsValid() {
		return []netip.Addr{t.Addr.Unmap()}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	var queue candidates
	question, listed := questionFor(ctx, t.Name)
	if len(listed) > 0 {
		queue.add(dnsAnswer{addrs: listed})
	} else {
		err = d.Connector.resolver.lookupEach(ctx, question, queue.add)
	}
	for !queue.empty() && len(addrs) < maxAttempts {
		addrs = append(addrs, queue.next())
	}
	if len(addrs) == 0 {
		return nil, cmp.Or(err, error(errNoAddress))
	}
	return addrs, nil
}
