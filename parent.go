// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/proxy"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/policy"
)

// Upstream is a parent proxy, through which this proxy connects to destinations.
type Upstream struct {
	// The URL of the parent proxy: `http://`, `https://` or `socks5://` (`socks5h://` is
	// the same), a host and optionally a port (default: 80, 443 or 1080). A user and
	// password before an @ may be placeholders such as {env.PROXY_PASSWORD} and
	// {file./run/secrets/proxy}, which are replaced when the config is loaded. Written
	// literally, they must be percent-encoded, and are visible in the config.
	URL string `json:"url"`

	// Header fields to add to the requests to the parent proxy, including CONNECT. Not
	// available with socks5.
	Headers map[string]string `json:"headers,omitempty"`

	// TLS settings for the connection to the parent proxy, if its scheme is https.
	TLS *reverseproxy.TLSConfig `json:"tls,omitempty"`
}

// parent opens connections through a parent proxy.
//
// All methods are safe for concurrent use.
type parent struct {
	scheme    string
	address   string        // host and port
	header    http.Header   // added to requests to the parent; includes credentials
	secure    *tls.Config   // nil: no TLS
	socks     socksDialer   // nil: an HTTP proxy
	timeout   time.Duration // for opening a connection through it
	dialer    net.Dialer
	connector *connector

	streams *muxPool    // for tunnels over HTTP/2; nil: the scheme is not https
	http1   atomic.Bool // the parent does not speak HTTP/2

	locality atomic.Pointer[parentLocality] // the cached result of isLocal
}

// socksDialer is implemented by the SOCKS5 dialer of golang.org/x/net/proxy.
type socksDialer interface {
	DialWithConn(ctx context.Context, c net.Conn, network, address string) (net.Addr, error)
}

