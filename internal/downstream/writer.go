// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// Writer writes the responses on a connection byte for byte as net/http would, except for the
// order of the fields that it adds.
type Writer struct {
	client      *clientConn
	header      http.Header
	freesHeader bool // header may be given back

	head     bool // the request is HEAD
	isHTTP10 bool // the request is one of HTTP/1.0
	closes   bool // the connection ends after this response
	hijacked bool
	takeover func()     // has the connection after the handler has returned; nil: nothing
	resets   bool       // reset the connection when it ends
	lingers  bool       // close the connection in stages
	sender   netip.Addr // the client, if lingers is set

	deadline   time.Time           // current write deadline; zero: none
	stallTimer *tcpconn.StallTimer // nil: it has not been started

	onHeader   func(status int) // called before a header is written; nil: nothing
	reason     string           // reason phrase of a response with the status reasonFor; "": the registered one
	reasonFor  int
	status     int        // 0: not set yet
	length     int64      // from Content-Length; < 0: unknown
	written    int64      // bytes of content
	headerSent bool       // the header has been sent
	chunked    bool       // the content is sent in chunks
	trailer    h1.NameSet // announced trailer fields
	pending    []byte     // content held back, since it may be the whole content
	names      []string   // of the fields, sorted
	buf        []byte
	vectors    net.Buffers
	vector     [3][]byte
}

// maxPendingContent limits how much content of unknown length is held back until a flush or the
// end.
const maxPendingContent = 2 << 10

// maxKeptBuffer is the largest buffer that is kept for the next response.
const maxKeptBuffer = 16 << 10

// reset resets the writer for the response to the next request.
func (w *Writer) reset(r *http.Request) {
	w.header, w.freesHeader = h1.NewHeader(), true
	w.head, w.isHTTP10, w.closes = r.Method == http.MethodHead, r.ProtoMinor == 0, r.Close
	w.lingers, w.onHeader, w.reason = false, nil, ""
	w.status, w.length, w.written, w.headerSent, w.chunked, w.trailer = 0, -1, 0, false, false, nil
	w.pending = w.pending[:0]
}

// Header implements http.ResponseWriter. The header may be used until the handler returns.
func (w *Writer) Header() http.Header { return w.header }

// TakeHeader makes h, which nothing else may use any longer, the header of the response, with the
// fields of the header so far that h does not have.
func (w *Writer) TakeHeader(h http.Header) {
	for name, values := range w.header {
		if _, ok := h[name]; !ok {
			h[name] = values
		}
	}
	if w.freesHeader {
		h1.FreeHeader(w.header)
	}
	w.header, w.freesHeader = h, len(h) <= h1.MaxFreedHeader
}

// Hijack implements http.Hijacker.
func (w *Writer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if w.status != 0 || w.client.r == nil {
		return nil, nil, http.ErrHijacked // the response has begun, or the connection is net/http's
	}
	w.hijacked = true
	w.client.stopWatch()
	w.clearDeadline()
	w.client.readDeadline.Clear(w.client.Conn)
	return w.client.Conn, bufio.NewReadWriter(w.client.r, nil), nil
}

// SetReadDeadline implements the method that http.ResponseController calls. A time that has passed
// stops reads of the content. Other times are not supported: each read has a deadline of its own.
func (w *Writer) SetReadDeadline(t time.Time) error {
	if t.IsZero() || t.After(time.Now()) {
		return http.ErrNotSupported
	}
	if content := w.client.content; content != nil {
		content.stop()
	}
	return nil
}

// EnableFullDuplex implements the method that http.ResponseController calls. The content of a
// request can always be read while the response is written.
func (w *Writer) EnableFullDuplex() error { return nil }

// ContentRead returns how many bytes of the request's content have been read.
func (w *Writer) ContentRead() int64 {
	if w.client.content == nil {
		return 0
	}
	return w.client.content.read.Load()
}

// Takeover makes the connection's goroutine call run after the handler has returned, when nothing
// that only the request needed is left on the stack. The handler must have hijacked the connection,
// which then belongs to run.
func (w *Writer) Takeover(run func()) { w.takeover = run }

// CloseInStages makes the connection close in stages after the response, because the client may
// still be sending.
func (w *Writer) CloseInStages(client netip.Addr) { w.lingers, w.sender = true, client }

// ResetAtEnd makes the connection end with a reset, so that the client does not mistake the response
// for a complete one.
func (w *Writer) ResetAtEnd() { w.resets, w.lingers = true, false }

// Conn returns the client's connection. Nothing may be read from it or written to it.
func (w *Writer) Conn() net.Conn { return w.client.Conn }

// Status returns the status of the response; 0 if its header is not written yet.
func (w *Writer) Status() int { return w.status }

// Written returns how many bytes of content the handler has written.
func (w *Writer) Written() int64 { return w.written }

