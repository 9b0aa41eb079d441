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
)

func init() { caddy.RegisterModule(ListenerWrapper{}) }

// ListenerWrapper lets the async_proxy of a server serve its clients' connections
// itself, below the HTTP server of Go and Caddy's, which takes about 0.7 of the CPU.
// What it does not serve so it leaves to them: TLS, HTTP/2, requests with content,
// and all of a server where something else takes part in connections or requests,
// such as another listener wrapper, an access log, metrics, or a handler before the
// proxy.
//
// On all servers where no other wrapper takes part, with TLS or without, it answers
// and logs clients that speak another protocol than the port's, and in clear also
// requests that Go's HTTP server refuses before any handler sees them.
//
// A Caddyfile has it wherever it helps, unless there are global options for the
// server.
type ListenerWrapper struct {
	ctx    caddy.Context
	server *caddyhttp.Server
	alone  bool // among the wrappers of the server
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
	addUnclaimed(w.server) // here, since the routes are provisioned after this
	w.alone = !slices.ContainsFunc(w.server.ListenerWrappersRaw, func(raw json.RawMessage) bool {
		var other struct{ Wrapper string }
		return json.Unmarshal(raw, &other) != nil || other.Wrapper != "async_proxy" && other.Wrapper != "tls"
	})
	return nil
}

// UnmarshalCaddyfile implements caddyfile.Unmarshaler. There are no options.
func (w *ListenerWrapper) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // its name
	if d.NextArg() {
		return d.ArgErr()
	}
	if d.NextBlock(0) {
		return d.Errf("the listener wrapper async_proxy has no options")
	}
	return nil
}

// WrapListener implements caddy.ListenerWrapper. It is called when all handlers
// are there, and before anything is accepted.
func (w *ListenerWrapper) WrapListener(ln net.Listener) net.Listener {
	switch ln.(type) {
	case *clientListener, *readListener:
		return ln // there is one wrapper for each site of the server
	}
	app, err := w.ctx.AppIfConfigured("http")
	if err != nil {
		return ln
	}
	h, _ := ownerOf(app.(*caddyhttp.App), w.server)
	if h != nil {
		h.wraps = w.alone
	}
	if overTLS := usesTLS(app.(*caddyhttp.App), w.server, ln); !w.alone {
		return ln
	} else if h == nil || overTLS {
		return watchFirstBytes(ln, firstProxy(w.server.Routes), overTLS)
	}
	l := newClientListener(ln, h, w.server)
	l.register()
	go l.accept()
	return l
}

// usesTLS reports whether Caddy has clients of a listener speak TLS: whatever comes
// in clear there is not to be served, wherever among the wrappers TLS is.
func usesTLS(app *caddyhttp.App, server *caddyhttp.Server, ln net.Listener) bool {
	tcp, ok := ln.Addr().(*net.TCPAddr)
	return len(server.TLSConnPolicies) > 0 && (!ok || tcp.Port != cmp.Or(app.HTTPPort, caddyhttp.DefaultHTTPPort))
}

// ownerOf returns the handler that alone has a part in the proxy requests to a
// server, or what else has.
func ownerOf(app *caddyhttp.App, server *caddyhttp.Server) (h *Handler, why string) {
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

// firstHandler returns the handler that gets all requests, and before any other.
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

// clientListener serves the connections that it accepts, and lets net/http's
// server accept those that are for it.
type clientListener struct {
	net.Listener
	address string
	handler *Handler
	config  <-chan struct{} // the handler's
	site    *caddyhttp.Server
	conns   clientConns

	others  chan net.Conn // for net/http
	close   sync.Once
	closing chan struct{} // closed by Close
	ended   chan struct{} // closed when there will be no others
}

func newClientListener(ln net.Listener, h *Handler, site *caddyhttp.Server) *clientListener {
	l := &clientListener{
		Listener: ln, address: ln.Addr().String(), handler: h, site: site,
		conns:  clientConns{conns: make(map[*clientConn]struct{})},
		others: make(chan net.Conn), closing: make(chan struct{}), ended: make(chan struct{}),
	}
	if h != nil {
		l.config = h.config
	}
	return l
}

// clientListeners are those that accept, by address. At a reload there are two for
// one, of which the later one stays, or the earlier one, if the new config fails.
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
	rest := slices.DeleteFunc(clientListeners.at[l.address], func(other *clientListener) bool { return other == l })
	if clientListeners.at[l.address] = rest; len(rest) == 0 {
		delete(clientListeners.at, l.address)
	}
}

// successor returns who accepts at the address after l has ended; nil: nobody.
func (l *clientListener) successor() *clientListener {
	clientListeners.Lock()
	defer clientListeners.Unlock()
	if all := clientListeners.at[l.address]; len(all) > 0 && all[len(all)-1] != l {
		return all[len(all)-1]
	}
	return nil
}

// replaced reports whether l's config has ended and another one has begun. Caddy
// says so a moment before it closes l: a request that comes then is for the new config.
func (l *clientListener) replaced() bool {
	select {
	case <-l.config:
		return l.successor() != nil
	default:
		return false
	}
}

// Accept implements net.Listener. After Close it still returns the connections
// that had come before.
func (l *clientListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.others:
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
	defer l.end()
	for pause := time.Duration(0); ; {
		conn, err := l.Listener.Accept()
		if err == nil {
			pause = 0
			l.take(conn, true)
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		// As net/http does, where it is descriptors that are missing.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		select {
		case <-l.closing:
			return
		case <-time.After(pause):
			l.handler.logger.Error("a connection could not be accepted", zap.Error(err))
		}
	}
}

// take serves a connection if it can be.
func (l *clientListener) take(conn net.Conn, isNew bool) {
	var read *readConn
	switch conn := conn.(type) {
	case *readConn:
		read = conn
	case *net.TCPConn:
		read = &readConn{TCPConn: conn}
	default:
		l.handOn(conn)
		return
	}
	if c := newClientConn(l, read, isNew); l.conns.add(c) {
		go c.run()
	} else if successor := l.successor(); successor != nil {
		successor.take(read, isNew)
	} else {
		l.handOn(conn)
	}
}

// handOn gives a connection to net/http.
func (l *clientListener) handOn(conn net.Conn) {
	select {
	case l.others <- conn:
	case <-l.ended:
		releaseClient(socketOf(conn))
		_ = conn.Close()
	}
}

// end has connections served elsewhere from now on, and waits until net/http has
// got those that it is to serve. That is soon, unless nobody is there to accept
// them.
func (l *clientListener) end() {
	l.unregister()
	l.conns.shutdown(caddy.Exiting())
	decided := make(chan struct{})
	go func() {
		l.conns.undecided.Wait()
		close(decided)
	}()
	select {
	case <-decided:
	case <-time.After(lastWords):
	}
	close(l.ended)
}

// Interface guards
var (
	_ caddy.Provisioner     = (*ListenerWrapper)(nil)
	_ caddyfile.Unmarshaler = (*ListenerWrapper)(nil)
	_ caddy.ListenerWrapper = (*ListenerWrapper)(nil)
)
