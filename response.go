// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

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
	maxHead   = 256 << 10
	maxFields = 1000 // field lines, or names in a Connection or Trailer field
)

// headEnd is the end of a head's last line and the empty line after it.
var headEnd = []byte("\r\n\r\n")

var (
	errHeadTooLarge  = errors.New("the head or the trailers of the response are larger than 256 KiB")
	errTooManyFields = errors.New("the head or the trailers of the response have more than 1000 lines")
)

// protocolError describes what is wrong with a message from an origin.
type protocolError string

func (e protocolError) Error() string { return string(e) }

// readResponse reads the head of a response to a request with the given method (RFC 9112),
// and sets up body, or a new one if that is nil. It is stricter than net/http: an endpoint may repair a message
// that an intermediary must not pass on, because others could split or read it differently.
func readResponse(r *bufio.Reader, method string, body *messageBody) (*http.Response, error) {
	// Check the first bytes first: something other than HTTP may never send a line end.
	if start, err := r.Peek(len("HTTP/")); string(start) != "HTTP/"[:len(start)] {
		return nil, protocolError("the response is not HTTP/1")
	} else if err == io.EOF && len(start) > 0 {
		return nil, io.ErrUnexpectedEOF
	} else if err != nil {
		return nil, err
	}
	head, err := readHead(r)
	if err != nil {
		return nil, err
	}
	line, fields, _ := strings.Cut(head, "\n")
	if strings.ContainsAny(line, "\x00\r") {
		return nil, protocolError("the status line contains a NUL or a bare CR")
	}
	res := &http.Response{Close: true}
	if err := parseStatusLine(res, line); err != nil {
		return nil, err
	}
	if res.Header, err = parseFields(fields); err != nil {
		return nil, err
	}
	if body == nil {
		body = new(messageBody)
	}
	*body = messageBody{r: r, head: len(head)}
	res.Body = body
	return res, setFraming(res, body, method)
}

// readHead reads lines up to an empty one, which it omits, and converts line ends to \n.
// It returns io.EOF if the connection ends before the first byte.
func readHead(r *bufio.Reader) (string, error) {
	var b strings.Builder
	buffered, _ := r.Peek(r.Buffered())
	if end := bytes.Index(buffered, headEnd); end >= 0 {
		b.Grow(end + len(headEnd)) // most heads arrive as a whole
	}
	for {
		line, err := r.ReadSlice('\n')
		if b.Len()+len(line) > maxHead {
			return "", errHeadTooLarge
		}
		if err != nil {
			if n := len(line) - 1; err == bufio.ErrBufferFull && line[n] == '\r' {
				_ = r.UnreadByte() // may be half of a line end; cannot fail after a read
				line = line[:n]
			}
			b.Write(line)
			if err == bufio.ErrBufferFull {
				continue
			}
			if err == io.EOF && b.Len() > 0 {
				err = io.ErrUnexpectedEOF
			}
			return "", err
		}
		n := len(line) - 1
		if n > 0 && line[n-1] == '\r' {
			n--
		}
		if n == 0 && (b.Len() == 0 || b.String()[b.Len()-1] == '\n') {
			return b.String(), nil
		}
		b.Write(line[:n])
		b.WriteByte('\n')
	}
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
			return protocolError("the response is not HTTP/1")
		}
		res.Proto, res.ProtoMajor, res.ProtoMinor = "HTTP/1.1", 1, 1
	}
	n, err := strconv.ParseUint(code, 10, 16)
	if err != nil || len(code) != 3 || n < 100 {
		return protocolError(fmt.Sprintf("the status %.20q is not a number from 100 to 999", code))
	}
	res.StatusCode = int(n)
	return nil
}

// parseFields parses field lines, each of which ends with \n.
func parseFields(lines string) (http.Header, error) {
	if strings.IndexByte(lines, 0) >= 0 || strings.IndexByte(lines, '\r') >= 0 {
		return nil, protocolError("a field of the response contains a NUL or a bare CR")
	}
	n := strings.Count(lines, "\n")
	if n > maxFields {
		return nil, errTooManyFields
	}
	fields := newFields(n)
	for lines != "" {
		var line, value string
		line, lines, _ = strings.Cut(lines, "\n")
		key, value, found := strings.Cut(line, ":")
		key = strings.TrimRight(key, " \t") // RFC 9112 §5.1
		if !found || !httpguts.ValidHeaderFieldName(key) {
			return nil, protocolError(fmt.Sprintf("the response has the malformed field line %.60q", line))
		}
		value = strings.Trim(value, " \t")
		if isFolded(lines) {
			value, lines = unfold(value, lines)
		}
		fields.add(textproto.CanonicalMIMEHeaderKey(key), value)
	}
	return fields.header, nil
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
		line, lines, _ = strings.Cut(lines, "\n")
		if line = strings.Trim(line, " \t"); line != "" && len(parts) > 0 {
			parts = append(parts, ' ')
		}
		parts = append(parts, line...)
	}
	return string(parts), lines
}

