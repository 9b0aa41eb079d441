// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"bufio"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

const (
	muxStreams      = 16        // tunnels on one connection
	muxWindow       = 256 << 10 // initial receive window of a tunnel: how much it buffers for its client
	muxMaxWindow    = 4 << 20   // maximum receive window of a tunnel, which it gets if its client keeps up
	muxConnGrowth   = 16 << 20  // by how much the receive windows on a connection may grow in all
	muxFrame        = 16 << 10  // maximum payload of a frame, which all implementations accept
	muxPending      = 64 << 10  // with so many bytes queued for the socket, tunnels must wait
	muxFlood        = 1 << 20   // with so many, control frames included, the parent counts as flooding this proxy
	muxHead         = 64 << 10  // maximum size of the head of an answer
	muxConnWindow   = 16 << 20  // credited on receipt: only the windows of streams limit the parent
	muxInitial      = 65535     // the windows that a connection begins with (RFC 9113 §6.9.2)
	muxBlockedAfter = time.Second
	muxTick         = 5 * time.Second
	muxSilence      = 15 * time.Second // after this much silence, a connection with tunnels is pinged
	muxPingTimeout  = 10 * time.Second
	muxIdleTime     = 90 * time.Second // after which a connection without tunnels is closed
	muxCloseTimeout = time.Second      // for writing the last frames
)

// muxConn is an HTTP/2 connection to a parent, whose streams are tunnels.
//
// It exists because net/http's client hides flow control, which decides whether tunnels can
// block each other. Here a tunnel that shares a connection always leaves some of the
// connection's window to the others. New tunnels avoid a connection on which tunnels are
// blocked. A silent parent is pinged as soon as a tunnel waits for an answer. And an idle
// tunnel has no buffer, whereas net/http keeps up to 512 KiB for each.
//
// All methods are safe for concurrent use.
type muxConn struct {
	conn     net.Conn
	lastRead atomic.Int64  // when something was last read, since epoch
	growth   *atomic.Int64 // by how much the receive windows on all connections may still grow
	silent   chan struct{} // closed when a ping was not answered in time
	done     chan struct{} // closed when the connection has ended

	mu        sync.Mutex
	pending   sync.Cond // there are frames to write, or the connection has ended
	changed   sync.Cond // a window has grown, frames were written, or a stream has ended
	out       frameBuffer
	spare     frameBuffer   // the previous buffer of out, for reuse
	framer    *http2.Framer // writes to out
	block     frameBuffer
	encoder   *hpack.Encoder // writes to block
	writing   int64          // when the current write began, since epoch; 0: not writing
	streams   map[uint32]*streamConn
	next      uint32     // the next stream's number
	owner     client.Key // the client whose tunnels the streams are
	window    int64      // the current send window for all streams
	maxWindow int64      // the largest value of window so far
	initial   int64      // the send window of a new stream
	limit     uint32     // how many streams the parent allows
	received  int64      // bytes received but not yet credited to the parent
	grown     int64      // by how much the receive windows of the streams have grown
	probing   bool       // a ping of probe is outstanding
	pinged    int64      // when a ping of tick was sent, since epoch; 0: none is outstanding
	idle      int64      // since when there has been no stream, since epoch
	retired   bool       // accepts no more streams
	closing   bool       // ends with its last stream
	ticker    *time.Timer
	err       error // why it has ended; nil: it has not
}

// frameBuffer is an io.Writer to memory.
type frameBuffer []byte

func (b *frameBuffer) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	return len(p), nil
}

var (
	// errUnprocessed reports that the parent has not begun to process a stream (RFC 9113
	// §8.7), so that the request may be sent again.
	errUnprocessed = errors.New("the parent did not process the request")

	errMuxIdle = errors.New("the connection was idle")
)

const errMuxSilent = SilentError("the connection to the parent is dead: pings go unanswered")

// newMuxConn starts HTTP/2 on conn. The receive windows of its streams may grow by growth
// in all, which it shares with other connections. ended is called when the connection has
// ended.
func newMuxConn(conn net.Conn, growth *atomic.Int64, ended func(*muxConn)) *muxConn {
	now := monotime.Of(time.Now())
	c := &muxConn{
		conn: conn, growth: growth, silent: make(chan struct{}), done: make(chan struct{}), streams: make(map[uint32]*streamConn), next: 1,
		window: muxInitial, maxWindow: muxInitial, initial: muxInitial, limit: muxStreams, idle: now,
	}
	c.lastRead.Store(now)
	c.pending.L, c.changed.L = &c.mu, &c.mu
	c.framer = http2.NewFramer(&c.out, nil)
	c.encoder = hpack.NewEncoder(&c.block)
	c.encoder.SetMaxDynamicTableSize(0)
	c.out = append(c.out, http2.ClientPreface...)
	_ = c.framer.WriteSettings(
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: muxWindow},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: muxHead},
	)
	_ = c.framer.WriteWindowUpdate(0, muxConnWindow-muxInitial)
	c.ticker = time.AfterFunc(muxTick, c.tick)
	go c.writeLoop()
	go func() {
		c.readLoop()
		ended(c)
	}()
	return c
}

