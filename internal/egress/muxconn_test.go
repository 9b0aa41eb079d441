// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// muxParent is the parent's end of a muxConn, frame by frame.
type muxParent struct {
	t      *testing.T
	conn   net.Conn
	mu     sync.Mutex
	framer *http2.Framer // only the test writes
	seen   []string      // frames received, except DATA
	data   map[uint32][]byte
	deaf   atomic.Bool // does not answer pings
	answer string      // the status of the response to each CONNECT; "": no response
}

// newMuxParent returns the parent's end of a connection, and the client's.
func newMuxParent(t *testing.T, settings ...http2.Setting) (*muxParent, net.Conn) {
	near, far := net.Pipe()
	p := &muxParent{t: t, conn: far, framer: http2.NewFramer(far, far), data: make(map[uint32][]byte), answer: "200"}
	p.framer.ReadMetaHeaders = hpack.NewDecoder(4<<10, nil)
	t.Cleanup(func() { far.Close() })
	go func() {
		if _, err := io.CopyN(io.Discard, far, int64(len(http2.ClientPreface))); err != nil {
			return
		}
		p.writeFrames(func(f *http2.Framer) { _ = f.WriteSettings(settings...) })
		for {
			frame, err := p.framer.ReadFrame()
			if err != nil {
				return
			}
			p.take(frame)
		}
	}()
	return p, near
}

func (p *muxParent) take(frame http2.Frame) {
	id, text := frame.Header().StreamID, ""
	switch f := frame.(type) {
	case *http2.DataFrame:
		p.mu.Lock()
		p.data[id] = append(p.data[id], f.Data()...)
		p.mu.Unlock()
		if f.StreamEnded() {
			text = fmt.Sprintf("END %d", id)
		}
	case *http2.MetaHeadersFrame:
		if text = fmt.Sprintf("HEADERS %d", id); p.answer != "" {
			p.writeHead(id, false, ":status", p.answer)
		}
	case *http2.PingFrame:
		if text = "PING"; !f.IsAck() && !p.deaf.Load() {
			p.writeFrames(func(w *http2.Framer) { _ = w.WritePing(true, f.Data) })
		}
	case *http2.RSTStreamFrame:
		text = fmt.Sprintf("RST_STREAM %d %v", id, f.ErrCode)
	case *http2.GoAwayFrame:
		text = fmt.Sprintf("GOAWAY %v", f.ErrCode)
	case *http2.WindowUpdateFrame:
		text = fmt.Sprintf("WINDOW_UPDATE %d %d", id, f.Increment)
	case *http2.SettingsFrame:
		return
	}
	p.mu.Lock()
	p.seen = append(p.seen, text)
	p.mu.Unlock()
}

// writeFrames runs f to write frames.
func (p *muxParent) writeFrames(f func(*http2.Framer)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(p.framer)
}

// writeHead sends HEADERS with the given fields, names and values in turn.
func (p *muxParent) writeHead(id uint32, end bool, fields ...string) {
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for i := 0; i < len(fields); i += 2 {
		_ = encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	p.writeFrames(func(f *http2.Framer) {
		_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: end})
	})
}

// received reports whether a frame was received.
func (p *muxParent) received(frame string) bool {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Contains(p.seen, frame)
}

func (p *muxParent) got(id uint32) string {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return string(p.data[id])
}

var muxClient = client.Address(netip.MustParseAddr("192.0.2.1"))

// muxStream opens the next stream of a connection and waits for its response.
func muxStream(t *testing.T, c *muxConn) *streamConn {
	t.Helper()
	s := c.open(muxClient, len(c.streams) == 0, "target.example:443", nil)
	if s == nil {
		t.Fatal("the connection accepts no stream")
	}
	if err := s.await(t.Context(), time.Second, time.Second); err != nil {
		t.Fatal(err)
	}
	return s
}

// runMux runs a test with a connection to a parent, in its own synctest bubble.
func runMux(t *testing.T, settings []http2.Setting, f func(t *testing.T, c *muxConn, p *muxParent)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p, near := newMuxParent(t, settings...)
		c := newMuxConn(near, new(atomic.Int64), func(*muxConn) {})
		synctest.Wait()
		f(t, c, p)
		c.end(errMuxIdle, nil)
		synctest.Wait()
	})
}

