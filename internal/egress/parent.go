// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

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

	"golang.org/x/net/proxy"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// Parent opens connections through a parent proxy.
//
// All methods are safe for concurrent use.
type Parent struct {
	Scheme    string
	Address   string        // host and port
	Header    http.Header   // added to requests to the parent; includes credentials
	secure    *tls.Config   // nil: no TLS
	socks     socksDialer   // nil: an HTTP proxy
	timeout   time.Duration // for opening a connection through it
	dialer    net.Dialer
	connector *Connector

	streams *muxPool    // for tunnels over HTTP/2; nil: the scheme is not https
	http1   atomic.Bool // the parent does not speak HTTP/2

	locality atomic.Pointer[parentLocality] // the cached result of isLocal
}

// socksDialer is implemented by the SOCKS5 dialer of golang.org/x/net/proxy.
type socksDialer interface {
	DialWithConn(ctx context.Context, c net.Conn, network, address string) (net.Addr, error)
}

// ParentConfig says where a parent is and how to use it.
type ParentConfig struct {
	Scheme  string        // http, https or socks5
	Address string        // host and port
	Header  http.Header   // to add to requests to the parent; not for SOCKS
	User    *url.Userinfo // nil: no credentials
	Secure  *tls.Config   // for https; nil: the defaults
	Timeout time.Duration // for opening a connection through the parent
}

// NewParent returns a parent, to which connections are made by connector.
func NewParent(c ParentConfig, connector *Connector) (*Parent, error) {
	p := &Parent{
		Scheme: c.Scheme, Address: c.Address, timeout: c.Timeout, Header: make(http.Header),
		dialer: net.Dialer{KeepAliveConfig: tcpconn.KeepAliveConfig}, connector: connector,
	}
	password := ""
	if c.User != nil {
		password, _ = c.User.Password()
	}
	if c.Scheme == "socks5" {
		var auth *proxy.Auth
		if c.User != nil {
			auth = &proxy.Auth{User: c.User.Username(), Password: password}
		}
		d, err := proxy.SOCKS5("tcp", c.Address, auth, nil)
		if err != nil {
			return nil, err
		}
		p.socks = d.(socksDialer)
		return p, nil
	}
	if c.Scheme == "https" {
		if p.secure = c.Secure; p.secure == nil {
			p.secure = new(tls.Config)
		}
		if p.secure.ServerName == "" {
			host, _, _ := hostport.Split(c.Address)
			p.secure.ServerName = strings.Trim(host, "[]")
		}
		p.streams = newMuxPool(p.dialStreams)
	}
	maps.Copy(p.Header, c.Header)
	if c.User != nil {
		p.Header.Set("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(c.User.Username()+":"+password)))
	}
	return p, nil
}

// maxParentInterim is how many interim responses the parent may send to a CONNECT.
const maxParentInterim = 100

// localityTTL is how long a result of isLocal is cached: a proxy that listens on port 443
// needs it for each CONNECT to that port.
const localityTTL = 10 * time.Second

// parentLocality is a cached result of isLocal.
type parentLocality struct {
	here bool
	at   time.Time
}

// isLocal reports whether the parent is on this machine. It may look up the parent's name.
func (p *Parent) isLocal(ctx context.Context) bool {
	if known := p.locality.Load(); known != nil && time.Since(known.at) < localityTTL {
		return known.here
	}
	host, _, _ := hostport.Split(p.Address)
	host = strings.Trim(host, "[]")
	addrs := []netip.Addr{}
	if addr, err := netip.ParseAddr(host); err == nil {
		addrs = append(addrs, addr)
	} else if addrs, err = p.connector.resolver.lookup(ctx, host); err != nil {
		return true // err on the side of denying
	}
	here := slices.ContainsFunc(addrs, func(addr netip.Addr) bool {
		addr = addr.Unmap()
		return addr.IsLoopback() || addr.IsUnspecified() || access.IsOwnAddress(addr)
	})
	p.locality.Store(&parentLocality{here, time.Now()})
	return here
}

// open connects to the parent. Its name, unlike a target's, may use the system's DNS
// search list.
func (p *Parent) open(ctx context.Context) (net.Conn, error) {
	t := hostport.TargetOf(p.Address)
	host, _, _ := hostport.Split(p.Address)
	return p.connector.dial(ctx, &p.dialer, strings.Trim(host, "[]"), t.Port)
}

// IsHTTP reports whether plain requests are sent to the parent as such, and not
// through a tunnel.
func (p *Parent) IsHTTP() bool { return p.socks == nil }

// Connect opens a tunnel through the parent to address, a host and a port. The parent
// resolves the name.
func (p *Parent) Connect(ctx context.Context, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	if p.streams != nil && !p.http1.Load() {
		conn, err := p.connectStream(ctx, address)
		if err == nil || !p.http1.Load() {
			return conn, err
		}
	}
	conn, err := p.Dial(ctx)
	if err != nil {
		return nil, err
	}
	// Abort the reads and writes below when ctx ends.
	stop := context.AfterFunc(ctx, func() { tcpconn.Interrupt(conn.SetDeadline) })
	var tunnel net.Conn
	if p.socks != nil {
		tunnel, err = p.connectSOCKS(ctx, conn, address)
	} else {
		tunnel, err = p.connectHTTP1(ctx, conn, address)
	}
	if !stop() && err == nil {
		err = &ParentError{Phase: ParentAnswering, socks: p.socks != nil, Err: context.Cause(ctx)}
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return tunnel, nil
}

// Dial connects to the parent itself. The policy does not apply: the operator chose its
// address.
func (p *Parent) Dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	return p.dial(ctx, func() {}, "http/1.1")
}

// dial connects to the parent. With TLS, it calls connected when that begins, and offers the
// parent the given protocols.
func (p *Parent) dial(ctx context.Context, connected func(), protocols ...string) (net.Conn, error) {
	conn, err := p.open(ctx)
	if err != nil {
		return nil, &ParentError{Err: err}
	}
	if p.secure == nil {
		return conn, nil
	}
	connected()
	secure, err := Handshake(ctx, conn, p.secure, protocols...)
	if err != nil {
		return nil, &ParentError{Phase: parentHandshaking, Err: err}
	}
	return secure, nil
}

// Handshake performs a TLS handshake on conn, and closes it if that fails.
func Handshake(ctx context.Context, conn net.Conn, config *tls.Config, protocols ...string) (*tls.Conn, error) {
	config = config.Clone()
	config.NextProtos = protocols
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return secure, nil
}

func (p *Parent) connectSOCKS(ctx context.Context, conn net.Conn, address string) (net.Conn, error) {
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
		return nil, &ParentError{Phase: ParentAnswering, Status: status, socks: true, Err: err}
	}
	return conn, nil
}