// writeLoop writes the queued frames. No other goroutine writes to the socket, so that
// neither the reader nor a tunnel blocks on it while holding the lock.
func (c *muxConn) writeLoop() {
	for {
		c.mu.Lock()
		for len(c.out) == 0 && c.err == nil {
			c.pending.Wait()
		}
		frames, ended := c.out, c.err != nil
		c.out, c.spare, c.writing = c.spare[:0], nil, monotime.Of(time.Now())
		c.mu.Unlock()
		_, err := c.conn.Write(frames)
		c.mu.Lock()
		c.writing = 0
		if cap(frames) <= 2*muxPending {
			c.spare = frames
		}
		c.changed.Broadcast()
		c.mu.Unlock()
		if err != nil || ended {
			c.end(err, nil)
			_ = c.conn.Close()
			return
		}
	}
}

// end ends the connection and all its streams. If code is not nil, it sends the parent a
// GOAWAY.
func (c *muxConn) end(err error, code *http2.ErrCode) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endLocked(err, code)
}

func (c *muxConn) endLocked(err error, code *http2.ErrCode) {
	if c.err != nil {
		return
	}
	c.err = err
	if code != nil {
		_ = c.framer.WriteGoAway(0, *code, nil)
	}
	for _, s := range c.streams {
		s.failLocked(err)
	}
	c.ticker.Stop()
	close(c.done)
	// writeLoop writes the queued frames and then closes the connection.
	_ = c.conn.SetDeadline(time.Now().Add(muxCloseTimeout))
	c.pending.Signal()
	c.changed.Broadcast()
}

// open opens a stream for owner. It returns nil if the connection cannot take it: it serves
// another client, is full or ending, or is blocked. If idle is set, the connection must
// have no streams, otherwise at least one.
func (c *muxConn) open(owner client.Key, idle bool, address string, fields http.Header) *streamConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.streams)
	if idle != (n == 0) || n > 0 && owner != c.owner || n >= muxStreams || uint32(n) >= c.limit ||
		c.err != nil || c.retired || c.closing || c.window < c.maxWindow/8 || c.blockedLocked() {
		return nil
	}
	s := newStreamConn(c, c.next)
	c.owner, c.streams[s.id] = owner, s
	if c.next += 2; c.next > 1<<30 {
		c.retired = true
	}
	c.block = c.block[:0]
	c.writeField(":method", http.MethodConnect)
	c.writeField(":authority", address)
	for name, values := range fields {
		if isConnectionField(name) {
			continue
		}
		for _, value := range values {
			if httpguts.ValidHeaderFieldName(name) && httpguts.ValidHeaderFieldValue(value) {
				c.writeField(strings.ToLower(name), value)
			}
		}
	}
	block := c.block
	_ = c.framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: s.id, BlockFragment: block[:min(len(block), muxFrame)], EndHeaders: len(block) <= muxFrame,
	})
	for len(block) > muxFrame {
		block = block[muxFrame:]
		_ = c.framer.WriteContinuation(s.id, len(block) <= muxFrame, block[:min(len(block), muxFrame)])
	}
	c.pending.Signal()
	return s
}

func (c *muxConn) writeField(name, value string) {
	_ = c.encoder.WriteField(hpack.HeaderField{Name: name, Value: value, Sensitive: strings.Contains(name, "auth")})
}

// isConnectionField reports whether a field must not be sent over HTTP/2: the
// connection-specific fields (RFC 9113 §8.2.2), and Host, which :authority replaces.
func isConnectionField(name string) bool {
	switch http.CanonicalHeaderKey(name) {
	case "Connection", "Host", "Keep-Alive", "Proxy-Connection", "Te", "Transfer-Encoding", "Upgrade":
		return true
	}
	return false
}

// blockedLocked reports whether a write has been blocked for so long that no further tunnel
// should use the connection.
func (c *muxConn) blockedLocked() bool {
	before := monotime.Of(time.Now().Add(-muxBlockedAfter))
	if c.writing != 0 && c.writing <= before {
		return true
	}
	for _, s := range c.streams {
		if s.blockedSince != 0 && s.blockedSince <= before {
			return true
		}
	}
	return false
}