// TestMuxTunnel checks both directions, half-closes, and how streams end.
func TestMuxTunnel(t *testing.T) {
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		s := muxStream(t, c)
		payload := strings.Repeat("0123456789abcdef", 4<<10)[:50_000]
		if n, err := io.WriteString(s, payload); n != len(payload) || err != nil {
			t.Fatal(n, err)
		}
		_ = s.CloseWrite()
		if got := p.got(1); got != payload || !p.received("END 1") {
			t.Errorf("the parent got %d bytes", len(got))
		}
		if _, err := s.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("writing after the end: %v", err)
		}
		go func() {
			for part := range slices.Chunk([]byte(payload), 7000) {
				p.writeFrames(func(f *http2.Framer) { _ = f.WriteDataPadded(1, false, part, make([]byte, 9)) })
			}
			p.writeFrames(func(f *http2.Framer) { _ = f.WriteData(1, true, []byte("last")) })
		}()
		if got, err := io.ReadAll(s); string(got) != payload+"last" || err != nil {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		_ = s.Close()
		if len(c.streams) > 0 || p.received("RST_STREAM 1 CANCEL") {
			t.Error("a stream closed on both sides still exists or was reset")
		}
		p.writeFrames(func(f *http2.Framer) { _ = f.WriteWindowUpdate(0, uint32(len(payload))) })
		for _, end := range []func(*streamConn) error{(*streamConn).Close, (*streamConn).Abort} {
			s := muxStream(t, c)
			reading := make(chan error, 1)
			go func() {
				_, err := s.Read(make([]byte, 1))
				reading <- err
			}()
			synctest.Wait()
			_ = end(s)
			_ = end(s)
			if err := <-reading; !errors.Is(err, net.ErrClosed) {
				t.Errorf("a blocked read: %v", err)
			}
			if !p.received(fmt.Sprintf("RST_STREAM %d CANCEL", s.id)) || len(c.streams) > 0 {
				t.Error("the stream was not reset")
			}
		}
		if !p.received("END 3") || p.received("END 5") {
			t.Errorf("an orderly end looks like a reset: %q", p.seen)
		}
	})
}

// TestMuxFields checks that the parent gets the intended fields and none that other
// handlers added.
func TestMuxFields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe()
		defer far.Close()
		c := newMuxConn(near, new(atomic.Int64), func(*muxConn) {})
		defer c.end(errMuxIdle, nil)
		c.open(muxClient, true, "target.example:443", http.Header{
			"Proxy-Authorization": {"Basic x"}, "Via": {"a", "b"}, "Connection": {"X"}, "Host": {"h"}, "Bad Name": {"x"}, "X": {"a\nb"}, "Long": {strings.Repeat("y", 40_000)},
		})
		_, _ = io.CopyN(io.Discard, far, int64(len(http2.ClientPreface)))
		f := http2.NewFramer(far, far)
		f.ReadMetaHeaders = hpack.NewDecoder(4<<10, nil)
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if head, ok := frame.(*http2.MetaHeadersFrame); ok {
				var got []string
				for _, field := range head.Fields {
					got = append(got, fmt.Sprintf("%s=%.7s", field.Name, field.Value))
				}
				slices.Sort(got)
				want := []string{":authority=target.", ":method=CONNECT", "long=yyyyyyy", "proxy-authorization=Basic x", "via=a", "via=b"}
				if !slices.Equal(got, want) || head.StreamEnded() {
					t.Errorf("the parent got %q, want %q", got, want)
				}
				return
			}
		}
	})
}

// TestMuxWindowShares checks that a tunnel whose target does not read leaves the others their
// share of the connection's window, that no tunnel joins such a connection, and that a
// reset restores the window.
func TestMuxWindowShares(t *testing.T) {
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) { // a parent with windows of 64 KiB for stream and connection
		stuck, other := muxStream(t, c), muxStream(t, c)
		written := make(chan error, 1)
		go func() {
			_, err := stuck.Write(make([]byte, 1<<20))
			written <- err
		}()
		if n := len(p.got(1)); n < muxInitial/2 || n > muxInitial*7/8 {
			t.Errorf("the stuck tunnel sent %d bytes", n)
		}
		if _, err := other.Write([]byte("hello")); err != nil || p.got(3) != "hello" {
			t.Errorf("the other tunnel: %q, %v", p.got(3), err)
		}
		if s := c.open(muxClient, false, "a:1", nil); s == nil {
			t.Error("no tunnel can join right after another has filled its window")
		} else {
			_ = s.Abort()
		}
		time.Sleep(muxBlockedAfter)
		if s := c.open(muxClient, false, "a:1", nil); s != nil {
			t.Error("a tunnel joins a connection on which another has been blocked for a second")
		}
		_ = stuck.Abort()
		if err := <-written; !errors.Is(err, net.ErrClosed) {
			t.Errorf("a blocked write: %v", err)
		}
		p.writeFrames(func(f *http2.Framer) { _ = f.WriteWindowUpdate(0, uint32(len(p.data[1]))) })
		if !p.received("RST_STREAM 1 CANCEL") || c.open(muxClient, false, "a:1", nil) == nil {
			t.Error("the connection accepts no tunnel after the reset")
		}
	})
}

