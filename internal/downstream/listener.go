// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"context"
	"crypto/tls"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// Listeners holds the listeners of a program that accept connections, by address. During a
// reload, an address has two. The zero value is ready for use.
type Listeners struct {
	mu   sync.Mutex
	at   map[string][]*Listener // the earliest first
	open atomic.Int64           // connections, also those of replaced listeners
}

func (ls *Listeners) add(l *Listener) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.at == nil {
		ls.at = make(map[string][]*Listener)
	}
	ls.at[l.address] = append(ls.at[l.address], l)
}

func (ls *Listeners) remove(l *Listener) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	rest := slices.DeleteFunc(ls.at[l.address], func(each *Listener) bool { return each == l })
	if len(rest) > 0 {
		ls.at[l.address] = rest
	} else {
		delete(ls.at, l.address)
	}
}

// successor returns the listener at l's address that takes over, as l's server decides.
func (ls *Listeners) successor(l *Listener) *Listener {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return l.server.Successor(ls.at[l.address])
}

// All returns the listeners that accept connections.
func (ls *Listeners) All() []*Listener {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return slices.Concat(slices.Collect(maps.Values(ls.at))...)
}

// Drain waits until the last responses of all listeners have been sent, or ctx ends. The
// listeners must have been closed before.
func (ls *Listeners) Drain(ctx context.Context) {
	for ls.open.Load() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Listener serves the connections that it accepts. Its Accept method returns those
// that it hands to net/http's server.
type Listener struct {
	net.Listener
	address string
	server  *Server
	conns   clientConns

	netHTTPConns chan net.Conn // handed to net/http
	close        sync.Once
	closing      chan struct{} // closed by Close
	ended        chan struct{} // closed when no more connections are handed to net/http
}

// Listen serves the connections of ln as s says. It returns a listener for net/http, whose Accept
// returns the connections that are handed to net/http. If ln is a listener of this package already,
// Listen returns ln.
func Listen(ln net.Listener, s *Server) net.Listener {
	if isOurs(ln) {
		return ln
	}
	l := newListener(ln, s)
	s.Listeners.add(l)
	go l.accept()
	return l
}

func newListener(ln net.Listener, s *Server) *Listener {
	return &Listener{
		Listener: ln, address: ln.Addr().String(), server: s,
		conns:        clientConns{conns: make(map[*clientConn]struct{})},
		netHTTPConns: make(chan net.Conn), closing: make(chan struct{}), ended: make(chan struct{}),
	}
}

// isOurs reports whether ln is a listener of this package.
func isOurs(ln net.Listener) bool {
	switch ln.(type) {
	case *Listener, *readListener:
		return true
	}
	return false
}

// successor returns the listener that takes over l's connections after l has ended, or nil if
// there is none.
func (l *Listener) successor() *Listener {
	if next := l.server.Listeners.successor(l); next != nil && next != l && next.server.Below == l.server.Below {
		return next
	}
	return nil
}

// heir returns l's successor if l has ended already, and nil otherwise.
func (l *Listener) heir() *Listener {
	if l.conns.closed.Load() || l.replaced() {
		return l.successor()
	}
	return nil
}

// Clients returns the remote addresses of the connections that l serves.
func (l *Listener) Clients() (remotes []net.Addr) {
	l.conns.mu.Lock()
	defer l.conns.mu.Unlock()
	for c := range l.conns.conns {
		if c.state.Load() == connOpening { // RemoteAddr may wait for the client
			remotes = append(remotes, tcpconn.Of(c.Conn).RemoteAddr())
		} else {
			remotes = append(remotes, c.RemoteAddr())
		}
	}
	return remotes
}

// replaced reports whether l's config has ended and another one has begun. Caddy ends the
// config a moment before it closes l. A request that arrives in between is for the new
// config.
func (l *Listener) replaced() bool {
	select {
	case <-l.server.ConfigDone:
		return l.successor() != nil
	default:
		return false
	}
}

// Accept implements net.Listener. After Close it still returns the connections that were
// accepted before.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.netHTTPConns:
		return conn, nil
	case <-l.ended:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *Listener) Close() (err error) {
	l.close.Do(func() {
		close(l.closing)
		err = l.Listener.Close()
	})
	return err
}

// accept accepts connections until the listener is closed.
func (l *Listener) accept() {
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
			l.server.OnAcceptError(err)
		}
	}
}

// serveConn serves a connection over TCP, with TLS, the PROXY protocol or both, and hands any other to
// net/http. If l is closed, the next listener takes the connection, or net/http if there is none.
func (l *Listener) serveConn(conn net.Conn, isNew bool) {
	read, ok := conn.(*readConn)
	if !ok {
		if !isServable(conn) {
			l.handToNetHTTP(conn)
			return
		}
		read = newReadConn(conn, nil)
	}
	if c := newClientConn(l, read, isNew); l.conns.add(c) {
		if c.state.Load() == connOpening {
			go c.open()
		} else {
			go c.run()
		}
	} else if successor := l.successor(); successor != nil {
		successor.serveConn(read, isNew)
	} else {
		l.handToNetHTTP(conn)
	}
}

// isServable reports whether conn, which a listener has accepted, is of a kind that is served here.
func isServable(conn net.Conn) bool {
	switch conn := conn.(type) {
	case *net.TCPConn:
		return true
	case *tls.Conn:
		return tcpconn.Of(conn) != nil
	case proxyProtocolConn:
		_, ok := conn.TCPConn()
		return ok
	}
	return false
}

// handToNetHTTP hands a connection to net/http.
func (l *Listener) handToNetHTTP(conn net.Conn) {
	if read, ok := conn.(*readConn); ok {
		read.back.listener = l
		if over, ok := read.Conn.(*tls.Conn); ok {
			conn = &tlsReadConn{read, over}
		}
	}
	select {
	case l.netHTTPConns <- conn:
	case <-l.ended:
		l.server.OnEnd(conn)
		_ = conn.Close()
	}
}

// stopServing stops serving: connections move to the next listener or to net/http. It waits, for
// up to firstRequestTimeout, until each new connection has sent its first request and so can be
// handed to net/http.
func (l *Listener) stopServing() {
	l.server.Listeners.remove(l)
	l.conns.shutdown(l.server.Exiting())
	decided := make(chan struct{})
	go func() {
		l.conns.pristine.Wait()
		close(decided)
	}()
	select {
	case <-decided:
	case <-time.After(firstRequestTimeout):
	}
	close(l.ended)
}

// firstRequestTimeout is how long a listener that was closed waits for the first requests of its
// new connections.
const firstRequestTimeout = 5 * time.Second