// Hijacked reports whether the handler has hijacked the connection.
func (w *Writer) Hijacked() bool { return w.hijacked }

// OnHeader sets the function that is called with the status of each interim and final response to
// the current request, before its header is written. It may be nil.
func (w *Writer) OnHeader(f func(status int)) { w.onHeader = f }

// WriterOf returns the Writer below all wrappers of w, or nil if w is net/http's.
func WriterOf(w http.ResponseWriter) *Writer {
	for {
		u, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			fast, _ := w.(*Writer)
			return fast
		}
		w = u.Unwrap()
	}
}

// SetReason sets the reason phrase of the response to the current request, which must be printable
// ASCII. If the response has another status in the end, it has the registered phrase of that status.
func (w *Writer) SetReason(status int, phrase string) { w.reasonFor, w.reason = status, phrase }

// WriteHeader implements http.ResponseWriter. An interim response is sent at once.
func (w *Writer) WriteHeader(status int) {
	if w.status != 0 || w.hijacked {
		return
	}
	if status < 100 || status > 999 {
		panic(fmt.Sprintf("invalid status %d", status))
	}
	if w.onHeader != nil {
		w.onHeader(status)
	}
	if status < 200 {
		if w.client.ctx.Err() != nil {
			return
		}
		w.freesHeader = w.freesHeader && len(w.header) <= h1.MaxFreedHeader
		delete(w.header, "Content-Length")
		delete(w.header, "Transfer-Encoding")
		w.buf = append(w.appendFields(h1.AppendStatusLine(w.buf[:0], status, "")), "\r\n"...)
		w.startDeadline()
		if _, err := w.client.Write(w.buf); err != nil {
			w.client.cancel() // or each further interim response would wait for the client again
		}
		return
	}
	w.status = status
	delete(w.header, "Transfer-Encoding")
	if values := w.header["Content-Length"]; len(values) > 0 {
		length, err := strconv.ParseUint(values[0], 10, 63)
		if err != nil {
			delete(w.header, "Content-Length")
		} else {
			w.length = int64(length)
		}
	}
	w.trailer = h1.ListedNames(w.header["Trailer"])
}

// hasContent reports whether a response with this status may have content.
func (w *Writer) hasContent() bool {
	return w.status != http.StatusNoContent && w.status != http.StatusNotModified
}

// Write implements io.Writer. It sends at most MaxWriteChunk bytes at a time, each with a deadline of
// their own.
func (w *Writer) Write(p []byte) (n int, err error) {
	for {
		part := p[n:]
		if most := w.client.server.MaxWriteChunk; most > 0 && len(part) > most {
			part = part[:most]
		}
		sent, err := w.write(part)
		if n += sent; err != nil || n == len(p) {
			return n, err
		}
	}
}

// write writes p at once.
func (w *Writer) write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	switch {
	case len(p) == 0:
		return 0, nil
	case !w.hasContent():
		return 0, http.ErrBodyNotAllowed
	}
	w.written += int64(len(p)) // counts bytes beyond Content-Length too, for finish to detect
	if w.length >= 0 && w.written > w.length {
		return 0, http.ErrContentLength
	}
	if !w.headerSent && len(w.pending)+len(p) <= maxPendingContent || w.head {
		if !w.head {
			w.pending = append(w.pending, p...)
		}
		return len(p), nil
	}
	return len(p), w.send(p, false)
}

// FlushError sends the header, and the content that is held back.
func (w *Writer) FlushError() error {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	if w.headerSent {
		return nil // no content is held back once the header is sent
	}
	return w.send(nil, false)
}

// Splice makes the kernel move the rest of the content, which has the given length, from the socket
// of src to the client's. It calls moved whenever the client's socket has accepted some. readErr is
// io.EOF if all has been moved. It is errors.ErrUnsupported if the caller must write the rest.
func (w *Writer) Splice(src tcpconn.Mover, length int64, moved func(n int64)) (readErr, writeErr error) {
	to, ok := w.client.Conn.(*net.TCPConn)
	from := src.Socket()
	if !ok || from == nil || w.head || !w.hasContent() || w.length-w.written != length {
		return errors.ErrUnsupported, nil
	}
	if err := w.FlushError(); err != nil {
		return nil, err
	}
	w.startStallTimer()
	splicer := tcpconn.NewSplicer(to, from)
	defer splicer.Close()
	drained := func(n int) {
		w.written += int64(n)
		moved(int64(n))
	}
	for {
		n, err := src.Move(splicer.Fill)
		if n > 0 {
			w.startDeadline()
			if err := splicer.Drain(drained); err != nil {
				return nil, err
			}
		}
		if err != nil {
			return err, nil
		}
	}
}

