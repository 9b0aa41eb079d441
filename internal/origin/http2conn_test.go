// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// pingedServer is an HTTP/2 server that answers nothing but pings, until it dies.
type pingedServer struct {
	dead  atomic.Bool
	pings atomic.Int64
}

func (s *pingedServer) serve(conn net.Conn) {
	if _, err := io.CopyN(io.Discard, conn, int64(len(http2.ClientPreface))); err != nil {
		return
	}
	f := http2.NewFramer(conn, conn)
	_ = f.WriteSettings()
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return
		}
		if ping, ok := frame.(*http2.PingFrame); ok && !ping.IsAck() {
			s.pings.Add(1)
			if !s.dead.Load() {
				_ = f.WritePing(true, ping.Data)
			}
		}
	}
}

// newPingedConn connects to a pingedServer inside a synctest bubble.
func newPingedConn(t *testing.T) (*http2Conn, *pingedServer) {
	near, far := net.Pipe()
	server := new(pingedServer)
	secure := tls.Server(far, &tls.Config{Certificates: []tls.Certificate{conntest.Certificate}, NextProtos: []string{"h2"}})
	go server.serve(secure)
	transport, err := newHTTP2Transport(nil, new(http.Transport))
	if err != nil {
		t.Fatal(err)
	}
	observed := &observedConn{Conn: tls.Client(near, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})}
	c, err := newHTTP2Conn(transport, observed, observed, DefaultPings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, server
}

// A request on a connection whose server has died fails after three seconds. If the server
// answers pings, the request goes on waiting, and pings become less frequent.
func TestHTTP2ConnPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, server := newPingedConn(t)
		defer c.Close()
		time.Sleep(time.Hour)
		if n := server.pings.Load(); n != 0 {
			t.Errorf("%d pings on a connection without requests", n)
		}
		ask := func(patience time.Duration) (time.Duration, error) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			r, _ := http.NewRequestWithContext(ctx, http.MethodGet, "https://origin.example/", nil)
			start := time.Now()
			stop := c.watch()
			defer stop()
			res, err := c.RoundTrip(r)
			if err == nil {
				_ = res.Body.Close()
			}
			return time.Since(start), err
		}
		for _, row := range []struct {
			patience time.Duration
			pings    int64
		}{{10 * time.Second, 1}, {50 * time.Second, 2}, {16 * time.Minute, 5}} {
			server.pings.Store(0)
			var pings atomic.Int64 // before the request is canceled, for which the transport pings too
			time.AfterFunc(row.patience-time.Millisecond, func() { pings.Store(server.pings.Load()) })
			took, err := ask(row.patience)
			if n := pings.Load(); took != row.patience || err == nil || n != row.pings {
				t.Errorf("ended after %v with %v and %d pings, want the request's own %v and %d pings", took, err, n, row.patience, row.pings)
			}
			synctest.Wait()
		}
		server.dead.Store(true)
		if took, err := ask(time.Minute); took != 3*time.Second || err == nil || !c.lost.Load() {
			t.Errorf("ended after %v with %v, want an error after 3s", took, err)
		}
		if c.CanTakeNewRequest() {
			t.Error("the dead connection accepts another request")
		}
	})
}

// Clients that give up before the detection do not prevent it.
func TestHTTP2ConnPingsBehindImpatientClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, server := newPingedConn(t)
		defer c.Close()
		time.Sleep(time.Minute)
		server.dead.Store(true)
		c.watch()()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if !c.lost.Load() {
			t.Error("the connection is still in use")
		}
	})
}