func (p *Parent) connectHTTP1(ctx context.Context, conn net.Conn, address string) (net.Conn, error) {
	head := []byte("CONNECT " + address + " HTTP/1.1\r\nHost: " + address + "\r\n")
	fields, _ := p.fields(ctx)
	for name, values := range fields {
		for _, value := range values {
			head = h1.AppendField(head, name, value)
		}
	}
	if _, err := conn.Write(append(head, "\r\n"...)); err != nil {
		return nil, AsAnswerError(err, nil)
	}
	r := bufio.NewReaderSize(io.LimitReader(conn, h1.MaxHead), 4<<10)
	var res http.Response
	err := h1.ReadResponse(r, http.MethodConnect, &res, new(h1.Body))
	for range maxParentInterim {
		if err != nil || res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols {
			break
		}
		err = h1.ReadResponse(r, http.MethodConnect, &res, new(h1.Body))
	}
	if err == nil && res.StatusCode < 200 {
		err = h1.ProtocolError(fmt.Sprintf("the response to CONNECT has the status %d", res.StatusCode))
	}
	if err != nil {
		return nil, AsAnswerError(err, r)
	}
	if res.StatusCode/100 != 2 {
		return nil, refusedConnect(res.StatusCode, res.Header)
	}
	if n := r.Buffered(); n > 0 {
		early, _ := r.Peek(n)
		return &tcpconn.Prefixed{Conn: conn, Prefix: early}, nil
	}
	return conn, nil
}

// refusedConnect returns the error for a CONNECT that the parent refused.
func refusedConnect(status int, header http.Header) *ParentError {
	return &ParentError{
		Phase: ParentAnswering, Status: status, Header: header,
		Err: fmt.Errorf("it answered CONNECT with %d", status),
	}
}

// ParentRequestKey is the context key under which the dial for a CONNECT carries a
// *ParentRequest.
type ParentRequestKey struct{}

// ParentRequest describes the client's CONNECT for which the parent is asked.
type ParentRequest struct {
	Fields   http.Header // to pass on to the parent
	LimitKey client.Key  // of the client
}

// fields returns the header of a CONNECT to the parent, and the key of the client that it is for.
// The key is zero if the CONNECT is not for one client only.
func (p *Parent) fields(ctx context.Context) (fields http.Header, owner client.Key) {
	fields = make(http.Header)
	if request, ok := ctx.Value(ParentRequestKey{}).(*ParentRequest); ok {
		maps.Copy(fields, request.Fields)
		owner = request.LimitKey
	}
	maps.Copy(fields, p.Header)
	return fields, owner
}

// dialStreams opens a connection for tunnels over HTTP/2. If the parent does not speak
// HTTP/2, it records that in p.http1 and returns an error.
func (p *Parent) dialStreams(connected func()) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), p.timeout)
	defer cancel()
	conn, err := p.dial(ctx, connected, "h2", "http/1.1")
	if err != nil {
		return nil, err
	}
	if conn.(*tls.Conn).ConnectionState().NegotiatedProtocol != "h2" {
		p.http1.Store(true)
		_ = conn.Close()
		return nil, errors.New("the parent does not speak HTTP/2")
	}
	return conn, nil
}

// connectStream opens a tunnel on an HTTP/2 stream. If the connection has died or the
// parent is closing it, connectStream tries another one, which is safe because nothing
// has been sent through the tunnel yet.
func (p *Parent) connectStream(ctx context.Context, address string) (net.Conn, error) {
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
		if retry := errors.Is(err, errUnprocessed) || IsStale(err, s.id > 1); !retry || attempt == muxDials || ctx.Err() != nil {
			return nil, AsAnswerError(err, nil)
		}
	}
}

// Close closes idle connections to the parent, and others once they are idle.
func (p *Parent) Close() {
	if p.streams != nil {
		p.streams.close()
	}
}
