// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package h1 reads and writes the parts of HTTP/1 messages (RFC 9112). It offers a strict
// parser of responses with their framing and chunks, and functions that write field lines. It
// knows nothing of connections, nor of which party may send which message.
package h1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// Limits for the head of a response, and separately for its trailers. The number of lines
// is limited too, because a short line takes many times its size in memory.
const (
	MaxHead   = 256 << 10
	MaxFields = 1000 // field lines, or names in a Connection or Trailer field
)

// HeadEnd is the end of a head's last line and the empty line after it.
var HeadEnd = []byte("\r\n\r\n")

// Errors for messages that exceed the limits.
var (
	ErrHeadTooLarge  = errors.New("the head or the trailers of the response are larger than 256 KiB")
	ErrTooManyFields = errors.New("the head or the trailers of the response have more than 1000 lines")
)

// ProtocolError describes what is wrong with a message from an origin.
type ProtocolError string

func (e ProtocolError) Error() string { return string(e) }

// ReadResponse reads the head of a response to a request with the given method (RFC 9112) into res,
// and sets up body. It is stricter than net/http: an endpoint may repair a message that an intermediary
// must not pass on, because others could split or read it differently.
func ReadResponse(r *bufio.Reader, method string, res *http.Response, body *Body) error {
	// Check the first bytes first: something other than HTTP may never send a line end.
	if start, err := r.Peek(len("HTTP/")); string(start) != "HTTP/"[:len(start)] {
		return ProtocolError("the response is not HTTP/1")
	} else if err == io.EOF && len(start) > 0 {
		return io.ErrUnexpectedEOF
	} else if err != nil {
		return err
	}
	head, _, err := readHead(r)
	if err != nil {
		return err
	}
	line, fields := cutLine(head)
	if strings.ContainsAny(line, "\x00\r") {
		return ProtocolError("the status line contains a NUL or a bare CR")
	}
	*res = http.Response{Close: true, Body: body}
	if err := parseStatusLine(res, line); err != nil {
		return err
	}
	if res.Header, err = parseFields(fields); err != nil {
		return err
	}
	*body = Body{R: r, Head: len(head)}
	return setFraming(res, body, method)
}

// readHead reads lines up to an empty one, and returns that separately. A line may end with \n alone. It
// returns io.EOF if the connection ends before the first byte.
func readHead(r *bufio.Reader) (lines, end string, err error) {
	if head := wholeHead(r); head != nil { // most heads arrive as a whole
		lines := string(head)
		_, _ = r.Discard(len(lines) + len("\r\n"))
		return lines, "\r\n", nil
	}
	var b strings.Builder
	for {
		line, err := r.ReadSlice('\n')
		switch {
		case b.Len()+len(line) > MaxHead:
			return "", "", ErrHeadTooLarge
		case err == io.EOF && b.Len()+len(line) > 0:
			return "", "", io.ErrUnexpectedEOF
		case err != nil && err != bufio.ErrBufferFull:
			return "", "", err
		}
		isStart := b.Len() == 0 || strings.HasSuffix(b.String(), "\n")
		if isStart && (string(line) == "\n" || string(line) == "\r\n") {
			return b.String(), string(line), nil
		}
		b.Write(line)
	}
}

// wholeHead returns the buffered lines up to an empty one. It returns nil if there is none, or if an
// earlier line may be empty.
func wholeHead(r *bufio.Reader) []byte {
	buffered, _ := r.Peek(r.Buffered())
	end := bytes.Index(buffered, []byte("\n\r\n")) + 1
	if end == 0 || buffered[0] == '\r' || buffered[0] == '\n' || bytes.Contains(buffered[:end], []byte("\n\n")) {
		return nil
	}
	return buffered[:end]
}

// cutLine returns the first of lines without its end, and the lines after it.
func cutLine(lines string) (line, rest string) {
	line, rest, _ = strings.Cut(lines, "\n")
	return strings.TrimSuffix(line, "\r"), rest
}

// parseStatusLine parses a line such as "HTTP/1.1 200 OK".
func parseStatusLine(res *http.Response, line string) error {
	version, rest, _ := strings.Cut(line, " ")
	code, _, _ := strings.Cut(rest, " ")
	switch version {
	case "HTTP/1.0":
		res.Proto, res.ProtoMajor, res.ProtoMinor = version, 1, 0
	default: // treat a later 1.x as 1.1 (RFC 9110 §2.5)
		minor, found := strings.CutPrefix(version, "HTTP/1.")
		if !found || len(minor) != 1 || minor[0] < '1' || minor[0] > '9' {
			return ProtocolError("the response is not HTTP/1")
		}
		res.Proto, res.ProtoMajor, res.ProtoMinor = "HTTP/1.1", 1, 1
	}
	n, err := strconv.ParseUint(code, 10, 16)
	if err != nil || len(code) != 3 || n < 100 {
		return ProtocolError(fmt.Sprintf("the status %.20q is not a number from 100 to 999", code))
	}
	res.StatusCode = int(n)
	return nil
}

