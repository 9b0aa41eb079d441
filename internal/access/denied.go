// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package access

import (
	"cmp"
	"net/netip"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// DeniedError reports that a Control denies a target.
type DeniedError struct {
	To      netip.AddrPort // the denied address; invalid if only the name was checked
	Rule    string         // the rule that denies it, for the log; may be ""
	subject string         // what is not allowed, for the client; "": the host
	Reason  string         // the reason, for the client; may be ""
	Hint    string         // how the operator could allow it, for the log; may be ""
	Allow   func() string  // makes the line of a Caddyfile that would allow it; nil: there is none
}

// Subject returns what is denied, with the reason in brackets. Without a subject of its own
// it is the host of the request. What would allow it is the operator's business and is only
// logged.
func (e *DeniedError) Subject(host string) string {
	what := cmp.Or(e.subject, host)
	if e.Reason != "" {
		what += " (" + e.Reason + ")"
	}
	return what
}

// DeniesAll reports whether it is a "deny all" that denies the target, because no rule before it
// has allowed it.
func (e *DeniedError) DeniesAll() bool {
	return e.Rule == "deny all" || strings.HasPrefix(e.Rule, "deny all:")
}

func (e *DeniedError) Error() string {
	text := "denied"
	if e.To.IsValid() {
		text = e.To.String() + " is denied"
	}
	if why := cmp.Or(e.Reason, e.subject, e.Rule); why != "" {
		text += ": " + why
	}
	return text
}

// AllowLine returns the line of a Caddyfile that would allow it, or "" if there is none. A line for
// an option that takes a list has the whole list, and replaces the one that is there.
func (e *DeniedError) AllowLine() string {
	if e == nil || e.Allow == nil {
		return ""
	}
	return e.Allow()
}

// allowAddress returns the rule that allows an address. inner is the IPv4 address that ip embeds,
// or else ip. A private inner address must be allowed itself.
func allowAddress(ip, inner netip.Addr) string {
	if !PublicScope.includes(inner, inner) {
		ip = inner
	}
	return "allow " + ip.String()
}

// allowName returns the rule that allows a name, or "" if that rule would allow something else: a
// client may ask for a host named "all".
func allowName(name string) string {
	d, err := ParseDestination(name)
	if err != nil || d != (Destination{Text: name}) || len(ExpandRanges(name)) > 1 || hostport.CheckHost(name) != nil {
		return ""
	}
	return "allow " + name
}
