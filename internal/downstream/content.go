// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// setFraming determines where the content of a request ends (RFC 9112 §6.3), and sets the request's
// body. It returns the reason to refuse a request whose end is not certain, because another server
// might see the end elsewhere.
func (c *clientConn) setFraming(r *http.Request) *Invalid {
	length, reason := contentLength(r.Header["Content-Length"])
	if reason != nil {
		return reason
	}
	chunked := false
	if codings, found := r.Header["Transfer-Encoding"]; found {
		switch {
		case r.ProtoMinor == 0:
			return badRequest("HTTP/1.0 has no Transfer-Encoding")
		case len(codings) > 1 || !strings.EqualFold(codings[0], "chunked"):
			return &Invalid{Kind: Refused, Status: "501 Not Implemented", Detail: "Unsupported transfer encoding"}
		case length >= 0:
			return errTwoLengths
		}
		delete(r.Header, "Transfer-Encoding")
		r.TransferEncoding, chunked, length = []string{"chunked"}, true, -1
	}
	if expect := r.Header["Expect"]; len(expect) > 0 && expect[0] != "" && !httpguts.HeaderValuesContainsToken(expect, "100-continue") {
		return &Invalid{Kind: Refused, Status: "417 Expectation Failed"}
	}
	if length <= 0 && !chunked {
		return nil
	}
	if chunked {
		r.Trailer = h1.AnnouncedTrailers(r.Header)
		if reason := checkTrailerNames(r.Trailer); reason != nil {
			return reason
		}
	}
	r.ContentLength = length
	c.content = &content{client: c}
	var trailers func(lines, end string) error
	if chunked {
		trailers = func(lines, end string) error { return parseTrailers(lines, end, r.Trailer) }
	}
	c.content.body.Delimit(c.r, length, trailers)
	r.Body = c.content
	return nil
}

var errTwoLengths = badRequest("it has both Content-Length and Transfer-Encoding")

// contentLength parses Content-Length. It returns -1 if there is none. Repeated equal values
// count as one (RFC 9112 §6.3).
func contentLength(values []string) (int64, *Invalid) {
	if len(values) == 0 {
		return -1, nil
	}
	length, err := h1.ContentLength(values)
	for _, value := range values {
		if err != nil || value != values[0] || strings.Contains(value, ",") {
			return 0, badRequest("its Content-Length is not one number")
		}
	}
	return length, nil
}

// checkTrailerNames refuses a request that announces a field as a trailer by which its content is
// framed.
func checkTrailerNames(trailer http.Header) *Invalid {
	for _, name := range []string{"Transfer-Encoding", "Trailer", "Content-Length"} {
		if _, found := trailer[name]; found {
			return badRequest("its Trailer field names " + name + ", which frames the content")
		}
	}
	return nil
}

// parseTrailers parses the lines of a trailer section, which end with an empty line, as strictly as those of
// a head: a server that reads one line differently would see another end of the message. It adds the
// fields to trailer, unless that is nil because the head has announced none.
func parseTrailers(lines, end string, trailer http.Header) error {
	whole, found := strings.CutSuffix(lines+end, "\r\n")
	if !found {
		return h1.ProtocolError(errLineEnd.Detail)
	}
	if whole == "" {
		return nil
	}
	fields, reason := parseFields(strings.TrimSuffix(whole, "\r\n"))
	if reason != nil {
		return h1.ProtocolError(reason.Detail)
	}
	if trailer != nil {
		maps.Copy(trailer, fields)
	}
	return nil
}

// content is the content of a request. It is read from the connection, whose reader it owns until
// the content has ended. Each read has a deadline.
type content struct {
	client  *clientConn
	body    h1.Body
	read    atomic.Int64
	stopped atomic.Bool // by Writer.SetReadDeadline
}

// Read implements io.Reader.
func (b *content) Read(p []byte) (n int, err error) {
	if !b.body.Ready() {
		if err := b.limitRead(); err != nil {
			return 0, err
		}
	}
	n, err = b.body.Read(p)
	return n, b.account(n, err)
}

// limitRead sets the deadline for a read that waits for the client.
func (b *content) limitRead() error {
	limit := b.client.server.ReadIdleTimeout
	b.client.limitRead(limit-limit/16, limit)
	if b.stopped.Load() { // stop may have interrupted reads before
		return os.ErrDeadlineExceeded
	}
	return nil
}

// account counts n bytes of content that have left the connection. err is the error of the read.
func (b *content) account(n int, err error) error {
	b.read.Add(int64(n))
	if err == io.EOF {
		b.client.contentEnded()
	}
	return err
}

// Socket implements tcpconn.Mover.
func (b *content) Socket() *net.TCPConn {
	socket, _ := b.client.Conn.(*net.TCPConn)
	if b.body.IsChunked() || b.body.R.Buffered() > 0 {
		return nil
	}
	return socket
}

// Move implements tcpconn.Mover.
func (b *content) Move(fill func(most int64) (int, error)) (int, error) {
	if err := b.limitRead(); err != nil {
		return 0, err
	}
	n, err := fill(b.body.Remaining)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if b.body.Skip(n) {
		err = io.EOF
	}
	return n, b.account(n, err)
}

// Close implements io.Closer. It does nothing: what has not been read ends the connection.
func (b *content) Close() error { return nil }

// stop makes pending and later reads fail instead of waiting for the client.
func (b *content) stop() {
	b.stopped.Store(true)
	b.client.readDeadline.Interrupt(b.client.Conn)
}

// Arrived returns how many bytes of content of known length are buffered, so that reading them does
// not wait for the client.
func (b *content) Arrived() int {
	return int(min(int64(b.body.R.Buffered()), max(b.body.Remaining, 0)))
}

// contentEnded starts the watch for the client's disconnect if it was asked for while the content was
// being read: only one of them may read from the connection.
func (c *clientConn) contentEnded() {
	c.mu.Lock()
	c.reading = false
	wanted := c.watchWanted
	c.mu.Unlock()
	if wanted {
		c.startWatch()
	}
}
