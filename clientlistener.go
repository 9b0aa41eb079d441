// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"encoding/json"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

func init() { caddy.RegisterModule(ListenerWrapper{}) }

// ListenerWrapper lets a server's async_proxy serve client connections itself, below Go's
// and Caddy's HTTP servers, with about 30 % less CPU. It hands everything else to those:
// TLS, HTTP/2, requests with content, and all connections of a server where something else
// takes part in connections or requests, such as another listener wrapper, an access log,
// metrics, or a handler before the proxy.
//
// If no other wrapper takes part, it also refuses and logs clients that do not speak the
// port's protocol, with TLS or without. Without TLS it does the same for requests that Go's
// HTTP server refuses before any handler sees them.
//
// The Caddyfile adapter adds it wherever it helps, unless the server has global options.
type ListenerWrapper struct {
	ctx         caddy.Context
	server      *caddyhttp.Server
	onlyWrapper bool // there is no other wrapper but tls
}

// CaddyModule returns the Caddy module information.
func (ListenerWrapper) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "caddy.listeners.async_proxy",
		New: func() caddy.Module { return new(ListenerWrapper) },
	}
}

// Provision implements caddy.Provisioner.
func (w *ListenerWrapper) Provision(ctx caddy.Context) error {
	w.ctx = ctx
	w.server, _ = ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server)
	if w.server == nil {
		return errors.New("async_proxy is a listener wrapper for HTTP servers")
	}
	addUnclaimed(w.server) // here, because the routes are provisioned later
	w.onlyWrapper = !slices.ContainsFunc(w.server.ListenerWrappersRaw, func(raw json.RawMessage) bool {
		var other struct{ Wrapper string }
		return json.Unmarshal(raw, &other) != nil || other.Wrapper != "async_proxy" && other.Wrapper != "tls"
	})
	return nil
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler. There are no options.
func (w *ListenerWrapper) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the wrapper's name
	if d.NextArg() {
		return d.ArgErr()
	}
	if d.NextBlock(0) {
		return d.Errf("the listener wrapper async_proxy has no options")
	}
	return nil
}

// WrapListener implements caddy.ListenerWrapper. Caddy calls it when all handlers are
// provisioned, and before it accepts connections.
func (w *ListenerWrapper) WrapListener(ln net.Listener) net.Listener {
	switch ln.(type) {
	case *clientListener, *readListener:
		return ln // the Caddyfile adapter adds one wrapper for each site of the server
	}
	app, err := w.ctx.AppIfConfigured("http")
	if err != nil {
		return ln
	}
	h, _ := fastPathHandler(app.(*caddyhttp.App), w.server)
	if h != nil {
		h.fastPath = w.onlyWrapper
	}
	if overTLS := usesTLS(app.(*caddyhttp.App), w.server, ln); !w.onlyWrapper {
		return ln
	} else if h == nil || overTLS {
		return watchFirstBytes(ln, firstProxy(w.server.Routes), overTLS)
	}
	l := newClientListener(ln, h, w.server)
	l.register()
	go l.accept()
	return l
}

// usesTLS reports whether Caddy expects TLS from the clients of a listener. Connections in
// clear must not be served there, whichever place TLS has among the wrappers.
func usesTLS(app *caddyhttp.App, server *caddyhttp.Server, ln net.Listener) bool {
	tcp, ok := ln.Addr().(*net.TCPAddr)
	return len(server.TLSConnPolicies) > 0 && (!ok || tcp.Port != cmp.Or(app.HTTPPort, caddyhttp.DefaultHTTPPort))
}

// fastPathHandler returns the handler if the fast path can serve the server's proxy requests, which
// is when no other part of Caddy takes part in them. Otherwise why names that part.
func fastPathHandler(app *caddyhttp.App, server *caddyhttp.Server) (h *Handler, why string) {
	lacksHTTP1 := func(protocols []string) bool { return protocols != nil && !slices.Contains(protocols, "h1") }
	switch {
	case server.Logs != nil:
		return nil, "access log"
	case app.Metrics != nil:
		return nil, "metrics"
	case server.Errors != nil:
		return nil, "error routes"
	case server.ReadTimeout > 0 || server.WriteTimeout > 0:
		return nil, "timeouts for whole requests"
	case server.ReadMinRate != 0 || server.WriteMinRate != 0:
		return nil, "minimum rates"
	case len(server.ExpectedUnderscoreHeaders) > 0 || len(server.ExpectedDotHeaders) > 0:
		return nil, "expected headers"
	case lacksHTTP1(server.Protocols) || slices.ContainsFunc(server.ListenProtocols, lacksHTTP1):
		return nil, "protocols"
	}
	if h, ok := firstHandler(server.Routes).(*Handler); ok {
		return h, ""
	}
	return nil, "another handler or a matcher before async_proxy"
}

// firstHandler returns the handler that gets every request before any other handler.
func firstHandler(routes caddyhttp.RouteList) caddyhttp.MiddlewareHandler {
	if len(routes) == 0 || len(routes[0].MatcherSets) > 0 || len(routes[0].Handlers) == 0 {
		return nil
	}
	first := routes[0].Handlers[0]
	if sub, ok := first.(*caddyhttp.Subroute); ok {
		if sub.Errors != nil {
			return nil
		}
		return firstHandler(sub.Routes)
	}
	return first
}