// parseFields parses field lines with their ends.
func parseFields(lines string) (http.Header, error) {
	if strings.IndexByte(lines, 0) >= 0 || strings.Count(lines, "\r") != strings.Count(lines, "\r\n") {
		return nil, ProtocolError("a field contains a NUL or a bare CR")
	}
	n := strings.Count(lines, "\n")
	if n > MaxFields {
		return nil, ErrTooManyFields
	}
	fields := NewFields(NewHeader(), n)
	for lines != "" {
		var line, value string
		line, lines = cutLine(lines)
		key, value, found := strings.Cut(line, ":")
		key = strings.TrimRight(key, " \t") // RFC 9112 §5.1
		if !found || !httpguts.ValidHeaderFieldName(key) {
			return nil, ProtocolError(fmt.Sprintf("the field line %.60q is malformed", line))
		}
		value = strings.Trim(value, " \t")
		if isFolded(lines) {
			value, lines = unfold(value, lines)
		}
		fields.Add(textproto.CanonicalMIMEHeaderKey(key), value)
	}
	return fields.Header, nil
}

// isFolded reports whether the first of lines continues the field before it.
func isFolded(lines string) bool {
	return lines != "" && (lines[0] == ' ' || lines[0] == '\t')
}

// unfold joins a value and the lines that continue it with single spaces (RFC 9112 §5.2),
// and returns the remaining lines.
func unfold(value, lines string) (joined, left string) {
	parts := []byte(value)
	for isFolded(lines) {
		var line string
		line, lines = cutLine(lines)
		if line = strings.Trim(line, " \t"); line != "" && len(parts) > 0 {
			parts = append(parts, ' ')
		}
		parts = append(parts, line...)
	}
	return string(parts), lines
}

// setFraming determines where the body of a response ends (RFC 9112 §6.3), and whether the
// connection can be reused after it.
func setFraming(res *http.Response, body *Body, method string) error {
	options := res.Header["Connection"]
	if CountMembers(options) > MaxFields || CountMembers(res.Header["Trailer"]) > MaxFields {
		return ErrTooManyFields
	}
	res.Close = httpguts.HeaderValuesContainsToken(options, "close") ||
		res.ProtoMinor == 0 && !httpguts.HeaderValuesContainsToken(options, "keep-alive")

	if status := res.StatusCode; status < 200 || method == http.MethodConnect && status/100 == 2 {
		// These responses have no content, whatever their fields say (RFC 9112 §6.3).
		delete(res.Header, "Content-Length")
		delete(res.Header, "Transfer-Encoding")
		return nil
	}
	length, err := NormalizeContentLength(res.Header)
	if err != nil {
		return err
	}
	coding := res.Header["Transfer-Encoding"]
	if len(coding) > 0 {
		switch {
		case len(coding) > 1 || !strings.EqualFold(coding[0], "chunked") || res.ProtoMinor == 0:
			return ProtocolError(fmt.Sprintf("the response has the unsupported transfer coding %.60q", coding))
		case length >= 0:
			// Transfer-Encoding overrides Content-Length (RFC 9112 §6.3). Another
			// intermediary may have used the length and left stray bytes on the
			// connection, so it is not reused.
			delete(res.Header, "Content-Length")
			length, res.Close = -1, true
		}
	}

	body.Remaining, res.ContentLength = length, length
	switch status := res.StatusCode; {
	case method == http.MethodHead || status == http.StatusNotModified:
		body.Remaining = 0
	case status == http.StatusNoContent:
		body.Remaining, res.ContentLength = 0, 0
		delete(res.Header, "Content-Length")
	case len(coding) > 0:
		body.chunks = &ChunkReader{R: body.R}
		res.Trailer = AnnouncedTrailers(res.Header)
		body.trailers = func(lines, _ string) error {
			fields, err := parseFields(lines)
			if res.Trailer == nil {
				res.Trailer = fields
			} else {
				maps.Copy(res.Trailer, fields)
			}
			return err
		}
	case length < 0: // to the end of the connection
		res.Close = true
	}
	return nil
}

// NormalizeContentLength returns the Content-Length of h, or -1 if there is none. It merges repeated
// equal values into one.
func NormalizeContentLength(h http.Header) (int64, error) {
	values := h["Content-Length"]
	length, err := ContentLength(values)
	if len(values) > 1 || len(values) == 1 && strings.Contains(values[0], ",") {
		h["Content-Length"] = []string{strconv.FormatInt(length, 10)}
	}
	return length, err
}

