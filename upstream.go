// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// Upstream is a parent proxy, through which this proxy connects to destinations.
type Upstream struct {
	// The URL of the parent proxy: `http://`, `https://` or `socks5://` (`socks5h://` is
	// the same), a host and optionally a port (default: 80, 443 or 1080). A user and
	// password before an @ may be placeholders such as {env.PROXY_PASSWORD} and
	// {file./run/secrets/proxy}, which are replaced when the config is loaded. Written
	// literally, they must be percent-encoded, and are visible in the config. `off` means
	// no parent: a policy can set it if its directive has one.
	URL string `json:"url"`

	// Header fields to add to the requests to the parent proxy, including CONNECT. Not
	// available with socks5.
	Headers map[string]string `json:"headers,omitempty"`

	// TLS settings for the connection to the parent proxy, if its scheme is https.
	TLS *reverseproxy.TLSConfig `json:"tls,omitempty"`
}

// parentConfig returns the configuration of the parent, with the placeholders of u replaced and
// its certificates loaded. timeout is the time limit for opening a connection through the parent.
func (u *Upstream) parentConfig(ctx caddy.Context, timeout time.Duration) (c egress.ParentConfig, err error) {
	var credentials string
	if c.Scheme, credentials, c.Address, err = splitUpstream(u.URL); err != nil {
		return c, err
	}
	if c.User, err = readCredentials(credentials); err != nil {
		return c, err
	}
	c.Timeout, c.Header = timeout, make(http.Header)
	repl := caddy.NewReplacer()
	for name, value := range u.Headers {
		value = repl.ReplaceKnown(value, "")
		if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) || c.Scheme == "socks5" {
			return c, fmt.Errorf("header %q: expected a valid field name and value; headers are not available with socks5", name)
		}
		c.Header.Set(name, value)
	}
	if u.TLS == nil {
		return c, nil
	}
	if c.Scheme != "https" {
		return c, errors.New("tls: expected an upstream with https://")
	}
	c.Secure, err = u.TLS.MakeTLSClientConfig(ctx)
	return c, err
}

// upstreamPorts maps the schemes of parents to their default ports. In curl, socks5h
// makes the parent resolve names; here the parent always does.
var upstreamPorts = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}

// splitUpstream splits the URL of a parent. Its errors never contain credentials.
func splitUpstream(s string) (scheme, credentials, address string, err error) {
	scheme, rest, found := strings.Cut(s, "://")
	if !found {
		return "", "", "", errors.New("missing scheme; expected http://, https:// or socks5://, and the host of a proxy")
	}
	scheme = strings.ToLower(scheme)
	port, known := upstreamPorts[scheme]
	if !known {
		return "", "", "", errors.New("the scheme is not supported; expected http://, https:// or socks5://, and the host of a proxy")
	}
	scheme = strings.TrimSuffix(scheme, "h")
	if i := strings.LastIndexByte(rest, '@'); i >= 0 {
		credentials, rest = rest[:i], rest[i+1:]
	}
	rest = strings.TrimSuffix(rest, "/")
	if strings.ContainsAny(rest, "/?#") {
		return "", "", "", errors.New("unexpected path, query or fragment, or a character of the password that is not percent-encoded; expected the host of a proxy, and optionally its port")
	}
	host, given, found := hostport.Split(rest)
	if found {
		port = given
	}
	if address, err = hostport.Join(host, port); err != nil {
		return "", "", "", fmt.Errorf("the host or the port is not valid; expected the host of a proxy, and optionally its port, after %s:// and any credentials", scheme)
	}
	return scheme, credentials, address, nil
}

// hasLiteralSecret reports whether u contains a literal secret instead of a placeholder.
func (u *Upstream) hasLiteralSecret() bool {
	_, credentials, _, _ := splitUpstream(u.URL)
	if _, password := cutCredentials(credentials); password != "" && !strings.Contains(password, "{") {
		return true
	}
	for name, value := range u.Headers {
		name = strings.ToLower(name)
		secret := slices.ContainsFunc([]string{"auth", "cookie", "key", "password", "secret", "token"}, func(word string) bool { return strings.Contains(name, word) })
		if secret && value != "" && !strings.Contains(value, "{") {
			return true
		}
	}
	return false
}

// cutCredentials splits a user and a password at the first colon outside a placeholder.
// It decodes neither.
func cutCredentials(s string) (user, password string) {
	depth := 0
	for i, c := range s {
		switch {
		case c == '{':
			depth++
		case c == '}':
			depth--
		case c == ':' && depth == 0:
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

// onlyPlaceholder matches a text that is a placeholder as a whole, so that it cannot be a password.
var onlyPlaceholder = regexp.MustCompile(`^\{(env|file)\.[^{}]+\}$`)

// readCredentials decodes a user and a password, which are percent-encoded or contain
// placeholders. It returns nil if s is empty.
func readCredentials(s string) (*url.Userinfo, error) {
	if s == "" {
		return nil, nil
	}
	repl := caddy.NewReplacer()
	read := func(s string) (string, error) {
		text, err := url.PathUnescape(s)
		if err != nil {
			return "", errors.New("the user or the password is not correctly percent-encoded")
		}
		replaced, err := repl.ReplaceOrErr(text, true, true)
		switch {
		case err != nil && onlyPlaceholder.MatchString(text):
			return "", fmt.Errorf("the placeholder %s is unknown or empty", text)
		case err != nil:
			// err may contain a part of the password that only looks like a placeholder.
			return "", errors.New("a placeholder in the user or the password is unknown or empty")
		}
		return replaced, nil
	}
	user, password := cutCredentials(s)
	name, err := read(user)
	if err != nil || len(user) == len(s) {
		return url.User(name), err
	}
	password, err = read(password)
	return url.UserPassword(name, password), err
}

// parseResolvers parses the option resolvers: IP addresses, each optionally with a network
// and a port.
func parseResolvers(addresses []string) ([]egress.DNSAddress, error) {
	var servers []egress.DNSAddress
	for _, address := range addresses {
		server, err := caddy.ParseNetworkAddressWithDefaults(address, "udp", 53)
		_, notIP := netip.ParseAddr(server.Host)
		_, port, split := net.SplitHostPort(address)
		if err != nil || split == nil && port == "" || server.PortRangeSize() != 1 || server.StartPort == 0 ||
			server.Network != "udp" && server.Network != "tcp" || notIP != nil {
			return nil, fmt.Errorf("resolvers %q: expected the IP address of a DNS server, such as 192.0.2.53 or tcp/[2001:db8::53]:53", address)
		}
		servers = append(servers, egress.DNSAddress{Network: server.Network, Address: server.JoinHostPort(0)})
	}
	return servers, nil
}
