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
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/gaissmai/bart"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// Control decides which targets clients may connect to. The rules of the config apply in
// their order; where no rule matches, the client's reach decides.
type Control struct {
	Sets          []*RuleSet
	Ports         []PortRange                              // nil: all but PortSMTP
	Connect       []PortRange                              // the ports for CONNECT; nil: those of Ports
	IsSelf        func(to netip.AddrPort, exact bool) bool // whether an address is a protected listener of this process
	ReportOnly    bool                                     // denials by rules and ports are only reported
	RecheckReused bool                                     // verdicts can change, or must be reported again: recheck reused connections
}

// PortSMTP is denied unless the option ports lists it: sending spam is the most common
// abuse of a forward proxy.
const PortSMTP = 25

// RuleSet merges the destinations of adjacent rules that have the same action and port
// range. The order among such rules makes no difference.
type RuleSet struct {
	deny  bool
	ports PortRange // zero: all of them

	all             bool
	private, public bool
	names           map[string]bool // in lower case, without a trailing dot
	domains         map[string]bool // match their subdomains; spelled like names
	prefixes        bart.Lite
	count           int // of prefixes
	Sources         []*RangeSource
}

// PortRange is the ports from low to high; the zero value is all ports.
type PortRange struct{ Low, High uint16 }

func (p PortRange) contains(port uint16) bool { return p.High == 0 || p.Low <= port && port <= p.High }

func (p PortRange) String() string {
	switch {
	case p.High == 0:
		return ""
	case p.Low == p.High:
		return strconv.Itoa(int(p.Low))
	}
	return fmt.Sprintf("%d-%d", p.Low, p.High)
}

// ParsePorts parses a port or a range of ports such as 8000-8999.
func ParsePorts(s string) (PortRange, error) {
	from, to, ranged := strings.Cut(s, "-")
	if !ranged {
		to = from
	}
	low, err := strconv.ParseUint(from, 10, 16)
	high, err2 := strconv.ParseUint(to, 10, 16)
	if err != nil || err2 != nil || low == 0 || high < low {
		return PortRange{}, fmt.Errorf("%q is neither a port from 1 to 65535 nor a range of ports such as 8000-8999", s)
	}
	return PortRange{uint16(low), uint16(high)}, nil
}

// ParsePortList parses the ports of an option.
func ParsePortList(option string, texts []string) (list []PortRange, err error) {
	for _, text := range texts {
		ports, err := ParsePorts(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", option, err)
		}
		list = append(list, ports)
	}
	return list, nil
}

// Verdict is a decision about a destination.
type Verdict struct {
	Denied   *DeniedError // nil: the destination is allowed
	Reported *DeniedError // the first denial that report-only mode suppressed; nil: none

	// The entry that allows the destination. Its text is only made if anybody asks for it.
	by       *RuleSet // nil: no rule allows it, nor denies it
	entry    string   // "": the range that contains host, or else ip
	ip, host netip.Addr
}

// Rule returns the rule that decides, such as "allow *.example.com"; "" if none does.
func (v *Verdict) Rule() string {
	switch {
	case v.Denied != nil:
		return v.Denied.Rule
	case v.by == nil:
		return ""
	case v.entry == "":
		return v.by.rule(cmp.Or(v.by.rangeOf(v.host), v.by.rangeOf(v.ip)))
	}
	return v.by.rule(v.entry)
}

