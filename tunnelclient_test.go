// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

//lint:file-ignore SA1019 the client of x/net speaks HTTP/2 and nothing else, as a test of HTTP/2 wants

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// tunnelProtocols are the protocols over which a client can request a tunnel: HTTP/1 plain
// and over TLS, HTTP/2 over TLS and plain, HTTP/3.
var tunnelProtocols = []string{"h1", "h1-tls", "h2", "h2c", "h3"}

// tunnelPatience bounds a tunnel's lifetime in the tests.
const tunnelPatience = time.Minute

// tunnelConn is the client's end of a tunnel. Read returns io.EOF when the proxy closes the
// tunnel in order, another error when it resets it.
type tunnelConn interface {
	io.Reader
	io.Writer
	CloseWrite() error // half-closes
	Reset()            // resets the tunnel
	Close() error      // closes the tunnel, for a client that is done with both directions
}

// tunnelClient opens tunnels through a proxy over one protocol.
type tunnelClient struct {
	t        testing.TB
	protocol string
	proxy    string     // host:port
	preface  string     // sent first on a connection of HTTP/1
	login    string     // Proxy-Authorization, if not empty
	header   string     // additional field lines of a CONNECT over HTTP/1, each with its \r\n
	local    netip.Addr // the client's address, if valid
	shared   int        // how many tunnels share a connection of HTTP/2 or 3; 0: each has its own

	mu   sync.Mutex
	used int               // tunnels opened on the connection below
	tcp  *net.TCPConn      // socket of h2
	h2   *http2.ClientConn // or nil
	h3   *http3.ClientConn // or nil
}

// open opens a tunnel to target. The end of the test closes it.
func (c *tunnelClient) open(target string) tunnelConn {
	c.t.Helper()
	return c.openEarly(target, "")
}

// openEarly is open with data that is sent without waiting for the response.
func (c *tunnelClient) openEarly(target, early string) tunnelConn {
	c.t.Helper()
	conn, err := c.try(target, early)
	if err != nil {
		c.t.Fatalf("CONNECT %s over %s: %v", target, c.protocol, err)
	}
	c.t.Cleanup(func() { conn.Close() })
	return conn
}

// halfCloses reports whether the client can keep sending after the target has half-closed.
func (c *tunnelClient) halfCloses() bool {
	return c.protocol == "h1" || c.protocol == "h1-tls"
}

// breakConnection resets the connection of a multiplexed protocol, with all its tunnels.
func (c *tunnelClient) breakConnection() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.h2 != nil {
		c.tcp.SetLinger(0)
		c.tcp.Close()
	}
	if c.h3 != nil {
		c.h3.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeInternalError), "")
	}
}

// refusedError is a response to CONNECT other than 200.
type refusedError struct {
	status      int
	body        string
	proxyStatus string
	challenge   string // Proxy-Authenticate
}

func (e *refusedError) Error() string { return fmt.Sprintf("status %d: %s", e.status, e.body) }

func newRefusedError(res *http.Response) error {
	body, err := io.ReadAll(res.Body)
	return errors.Join(&refusedError{res.StatusCode, string(body), res.Header.Get("Proxy-Status"), res.Header.Get("Proxy-Authenticate")}, err)
}

// refused opens a tunnel that must be refused and returns the response.
func (c *tunnelClient) refused(target string) *refusedError {
	c.t.Helper()
	conn, err := c.try(target, "")
	if err == nil {
		conn.Close()
		c.t.Fatalf("CONNECT %s over %s is accepted", target, c.protocol)
	}
	var refused *refusedError
	if !errors.As(err, &refused) {
		c.t.Fatalf("CONNECT %s over %s: %v", target, c.protocol, err)
	}
	return refused
}