// roomLocked returns how many bytes s may send now. If s is not the only stream, it leaves
// at least a third of what it has in flight in the connection's window, so that the others
// can always send.
func (c *muxConn) roomLocked(s *streamConn) int64 {
	if len(c.out) >= muxPending {
		return 0
	}
	room := min(s.window, c.window)
	if len(c.streams) > 1 {
		room = min(room, c.window-(s.maxWindow-s.window)/3)
	}
	return room
}

// growLocked makes the receive window of s up to four times as large, within the limits.
func (c *muxConn) growLocked(s *streamConn) {
	by := min(3*s.size, muxMaxWindow-s.size, muxConnGrowth-c.grown, c.growth.Load())
	if by <= 0 {
		return
	}
	c.growth.Add(-by) // concurrent calls may make it slightly negative
	c.grown += by
	s.size += by
	s.read += by // credited to the parent with the next WINDOW_UPDATE
}

// removeLocked removes a stream that has ended in both directions.
func (c *muxConn) removeLocked(s *streamConn) {
	if c.streams[s.id] != s {
		return
	}
	delete(c.streams, s.id)
	c.grown -= s.size - muxWindow
	c.growth.Add(s.size - muxWindow)
	s.size = muxWindow
	s.readBy.stop()
	s.writeBy.stop()
	c.changed.Broadcast() // the others may use more of the window
	if len(c.streams) > 0 {
		return
	}
	c.idle = monotime.Of(time.Now())
	if c.closing || c.retired {
		c.goodbyeLocked(errMuxIdle)
	}
}

// goodbyeLocked ends a connection without streams gracefully.
func (c *muxConn) goodbyeLocked(err error) {
	code := http2.ErrCodeNo
	c.endLocked(err, &code)
}

// close ends the connection as soon as it has no stream.
func (c *muxConn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing = true; len(c.streams) == 0 {
		c.goodbyeLocked(errMuxIdle)
	}
}

// tick ends a connection that has been idle for too long, and pings one that is silent.
func (c *muxConn) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	if len(c.out) == 0 && c.writing == 0 {
		c.out, c.spare = nil, nil // a quiet connection holds no buffers
	}
	now, heard := monotime.Of(time.Now()), c.lastRead.Load()
	switch {
	case len(c.streams) == 0:
		if c.pinged = 0; now-c.idle >= int64(muxIdleTime) {
			c.goodbyeLocked(errMuxIdle)
			return
		}
	case c.pinged != 0 && heard >= c.pinged:
		c.pinged = 0
	case c.pinged != 0 && now-c.pinged >= int64(muxPingTimeout):
		c.endLocked(errMuxSilent, nil)
		tcpconn.Interrupt(c.conn.SetDeadline) // do not wait to write the last frames
		return
	case c.pinged == 0 && now-heard >= int64(muxSilence):
		c.pinged = now
		c.pingLocked()
	}
	c.ticker.Reset(muxTick)
}

func (c *muxConn) pingLocked() {
	_ = c.framer.WritePing(false, [8]byte{})
	c.pending.Signal()
}

// probe pings the parent. If nothing arrives within timeout, the connection accepts no more
// streams, and silent is closed for the tunnels that wait for an answer.
func (c *muxConn) probe(timeout time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.probing || c.err != nil {
		return
	}
	c.probing = true
	c.pingLocked()
	sent := monotime.Of(time.Now())
	time.AfterFunc(timeout, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.probing = false
		select {
		case <-c.silent:
		default:
			if c.lastRead.Load() < sent {
				c.retired = true
				close(c.silent)
			}
		}
	})
}

// timestampingReader reads from the connection and records when something arrives.
type timestampingReader struct{ c *muxConn }

func (h timestampingReader) Read(b []byte) (int, error) {
	n, err := h.c.conn.Read(b)
	if n > 0 {
		h.c.lastRead.Store(monotime.Of(time.Now()))
	}
	return n, err
}

// readLoop reads frames until the connection ends.
func (c *muxConn) readLoop() {
	framer := http2.NewFramer(nil, bufio.NewReader(timestampingReader{c}))
	framer.SetMaxReadFrameSize(muxFrame)
	framer.SetReuseFrames()
	framer.ReadMetaHeaders = hpack.NewDecoder(4<<10, nil)
	framer.MaxHeaderListSize = muxHead
	for {
		frame, err := framer.ReadFrame()
		if err == nil {
			err = c.handleFrame(frame)
		}
		var streamErr http2.StreamError
		if errors.As(err, &streamErr) {
			c.mu.Lock()
			if s := c.streams[streamErr.StreamID]; s != nil {
				s.resetLocked(streamErr.Code, h1.ProtocolError("the parent violates HTTP/2: "+err.Error()))
			}
			c.mu.Unlock()
			continue
		}
		if err != nil {
			c.handleReadError(err)
			return
		}
	}
}