// newParent returns a parent for the config u.
func newParent(ctx caddy.Context, u *Upstream, timeout time.Duration, connector *connector) (*parent, error) {
	scheme, credentials, address, err := splitUpstream(u.URL)
	if err != nil {
		return nil, err
	}
	user, err := readCredentials(credentials)
	if err != nil {
		return nil, err
	}
	p := &parent{
		scheme: scheme, address: address, timeout: timeout, header: make(http.Header),
		dialer: net.Dialer{KeepAliveConfig: keepAliveConfig}, connector: connector,
	}
	repl := caddy.NewReplacer()
	for name, value := range u.Headers {
		value = repl.ReplaceKnown(value, "")
		if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) || scheme == "socks5" {
			return nil, fmt.Errorf("header %q: expected a valid field name and value; headers are not available with socks5", name)
		}
		p.header.Set(name, value)
	}
	if u.TLS != nil && scheme != "https" {
		return nil, errors.New("tls: expected an upstream with https://")
	}
	switch scheme {
	case "socks5":
		var auth *proxy.Auth
		if user != nil {
			password, _ := user.Password()
			auth = &proxy.Auth{User: user.Username(), Password: password}
		}
		d, err := proxy.SOCKS5("tcp", address, auth, nil)
		if err != nil {
			return nil, err
		}
		p.socks = d.(socksDialer)
		return p, nil
	case "https":
		p.secure = new(tls.Config)
		if u.TLS != nil {
			if p.secure, err = u.TLS.MakeTLSClientConfig(ctx); err != nil {
				return nil, err
			}
		}
		if p.secure.ServerName == "" {
			host, _, _ := hostport.Split(address)
			p.secure.ServerName = strings.Trim(host, "[]")
		}
		p.streams = newMuxPool(p.dialStreams)
	}
	if user != nil {
		password, _ := user.Password()
		p.header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	return p, nil
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

// readCredentials decodes a user and a password, which are percent-encoded or contain
// placeholders. It returns nil if s is empty.
func readCredentials(s string) (*url.Userinfo, error) {
	if s == "" {
		return nil, nil
	}
	repl := caddy.NewReplacer()
	read := func(s string) (string, error) {
		s, err := url.PathUnescape(s)
		if err != nil {
			return "", errors.New("the user or the password is not correctly percent-encoded")
		}
		if s, err = repl.ReplaceOrErr(s, true, true); err != nil {
			// err may contain a part of the password that only looks like a placeholder.
			return "", errors.New("a placeholder in the user or the password is unknown or empty")
		}
		return s, nil
	}
	user, password := cutCredentials(s)
	name, err := read(user)
	if err != nil || len(user) == len(s) {
		return url.User(name), err
	}
	password, err = read(password)
	return url.UserPassword(name, password), err
}

// localityTTL is how long a result of isLocal is cached: a proxy that listens on port 443
// needs it for each CONNECT to that port.
const localityTTL = 10 * time.Second

// parentLocality is a cached result of isLocal.
type parentLocality struct {
	here bool
	at   time.Time
}

// isLocal reports whether the parent is on this machine. It may look up the parent's name.
func (p *parent) isLocal(ctx context.Context) bool {
	if known := p.locality.Load(); known != nil && time.Since(known.at) < localityTTL {
		return known.here
	}
	host, _, _ := hostport.Split(p.address)
	host = strings.Trim(host, "[]")
	addrs := []netip.Addr{}
	if addr, err := netip.ParseAddr(host); err == nil {
		addrs = append(addrs, addr)
	} else if addrs, err = p.connector.resolver.lookup(ctx, host); err != nil {
		return true // err on the side of denying
	}
	here := slices.ContainsFunc(addrs, func(addr netip.Addr) bool {
		addr = addr.Unmap()
		return addr.IsLoopback() || addr.IsUnspecified() || policy.IsOwnAddress(addr)
	})
	p.locality.Store(&parentLocality{here, time.Now()})
	return here
}

// open connects to the parent. Its name, unlike a target's, may use the system's DNS
// search list.
func (p *parent) open(ctx context.Context) (net.Conn, error) {
	t := hostport.TargetOf(p.address)
	host, _, _ := hostport.Split(p.address)
	return p.connector.dial(ctx, &p.dialer, strings.Trim(host, "[]"), t.Port)
}

// isHTTP reports whether plain requests are sent to the parent as such, and not
// through a tunnel.
func (p *parent) isHTTP() bool { return p.socks == nil }

// connect opens a tunnel through the parent to address, a host and a port. The parent
// resolves the name.
func (p *parent) connect(ctx context.Context, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	if p.streams != nil && !p.http1.Load() {
		conn, err := p.connectStream(ctx, address)
		if err == nil || !p.http1.Load() {
			return conn, err
		}
	}
	conn, err := p.dial(ctx)
	if err != nil {
		return nil, err
	}
	// Abort the reads and writes below when ctx ends.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	var tunnel net.Conn
	if p.socks != nil {
		tunnel, err = p.connectSOCKS(ctx, conn, address)
	} else {
		tunnel, err = p.connectHTTP1(ctx, conn, address)
	}
	if !stop() && err == nil {
		err = &parentError{phase: parentAnswering, socks: p.socks != nil, err: context.Cause(ctx)}
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return tunnel, nil
}

// dial connects to the parent itself. The policy does not apply: the operator chose its
// address.
func (p *parent) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	conn, err := p.open(ctx)
	if err != nil {
		return nil, &parentError{err: err}
	}
	if p.secure == nil {
		return conn, nil
	}
	secure, err := handshakeWith(ctx, conn, p.secure, "http/1.1")
	if err != nil {
		return nil, &parentError{phase: parentHandshaking, err: err}
	}
	return secure, nil
}

// handshakeWith performs a TLS handshake on conn, and closes it if that fails.
func handshakeWith(ctx context.Context, conn net.Conn, config *tls.Config, protocols ...string) (*tls.Conn, error) {
	config = config.Clone()
	config.NextProtos = protocols
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return secure, nil
}

func (p *parent) connectSOCKS(ctx context.Context, conn net.Conn, address string) (net.Conn, error) {
	if _, err := p.socks.DialWithConn(ctx, conn, "tcp", address); err != nil {
		status := 0
		switch text := err.Error(); { // the package's errors have no types
		case strings.Contains(text, "not allowed by ruleset"):
			status = http.StatusForbidden
		case strings.Contains(text, "authentication"):
			status = http.StatusProxyAuthRequired
		case strings.Contains(text, "unreachable"), strings.Contains(text, "connection refused"),
			strings.Contains(text, "general SOCKS server failure"):
			status = http.StatusBadGateway
		case strings.Contains(text, "TTL expired"):
			status = http.StatusGatewayTimeout
		}
		return nil, &parentError{phase: parentAnswering, status: status, socks: true, err: err}
	}
	return conn, nil
}

func (p *parent) connectHTTP1(ctx context.Context, conn net.Conn, address string) (net.Conn, error) {
	head := []byte("CONNECT " + address + " HTTP/1.1\r\nHost: " + address + "\r\n")
	fields, _ := p.fields(ctx)
	for name, values := range fields {
		for _, value := range values {
			head = h1.AppendField(head, name, value)
		}
	}
	if _, err := conn.Write(append(head, "\r\n"...)); err != nil {
		return nil, asAnswerError(err, nil)
	}
	r := bufio.NewReaderSize(io.LimitReader(conn, h1.MaxHead), 4<<10)
	res, err := h1.ReadResponse(r, http.MethodConnect, nil)
	for range maxInterim {
		if err != nil || res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols {
			break
		}
		res, err = h1.ReadResponse(r, http.MethodConnect, nil)
	}
	if err == nil && res.StatusCode < 200 {
		err = h1.ProtocolError(fmt.Sprintf("the response to CONNECT has the status %d", res.StatusCode))
	}
	if err != nil {
		return nil, asAnswerError(err, r)
	}
	if res.StatusCode/100 != 2 {
		return nil, refusedConnect(res.StatusCode, res.Header)
	}
	if n := r.Buffered(); n > 0 {
		early, _ := r.Peek(n)
		return &prefixConn{Conn: conn, prefix: early}, nil
	}
	return conn, nil
}

// refusedConnect returns the error for a CONNECT that the parent refused.
func refusedConnect(status int, header http.Header) *parentError {
	return &parentError{
		phase: parentAnswering, status: status, header: header,
		err: fmt.Errorf("it answered CONNECT with %d", status),
	}
}

// parentRequestKey is the context key under which the dial for a CONNECT carries a
// *parentRequest.
type parentRequestKey struct{}

// parentRequest holds what the parent is told of a CONNECT, and for whom it is.
type parentRequest struct {
	fields   http.Header
	limitKey client.Key
}

// fields returns the header of a CONNECT to the parent, and the client that it is for,
// if it is for one client only.
func (p *parent) fields(ctx context.Context) (fields http.Header, owner client.Key) {
	fields = make(http.Header)
	if request, ok := ctx.Value(parentRequestKey{}).(*parentRequest); ok {
		maps.Copy(fields, request.fields)
		owner = request.limitKey
	}
	maps.Copy(fields, p.header)
	return fields, owner
}

// prefixConn is a connection that first returns the bytes that were read ahead.
type prefixConn struct {
	net.Conn
	prefix []byte
}

func (c *prefixConn) Read(b []byte) (int, error) {
	if len(c.prefix) > 0 {
		n := copy(b, c.prefix)
		c.prefix = c.prefix[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

func (c *prefixConn) CloseWrite() error {
	if half, ok := c.Conn.(closeWriter); ok {
		return half.CloseWrite()
	}
	return c.Close()
}

// dialStreams opens a connection for tunnels over HTTP/2. If the parent does not speak
// HTTP/2, it records that in p.http1 and returns errNoHTTP2.
func (p *parent) dialStreams(connected func()) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), p.timeout)
	defer cancel()
	conn, err := p.open(ctx)
	if err != nil {
		return nil, &parentError{err: err}
	}
	connected()
	secure, err := handshakeWith(ctx, conn, p.secure, "h2", "http/1.1")
	if err != nil {
		return nil, &parentError{phase: parentHandshaking, err: err}
	}
	if secure.ConnectionState().NegotiatedProtocol != "h2" {
		p.http1.Store(true)
		_ = secure.Close()
		return nil, errNoHTTP2
	}
	return secure, nil
}

// connectStream opens a tunnel on an HTTP/2 stream. If the connection has died or the
// parent is closing it, connectStream tries another one, which is safe because nothing
// has been sent through the tunnel yet.
func (p *parent) connectStream(ctx context.Context, address string) (net.Conn, error) {
	fields, owner := p.fields(ctx)
	quiet, ping := min(time.Second, p.timeout/6), min(2*time.Second, p.timeout/3)
	for attempt := 1; ; attempt++ {
		s, err := p.streams.open(ctx, owner, address, fields)
		if err != nil {
			return nil, err
		}
		err = s.await(ctx, quiet, ping)
		if err == nil && s.status/100 != 2 {
			_ = s.Abort()
			return nil, refusedConnect(s.status, s.header)
		}
		if err == nil {
			return s, nil
		}
		retry := errors.Is(err, errUnprocessed) || errors.Is(err, errSilence) || isClosed(err) && s.id > 1
		if !retry || attempt == muxDials || ctx.Err() != nil {
			return nil, asAnswerError(err, nil)
		}
	}
}

// close closes idle connections to the parent, and others once they are idle.
func (p *parent) close() {
	if p.streams != nil {
		p.streams.close()
	}
}