// setFraming determines where the body of a response ends (RFC 9112 §6.3), and whether the
// connection can be reused after it.
func setFraming(res *http.Response, body *messageBody, method string) error {
	options := res.Header["Connection"]
	if countMembers(options) > maxFields || countMembers(res.Header["Trailer"]) > maxFields {
		return errTooManyFields
	}
	res.Close = httpguts.HeaderValuesContainsToken(options, "close") ||
		res.ProtoMinor == 0 && !httpguts.HeaderValuesContainsToken(options, "keep-alive")

	if status := res.StatusCode; status < 200 || method == http.MethodConnect && status/100 == 2 {
		// These responses have no content, whatever their fields say (RFC 9112 §6.3).
		delete(res.Header, "Content-Length")
		delete(res.Header, "Transfer-Encoding")
		return nil
	}
	length, err := normalizeContentLength(res.Header)
	if err != nil {
		return err
	}
	coding := res.Header["Transfer-Encoding"]
	if len(coding) > 0 {
		switch {
		case len(coding) > 1 || !strings.EqualFold(coding[0], "chunked") || res.ProtoMinor == 0:
			return protocolError(fmt.Sprintf("the response has the unsupported transfer coding %.60q", coding))
		case length >= 0:
			// Transfer-Encoding overrides Content-Length (RFC 9112 §6.3). Another
			// intermediary may have used the length and left stray bytes on the
			// connection, so it is not reused.
			delete(res.Header, "Content-Length")
			length, res.Close = -1, true
		}
	}

	body.remaining, res.ContentLength = length, length
	switch status := res.StatusCode; {
	case method == http.MethodHead || status == http.StatusNotModified:
		body.remaining = 0
	case status == http.StatusNoContent:
		body.remaining, res.ContentLength = 0, 0
		delete(res.Header, "Content-Length")
	case len(coding) > 0:
		body.chunks = &chunkReader{r: body.r}
		res.Trailer = announcedTrailers(res.Header)
		body.trailers = func(h http.Header) {
			if res.Trailer == nil {
				res.Trailer = h
				return
			}
			maps.Copy(res.Trailer, h)
		}
	case length < 0: // to the end of the connection
		res.Close = true
	}
	return nil
}

// normalizeContentLength returns the Content-Length of h, or -1 if there is none. It merges repeated
// equal values into one.
func normalizeContentLength(h http.Header) (int64, error) {
	values := h["Content-Length"]
	length, err := contentLength(values)
	if len(values) > 1 || len(values) == 1 && strings.Contains(values[0], ",") {
		h["Content-Length"] = []string{strconv.FormatInt(length, 10)}
	}
	return length, err
}

// contentLength parses the values of Content-Length. It returns -1 if there are none, and
// an error if they differ.
func contentLength(values []string) (int64, error) {
	length := int64(-1)
	for _, value := range values {
		for part := range strings.SplitSeq(value, ",") {
			part = strings.Trim(part, " \t")
			n, err := strconv.ParseUint(part, 10, 63)
			if err != nil || part[0] == '+' || length >= 0 && int64(n) != length {
				return 0, protocolError(fmt.Sprintf("the response has the invalid Content-Length %.60q", values))
			}
			length = int64(n)
		}
	}
	return length, nil
}

// announcedTrailers removes the Trailer field from h, and returns the names in it as keys
// without values, the form of http.Response.Trailer.
func announcedTrailers(h http.Header) http.Header {
	names := listedNames(h["Trailer"])
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

// messageBody is the body of a response, as its framing delimits it.
type messageBody struct {
	r         *bufio.Reader
	remaining int64             // bytes left to read; < 0: unknown
	chunks    *chunkReader      // nil: not chunked
	trailers  func(http.Header) // receives the trailers of a chunked body
	ended     bool              // read to its end
	head      int               // size of the response head in bytes
}

func (b *messageBody) Read(p []byte) (n int, err error) {
	switch {
	case b.ended || b.remaining == 0:
		b.ended = true
		return 0, io.EOF
	case b.chunks != nil:
		n, err = b.chunks.Read(p)
		if err == io.EOF {
			err = b.readTrailers()
		}
	case b.remaining < 0:
		n, err = b.r.Read(p)
		b.ended = err == io.EOF
	default:
		n, err = b.r.Read(p[:min(int64(len(p)), b.remaining)])
		b.remaining -= int64(n)
		b.ended = b.remaining == 0
		if err == io.EOF && !b.ended {
			err = io.ErrUnexpectedEOF
		}
		if b.ended {
			err = io.EOF
		}
	}
	return n, err
}

// readTrailers reads the trailers after the last chunk. It returns io.EOF on success.
func (b *messageBody) readTrailers() error {
	lines, err := readHead(b.r)
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	fields, err := parseFields(lines)
	if err != nil {
		return err
	}
	b.trailers(fields)
	b.ended = true
	return io.EOF
}

// checkStart returns an error if the content that arrived with the head is malformed. At
// that point the client can still be sent an error response.
func (b *messageBody) checkStart() error {
	if b.chunks == nil {
		return nil
	}
	return b.chunks.checkStart()
}

// ready reports whether the next read returns without blocking.
func (b *messageBody) ready() bool {
	if b.chunks != nil {
		return b.chunks.ready()
	}
	return b.r.Buffered() > 0
}

// buffered returns the rest of the body if it is completely buffered.
func (b *messageBody) buffered() ([]byte, bool) {
	if b.chunks != nil || b.remaining < 0 || int64(b.r.Buffered()) < b.remaining {
		return nil, false
	}
	data, _ := b.r.Peek(int(b.remaining))
	_, _ = b.r.Discard(len(data)) // data stays valid until the next read
	b.remaining, b.ended = 0, true
	return data, true
}

// Close implements io.Closer. It does nothing.
func (b *messageBody) Close() error { return nil }

// isChunked reports whether the body is chunked.
func (b *messageBody) isChunked() bool { return b.chunks != nil }