// TestMuxSingleTunnel checks that a single tunnel may use the whole window, and that no other
// tunnel can then join.
func TestMuxSingleTunnel(t *testing.T) {
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		s := muxStream(t, c)
		go s.Write(make([]byte, muxInitial)) // none of it blocks
		if n := len(p.got(1)); n != muxInitial {
			t.Errorf("it sent %d bytes", n)
		}
		if c.open(muxClient, false, "a:1", nil) != nil {
			t.Error("a tunnel joins a connection without a window")
		}
	})
}

// TestMuxSocketStuck checks that a parent that reads nothing blocks writes and nothing
// else.
func TestMuxSocketStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe() // nothing reads from far
		defer far.Close()
		c := newMuxConn(near, new(atomic.Int64), func(*muxConn) {})
		s := c.open(muxClient, true, "a:1", nil)
		c.mu.Lock()
		c.window, s.window, s.maxWindow = 1<<30, 1<<30, 1<<30
		c.mu.Unlock()
		written := make(chan error, 1)
		go func() {
			_, err := s.Write(make([]byte, 1<<20))
			written <- err
		}()
		time.Sleep(2 * muxBlockedAfter)
		c.mu.Lock()
		pending := len(c.out)
		c.mu.Unlock()
		if pending > 2*muxPending || c.open(muxClient, false, "a:1", nil) != nil {
			t.Errorf("%d bytes are pending, or a tunnel joins", pending)
		}
		_ = s.SetWriteDeadline(time.Now().Add(time.Second))
		if err := <-written; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a write with a deadline: %v", err)
		}
		c.end(errMuxIdle, nil)
		synctest.Wait()
	})
}

// TestMuxReceiveWindow checks that unread data for a client is bounded, and credited when
// its tunnel ends.
func TestMuxReceiveWindow(t *testing.T) {
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		s, other := muxStream(t, c), muxStream(t, c)
		for range muxWindow / muxFrame {
			p.writeFrames(func(f *http2.Framer) { _ = f.WriteData(1, false, make([]byte, muxFrame)) })
		}
		p.writeFrames(func(f *http2.Framer) { _ = f.WriteData(3, false, []byte("hello")) })
		buf := make([]byte, muxWindow)
		if n, err := other.Read(buf); n != 5 || err != nil {
			t.Errorf("the other tunnel reads %d bytes, %v", n, err)
		}
		if _, err := s.Read(buf[:muxWindow/16-1]); err != nil || strings.Contains(strings.Join(p.seen, " "), "WINDOW_UPDATE 1 ") {
			t.Errorf("%v, or the first bytes were credited", err)
		}
		if n, err := s.Read(buf[:muxWindow/4-muxWindow/16+1]); n != muxWindow/4-muxWindow/16+1 || err != nil || !p.received("WINDOW_UPDATE 1 65536") {
			t.Errorf("%d bytes, %v, and no credit", n, err)
		}
		// To exceed the window is the parent's error.
		for range muxWindow/muxFrame/4 + 1 {
			p.writeFrames(func(f *http2.Framer) { _ = f.WriteData(1, false, make([]byte, muxFrame)) })
		}
		if !p.received("RST_STREAM 1 FLOW_CONTROL_ERROR") {
			t.Error("data beyond the window is accepted")
		}
		if n, err := io.ReadFull(s, buf); n != muxWindow || err != nil {
			t.Errorf("the data before: %d bytes, %v", n, err)
		}
		if _, err := s.Read(buf); err == nil || err == io.EOF {
			t.Errorf("after that: %v", err)
		}
	})
}

