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
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

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
	r.Admit(t.Owner, t.LimitKey, tunnel.Limits{})
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
				if tun.EndReason() != reason {
					t.Errorf("reason %q, want %q", tun.EndReason(), reason)
				}
			})
		})
	}
}

// A stream that the client has reset is freed although the target goes on sending and the
// connection stays open: no deadline's timer keeps it alive.
func TestResetStreamsLeaveNoMemory(t *testing.T) {
	const each = 200
	var handlers sync.WaitGroup
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer handlers.Done()
		control := http.NewResponseController(w)
		writer := &caddyhttp.IdleTimeoutWriter{
			ResponseWriterWrapper: &caddyhttp.ResponseWriterWrapper{ResponseWriter: w}, Ctrl: control,
			Deadline: caddyhttp.IdleDeadline{Timeout: time.Minute}, ClearBetweenWrites: true,
		}
		reader := &caddyhttp.IdleTimeoutReader{
			ReadCloser: r.Body, Ctrl: control,
			Deadline: caddyhttp.IdleDeadline{Timeout: time.Minute}, ClearBetweenReads: true,
		}
		r.Body = reader
		p := newStreamPeer(writer, r.WithContext(caddyhttp.ContextWithIdleTimeouts(r.Context(), reader, writer)))
		_, _ = p.Write([]byte("before the reset"))
		<-r.Context().Done()
		_, _ = p.Write([]byte("after the reset"))
		_, _ = p.Read(make([]byte, 1))
	}))
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	defer server.Close()
	c := &tunnelClient{t: t, protocol: "h2c", proxy: server.Listener.Addr().String(), shared: 10 * each}
	resetStreams := func() {
		t.Helper()
		handlers.Add(each)
		if err := concurrently(each, 8, func(int) error {
			conn, err := c.try("target.example:443", "")
			if err == nil {
				conn.Reset()
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		handlers.Wait()
	}
	resetStreams()
	resetStreams()
	before := liveHeap()
	resetStreams()
	// The timeouts last longer than this waits. What else the process has to do may take memory for a moment.
	eventually(t, "the memory of the streams to be free", func() bool { return liveHeap()-before <= each*500 })
}

// liveHeap returns the number of heap bytes in use.
func liveHeap() int64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.GC() // the second collection also frees what pools hold
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// deadlines records the deadlines that are set.
type deadlines struct {
	*httptest.ResponseRecorder
	read, write []time.Time
}

func (d *deadlines) SetReadDeadline(at time.Time) error {
	d.read = append(d.read, at)
	return nil
}

func (d *deadlines) SetWriteDeadline(at time.Time) error {
	d.write = append(d.write, at)
	return nil
}

// A stream sets no deadline per read or write. The operator's timeouts for whole requests
// apply; over HTTP/3 the stream sets them itself.
func TestStreamPeerSetsNoDeadlines(t *testing.T) {
	due := time.Now().Add(time.Hour)
	for _, row := range []struct {
		name  string
		major int
		due   time.Time
		want  int
	}{
		{"HTTP/2", 2, time.Time{}, 0},
		{"HTTP/2 with timeouts", 2, due, 0}, // net/http has its own timers
		{"HTTP/3", 3, time.Time{}, 0},
		{"HTTP/3 with timeouts", 3, due, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			set := &deadlines{ResponseRecorder: httptest.NewRecorder()}
			control := http.NewResponseController(set)
			body := &caddyhttp.IdleTimeoutReader{
				ReadCloser: io.NopCloser(strings.NewReader("up")), Ctrl: control,
				Deadline: caddyhttp.IdleDeadline{Timeout: time.Minute, HardDeadline: row.due},
			}
			w := &caddyhttp.IdleTimeoutWriter{
				ResponseWriterWrapper: &caddyhttp.ResponseWriterWrapper{ResponseWriter: set}, Ctrl: control,
				Deadline: caddyhttp.IdleDeadline{Timeout: time.Minute, HardDeadline: row.due},
			}
			r := httptest.NewRequest(http.MethodConnect, "https://target.example:443", body)
			r = r.WithContext(caddyhttp.ContextWithIdleTimeouts(r.Context(), body, w))
			r.ProtoMajor = row.major
			p := newStreamPeer(w, r)
			if _, err := p.Write([]byte("down")); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(p); err != nil || string(got) != "up" {
				t.Fatalf("read %q, %v", got, err)
			}
			if len(set.read) != row.want || len(set.write) != row.want {
				t.Errorf("deadlines for reads %v and for writes %v, want %d each", set.read, set.write, row.want)
			}
			for _, at := range append(set.read, set.write...) {
				if !at.Equal(due) {
					t.Errorf("deadline %v, want %v", at, due)
				}
			}
		})
	}
}
