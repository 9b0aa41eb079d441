// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// allClients is the value of the option clients that opens the proxy.
const allClients = "all"

// provisionClients parses the option clients.
func (p *proxy) provisionClients(server *caddyhttp.Server) (err error) {
	var ranges []string
	for _, r := range p.config.Clients {
		if r == allClients {
			ranges = append(ranges, "0.0.0.0/0", "::/0")
		} else {
			ranges = append(ranges, r)
		}
	}
	if len(p.config.Clients) == 0 {
		ranges = []string{"private_ranges"}
	}
	if p.clients, err = parsePrefixes("clients", ranges); err != nil {
		return err
	}
	p.restrictedElsewhere = sync.OnceValue(func() bool {
		return server != nil && restrictedBefore(server, p.config, matchesClients)
	})
	p.clientsLine = sync.OnceValues(p.makeClientsLine)
	return nil
}

// admits reports whether a client may use the proxy. A client on a Unix socket has no
// valid address; it is always admitted.
//
// Without the option clients, every client is admitted if authentication or an address
// matcher already restricts access; otherwise only private addresses are. That depends on
// the routes around the handler, which are complete only once all handlers are provisioned.
// It is therefore decided at the first request, so the proxy is never open in between.
func (p *proxy) admits(addr netip.Addr) bool {
	return p.admitsWithoutLogin(addr) || len(p.config.Clients) == 0 && len(p.auth) > 0
}

// admitsWithoutLogin is admits for a client that need not log in.
func (p *proxy) admitsWithoutLogin(addr netip.Addr) bool {
	return !addr.IsValid() || p.clients.Contains(addr) || len(p.config.Clients) == 0 && p.restrictedElsewhere()
}

// deniedClient returns why a client may not use the proxy, if it is not admitted.
func (p *proxy) deniedClient(addr netip.Addr) *access.DeniedError {
	reason, line := p.clientsLine()
	e := &access.DeniedError{Rule: "clients", Reason: reason, Hint: fmt.Sprintf("add %s to clients", addr)}
	if line != "" {
		e.Allow = func() string { return line + " " + addr.String() }
	}
	return e
}

// makeClientsLine returns why clients are not admitted, and the option clients as a line of a
// Caddyfile. If that would be long, the reason has the beginning of it, and there is no line:
// the list may have thousands of ranges, and each stranger would cost as much.
func (p *proxy) makeClientsLine() (reason, line string) {
	line = "clients " + strings.Join(p.effectiveClients(), " ")
	reason = "the client's address is not in " + printable.Text(line)
	if len(line) > printable.MaxText {
		line = ""
	}
	return reason, line
}

// servesWithoutLogin reports whether a client at addr that meets the policy's conditions needs no
// credentials. If the conditions name neither clients nor users, strangers can meet them. Such a policy
// is only for the clients that could use the proxy if it had no authentication.
func (y *policy) servesWithoutLogin(addr netip.Addr) bool {
	return y.anonymous && (y.namesClients || y.proxy.admitsWithoutLogin(addr))
}

// isOpen reports whether every client that can reach the proxy may use it.
func (p *proxy) isOpen() bool {
	if namesClients(p.config.Clients) || p.restrictedElsewhere() {
		return false
	}
	open := len(p.config.Clients) > 0 // to all
	if len(p.auth) == 0 {
		return open
	}
	return slices.ContainsFunc(p.policies, func(y *policy) bool {
		return y.anonymous && (y.isOpen || open && !y.namesClients)
	})
}

// effectiveClients returns the value of the option clients that is in effect.
func (p *proxy) effectiveClients() []string {
	switch {
	case len(p.config.Clients) > 0:
		return p.config.Clients
	case len(p.auth) > 0 || p.restrictedElsewhere():
		return []string{allClients}
	}
	return []string{"private_ranges"}
}

// namesClients reports whether ranges restrict access, which ranges that include all
// addresses do not.
func namesClients(ranges []string) bool {
	return len(ranges) > 0 && !slices.ContainsFunc(ranges, func(r string) bool { return r == allClients || strings.HasSuffix(r, "/0") })
}