// TestMuxWindowGrows checks that the window of a client that keeps up grows, within the
// limits of the connection and the process, and that the growth is given back afterwards.
func TestMuxWindowGrows(t *testing.T) {
	for _, tc := range []struct{ room, want int64 }{{muxGrowth, muxMaxWindow}, {0, muxWindow}, {muxWindow, 2 * muxWindow}} {
		runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
			c.growth.Store(tc.room)
			s := muxStream(t, c)
			granted := int64(0)
			for range 4 * muxMaxWindow / muxFrame {
				p.writeFrames(func(f *http2.Framer) { _ = f.WriteData(1, false, make([]byte, muxFrame)) })
				if _, err := io.ReadFull(s, make([]byte, muxFrame)); err != nil {
					t.Fatal(err)
				}
				if c.mu.Lock(); s.room > granted {
					granted = s.room
				}
				c.mu.Unlock()
			}
			if granted != tc.want || c.growth.Load() != tc.room-tc.want+muxWindow {
				t.Errorf("with room for %d the window grew to %d, want %d; %d left", tc.room, granted, tc.want, c.growth.Load())
			}
			_ = s.Abort()
			if c.growth.Load() != tc.room || c.grown != 0 {
				t.Errorf("%d of %d given back, %d left on the connection", c.growth.Load(), tc.room, c.grown)
			}
		})
	}
	// One connection may use only part of the process's room.
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		c.growth.Store(muxGrowth)
		var sum int64
		for range muxStreams {
			s := muxStream(t, c)
			c.mu.Lock()
			for range 10 {
				c.growLocked(s)
			}
			sum += s.size - muxWindow
			c.mu.Unlock()
		}
		if sum != muxConnGrowth {
			t.Errorf("the windows grew by %d", sum)
		}
	})
}

// TestMuxConnectionWindow checks that the connection's window is refilled whatever the
// streams do.
func TestMuxConnectionWindow(t *testing.T) {
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		for range 8 {
			s := muxStream(t, c)
			for range muxWindow / muxFrame {
				p.writeFrames(func(f *http2.Framer) { _ = f.WriteData(s.id, false, make([]byte, muxFrame)) })
			}
			_ = s.Abort()
			p.writeFrames(func(f *http2.Framer) { _ = f.WriteData(s.id, false, make([]byte, muxFrame)) }) // already in flight
		}
		if !p.received(fmt.Sprintf("WINDOW_UPDATE 0 %d", muxConnWindow/16)) {
			t.Errorf("no credit for the connection: %q", p.seen)
		}
	})
}

// TestMuxDeadlines checks that deadlines end blocked reads and can be lifted.
func TestMuxDeadlines(t *testing.T) {
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		s := muxStream(t, c)
		start := time.Now()
		_ = s.SetReadDeadline(start.Add(time.Hour))
		_ = s.SetReadDeadline(start.Add(time.Minute))
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		_ = s.SetDeadline(time.Time{})
		p.writeFrames(func(f *http2.Framer) { _ = f.WriteData(1, false, []byte("a")) })
		if n, err := s.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		tcpconn.Interrupt(s.SetDeadline)
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
	})
}

// TestMuxIdle checks that a connection closes after the idle timeout and not before.
func TestMuxIdle(t *testing.T) {
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		s := muxStream(t, c)
		time.Sleep(2 * muxIdleTime)
		if c.err != nil {
			t.Fatalf("with a tunnel: %v", c.err)
		}
		_ = s.Close()
		time.Sleep(muxIdleTime - muxTick)
		if p.received("GOAWAY NO_ERROR") {
			t.Error("it closes too early")
		}
		time.Sleep(2 * muxTick)
		if !p.received("GOAWAY NO_ERROR") {
			t.Error("it does not close")
		}
	})
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		s := muxStream(t, c)
		c.close()
		if p.received("GOAWAY NO_ERROR") || c.open(muxClient, false, "a:1", nil) != nil {
			t.Error("it closes under a tunnel, or accepts another")
		}
		_ = s.Close()
		if !p.received("GOAWAY NO_ERROR") {
			t.Error("it does not close with its last tunnel")
		}
	})
}

