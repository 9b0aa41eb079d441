// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// openTo describes the clients that may use the proxy, in words.
func (p *proxy) openTo(server *caddyhttp.Server) string {
	named := namesClients(p.config.Clients)
	switch {
	case !slices.ContainsFunc(server.Listeners(), func(ln net.Listener) bool { return isBeyondLoopback(ln.Addr()) }):
		if len(p.auth) > 0 {
			return "users on this machine who log in" + p.anonymousClients()
		}
		return "this machine only"
	case p.isOpen():
		return "everybody who can reach it"
	case len(p.auth) > 0 && named:
		return "users who log in" + p.anonymousClients() + ", from " + strings.Join(p.config.Clients, " ")
	case len(p.auth) > 0:
		return "users who log in" + p.anonymousClients()
	case named:
		return "clients from " + strings.Join(p.config.Clients, " ")
	case p.restrictedElsewhere():
		return "clients that its site admits"
	}
	return "clients with private addresses"
}

// anonymousClients says in words which clients need no login although the proxy asks for one; "" for
// none.
func (p *proxy) anonymousClients() string {
	var names []string
	for _, y := range p.policies {
		if y.anonymous {
			names = append(names, y.name)
		}
	}
	switch len(names) {
	case 0:
		return ""
	case 1:
		return " and anonymous clients of the policy " + names[0]
	}
	return " and anonymous clients of the policies " + strings.Join(names, " ")
}

// proxyURL returns the URL by which a client on this machine can use the proxy, or "" if there is
// none because it listens on Unix sockets only. With TLS, the URL has the first of the option
// hosts, because a certificate is usually for a name.
func (p *proxy) proxyURL(server *caddyhttp.Server) string {
	for _, ln := range server.Listeners() {
		at := hostport.AddrPortOf(ln.Addr())
		if !at.IsValid() {
			continue
		}
		scheme, host := p.schemeOf(server, ln), reachable(at.Addr()).String()
		if scheme == "https" && len(p.config.Hosts) > 0 {
			host = p.config.Hosts[0]
		}
		return scheme + "://" + net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(int(at.Port())))
	}
	return ""
}

// schemeOf returns the scheme that clients of a listener use.
func (p *proxy) schemeOf(server *caddyhttp.Server, ln net.Listener) string {
	app, err := p.own.ctx.AppIfConfigured("http")
	if err == nil && usesTLS(app.(*caddyhttp.App), server, ln) {
		return "https"
	}
	return "http"
}

// reachable returns an address at which a client on this machine reaches a listener.
func reachable(addr netip.Addr) netip.Addr {
	if addr.IsUnspecified() {
		return loopback4 // Go's listeners for all addresses of IPv6 also accept IPv4
	}
	return addr
}

// usageLine returns the command by which a shell makes programs use a proxy; "" without a URL.
func usageLine(url string) string {
	if url == "" {
		return ""
	}
	if runtime.GOOS == "windows" {
		return fmt.Sprintf("$env:http_proxy='%s'; $env:https_proxy='%[1]s'", url)
	}
	return fmt.Sprintf("export http_proxy=%s https_proxy=%[1]s", url)
}

// statusURLs returns the URLs of the status pages, as a browser on this machine would open them.
func (p *proxy) statusURLs() (urls []string) {
	app, err := p.own.ctx.AppIfConfigured("http")
	if err != nil {
		return nil
	}
	servers := slices.Collect(maps.Values(app.(*caddyhttp.App).Servers))
	program.statusServers.Range(func(key, value any) bool {
		s, server := key.(*Status), value.(*caddyhttp.Server)
		if !slices.Contains(servers, server) {
			return true // of the config that a reload is replacing
		}
		hosts, _ := hostsLeadingTo(routesOf(server), s)
		path, found := pathLeadingTo(routesOf(server), s)
		for _, ln := range server.Listeners() {
			at := hostport.AddrPortOf(ln.Addr())
			if !at.IsValid() || !found {
				continue
			}
			host := reachable(at.Addr()).String()
			if len(hosts) > 0 {
				host = hosts[0]
			}
			scheme := p.schemeOf(server, ln)
			host = net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(int(at.Port())))
			host = strings.TrimSuffix(host, map[string]string{"http": ":80", "https": ":443"}[scheme])
			urls = append(urls, scheme+"://"+host+path)
			break
		}
		return true
	})
	slices.Sort(urls)
	return slices.Compact(urls)
}

// introduction introduces a proxy that has just started, in one line: where it listens, for which
// clients, and how to use it.
func (p *proxy) introduction() string {
	server := p.own.self
	line := fmt.Sprintf("A forward proxy listens on %s, for %s.", strings.Join(server.Listen, " "), p.openTo(server))
	if url := p.proxyURL(server); url != "" {
		line += " To use it: " + usageLine(url)
		if p.config.ServePAC != "" {
			line += "  PAC script for browsers: " + url + p.config.ServePAC
		}
	}
	if urls := p.statusURLs(); len(urls) > 0 {
		line += "  Status page: " + strings.Join(urls, " ")
	}
	return line
}
