// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// lengthGuard rejects responses from an HTTP/2 origin that have a malformed Content-Length
// (RFC 9113 §8.1.1). golang.org/x/net/http2 silently drops such a field. So the guard reads
// the frames first, and replaces such a response with a reset of its stream. It leaves all
// other errors in frames to golang.org/x/net/http2.
type lengthGuard struct {
	*observedConn
	frames  *http2.Framer
	decoder *hpack.Decoder
	unread  bytes.Buffer // bytes of frames that have been checked but not returned by Read
	lengths []string     // Content-Length values of the field block that is being decoded
	off     bool         // a frame was malformed, so everything after it passes unchecked
}

// maxFrame is the maximum frame size that origins are offered, the smallest that HTTP/2
// allows.
const maxFrame = 16 << 10

func newLengthGuard(conn *observedConn) *lengthGuard {
	g := &lengthGuard{observedConn: conn}
	g.frames = http2.NewFramer(io.Discard, io.TeeReader(conn, &g.unread))
	g.frames.SetReuseFrames()
	g.frames.SetMaxReadFrameSize(maxFrame)
	g.decoder = hpack.NewDecoder(4<<10, func(f hpack.HeaderField) {
		if f.Name == "content-length" {
			g.lengths = append(g.lengths, f.Value)
		}
	})
	g.decoder.SetMaxStringLength(h1.MaxHead)
	return g
}

// Read implements net.Conn.
func (g *lengthGuard) Read(p []byte) (int, error) {
	for g.unread.Len() == 0 {
		if g.off {
			return g.observedConn.Read(p)
		}
		if err := g.readFrame(); err != nil && g.unread.Len() == 0 {
			return 0, err
		}
	}
	return g.unread.Read(p)
}

// readFrame reads one frame, or all frames of one field block.
func (g *lengthGuard) readFrame() error {
	frame, err := g.frames.ReadFrame()
	if headers, ok := frame.(*http2.HeadersFrame); ok {
		return g.readFields(headers)
	}
	var stream http2.StreamError
	if err != nil && !errors.As(err, &stream) {
		g.off = true
	}
	return err
}

func (g *lengthGuard) readFields(headers *http2.HeadersFrame) error {
	stream, block, ends := headers.StreamID, headers.HeaderBlockFragment(), headers.HeadersEnded()
	g.lengths = g.lengths[:0]
	for {
		_, err := g.decoder.Write(block)
		if err == nil && ends {
			err = g.decoder.Close()
		}
		if err != nil || g.unread.Len() > 2*h1.MaxHead {
			g.off = true
			return nil
		}
		if ends {
			break
		}
		frame, err := g.frames.ReadFrame()
		next, ok := frame.(*http2.ContinuationFrame)
		if !ok {
			g.off = true
			return err
		}
		block, ends = next.HeaderBlockFragment(), next.HeadersEnded()
	}
	if _, err := h1.ContentLength(g.lengths); err != nil {
		g.reset(stream)
	}
	return nil
}

// reset replaces the field block that was read with a reset of its stream. The block itself
// is readdressed to a stream that does not exist. There its fields are ignored, but they
// still update the decoder's table, which all later blocks depend on.
func (g *lengthGuard) reset(stream uint32) {
	block := bytes.Clone(g.unread.Bytes())
	g.unread.Reset()
	_ = http2.NewFramer(&g.unread, nil).WriteRSTStream(stream, http2.ErrCodeProtocol)
	for rest := block; len(rest) > 0; { // frames: length (24 bits), type, flags, stream (32 bits), payload
		binary.BigEndian.PutUint32(rest[5:], noStream)
		rest = rest[9+(binary.BigEndian.Uint32(rest)>>8):]
	}
	_, _ = g.unread.Write(block)
}

// noStream is a stream number that no connection ever reaches.
const noStream = 1<<31 - 1

// Interface guard
var _ io.Reader = (*lengthGuard)(nil)