// try opens a tunnel. If the proxy has responded otherwise, the error is a refusedError.
func (c *tunnelClient) try(target, early string) (tunnelConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), tunnelPatience)
	var conn tunnelConn
	var err error
	switch c.protocol {
	case "h1", "h1-tls":
		conn, err = c.tryH1(ctx, target, early)
	case "h2", "h2c":
		if conn, err = c.tryH2(ctx, cancel, target, early); err == nil {
			return conn, nil // keep ctx alive: canceling it would end the tunnel
		}
	case "h3":
		conn, err = c.tryH3(ctx, target, early)
	default:
		err = fmt.Errorf("unknown protocol %q", c.protocol)
	}
	cancel()
	return conn, err
}

// dial opens a TCP connection to the proxy and, if alpn is given, TLS on it.
func (c *tunnelClient) dial(ctx context.Context, alpn string) (tcp *net.TCPConn, conn net.Conn, err error) {
	dialer := net.Dialer{}
	if c.local.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.local, 0))
	}
	if conn, err = dialer.DialContext(ctx, "tcp4", c.proxy); err != nil {
		return nil, nil, err
	}
	tcp = conn.(*net.TCPConn)
	deadline, _ := ctx.Deadline()
	tcp.SetDeadline(deadline)
	if _, err = io.WriteString(tcp, c.preface); err == nil && alpn != "" {
		over := tls.Client(tcp, clientTLS(alpn))
		conn, err = over, over.HandshakeContext(ctx)
	}
	if err != nil {
		tcp.Close()
	}
	return tcp, conn, err
}

func clientTLS(alpn string) *tls.Config {
	return &tls.Config{ServerName: "localhost", InsecureSkipVerify: true, NextProtos: []string{alpn}}
}