// TestMuxSilence checks that tunnels on a dead connection end, and that silence alone ends
// none.
func TestMuxSilence(t *testing.T) {
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		s := muxStream(t, c)
		failed := make(chan error, 1)
		go func() {
			_, err := s.Read(make([]byte, 1))
			failed <- err
		}()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if len(failed) > 0 {
			t.Fatalf("a silent tunnel ended: %v", <-failed)
		}
		start := time.Now()
		p.deaf.Store(true)
		if err := <-failed; !errors.Is(err, errMuxSilent) || time.Since(start) > 45*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// TestMuxAnotherConnection checks that a CONNECT is retried on another connection, within
// the same time limit, if its first connection is dead or was being closed, or if the
// parent has not processed it.
func TestMuxAnotherConnection(t *testing.T) {
	for name, fail := range map[string]func(*muxParent, uint32){
		"silence": func(p *muxParent, id uint32) {},
		"refused": func(p *muxParent, id uint32) {
			p.writeFrames(func(f *http2.Framer) { _ = f.WriteRSTStream(id, http2.ErrCodeRefusedStream) })
		},
		"going away": func(p *muxParent, id uint32) {
			p.writeFrames(func(f *http2.Framer) { _ = f.WriteGoAway(id-2, http2.ErrCodeNo, nil) })
		},
		"closed": func(p *muxParent, id uint32) { p.conn.Close() },
	} {
		for _, timeout := range []time.Duration{10 * time.Second, 3 * time.Second} {
			synctest.Test(t, func(t *testing.T) {
				var parents []*muxParent
				up := &Parent{timeout: timeout, Header: make(http.Header)}
				up.streams = newMuxPool(func(func()) (net.Conn, error) {
					p, near := newMuxParent(t)
					parents = append(parents, p)
					return near, nil
				})
				first, err := up.Connect(t.Context(), "a.example:443")
				if err != nil {
					t.Fatal(err)
				}
				dead := parents[0]
				dead.answer = ""
				dead.deaf.Store(true)
				start := time.Now()
				go func() {
					for !dead.received("HEADERS 3") {
						time.Sleep(time.Millisecond)
					}
					fail(dead, 3)
				}()
				second, err := up.Connect(t.Context(), "b.example:443")
				if err != nil || len(parents) != 2 || second.(*streamConn).c == first.(*streamConn).c {
					t.Fatalf("%s, %v: %v after %v with %d connections", name, timeout, err, time.Since(start), len(parents))
				}
				third, err := up.Connect(t.Context(), "c.example:443")
				if err != nil || name != "refused" && third.(*streamConn).c != second.(*streamConn).c {
					t.Errorf("%s, %v: the dead connection is reused: %v", name, timeout, err)
				}
				for _, conn := range []net.Conn{first, second, third} {
					if conn != nil {
						_ = conn.Close()
					}
				}
				up.Close()
				for _, p := range parents {
					_ = p.conn.Close()
				}
				synctest.Wait()
			})
		}
	}
}

// TestMuxSlowAnswer checks that a slow response on a live connection is waited for, on that
// connection.
func TestMuxSlowAnswer(t *testing.T) {
	runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
		p.answer = ""
		s := c.open(muxClient, true, "a:1", nil)
		time.AfterFunc(9*time.Second, func() {
			p.writeHead(1, false, ":status", "103")
			p.writeHead(1, false, ":status", "200")
		})
		if err := s.await(t.Context(), time.Second, 2*time.Second); err != nil || s.status != 200 || !p.received("PING") {
			t.Errorf("%v, %d", err, s.status)
		}
		s = c.open(muxClient, false, "a:1", nil)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := s.await(ctx, time.Second, 2*time.Second); !errors.Is(err, context.DeadlineExceeded) || !p.received("RST_STREAM 3 CANCEL") || c.retired {
			t.Errorf("%v", err)
		}
	})
}