// handleReadError ends the connection after a read error. For a violation of HTTP/2 it tells
// the parent the error code.
func (c *muxConn) handleReadError(err error) {
	var broken http2.ConnectionError
	switch code := http2.ErrCode(0); {
	case errors.As(err, &broken):
		code = http2.ErrCode(broken)
		c.end(h1.ProtocolError("the parent violates HTTP/2: "+err.Error()), &code)
	case errors.Is(err, http2.ErrFrameTooLarge):
		code = http2.ErrCodeFrameSize
		c.end(h1.ProtocolError("the parent violates HTTP/2: "+err.Error()), &code)
	default:
		c.end(err, nil)
		tcpconn.Interrupt(c.conn.SetDeadline) // the parent reads no more either
	}
}

// handleFrame processes a frame. It returns a stream error or a connection error.
func (c *muxConn) handleFrame(frame http2.Frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	id := frame.Header().StreamID
	s := c.streams[id]
	switch frame.(type) {
	case *http2.DataFrame, *http2.MetaHeadersFrame, *http2.RSTStreamFrame, *http2.WindowUpdateFrame:
		if id >= c.next || id != 0 && id%2 == 0 { // never opened
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
	}
	var err error
	switch f := frame.(type) {
	case *http2.MetaHeadersFrame:
		if s != nil {
			err = s.handleHeadLocked(f)
		}
	case *http2.DataFrame:
		err = c.handleDataLocked(s, f)
	case *http2.RSTStreamFrame:
		if s != nil {
			s.handleResetLocked(f.ErrCode)
		}
	case *http2.WindowUpdateFrame:
		err = c.handleWindowLocked(s, f)
	case *http2.SettingsFrame:
		err = c.handleSettingsLocked(f)
	case *http2.PingFrame:
		if !f.IsAck() {
			_ = c.framer.WritePing(true, f.Data)
		}
	case *http2.GoAwayFrame:
		c.handleGoAwayLocked(f)
	case *http2.PushPromiseFrame:
		err = http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if len(c.out) > muxFlood {
		err = http2.ConnectionError(http2.ErrCodeEnhanceYourCalm)
	}
	if len(c.out) > 0 {
		c.pending.Signal()
	}
	return err
}

// handleDataLocked processes data for s, which is nil if the stream has ended meanwhile.
func (c *muxConn) handleDataLocked(s *streamConn, f *http2.DataFrame) error {
	if c.received += int64(f.Length); c.received >= muxConnWindow/16 {
		_ = c.framer.WriteWindowUpdate(0, uint32(c.received))
		c.received = 0
	}
	if s == nil {
		return nil
	}
	return s.handleDataLocked(f)
}

func (c *muxConn) handleWindowLocked(s *streamConn, f *http2.WindowUpdateFrame) error {
	const most = 1<<31 - 1
	switch {
	case f.StreamID == 0:
		if c.window += int64(f.Increment); c.window > most {
			return http2.ConnectionError(http2.ErrCodeFlowControl)
		}
		c.maxWindow = max(c.maxWindow, c.window)
	case s != nil:
		if s.window += int64(f.Increment); s.window > most {
			return http2.StreamError{StreamID: s.id, Code: http2.ErrCodeFlowControl}
		}
		s.maxWindow = max(s.maxWindow, s.window)
	}
	c.changed.Broadcast()
	return nil
}

func (c *muxConn) handleSettingsLocked(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	err := f.ForeachSetting(func(setting http2.Setting) error {
		if err := setting.Valid(); err != nil {
			return err
		}
		switch setting.ID {
		case http2.SettingInitialWindowSize:
			grown := int64(setting.Val) - c.initial
			c.initial = int64(setting.Val)
			for _, s := range c.streams {
				s.window += grown
				s.maxWindow += grown
			}
		case http2.SettingMaxConcurrentStreams:
			c.limit = setting.Val
		}
		return nil
	})
	if err != nil {
		return err
	}
	c.changed.Broadcast()
	return c.framer.WriteSettingsAck()
}

// handleGoAwayLocked fails the streams that the parent will not process. The others continue.
func (c *muxConn) handleGoAwayLocked(f *http2.GoAwayFrame) {
	c.retired = true
	for _, s := range c.streams {
		if s.id > f.LastStreamID {
			s.endSent = true // the parent need not be told of its end
			s.failLocked(errUnprocessed)
			c.removeLocked(s)
		}
	}
	if len(c.streams) == 0 && c.err == nil {
		c.goodbyeLocked(errMuxIdle)
	}
}

// streamError reports that the parent reset a stream.
type streamError struct{ code http2.ErrCode }

func (e streamError) Error() string { return "the parent reset the stream: " + e.code.String() }
func (e streamError) Unwrap() error { return syscall.ECONNRESET }