// ContentLength parses the values of Content-Length. It returns -1 if there are none, and
// an error if they differ.
func ContentLength(values []string) (int64, error) {
	length := int64(-1)
	for _, value := range values {
		for part := range strings.SplitSeq(value, ",") {
			part = strings.Trim(part, " \t")
			n, err := strconv.ParseUint(part, 10, 63)
			if err != nil || part[0] == '+' || length >= 0 && int64(n) != length {
				return 0, ProtocolError(fmt.Sprintf("the response has the invalid Content-Length %.60q", values))
			}
			length = int64(n)
		}
	}
	return length, nil
}

// AnnouncedTrailers removes the Trailer field from h, and returns the names in it as keys
// without values, the form of http.Request.Trailer and http.Response.Trailer. It returns nil if
// there are none.
func AnnouncedTrailers(h http.Header) http.Header {
	names := ListedNames(h["Trailer"])
	delete(h, "Trailer")
	if len(names) == 0 {
		return nil
	}
	trailer := make(http.Header, len(names))
	for name := range names {
		trailer[name] = nil
	}
	return trailer
}

// Body is the content of a message, as its framing delimits it.
type Body struct {
	R         *bufio.Reader
	Remaining int64                         // bytes left to read; < 0: unknown
	chunks    *ChunkReader                  // nil: not chunked
	trailers  func(lines, end string) error // parses the trailers of a chunked body
	Ended     bool                          // read to its end
	Head      int                           // size of a response's head in bytes
}

// Delimit makes b the content of a request, which r reads. length is its length; < 0: it is
// chunked, and trailers parses the lines of the trailer section, with their ends, and the empty line after
// them. An error of trailers is one of reading the content.
func (b *Body) Delimit(r *bufio.Reader, length int64, trailers func(lines, end string) error) {
	*b = Body{R: r, Remaining: length}
	if length < 0 {
		b.chunks, b.trailers = &ChunkReader{R: r}, trailers
	}
}

// Read implements io.Reader. It returns io.ErrUnexpectedEOF if the connection ends before
// the body does.
func (b *Body) Read(p []byte) (n int, err error) {
	switch {
	case b.Ended || b.Remaining == 0:
		b.Ended = true
		return 0, io.EOF
	case b.chunks != nil:
		n, err = b.chunks.Read(p)
		if err == io.EOF {
			err = b.readTrailers()
		}
	case b.Remaining < 0:
		n, err = b.R.Read(p)
		b.Ended = err == io.EOF
	default:
		n, err = b.R.Read(p[:min(int64(len(p)), b.Remaining)])
		b.Remaining -= int64(n)
		b.Ended = b.Remaining == 0
		if err == io.EOF && !b.Ended {
			err = io.ErrUnexpectedEOF
		}
		if b.Ended {
			err = io.EOF
		}
	}
	return n, err
}

// Skip counts n bytes of content of known length as read, which were taken from the connection below
// R. It reports whether they were the last ones.
func (b *Body) Skip(n int) (ended bool) {
	b.Remaining -= int64(n)
	b.Ended = b.Remaining == 0
	return b.Ended
}

// readTrailers reads the trailers after the last chunk. It returns io.EOF on success.
func (b *Body) readTrailers() error {
	lines, end, err := readHead(b.R)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		err = b.trailers(lines, end)
	}
	if err != nil {
		return err
	}
	b.Ended = true
	return io.EOF
}

// CheckStart returns an error if the content that arrived with the head is malformed. At
// that point the client can still be sent an error response.
func (b *Body) CheckStart() error {
	if b.chunks == nil {
		return nil
	}
	return b.chunks.checkStart()
}

// Ready reports whether the next read returns without blocking.
func (b *Body) Ready() bool {
	if b.chunks != nil {
		return b.chunks.ready()
	}
	return b.R.Buffered() > 0
}

// Buffered returns the rest of the body if it is completely buffered.
func (b *Body) Buffered() ([]byte, bool) {
	if b.chunks != nil || b.Remaining < 0 || int64(b.R.Buffered()) < b.Remaining {
		return nil, false
	}
	data, _ := b.R.Peek(int(b.Remaining))
	_, _ = b.R.Discard(len(data)) // data stays valid until the next read
	b.Remaining, b.Ended = 0, true
	return data, true
}

// Close implements io.Closer. It does nothing.
func (b *Body) Close() error { return nil }

// IsChunked reports whether the body is chunked.
func (b *Body) IsChunked() bool { return b.chunks != nil }