// TestMuxPool checks that each client's connections are dialed one at a time, and carry up
// to 16 tunnels of that client alone.
func TestMuxPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials, busy atomic.Int32
		pool := newMuxPool(func(func()) (net.Conn, error) {
			dials.Add(1)
			busy.Add(1)
			time.Sleep(time.Second)
			busy.Add(-1)
			_, near := newMuxParent(t)
			return near, nil
		})
		otherClient := client.Address(netip.MustParseAddr("192.0.2.2"))
		var mu sync.Mutex
		streams := make(map[client.Key][]*streamConn)
		for i := range 50 {
			key := muxClient
			if i >= 40 {
				key = otherClient
			}
			go func() {
				s, err := pool.open(t.Context(), key, "a:1", nil)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				streams[key] = append(streams[key], s)
				mu.Unlock()
			}()
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if n := dials.Load(); n != 4 || len(streams[muxClient]) != 40 || len(streams[otherClient]) != 10 {
			t.Fatalf("%d connections for %d and %d tunnels, want 4 for 40 and 10", n, len(streams[muxClient]), len(streams[otherClient]))
		}
		for _, c := range pool.conns {
			if n := len(c.streams); n > muxStreams {
				t.Errorf("%d tunnels on a connection", n)
			}
		}
		mine := streams[otherClient][0].c
		for _, s := range streams[muxClient] {
			if s.c == mine {
				t.Fatal("two clients share a connection")
			}
		}
		// An idle connection can serve another client.
		for _, s := range streams[otherClient] {
			_ = s.Close()
		}
		if s, err := pool.open(t.Context(), client.Address(netip.MustParseAddr("192.0.2.3")), "a:1", nil); err != nil || s.c != mine {
			t.Errorf("an idle connection is not reused: %v", err)
		}
		// A client that disconnects does not end the dial that others wait for.
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() {
			_, err := pool.open(ctx, otherClient, "a:1", nil)
			left <- err
		}()
		synctest.Wait()
		opened := make(chan error, 1)
		go func() {
			_, err := pool.open(t.Context(), otherClient, "a:1", nil)
			opened <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if err := <-opened; err != nil || dials.Load() != 5 {
			t.Errorf("%v, %d dials", err, dials.Load())
		}
		for _, c := range slices.Clone(pool.conns) {
			c.end(errMuxIdle, nil)
		}
		synctest.Wait()
		if len(pool.conns) > 0 {
			t.Errorf("%d closed connections are kept", len(pool.conns))
		}
		broken := newMuxPool(func(func()) (net.Conn, error) { return nil, syscall.ECONNREFUSED })
		if _, err := broken.open(t.Context(), otherClient, "a:1", nil); !errors.Is(err, syscall.ECONNREFUSED) || len(broken.dials) > 0 {
			t.Errorf("%v, %d dials", err, len(broken.dials))
		}
	})
}

// TestMuxProtocolErrors checks that a parent that breaks the protocol loses the stream or the
// connection.
func TestMuxProtocolErrors(t *testing.T) {
	frame := func(write func(*http2.Framer)) func(*muxParent) {
		return func(p *muxParent) {
			p.writeFrames(func(f *http2.Framer) {
				f.AllowIllegalWrites = true
				write(f)
			})
		}
	}
	head := func(fields ...string) func(*muxParent) {
		return func(p *muxParent) { p.writeHead(1, false, fields...) }
	}
	for name, tc := range map[string]struct {
		do   func(p *muxParent)
		want string
	}{
		"content before the head":      {frame(func(f *http2.Framer) { _ = f.WriteData(1, false, []byte("x")) }), "RST_STREAM 1 PROTOCOL_ERROR"},
		"a stream that was not opened": {frame(func(f *http2.Framer) { _ = f.WriteData(3, false, []byte("x")) }), "GOAWAY PROTOCOL_ERROR"},
		"a stream the parent opens":    {frame(func(f *http2.Framer) { _ = f.WriteWindowUpdate(2, 1) }), "GOAWAY PROTOCOL_ERROR"},
		"a push promise": {frame(func(f *http2.Framer) {
			_ = f.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true})
		}), "GOAWAY PROTOCOL_ERROR"},
		"a zero increment":                {frame(func(f *http2.Framer) { _ = f.WriteRawFrame(http2.FrameWindowUpdate, 0, 1, make([]byte, 4)) }), "RST_STREAM 1 PROTOCOL_ERROR"},
		"a window of 2^31":                {frame(func(f *http2.Framer) { _ = f.WriteWindowUpdate(0, 1<<31-1) }), "GOAWAY FLOW_CONTROL_ERROR"},
		"a window of 2^31 for the stream": {frame(func(f *http2.Framer) { _ = f.WriteWindowUpdate(1, 1<<31-1) }), "RST_STREAM 1 FLOW_CONTROL_ERROR"},
		"an invalid setting": {frame(func(f *http2.Framer) {
			_ = f.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1})
		}), "GOAWAY PROTOCOL_ERROR"},
		"a frame that is too large": {frame(func(f *http2.Framer) { _ = f.WriteData(1, false, make([]byte, muxFrame+1)) }), "GOAWAY FRAME_SIZE_ERROR"},
		"an invalid head": {frame(func(f *http2.Framer) {
			_ = f.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, []byte{0x80})
		}), "GOAWAY COMPRESSION_ERROR"},
		"a head that is too large": {head(append([]string{":status", "200"}, slices.Repeat([]string{"a", strings.Repeat("~", 1000)}, 80)...)...), "RST_STREAM 1 ENHANCE_YOUR_CALM"},
		"101":                      {head(":status", "101"), "RST_STREAM 1 PROTOCOL_ERROR"},
		"no status":                {head("a", "b"), "RST_STREAM 1 PROTOCOL_ERROR"},
		"an invalid status":        {head(":status", "2e2"), "RST_STREAM 1 PROTOCOL_ERROR"},
		"endless interim responses": {func(p *muxParent) {
			for range maxParentInterim {
				p.writeHead(1, false, ":status", "102")
			}
		}, "RST_STREAM 1 PROTOCOL_ERROR"},
	} {
		t.Run(name, func(t *testing.T) {
			runMux(t, nil, func(t *testing.T, c *muxConn, p *muxParent) {
				p.answer = ""
				s := c.open(muxClient, true, "a:1", nil)
				synctest.Wait()
				tc.do(p)
				if !p.received(tc.want) {
					t.Errorf("the parent got %q, want %s", p.seen, tc.want)
				}
				if err := s.await(t.Context(), time.Second, time.Second); err == nil {
					t.Error("the stream got a response")
				}
			})
		})
	}
}