// clientListener serves the connections that it accepts. Its Accept method returns those
// that it hands to net/http's server.
type clientListener struct {
	net.Listener
	address string
	handler *Handler
	config  <-chan struct{} // closed when the handler's config has ended
	site    *caddyhttp.Server
	conns   clientConns

	netHTTPConns chan net.Conn // handed to net/http
	close        sync.Once
	closing      chan struct{} // closed by Close
	ended        chan struct{} // closed when no more connections are handed to net/http
}

func newClientListener(ln net.Listener, h *Handler, site *caddyhttp.Server) *clientListener {
	l := &clientListener{
		Listener: ln, address: ln.Addr().String(), handler: h, site: site,
		conns:        clientConns{conns: make(map[*clientConn]struct{})},
		netHTTPConns: make(chan net.Conn), closing: make(chan struct{}), ended: make(chan struct{}),
	}
	if h != nil {
		l.config = h.configDone
	}
	return l
}

// clientListeners holds the accepting listeners by address. During a reload, an address has
// two. The later one stays, or the earlier one if the new config fails.
var clientListeners = struct {
	sync.Mutex
	at map[string][]*clientListener
}{at: make(map[string][]*clientListener)}

func (l *clientListener) register() {
	clientListeners.Lock()
	defer clientListeners.Unlock()
	clientListeners.at[l.address] = append(clientListeners.at[l.address], l)
}

func (l *clientListener) unregister() {
	clientListeners.Lock()
	defer clientListeners.Unlock()
	rest := slices.DeleteFunc(clientListeners.at[l.address], func(each *clientListener) bool { return each == l })
	if clientListeners.at[l.address] = rest; len(rest) == 0 {
		delete(clientListeners.at, l.address)
	}
}

// successor returns the listener that accepts at the address after l has ended, or nil if
// there is none.
func (l *clientListener) successor() *clientListener {
	clientListeners.Lock()
	defer clientListeners.Unlock()
	if all := clientListeners.at[l.address]; len(all) > 0 && all[len(all)-1] != l {
		return all[len(all)-1]
	}
	return nil
}

// replaced reports whether l's config has ended and another one has begun. Caddy ends the
// config a moment before it closes l. A request that arrives in between is for the new
// config.
func (l *clientListener) replaced() bool {
	select {
	case <-l.config:
		return l.successor() != nil
	default:
		return false
	}
}

// Accept implements net.Listener. After Close it still returns the connections that were
// accepted before.
func (l *clientListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.netHTTPConns:
		return conn, nil
	case <-l.ended:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *clientListener) Close() (err error) {
	l.close.Do(func() {
		close(l.closing)
		err = l.Listener.Close()
	})
	return err
}

// accept accepts connections until the listener is closed.
func (l *clientListener) accept() {
	defer l.stopServing()
	for pause := time.Duration(0); ; {
		conn, err := l.Listener.Accept()
		if err == nil {
			pause = 0
			l.serveConn(conn, true)
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		// Back off as net/http does. The usual cause is a lack of file descriptors.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		select {
		case <-l.closing:
			return
		case <-time.After(pause):
			l.handler.logger.Error("a connection could not be accepted", zap.Error(err))
		}
	}
}

// serveConn serves a TCP connection, and hands any other to net/http. If l is closed, the next
// listener takes the connection, or net/http if there is none.
func (l *clientListener) serveConn(conn net.Conn, isNew bool) {
	var read *readConn
	switch conn := conn.(type) {
	case *readConn:
		read = conn
	case *net.TCPConn:
		read = newReadConn(conn, nil)
	default:
		l.handToNetHTTP(conn)
		return
	}
	if c := newClientConn(l, read, isNew); l.conns.add(c) {
		go c.run()
	} else if successor := l.successor(); successor != nil {
		successor.serveConn(read, isNew)
	} else {
		l.handToNetHTTP(conn)
	}
}

// handToNetHTTP hands a connection to net/http.
func (l *clientListener) handToNetHTTP(conn net.Conn) {
	select {
	case l.netHTTPConns <- conn:
	case <-l.ended:
		releaseClient(socketOf(conn))
		_ = conn.Close()
	}
}

// stopServing stops serving: connections move to the next listener or to net/http. It waits, for up
// to tunnel.DrainTimeout, until each new connection has sent its first request and so can be handed to
// net/http.
func (l *clientListener) stopServing() {
	l.unregister()
	l.conns.shutdown(caddy.Exiting())
	decided := make(chan struct{})
	go func() {
		l.conns.pristine.Wait()
		close(decided)
	}()
	select {
	case <-decided:
	case <-time.After(tunnel.DrainTimeout):
	}
	close(l.ended)
}

// Interface guards
var (
	_ caddy.Provisioner     = (*ListenerWrapper)(nil)
	_ caddyfile.Unmarshaler = (*ListenerWrapper)(nil)
	_ caddy.ListenerWrapper = (*ListenerWrapper)(nil)
)