func (c *tunnelClient) tryH1(ctx context.Context, target, early string) (tunnelConn, error) {
	alpn := map[string]string{"h1-tls": "http/1.1"}[c.protocol]
	tcp, conn, err := c.dial(ctx, alpn)
	if err != nil {
		return nil, err
	}
	tunnel := newH1Tunnel(conn, tcp)
	header := c.header
	if c.login != "" {
		header += "Proxy-Authorization: " + c.login + "\r\n"
	}
	res, err := tunnel.connect(target, header, early)
	if err == nil && res.StatusCode != http.StatusOK {
		err = newRefusedError(res)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return tunnel, nil
}

// h1Tunnel is a connection of its own.
type h1Tunnel struct {
	net.Conn
	tcp *net.TCPConn
	r   *bufio.Reader
}

func newH1Tunnel(conn net.Conn, tcp *net.TCPConn) *h1Tunnel {
	return &h1Tunnel{conn, tcp, bufio.NewReaderSize(conn, 512)}
}

func (t *h1Tunnel) connect(target, header, early string) (*http.Response, error) {
	if _, err := fmt.Fprintf(t.Conn, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n%s\r\n%s", target, header, early); err != nil {
		return nil, err
	}
	return http.ReadResponse(t.r, &http.Request{Method: http.MethodConnect})
}

func (t *h1Tunnel) Read(b []byte) (int, error) { return t.r.Read(b) }
func (t *h1Tunnel) CloseWrite() error          { return t.Conn.(tcpconn.HalfCloser).CloseWrite() }

func (t *h1Tunnel) Reset() {
	t.tcp.SetLinger(0)
	t.tcp.Close()
}

func (c *tunnelClient) tryH2(ctx context.Context, cancel func(), target, early string) (tunnelConn, error) {
	conn, err := c.h2Conn(ctx)
	if err != nil {
		return nil, err
	}
	body, up := io.Pipe()
	sent := make(chan struct{}) // closed when early is written, before anything else is
	go func() {
		defer close(sent)
		if early != "" {
			_, _ = io.WriteString(up, early)
		}
	}()
	// The request body has no length and so is a stream.
	req, err := http.NewRequestWithContext(ctx, http.MethodConnect, "https://"+target, body)
	if err != nil {
		return nil, err
	}
	if c.login != "" {
		req.Header.Set("Proxy-Authorization", c.login)
	}
	res, err := conn.RoundTrip(req)
	if err == nil && res.StatusCode != http.StatusOK {
		err = newRefusedError(res)
	}
	if err != nil {
		up.Close()
		return nil, err
	}
	<-sent
	return &h2Tunnel{res.Body, up, cancel}, nil
}

// h2Conn returns a connection with room for one more tunnel.
func (c *tunnelClient) h2Conn(ctx context.Context) (*http2.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.h2 != nil && c.used < c.shared {
		c.used++
		return c.h2, nil
	}
	alpn := map[string]string{"h2": "h2"}[c.protocol]
	tcp, conn, err := c.dial(ctx, alpn)
	if err != nil {
		return nil, err
	}
	c.tcp = tcp
	c.t.Cleanup(func() { conn.Close() })
	if c.h2, err = newH2Conn(conn); err != nil {
		return nil, err
	}
	c.used = 1
	return c.h2, nil
}

func newH2Conn(conn net.Conn) (*http2.ClientConn, error) {
	return (&http2.Transport{AllowHTTP: true}).NewClientConn(conn)
}

// h2Tunnel is a stream of an HTTP/2 connection.
type h2Tunnel struct {
	io.ReadCloser         // the response body
	*io.PipeWriter        // the request body
	cancel         func() // resets the stream
}

func (t *h2Tunnel) CloseWrite() error { return t.PipeWriter.Close() }

func (t *h2Tunnel) Reset() {
	t.CloseWithError(context.Canceled)
	t.cancel()
}

func (t *h2Tunnel) Close() error {
	t.Reset()
	return t.ReadCloser.Close()
}

func (c *tunnelClient) tryH3(ctx context.Context, target, early string) (tunnelConn, error) {
	conn, err := c.h3Conn(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := conn.OpenRequestStream(ctx)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	stream.SetDeadline(deadline)
	tunnel := &h3Tunnel{stream}
	res, err := tunnel.connect(target, c.login, early)
	if err == nil && res.StatusCode != http.StatusOK {
		err = newRefusedError(res)
	}
	if err != nil {
		tunnel.Reset()
		return nil, err
	}
	return tunnel, nil
}

// h3Conn returns a connection with room for one more tunnel.
func (c *tunnelClient) h3Conn(ctx context.Context) (*http3.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.h3 != nil && c.used < c.shared {
		c.used++
		return c.h3, nil
	}
	to, err := net.ResolveUDPAddr("udp4", c.proxy)
	if err != nil {
		return nil, err
	}
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: c.local.AsSlice()})
	if err != nil {
		return nil, err
	}
	c.t.Cleanup(func() { socket.Close() })
	conn, err := quic.Dial(ctx, socket, to, clientTLS(http3.NextProtoH3), nil)
	if err != nil {
		return nil, err
	}
	c.t.Cleanup(func() { conn.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeNoError), "") })
	c.h3, c.used = (&http3.Transport{}).NewClientConn(conn), 1
	return c.h3, nil
}

// h3Tunnel is a stream of an HTTP/3 connection.
type h3Tunnel struct{ *http3.RequestStream }

func (t *h3Tunnel) connect(target, login, early string) (*http.Response, error) {
	req := &http.Request{Method: http.MethodConnect, Host: target, URL: &url.URL{Host: target}, Header: http.Header{}}
	if login != "" {
		req.Header.Set("Proxy-Authorization", login)
	}
	if err := t.SendRequestHeader(req); err != nil {
		return nil, err
	}
	if early != "" {
		if _, err := io.WriteString(t, early); err != nil {
			return nil, err
		}
	}
	return t.ReadResponse()
}

func (t *h3Tunnel) CloseWrite() error { return t.RequestStream.Close() }