// TestMuxFlood checks that a parent that sends pings without reading the replies is
// disconnected.
func TestMuxFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := net.Pipe() // nothing reads the output
		defer far.Close()
		c := newMuxConn(near, new(atomic.Int64), func(*muxConn) {})
		f := http2.NewFramer(far, nil)
		var err error
		for i := 0; i < 1<<20 && err == nil; i++ {
			err = f.WritePing(false, [8]byte{})
		}
		if err == nil {
			t.Error("pings are accepted without end")
		}
		if c.mu.Lock(); len(c.out) > 2*muxFlood || c.err == nil {
			t.Errorf("%d bytes are pending, %v", len(c.out), c.err)
		}
		c.mu.Unlock()
		synctest.Wait()
	})
}

func TestBlockQueue(t *testing.T) {
	var q blockQueue
	var want, got bytes.Buffer
	for i := range 300 {
		part := bytes.Repeat([]byte{byte(i)}, i*i%40_000)
		want.Write(part)
		q.put(part)
		b := make([]byte, i*7%50_000)
		got.Write(b[:q.take(b)])
	}
	for q.size > 0 {
		b := make([]byte, 999)
		got.Write(b[:q.take(b)])
	}
	if !bytes.Equal(got.Bytes(), want.Bytes()) {
		t.Errorf("%d bytes, want %d", got.Len(), want.Len())
	}
	if len(q.blocks) > 0 {
		t.Error("an empty queue has blocks")
	}
}

// FuzzMuxConn checks that whatever a parent sends, nothing panics or hangs, and memory
// stays bounded.
func FuzzMuxConn(f *testing.F) {
	frames := func(do func(*http2.Framer)) []byte {
		var b bytes.Buffer
		do(http2.NewFramer(&b, nil))
		return b.Bytes()
	}
	f.Add(frames(func(w *http2.Framer) {
		_ = w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 5})
		_ = w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x88}, EndHeaders: true})
		_ = w.WriteData(1, false, []byte("hello"))
		_ = w.WriteWindowUpdate(1, 5)
		_ = w.WritePing(false, [8]byte{})
		_ = w.WriteRSTStream(1, http2.ErrCodeNo)
		_ = w.WriteGoAway(1, http2.ErrCodeNo, nil)
	}))
	f.Add(frames(func(w *http2.Framer) { _ = w.WriteData(1, true, nil) }))
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		near, far := net.Pipe()
		ended := make(chan struct{})
		c := newMuxConn(near, new(atomic.Int64), func(*muxConn) { close(ended) })
		s := c.open(muxClient, true, "a:1", nil)
		go io.Copy(io.Discard, far)
		go s.Write([]byte("hello"))
		_, _ = far.Write(data)
		c.mu.Lock()
		if s.received.size > muxWindow || len(c.out) > 2*muxFlood || len(s.header) > muxHead/32 {
			t.Errorf("%d bytes are buffered, %d are pending", s.received.size, len(c.out))
		}
		c.mu.Unlock()
		far.Close()
		_, _ = io.Copy(io.Discard, s)
		<-s.answered
		<-ended
	})
}
