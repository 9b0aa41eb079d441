// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// lengthGuard keeps responses from an HTTP/2 origin whose Content-Length is malformed from
// being passed on (RFC 9113 §8.1.1). golang.org/x/net/http2 drops such a field without a
// trace, so the guard reads frames before it does, and resets the stream of such a
// response. Whatever else is wrong with frames it leaves to golang.org/x/net/http2.
type lengthGuard struct {
	*observedConn
	frames  *http2.Framer
	decoder *hpack.Decoder
	unread  bytes.Buffer // what the frames were read from, and was not asked for yet
	lengths []string     // in the block of fields that is being decoded
	off     bool         // a frame was malformed: what follows is passed on as it is
}

// maxFrame is the size of frames that origins are offered, the least there is.
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
	g.decoder.SetMaxStringLength(maxHead)
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

// readFrame reads a frame, or all those of a block of fields.
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
		if err != nil || g.unread.Len() > 2*maxHead {
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
	if _, err := contentLength(g.lengths); err != nil {
		g.reset(stream)
	}
	return nil
}

// reset puts the reset of a stream in the place of the block of fields that was read. The
// block itself goes to a stream that there is not: its fields are ignored there, but for
// what they mean to the decoder of all blocks.
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

// noStream is a stream that no connection gets to.
const noStream = 1<<31 - 1

// Interface guard
var _ io.Reader = (*lengthGuard)(nil)