// Check decides whether a client of reach r may connect to the address to, which belongs
// to target t. The first rule that matches the target's name or the address decides.
// Allowing a name does not allow whatever it resolves to: the address must still pass the
// later rules for addresses, and the client's reach.
func (p *Control) Check(ctx context.Context, r Scope, t hostport.Target, to netip.AddrPort) (v Verdict) {
	ip := to.Addr().WithZone("").Unmap()
	host := EmbeddedIPv4(ip)
	if e := p.CheckSelf(to, false); e != nil {
		return Verdict{Denied: e}
	}
	if e := p.CheckPort(ctx, to.Port()); e != nil {
		if e.To = to; v.enforces(p, e) {
			return v
		}
	}
	for _, s := range p.Sets {
		if !s.ports.contains(to.Port()) {
			continue
		}
		entry, byAddress := s.MatchAddress(ctx, ip, host)
		byName := false
		if !byAddress && v.by == nil { // else a rule has allowed the name
			entry, byName = s.MatchName(t)
		}
		switch {
		case s.deny && (byAddress || byName):
			e := s.denied(entry)
			if e.To, e.Allow = to, func() string { return allowName(t.Name) }; byAddress || t.Name == "" {
				e.Allow = func() string { return allowAddress(ip, host) }
			}
			if v.enforces(p, e) {
				return v
			}
		case byAddress:
			v.by, v.entry, v.ip, v.host = s, entry, ip, host
			return v
		case byName:
			v.by, v.entry = s, entry
		}
	}
	if r.includes(ip, host) {
		return v
	}
	line := allowAddress(ip, host)
	e := &DeniedError{To: to, Reason: "its address is private or local", Hint: line, Allow: func() string { return line }}
	if r == LocalScope {
		e.Reason = "its address has a special purpose"
	}
	return Verdict{Denied: e}
}

// CheckSelf denies the address of a protected listener of this process. Unless exact is set,
// it may miss a listener that was opened within the last SystemCacheTTL.
func (p *Control) CheckSelf(to netip.AddrPort, exact bool) *DeniedError {
	if p.IsSelf == nil {
		return nil
	}
	ip := to.Addr().WithZone("").Unmap()
	host := EmbeddedIPv4(ip)
	if p.IsSelf(netip.AddrPortFrom(ip, to.Port()), exact) || host != ip && p.IsSelf(netip.AddrPortFrom(host, to.Port()), exact) {
		return &DeniedError{To: to, Reason: "it is an address of the proxy itself"}
	}
	return nil
}

