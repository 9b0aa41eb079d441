// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package access decides which destinations clients may connect to. It offers the rules of a
// configuration, compiled for fast lookup, the address classes that are closed by default,
// and checks for rules without effect. It never connects, resolves a name or answers a
// request.
package access

import (
	"cmp"
	"context"
	"net/netip"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// Control decides which targets clients may connect to. The rules of the config apply in
// their order; where no rule matches, the client's scope decides.
type Control struct {
	Sets          []*RuleSet
	Ports         []PortRange                              // nil: all but PortSMTP
	Connect       []PortRange                              // the ports for CONNECT; nil: those of Ports
	IsSelf        func(to netip.AddrPort, exact bool) bool // whether an address is a protected listener of this process
	ReportOnly    bool                                     // denials by rules and ports are only reported
	RecheckReused bool                                     // verdicts can change, or must be reported again: recheck reused connections
}

// Verdict is a decision about a destination.
type Verdict struct {
	Denied   *DeniedError // nil: the destination is allowed
	Reported *DeniedError // the first denial that report-only mode suppressed; nil: none

	// The entry that allows the destination, from which Rule makes the text on demand.
	by        *RuleSet // nil: no rule allows it, nor denies it
	entry     string   // "": the range that contains inner, or else ip
	ip, inner netip.Addr
}

// Rule returns the rule that decides, such as "allow *.example.com"; "" if none does.
func (v *Verdict) Rule() string {
	switch {
	case v.Denied != nil:
		return v.Denied.Rule
	case v.by == nil:
		return ""
	case v.entry == "":
		return v.by.rule(cmp.Or(v.by.rangeOf(v.inner), v.by.rangeOf(v.ip)))
	}
	return v.by.rule(v.entry)
}

// Check decides whether a client of scope r may connect to the address to, which belongs
// to target t. The first rule that matches the target's name or the address decides.
// Allowing a name does not allow whatever it resolves to: the address must still pass the
// later rules for addresses, and the client's scope.
func (c *Control) Check(ctx context.Context, r Scope, t hostport.Target, to netip.AddrPort) (v Verdict) {
	ip := to.Addr().WithZone("").Unmap()
	inner := EmbeddedIPv4(ip)
	if e := c.CheckSelf(to, false); e != nil {
		return Verdict{Denied: e}
	}
	if e := c.CheckPort(ctx, to.Port()); e != nil {
		if e.To = to; v.enforces(c, e) {
			return v
		}
	}
	for _, s := range c.Sets {
		if !s.ports.contains(to.Port()) {
			continue
		}
		entry, byAddress := s.MatchAddress(ctx, ip, inner)
		byName := false
		if !byAddress && v.by == nil { // else a rule has allowed the name
			entry, byName = s.MatchName(t)
		}
		switch {
		case s.deny && (byAddress || byName):
			e := s.denied(entry)
			if e.To, e.Allow = to, func() string { return allowName(t.Name) }; byAddress || t.Name == "" {
				e.Allow = func() string { return allowAddress(ip, inner) }
			}
			if v.enforces(c, e) {
				return v
			}
		case byAddress:
			v.by, v.entry, v.ip, v.inner = s, entry, ip, inner
			return v
		case byName:
			v.by, v.entry = s, entry
		}
	}
	if r.includes(ip, inner) {
		return v
	}
	line := allowAddress(ip, inner)
	e := &DeniedError{To: to, Reason: "its address is private or local", Hint: line, Allow: func() string { return line }}
	if r == LocalScope {
		e.Reason = "its address has a special purpose"
	}
	return Verdict{Denied: e}
}

// CheckSelf denies the address of a protected listener of this process. Unless exact is set,
// it may miss a listener that was opened within the last SystemCacheTTL.
func (c *Control) CheckSelf(to netip.AddrPort, exact bool) *DeniedError {
	if c.IsSelf == nil {
		return nil
	}
	ip := to.Addr().WithZone("").Unmap()
	inner := EmbeddedIPv4(ip)
	if c.IsSelf(netip.AddrPortFrom(ip, to.Port()), exact) || inner != ip && c.IsSelf(netip.AddrPortFrom(inner, to.Port()), exact) {
		return &DeniedError{To: to, Reason: "it is an address of the proxy itself"}
	}
	return nil
}

// enforces reports whether a denial by rules or ports is enforced, which makes it the verdict.
// In report-only mode it records the first denial instead.
func (v *Verdict) enforces(c *Control, e *DeniedError) bool {
	if !c.ReportOnly {
		*v = Verdict{Denied: e}
		return true
	}
	v.Reported = cmp.Or(v.Reported, e)
	return false
}

// CheckName decides about a target before its name is resolved, which saves DNS queries
// for denied names. What it allows must still pass Check. If resolvable is false, this
// proxy never resolves the name, because the parent does. Rules for addresses then do not
// apply to names, and CheckName decides alone.
func (c *Control) CheckName(ctx context.Context, r Scope, t hostport.Target, resolvable bool) (v Verdict) {
	if t.Addr.IsValid() {
		if resolvable {
			return v // Check decides about it
		}
		return c.Check(ctx, r, t, netip.AddrPortFrom(t.Addr, t.Port))
	}
	if !resolvable && (t.Name == "localhost" || strings.HasSuffix(t.Name, ".localhost")) {
		return c.Check(ctx, r, t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), t.Port))
	}
	if e := c.CheckPort(ctx, t.Port); e != nil && v.enforces(c, e) {
		return v
	}
	for _, s := range c.Sets {
		if !s.ports.contains(t.Port) {
			continue
		}
		entry, matches := s.MatchName(t)
		if matches && s.deny {
			e := s.denied(entry)
			e.Allow = func() string { return allowName(t.Name) }
			if v.enforces(c, e) {
				return v
			}
			continue
		}
		if matches {
			v.by, v.entry = s, entry
		}
		if matches || resolvable && !s.deny && s.aboutAddresses() {
			break
		}
	}
	if resolvable {
		v.Reported = nil // Check reports it again
	}
	return v
}
