// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// failingListener is a listener whose Accept fails until failures is used up, and for good
// after two connections.
type failingListener struct {
	net.Listener
	failures atomic.Int64
	accepted int
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.failures.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	conn, err := l.Listener.Accept()
	if l.accepted++; l.accepted == 2 {
		l.failures.Store(1 << 40)
	}
	return conn, err
}

// A listener recovers when Accept fails for a while, without spinning.
func TestListenerAcceptErrors(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := &failingListener{Listener: inner}
	ln.failures.Store(4)
	l := unitListener(nil)
	l.Listener = ln
	start := time.Now()
	go l.accept()
	c, err := net.Dial("tcp4", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = io.WriteString(c, "POST / HTTP/1.1\r\n\r\n") // goes to net/http
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if took := time.Since(start); took < (5+10+20+40)*time.Millisecond {
		t.Errorf("4 failures were over in %v", took)
	}
	c2, err := net.Dial("tcp4", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c2.Close()
	await(t, "failures", func() bool { n := ln.failures.Load(); return n > 0 && n < 1<<40-2 })
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if conn, err := l.Accept(); err != nil { // accepted, no request yet
		t.Error(err)
	} else {
		conn.Close()
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accepting from a closed listener: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
}

// A server that has stopped accepting but was not yet told to shut down does not hold
// connections open.
func TestListenerWithoutAccept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := unitListener(nil)
		l.conns.pristine.Add(1)
		near, far := net.Pipe()
		go l.handToNetHTTP(near)
		go l.stopServing()
		start := time.Now()
		if _, err := far.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the client read %v, want the end", err)
		}
		if took := time.Since(start); took != firstRequestTimeout {
			t.Errorf("the connection was kept for %v, want %v", took, firstRequestTimeout)
		}
		l.conns.pristine.Done()
	})
}

// A connection that should go to a server that has shut down is closed.
func TestClientConnHandOffAtShutdown(t *testing.T) {
	t.Parallel()
	near, far := tcpPair(t)
	l := unitListener(nil)
	l.stopServing()
	l.handToNetHTTP(near)
	if n, err := io.Copy(io.Discard, far); n > 0 || err != nil {
		t.Errorf("%d bytes, %v, want the end", n, err)
	}
}

// A request that arrives when its config has ended is the new config's, also on a connection that
// the old listener has not yet moved.
func TestClientConnOfEndedConfig(t *testing.T) {
	t.Parallel()
	near, far := tcpPair(t)
	answer := func(name string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.Header()["X-Config"] = []string{name} }
	}
	first, second := unitListener(answer("first")), unitListener(answer("second"))
	second.server.Listeners = first.server.Listeners
	done := make(chan struct{})
	first.server.ConfigDone = done
	first.server.Listeners.add(first)
	first.serveConn(near, true)
	r := bufio.NewReader(far)
	for _, want := range []string{"first", "first", "second", "second"} {
		_, _ = io.WriteString(far, "GET http://a.example/ HTTP/1.1\r\nHost: x\r\n\r\n")
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := res.Header.Get("X-Config"); got != want {
			t.Errorf("served by the %s config, want the %s", got, want)
		}
		if done != nil && len(first.server.Listeners.All()) == 2 {
			close(done)
			done = nil
		} else if done != nil {
			first.server.Listeners.add(second) // during a reload, both accept
		}
	}
}