// enforces reports whether a denial by rules or ports is enforced, which makes it the verdict.
// In report-only mode it records the first denial instead.
func (v *Verdict) enforces(p *Control, e *DeniedError) bool {
	if !p.ReportOnly {
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
func (p *Control) CheckName(ctx context.Context, r Scope, t hostport.Target, resolvable bool) (v Verdict) {
	if t.Addr.IsValid() {
		if resolvable {
			return v // Check decides about it
		}
		return p.Check(ctx, r, t, netip.AddrPortFrom(t.Addr, t.Port))
	}
	if !resolvable && (t.Name == "localhost" || strings.HasSuffix(t.Name, ".localhost")) {
		return p.Check(ctx, r, t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), t.Port))
	}
	if e := p.CheckPort(ctx, t.Port); e != nil && v.enforces(p, e) {
		return v
	}
	for _, s := range p.Sets {
		if !s.ports.contains(t.Port) {
			continue
		}
		entry, matches := s.MatchName(t)
		if matches && s.deny {
			e := s.denied(entry)
			e.Allow = func() string { return allowName(t.Name) }
			if v.enforces(p, e) {
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

// connectKey is the context key that marks the dial of a CONNECT.
type connectKey struct{}

// WithConnect marks ctx as that of the dial of a CONNECT, for which the option connect_ports
// may allow other ports.
func (p *Control) WithConnect(ctx context.Context) context.Context {
	if p.Connect == nil {
		return ctx
	}
	return context.WithValue(ctx, connectKey{}, true)
}

// PortsFor returns the ports that are open, and the option that says so; none: all but PortSMTP.
func (p *Control) PortsFor(ctx context.Context) (open []PortRange, option string) {
	if p.Connect != nil && ctx.Value(connectKey{}) != nil {
		return p.Connect, "connect_ports"
	}
	return p.Ports, "ports"
}

// CheckPort returns why a port is closed; nil if it is open.
func (p *Control) CheckPort(ctx context.Context, port uint16) *DeniedError {
	ports, option := p.PortsFor(ctx)
	if ports == nil && port != PortSMTP || slices.ContainsFunc(ports, func(r PortRange) bool { return r.contains(port) }) {
		return nil
	}
	e := &DeniedError{Rule: option, subject: fmt.Sprintf("port %d", port), Hint: fmt.Sprintf("add %d to %s", port, option)}
	e.Allow = func() string { return portLine(option, ports, port) }
	if port == PortSMTP && ports == nil {
		e.subject = "port 25 (mail)"
		e.Hint = "list the open ports, including 25, in " + option
	}
	return e
}

// MatchAddress returns which entry of the set matches an address. host is the IPv4
// address that ip embeds, or else ip. Allowing a range of IPv6 addresses such as
// 2000::/3 does not allow private IPv4 addresses embedded in them: a rule must allow
// those themselves.
func (s *RuleSet) MatchAddress(ctx context.Context, ip, host netip.Addr) (string, bool) {
	entry, matches := s.matchRange(ctx, host)
	if !matches && ip != host && (s.deny || PublicScope.includes(host, host)) {
		entry, matches = s.matchRange(ctx, ip)
	}
	if matches || !s.public && !s.private {
		return entry, matches
	}
	isPublic := PublicScope.includes(ip, host)
	switch {
	case s.public && isPublic:
		return "public", true
	case s.private && !isPublic && (s.deny || LocalScope.includes(ip, host)):
		return "private", true
	}
	return "", false
}

// matchRange returns which range of the set contains an address. A metadata service is
// only allowed by an entry for its exact address, not by a range around it.
func (s *RuleSet) matchRange(ctx context.Context, addr netip.Addr) (string, bool) {
	if !s.deny && isMetadata(addr) {
		return "", s.count > 0 && s.prefixes.Get(netip.PrefixFrom(addr, addr.BitLen()))
	}
	if s.count > 0 && s.prefixes.Contains(addr) {
		if !s.deny {
			return "", true
		}
		return s.rangeOf(addr), true
	}
	for _, source := range s.Sources {
		if source.contains(ctx, addr) {
			return source.Name, true
		}
	}
	return "", false
}

// rangeOf returns the smallest range of the set that contains an address, which is not a range
// of a source; "": none does.
func (s *RuleSet) rangeOf(addr netip.Addr) string {
	if prefix, ok := s.prefixes.LookupPrefixLPM(netip.PrefixFrom(addr, addr.BitLen())); ok {
		return prefix.String()
	}
	return ""
}

// MatchName returns which entry of the set matches a target's name. The entry all also
// matches addresses.
func (s *RuleSet) MatchName(t hostport.Target) (string, bool) {
	if s.all {
		return "all", true
	}
	if t.Name == "" {
		return "", false
	}
	if s.names[t.Name] {
		return t.Name, true
	}
	if len(s.domains) > 0 {
		for rest, found := t.Name, true; ; {
			if _, rest, found = strings.Cut(rest, "."); !found {
				break
			}
			if s.domains[rest] {
				return "*." + rest, true
			}
		}
	}
	return "", false
}

// aboutAddresses reports whether the set has entries for addresses.
func (s *RuleSet) aboutAddresses() bool {
	return s.count > 0 || len(s.Sources) > 0 || s.private || s.public
}

// denied returns the error for a target that matches an entry of a deny set.
func (s *RuleSet) denied(entry string) *DeniedError {
	return &DeniedError{Rule: s.rule(entry), Hint: "put an allow rule before it"}
}

// rule returns the rule that an entry of the set is.
func (s *RuleSet) rule(entry string) string {
	if s.ports.High > 0 {
		entry += ":" + s.ports.String()
	}
	return s.action() + " " + entry
}

// RangeSource is a list of CIDR ranges that may change while the config runs.
type RangeSource struct {
	Name  string                               // the module's ID
	List  func(context.Context) []netip.Prefix // the ranges for the request of a context
	built atomic.Pointer[builtRanges]
}

// builtRanges is a list and the lookup table built from it.
type builtRanges struct {
	list  []netip.Prefix
	table bart.Lite
}

func (s *RangeSource) contains(ctx context.Context, addr netip.Addr) bool {
	list := s.List(ctx)
	if len(list) == 0 {
		return false
	}
	b := s.built.Load()
	if b == nil || len(b.list) != len(list) || &b.list[0] != &list[0] {
		b = &builtRanges{list: list}
		for _, prefix := range list {
			b.table.Insert(prefix.Masked())
		}
		s.built.Store(b)
	}
	return b.table.Contains(addr)
}

// A Scope says which addresses a client may reach by default: no more than it could
// reach without the proxy.
type Scope int

const (
	PublicScope Scope = iota // public unicast addresses outside this machine's networks: open to any client
	LocalScope               // this machine and its networks as well: for clients on this machine
	ScopeCount               // the number of scopes
)

// includes reports whether an address is within reach. ip is not v4-mapped and has no
// zone; host is the IPv4 address that it embeds, or else ip. Both must be within reach,
// except that for the public NAT64 prefix only host counts.
func (r Scope) includes(ip, host netip.Addr) bool {
	return r.reaches(host) && (ip == host || nat64.Contains(ip) || r.reaches(ip))
}

func (r Scope) reaches(ip netip.Addr) bool {
	if r == LocalScope {
		return !neverReachable.Contains(ip) && !isMetadata(ip)
	}
	return !notPublic.Contains(ip) && !isNearby(ip)
}

// notPublic contains the addresses that are not public unicast, from IANA's
// special-purpose registries (RFC 6890), everything in IPv6 outside global unicast,
// 2000::/3, and Azure's 168.63.129.16, which belongs to the machine's host. neverReachable
// contains the addresses that even a client on this machine may not reach by default:
// unspecified ones, which are aliases of this machine, link-local, multicast and
// broadcast.
var (
	notPublic = prefixes("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
		"172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
		"168.63.129.16/32", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
		"::/3", "4000::/2", "8000::/1", "2001::/23", "2001:db8::/32", "3fff::/20")
	neverReachable = prefixes("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32",
		"::/128", "fe80::/10", "ff00::/8", "2001::/32")

	// The metadata services that hand a machine its cloud credentials: AWS (also ECS
	// and EKS), Google, Azure, Oracle, OpenStack, Alibaba, Tencent and Scaleway.
	metadata = addressSet("169.254.169.254", "169.254.170.2", "169.254.170.23", "169.254.0.23", "169.254.42.42",
		"168.63.129.16", "192.0.0.192", "100.100.100.200",
		"fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "fd00:42::42", "fe80::a9fe:a9fe")

	nat64          = netip.MustParsePrefix("64:ff9b::/96")    // RFC 6052
	localNAT64     = netip.MustParsePrefix("64:ff9b:1::/48")  // RFC 8215
	sixToFour      = netip.MustParsePrefix("2002::/16")       // RFC 3056
	ipv4Compatible = netip.MustParsePrefix("::/96")           // RFC 4291 §2.5.5.1
	ipv4Translated = netip.MustParsePrefix("::ffff:0:0:0/96") // RFC 2765
)

// EmbeddedIPv4 returns the IPv4 address that is embedded in an IPv6 address for a
// translator, relay or tunnel, in current or obsolete use, or else ip itself.
func EmbeddedIPv4(ip netip.Addr) netip.Addr {
	if ip.Is4() {
		return ip
	}
	b := ip.As16()
	last := netip.AddrFrom4([4]byte(b[12:]))
	switch {
	case nat64.Contains(ip), ipv4Translated.Contains(ip), ipv4Compatible.Contains(ip) && b[12] != 0:
		return last
	case sixToFour.Contains(ip):
		return netip.AddrFrom4([4]byte(b[2:6]))
	case localNAT64.Contains(ip) && [5]byte(b[11:]) == [5]byte{}: // the prefix has 48 bits
		return netip.AddrFrom4([4]byte{b[6], b[7], b[9], b[10]})
	case localNAT64.Contains(ip): // the prefix has 96 bits
		return last
	case b[8]&^2 == 0 && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe: // ISATAP, RFC 5214
		return last
	}
	return ip
}

// isMetadata reports whether addr is that of a cloud's metadata service.
func isMetadata(addr netip.Addr) bool { return metadata[addr] }

func addressSet(list ...string) map[netip.Addr]bool {
	set := make(map[netip.Addr]bool)
	for _, addr := range list {
		set[netip.MustParseAddr(addr)] = true
	}
	return set
}

func prefixes(cidrs ...string) *bart.Lite {
	table := new(bart.Lite)
	for _, c := range cidrs {
		table.Insert(netip.MustParsePrefix(c))
	}
	return table
}