// finish completes the response and drops what was kept for it.
func (w *Writer) finish() error {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	if w.length >= 0 && w.written != w.length && w.hasContent() && !w.head {
		w.closes = true // tells the client that the response is incomplete
	}
	var err error
	if !w.headerSent || w.chunked {
		err = w.send(nil, true)
	}
	w.stallTimer.Stop()
	w.stallTimer = nil
	// Every header name is a substring of the request head. Drop them, so that an idle
	// connection does not keep the head in memory.
	if w.freesHeader {
		h1.FreeHeader(w.header)
	}
	w.header = nil
	clear(w.names[:cap(w.names)])
	return err
}

// send writes the header if it is not sent yet, the content that is held back, and p. If
// last is set, it also writes the end of the content.
func (w *Writer) send(p []byte, last bool) error {
	b := w.buf[:0]
	if !w.headerSent {
		b = w.appendHead(b, int64(len(w.pending)+len(p)), last)
		w.headerSent = true
	}
	chunkEnd := ""
	if size := len(w.pending) + len(p); w.chunked && size > 0 {
		b = append(strconv.AppendInt(b, int64(size), 16), "\r\n"...)
		chunkEnd = "\r\n"
	}
	b = append(b, w.pending...)
	w.pending = w.pending[:0]
	if len(b)+len(p) <= cap(b) || len(p) <= maxPendingContent || w.client.tls != nil && len(b)+len(p) < maxKeptBuffer {
		b, p = append(b, p...), nil
		b = append(b, chunkEnd...)
		chunkEnd = ""
	}
	if last && w.chunked {
		b = append(w.appendTrailers(append(b, "0\r\n"...)), "\r\n"...)
	}
	if w.buf = b; cap(b) > maxKeptBuffer {
		w.buf = nil
	}
	var err error
	w.startDeadline()
	if !last && w.written != w.length {
		w.startStallTimer() // there is more to come
	}
	if len(p) == 0 {
		_, err = w.client.Write(b)
	} else {
		w.vector = [...][]byte{b, p, []byte(chunkEnd)}
		w.vectors = w.vector[:]
		_, err = w.vectors.WriteTo(w.client.Conn)
		w.vector = [3][]byte{}
	}
	return err
}

// appendHead appends the status line and the fields. content is the size of the content so
// far, and if last is set, of all the content.
func (w *Writer) appendHead(b []byte, content int64, last bool) []byte {
	trailers := len(w.trailer) > 0
	for name := range w.header {
		trailers = trailers || strings.HasPrefix(name, http.TrailerPrefix)
	}
	addLength := false
	switch {
	case !w.hasContent():
		delete(w.header, "Content-Length")
		if w.status == http.StatusNotModified {
			delete(w.header, "Content-Type")
		}
	case w.length >= 0:
	case w.head: // as if its content were sent
		addLength = last && !trailers && w.written > 0 && w.written <= maxPendingContent
		content = w.written
	case last && !trailers:
		addLength = true // Content-Length is added below
	default: // HTTP/1.0 has no chunks: the end of the connection ends the content
		w.chunked = !w.isHTTP10
	}
	if connection := w.header["Connection"]; !w.closes && w.client.isShuttingDown() || len(connection) > 0 && connection[0] == "close" {
		w.closes = true
	}
	if w.closes && !w.isHTTP10 && !httpguts.HeaderValuesContainsToken(w.header["Connection"], "close") {
		w.header["Connection"] = []string{"close"}
	}
	b = w.appendFields(w.appendStatusLine(b))
	if _, ok := w.header["Date"]; !ok {
		b = append(b, "Date: "...)
		b = time.Now().UTC().AppendFormat(b, http.TimeFormat)
		b = append(b, "\r\n"...)
	}
	if addLength {
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, content, 10)
		b = append(b, "\r\n"...)
	}
	if w.chunked {
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	}
	return append(b, "\r\n"...)
}

func (w *Writer) appendStatusLine(b []byte) []byte {
	start, reason := len(b), ""
	if w.status == w.reasonFor {
		reason = w.reason
	}
	if b = h1.AppendStatusLine(b, w.status, reason); w.isHTTP10 {
		b[start+len("HTTP/1.")] = '0'
	}
	return b
}

// appendFields appends the fields, sorted by name.
func (w *Writer) appendFields(b []byte) []byte {
	w.names = w.names[:0]
	for name := range w.header {
		if !strings.HasPrefix(name, http.TrailerPrefix) {
			w.names = append(w.names, name)
		}
	}
	slices.Sort(w.names)
	for _, name := range w.names {
		b = h1.AppendValues(b, name, w.header[name])
	}
	return b
}

// appendTrailers appends the trailer fields, which follow the last chunk.
func (w *Writer) appendTrailers(b []byte) []byte {
	for name, values := range w.header {
		announced := w.trailer.Has(name)
		if after, ok := strings.CutPrefix(name, http.TrailerPrefix); ok {
			name, announced = after, true
		}
		if announced {
			b = h1.AppendValues(b, name, values)
		}
	}
	return b
}
