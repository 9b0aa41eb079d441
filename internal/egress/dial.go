// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package egress connects to destinations, directly or through a parent proxy. It offers
// dialing by RFC 8305 within a policy, the causes of failures, and tunnels over HTTP/2 to a
// parent. It knows nothing of the requests of clients, and neither answers nor logs them.
package egress

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// Dialer opens connections to targets, directly or through a parent proxy. It checks
// each address against the rules after resolution, immediately before connecting, so
// that no name, no spelling of an address and no later DNS answer can bypass them.
type Dialer struct {
	Access    *access.Control
	timeout   time.Duration
	Parent    *Parent           // nil: none
	Direct    *access.RuleSet   // the targets that bypass the parent
	OwnPort   func(uint16) bool // whether one of our protected listeners uses a port; may be nil
	dialers   [access.ScopeCount]net.Dialer
	Connector *Connector
	Report    func(ctx context.Context, target string, reported *access.DeniedError)
}

// NewDialer returns a dialer. The timeout covers resolution and all addresses of a
// name together.
func NewDialer(p *access.Control, timeout time.Duration, resolver *Resolver) *Dialer {
	d := &Dialer{Access: p, timeout: timeout, Connector: newConnector(resolver)}
	resolver.setTimeout(timeout)
	for r := range access.ScopeCount {
		d.dialers[r] = net.Dialer{
			Timeout:   timeout,
			KeepAlive: -1, // see tcpconn.EnableKeepAlive
			ControlContext: func(ctx context.Context, _, address string, _ syscall.RawConn) error {
				to, err := netip.ParseAddrPort(address)
				if err != nil {
					return err
				}
				a := ctx.Value(attemptKey{}).(*attempt)
				v := p.Check(ctx, r, a.Target, to)
				if v.Denied != nil {
					a.denied.Store(v.Denied)
				}
				return d.enforce(ctx, a.address, v)
			},
		}
	}
	return d
}

// attempt tells the access checks of a dial which target its addresses belong to.
type attempt struct {
	hostport.Target
	address string
	denied  atomic.Pointer[access.DeniedError] // the last denial, if any
}

// attemptKey is the context key under which a dial carries its attempt.
type attemptKey struct{}

// Dial connects to address, a host and a port, for a client of the given scope. It
// uses the parent unless the address bypasses it. The addresses of a name are tried as
// RFC 8305 recommends. If the dial fails and any of the addresses was denied, Dial
// returns the denial.
func (d *Dialer) Dial(ctx context.Context, r access.Scope, address string) (net.Conn, error) {
	if d.UsesParent(address) {
		if err := d.CheckForParent(ctx, r, address); err != nil {
			return nil, err
		}
		return d.Parent.Connect(ctx, address)
	}
	a := &attempt{Target: hostport.TargetOf(address), address: address}
	if v := d.Access.CheckName(ctx, r, a.Target, true); v.Denied != nil {
		return nil, v.Denied
	}
	conn, err := d.dialTarget(context.WithValue(ctx, attemptKey{}, a), &d.dialers[r], a.Target)
	if denied := a.denied.Load(); err != nil && denied != nil && !errors.Is(ctx.Err(), context.Canceled) {
		return nil, denied
	}
	if err != nil {
		return nil, err
	}
	// A listener may have been opened between the check and the connection: a reload
	// opens the admin endpoint's.
	if denied := d.Access.CheckSelf(hostport.AddrPortOf(conn.RemoteAddr()), true); denied != nil {
		_ = conn.Close()
		return nil, denied
	}
	return conn, nil
}

// dialTarget dials t, an address or a name.
func (d *Dialer) dialTarget(ctx context.Context, dialer *net.Dialer, t hostport.Target) (net.Conn, error) {
	if t.Addr.IsValid() {
		return dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(t.Addr, t.Port).String())
	}
	question, addrs := questionFor(ctx, t.Name)
	if len(addrs) > 0 {
		return d.Connector.dialAddresses(ctx, dialer, hostPort{t.Name, t.Port}, addrs)
	}
	return d.Connector.dial(ctx, dialer, question, t.Port)
}

