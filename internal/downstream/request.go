// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package downstream

import (
	"bytes"
	"io"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// readHead reads a whole request head and returns its length without the empty line. The
// length is negative if the request is for net/http: the head is longer than MaxHeaderBytes,
// the client half-closed or timed out in the middle, or parse would not accept the lines
// that have arrived. net/http then refuses malformed lines without waiting for the rest. If
// reading fails, the bytes that were read before are still buffered.
func (c *clientConn) readHead() (length int, err error) {
	waiting, checked := false, 0 // checked: bytes of whole lines that isOrdinaryStart accepts
	searched := 0                // bytes that do not contain the end of a head
	longest := c.server.MaxHeaderBytes + headSlop
	for {
		input, _ := c.r.Peek(c.r.Buffered())
		if bytes.HasPrefix(input, emptyLine) { // RFC 9112 §2.2
			_, _ = c.r.Discard(len(emptyLine))
			continue
		}
		from := max(0, searched-len(h1.HeadEnd)+1)
		if end := bytes.Index(input[from:], h1.HeadEnd); end >= 0 {
			if length = from + end; length > longest {
				length = -1
			}
			return length, nil
		}
		switch searched = len(input); {
		case searched > longest:
			return -1, nil
		case searched == c.r.Size():
			c.resizeReader(min(4*searched, longest+1))
			continue
		}
		if len(input) > 0 && !httpguts.IsTokenRune(rune(input[0])) && string(input) != "\r" {
			return -1, nil
		}
		if end := bytes.LastIndexByte(input, '\n') + 1; end > checked {
			if !isOrdinaryStart(string(input[checked:end]), checked == 0) {
				return -1, nil
			}
			checked = end
		}
		if !waiting {
			waiting = true
			limit := c.server.ReadHeaderTimeout
			c.limitRead(limit, limit) // exactly: the current deadline was not for a request head
		}
		if _, err := c.r.Peek(len(input) + 1); err == io.EOF && len(input) > 0 {
			return -1, nil // the client half-closed mid-head; net/http responds with 400
		} else if err != nil {
			return -1, err
		}
	}
}

// isOrdinaryStart reports whether lines of a head may belong to a request that this package
// serves. first says that they start with the request line.
func isOrdinaryStart(lines string, first bool) bool {
	lines, ok := strings.CutSuffix(lines, "\r\n")
	if ok && first {
		_, _, header := parseLines(lines)
		return header != nil
	}
	return ok && parseStrictly(lines) != nil
}

// emptyLine is ignored before a request (RFC 9112 §2.2).
var emptyLine = []byte("\r\n")

// parse returns the request with the given head, which does not include the empty line. It
// returns nil if the request is not ordinary and well-formed beyond doubt.
func (c *clientConn) parse(head string) *http.Request {
	method, target, header := parseLines(head)
	if header == nil || !isOrdinary(header) {
		return nil
	}
	var u *url.URL
	if method == http.MethodConnect {
		// The handler responds to a target that is not an authority.
		if u = connectURL(target); u == nil {
			return nil
		}
	} else {
		var err error
		if u, err = parseURL(target); err != nil || strings.Trim(u.Hostname(), ".") == "" || !httpguts.ValidHostHeader(u.Host) {
			return nil
		}
		if strings.HasPrefix(u.Path, "/.well-known/") { // perhaps an ACME challenge for Caddy
			return nil
		}
	}
	if host := header["Host"]; len(host) != 1 || !httpguts.ValidHostHeader(host[0]) {
		return nil
	}
	delete(header, "Host")
	r := c.newRequest(method)
	r.URL, r.RequestURI, r.Host, r.Header, r.Close = u, target, u.Host, header, wantsClose(header["Connection"])
	return r
}

// connectURL returns the URL that net/http makes of a CONNECT target, or nil if net/http or
// Caddy would refuse the target. It drops user names and passwords.
func connectURL(target string) *url.URL {
	if strings.ContainsFunc(target, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return nil
	}
	host := hostport.WithoutUser(target)
	if name, _, _ := hostport.Split(host); !hostport.IsPlain(target) && strings.Trim(name, ".[]") == "" {
		return nil // Caddy refuses such a host
	}
	return &url.URL{Host: host}
}

// parseURL is url.ParseRequestURI, but also accepts a % in the path that begins no escape.
// Browsers send that (WHATWG URL §4.4), and its meaning is up to the origin, which gets the
// target as the client sent it.
func parseURL(target string) (*url.URL, error) {
	u, err := url.ParseRequestURI(target)
	if err == nil || strings.ContainsFunc(target, isControl) {
		return u, err
	}
	start := strings.IndexAny(target[len("http://"):], "/?#") + len("http://")
	if start < len("http://") || target[start] != '/' {
		return nil, err
	}
	path, query, _ := strings.Cut(target[start:], "?")
	u, err = url.ParseRequestURI(target[:start] + escapePercents(path))
	if u != nil {
		u.RawQuery = query
	}
	return u, err
}

// isControl reports whether c is an ASCII control character, which no target may contain.
func isControl(c rune) bool { return c < ' ' || c == 0x7f }

// escapePercents escapes each % that begins no escape.
func escapePercents(path string) string {
	var b strings.Builder
	for i := range len(path) {
		b.WriteByte(path[i])
		if path[i] == '%' && (i+2 >= len(path) || !isHex(path[i+1]) || !isHex(path[i+2])) {
			b.WriteString("25")
		}
	}
	return b.String()
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'f'
}

// isOrdinary reports whether a request with these fields has no content and asks for nothing
// but a response.
func isOrdinary(header http.Header) bool {
	for _, name := range [...]string{"Content-Length", "Expect", "Trailer", "Transfer-Encoding", "Upgrade"} {
		if _, ok := header[name]; ok {
			return false
		}
	}
	return len(header["Pragma"]) == 0 || len(header["Cache-Control"]) > 0 // net/http adds the latter
}

// wantsClose reports whether Connection has the token close, parsed as net/http does.
func wantsClose(connection []string) bool {
	for _, value := range connection {
		for token := range strings.FieldsFuncSeq(value, func(c rune) bool { return c == ',' || c == ' ' || c == '\t' }) {
			if strings.EqualFold(token, "close") {
				return true
			}
		}
	}
	return false
}

// parseLines parses a request line and the field lines after it, without the last CRLF. It
// returns a nil header if one of them does not belong to an ordinary request. POST is
// excluded even without content, because net/http tolerates empty lines after one.
func parseLines(head string) (method, target string, header http.Header) {
	line, lines, hasFields := strings.Cut(head, "\r\n")
	method, rest, _ := strings.Cut(line, " ")
	target, version, _ := strings.Cut(rest, " ")
	switch {
	case version != "HTTP/1.1" || len(method) > 32 || !httpguts.ValidHeaderFieldName(method) || method == http.MethodPost,
		method != http.MethodConnect && !strings.HasPrefix(target, "http://"):
		return "", "", nil
	case !hasFields:
		return method, target, make(http.Header)
	}
	return method, target, parseStrictly(lines)
}

// maxFields limits how many fields a request may have here. Each one takes more memory than the
// client has sent.
const maxFields = 1000

// parseStrictly parses field lines. It returns nil if one of them is malformed, or if there are
// more than maxFields. Unlike
// Caddy, it keeps fields with _ or . in their names: a proxy has to forward fields that it
// does not know (RFC 9110 §5.1).
func parseStrictly(lines string) http.Header {
	n := strings.Count(lines, "\r\n") + 1
	if n > maxFields {
		return nil
	}
	fields := h1.NewFields(n)
	for line := range strings.SplitSeq(lines, "\r\n") {
		name, value, found := strings.Cut(line, ":")
		value = strings.Trim(value, " \t")
		if !found || !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
			return nil
		}
		fields.Add(textproto.CanonicalMIMEHeaderKey(name), value)
	}
	return fields.Header
}