func (t *h3Tunnel) Reset() {
	t.CancelWrite(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
	t.CancelRead(quic.StreamErrorCode(http3.ErrCodeRequestCanceled))
}

func (t *h3Tunnel) Close() error {
	t.Reset()
	return nil
}

// tunnelWorld is a Caddy in this process with a plain and a TLS proxy site.
type tunnelWorld struct {
	*world
	plain, tls string // addresses of its proxies
}

// tunnelSetup holds the parts of a Caddyfile in which tunnelWorlds differ.
type tunnelSetup struct {
	admin     string // address of the admin endpoint; "off" if empty
	level     string // of the log; "DEBUG" if empty
	global    string // global options
	servers   string // of the option servers; the listener wrapper if empty
	site      string // directives of both sites
	options   string // of async_proxy
	protocols string // "h1 h2 h2c h3" if empty
}

func newTunnelWorld(t *testing.T, setup tunnelSetup) *tunnelWorld {
	t.Helper()
	w := emptyTunnelWorld(t)
	loadCaddyfile(t, w.caddyfile(setup))
	w.ready(t)
	return w
}

// emptyTunnelWorld returns a world with addresses but no running Caddy.
func emptyTunnelWorld(t *testing.T) *tunnelWorld {
	t.Helper()
	w := &tunnelWorld{world: &world{t: t, proxy: freeAddress(t), logs: filepath.Join(t.TempDir(), "caddy.log")}}
	w.plain, w.tls = w.proxy, freeAddress(t)
	return w
}

// caddyfile sets no grace period, so that only the tunnels' own settings limit their
// lifetime.
func (w *tunnelWorld) caddyfile(setup tunnelSetup) string {
	servers := cmp.Or(setup.servers, withWrapper)
	admin, level, protocols := cmp.Or(setup.admin, "off"), cmp.Or(setup.level, "DEBUG"), cmp.Or(setup.protocols, "h1 h2 h2c h3")
	// A certificate that Caddy obtains itself while it starts is a data race in its TLS app: an
	// event copies the app before it has started. So the site brings one, and auto_https is off.
	certificate, key := conntest.CertificateFiles(w.t)
	_, plain, _ := net.SplitHostPort(w.plain)
	_, secure, _ := net.SplitHostPort(w.tls)
	proxy := fmt.Sprintf(`%s
async_proxy {
	burst 1000000
	refill 1000000
	%s
}
`, setup.site, setup.options)
	return fmt.Sprintf(`{
	admin %s
	persist_config off
	skip_install_trust
	default_bind 127.0.0.1
	storage file_system %s
	https_port %s
	auto_https off
	log {
		output file %s
		format json
		level %s
	}
	servers {
		protocols %s
		%s
	}
	%s
}
http://:%s {
	%s
}
:%[3]s, localhost:%[3]s {
	tls %[11]s %[12]s
	%[10]s
}
`, admin, filepath.Dir(w.logs), secure, w.logs, level, protocols, servers, setup.global, plain, proxy, certificate, key)
}

// reload replaces the running config until the end of the world's test.
func (w *tunnelWorld) reload(t *testing.T, setup tunnelSetup) {
	t.Helper()
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(w.caddyfile(setup)), nil)
	if err != nil {
		t.Fatal(err)
	}
	reloadAndWait(t, func() {
		if err := caddy.Load(config, true); err != nil {
			t.Fatal(err)
		}
	})
}

// ready waits until Caddy has a certificate.
func (w *tunnelWorld) ready(t *testing.T) {
	t.Helper()
	eventually(t, "a certificate", func() bool {
		conn, err := tls.Dial("tcp4", w.tls, clientTLS("http/1.1"))
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// address returns the address of the proxy for a protocol.
func (w *tunnelWorld) address(protocol string) string {
	if protocol == "h1" || protocol == "h2c" {
		return w.plain
	}
	return w.tls
}

// client returns a client of the world's proxy. It hides world.client, which is for plain
// requests.
func (w *tunnelWorld) client(t testing.TB, protocol string) *tunnelClient {
	return &tunnelClient{t: t, protocol: protocol, proxy: w.address(protocol)}
}