// questionFor returns a target's name as the resolver must get it, or the addresses that the
// hosts file has for it. Names are made fully qualified with a trailing dot: the system's search
// list could otherwise turn the name into one that no rule has checked.
func questionFor(ctx context.Context, name string) (question string, listed []netip.Addr) {
	if !strings.Contains(name, ".") { // the hosts file lists such names without the dot
		if addrs, err := hostsFile.LookupNetIP(ctx, "ip", name); err == nil {
			return "", addrs
		}
	}
	if name == "localhost" { // most systems know it only without the dot
		return name, nil
	}
	return name + ".", nil
}

// hostsFile resolves names from the system's hosts file only; it sends no queries.
var hostsFile = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
	return nil, errors.New("only the hosts file is consulted")
}}

// UsesParent reports whether connections to address go through the parent.
func (d *Dialer) UsesParent(address string) bool {
	if d.Parent == nil {
		return false
	}
	t := hostport.TargetOf(address)
	_, direct := d.Direct.MatchName(t)
	if !direct && t.Addr.IsValid() {
		ip := t.Addr.Unmap()
		_, direct = d.Direct.MatchAddress(context.Background(), ip, access.EmbeddedIPv4(ip))
	}
	return !direct
}

// CheckForParent checks a target whose name the parent resolves.
func (d *Dialer) CheckForParent(ctx context.Context, r access.Scope, address string) error {
	return d.enforce(ctx, address, d.checkForParent(ctx, r, hostport.TargetOf(address)))
}

// checkForParent decides about a target whose name the parent resolves. A parent on this
// machine can resolve any name to this machine, so the ports of our own protected
// listeners are then denied for all names.
func (d *Dialer) checkForParent(ctx context.Context, r access.Scope, t hostport.Target) access.Verdict {
	if t.Name != "" && d.OwnPort != nil && d.OwnPort(t.Port) && d.Parent.isLocal(ctx) {
		return access.Verdict{Denied: &access.DeniedError{Reason: "its port is reserved",
			Hint: "the parent proxy on this machine could resolve the name to it; add the name to no_upstream, so that it is resolved here"}}
	}
	return d.Access.CheckName(ctx, r, t, false)
}

// enforce logs a denial that is only reported, and returns one that is enforced.
func (d *Dialer) enforce(ctx context.Context, address string, v access.Verdict) error {
	if v.Reported != nil {
		d.Report(ctx, address, v.Reported)
	}
	if v.Denied != nil {
		return v.Denied
	}
	return nil
}

// Denies reports whether the rules would now deny an open connection to target, whose
// address is to.
func (d *Dialer) Denies(ctx context.Context, r access.Scope, target string, to netip.AddrPort) bool {
	if d.UsesParent(target) {
		return d.CheckForParent(ctx, r, target) != nil
	}
	return d.Access.Check(ctx, r, hostport.TargetOf(target), to).Denied != nil
}

// Recheck checks a reused connection, which was opened for an earlier request, for a
// client of scope r.
func (d *Dialer) Recheck(ctx context.Context, r access.Scope, address string, conn net.Conn) error {
	if d.UsesParent(address) {
		return d.CheckForParent(ctx, r, address)
	}
	return d.enforce(ctx, address, d.checkConnected(ctx, r, hostport.TargetOf(address), hostport.AddrPortOf(conn.RemoteAddr())))
}

// checkConnected decides about an open connection, or as if there were one: unlike Check, it also
// knows the listeners that this process has only just opened.
func (d *Dialer) checkConnected(ctx context.Context, r access.Scope, t hostport.Target, to netip.AddrPort) access.Verdict {
	if denied := d.Access.CheckSelf(to, true); denied != nil {
		return access.Verdict{Denied: denied}
	}
	return d.Access.Check(ctx, r, t, to)
}
