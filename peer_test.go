// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// silentObserver is the observer of a test's tunnels.
type silentObserver struct{}

func (silentObserver) Opened(*tunnel.Tunnel) {}
func (silentObserver) Closed(*tunnel.Tunnel) {}

// newTestStream returns a stream on conn whose client sends what is written to up.
func newTestStream(w http.ResponseWriter, conn net.Conn) (stream *streamPeer, up *io.PipeWriter) {
	body, up := io.Pipe()
	r := (&http.Request{Body: body}).WithContext(withConn(context.Background(), conn))
	return newStreamPeer(w, r), up
}

// runTestTunnel starts a tunnel. The channel is closed when it ends.
func runTestTunnel(r *tunnel.Registry, idleTimeout time.Duration, near, far tunnel.End) (t *tunnel.Tunnel, done chan struct{}) {
	owner := &tunnel.Owner{IdleTimeout: idleTimeout, Observer: silentObserver{}}
	t = &tunnel.Tunnel{Owner: owner, Registry: r, Start: time.Now(), Near: near, Far: far}
	r.Admit(t.LimitKey, 0, 0)
	done = make(chan struct{})
	go func() {
		t.Run()
		close(done)
	}()
	return t, done
}

// When the target's end closes a stream, a client that had been silent counts as complete,
// but what another client was sending is cut short.
func TestStreamIsCutShort(t *testing.T) {
	for name, tc := range map[string]struct {
		says           bool
		taking, silent time.Duration // how long the target takes to read it, and the silence afterwards
		want           error
	}{
		"a client that has sent nothing":               {false, 0, 0, net.ErrClosed},
		"a client silent for a while":                  {true, 0, cutShortWindow, net.ErrClosed},
		"a client that has just sent":                  {true, 0, cutShortWindow - 1, errCutShort},
		"a client whose data the target has just read": {true, time.Minute, 0, errCutShort},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, conn := net.Pipe()
				defer near.Close()
				defer conn.Close()
				stream, up := newTestStream(httptest.NewRecorder(), near)
				if tc.says {
					go io.WriteString(up, "word")
					io.ReadFull(stream, make([]byte, 4))
				}
				time.Sleep(tc.taking)
				end := make(chan error)
				go func() {
					_, err := stream.Read(make([]byte, 4))
					end <- err
				}()
				time.Sleep(tc.silent)
				synctest.Wait()
				stream.CloseWrite()
				if err := <-end; !errors.Is(err, tc.want) {
					t.Errorf("the stream ends with %v, want %v", err, tc.want)
				}
			})
		})
	}
}

// halfPipe is a connection whose directions close separately.
type halfPipe struct {
	net.Conn          // for writing
	r        net.Conn // for reading
}

func (p halfPipe) Read(b []byte) (int, error) { return p.r.Read(b) }
func (p halfPipe) CloseWrite() error          { return p.Conn.Close() }
func (p halfPipe) Close() error               { return errors.Join(p.Conn.Close(), p.r.Close()) }

// A target that has half-closed may still read what the client of a stream sent before, but
// only for tunnel.DrainTimeout.
func TestDrainTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := tunnel.NewRegistry()
		defer r.Stop()
		near, conn := net.Pipe()
		defer near.Close()
		defer conn.Close()
		stream, up := newTestStream(httptest.NewRecorder(), near)
		toTarget, deaf := net.Pipe()
		fromTarget, target := net.Pipe()
		defer deaf.Close()
		_, done := runTestTunnel(r, 0, stream, tunnel.NewConnEnd(halfPipe{toTarget, fromTarget}))
		io.WriteString(up, "words")
		begun := time.Now()
		target.Close()
		<-done
		if took := time.Since(begun); took != tunnel.DrainTimeout {
			t.Errorf("the tunnel ended after %v, want %v", took, tunnel.DrainTimeout)
		}
	})
}

// stuckWriter is a stream's writer that blocks until the connection accepts data.
type stuckWriter struct {
	http.ResponseWriter
	conn net.Conn
}

func (w stuckWriter) Write(b []byte) (int, error) { return w.conn.Write(b) }

// A tunnel whose stream cannot end because its connection is stuck closes the connection.
func TestStuckConnectionIsClosed(t *testing.T) {
	for reason, tc := range map[string]struct {
		idle  time.Duration
		begin func(*tunnel.Registry)
		after time.Duration
	}{
		tunnel.ReasonIdle:     {time.Minute, func(*tunnel.Registry) {}, time.Minute + tunnel.AbortGrace},
		tunnel.ReasonReload:   {-1, func(r *tunnel.Registry) { r.CloseAll(tunnel.ReasonReload); r.Stop() }, tunnel.AbortGrace},
		tunnel.ReasonShutdown: {-1, func(r *tunnel.Registry) { r.CloseAll(tunnel.ReasonShutdown) }, tunnel.AbortGraceOnExit},
	} {
		t.Run(reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := tunnel.NewRegistry()
				defer r.Stop()
				near, deaf := net.Pipe()
				defer deaf.Close()
				stream, _ := newTestStream(stuckWriter{httptest.NewRecorder(), near}, near)
				far, target := net.Pipe()
				defer target.Close()
				tun, done := runTestTunnel(r, tc.idle, stream, tunnel.NewConnEnd(far))
				synctest.Wait()
				begun := time.Now()
				tc.begin(r)
				<-done
				if took := time.Since(begun); took < tc.after || took > tc.after+3*tunnel.WatchInterval {
					t.Errorf("the tunnel ended after %v, want %v", took, tc.after)
				}
				if *tun.Reason.Load() != reason {
					t.Errorf("reason %q, want %q", *tun.Reason.Load(), reason)
				}
			})
		})
	}
}
