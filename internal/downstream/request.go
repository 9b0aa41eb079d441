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

// readHead reads a whole request head and returns its length without the empty line. It stops
// early, with reason, at lines that no head begins with, so that a client that sends something
// else is not waited for. If reading fails, the bytes that were read before are still buffered.
func (c *clientConn) readHead() (length int, reason *Invalid, err error) {
	waiting, checked := false, 0 // checked: bytes of whole lines that checkLines accepts
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
				return 0, headTooLong(input), nil
			}
			return length, nil, nil
		}
		switch searched = len(input); {
		case searched > longest:
			return 0, headTooLong(input), nil
		case searched == c.r.Size():
			c.resizeReader(min(4*searched, longest+1))
			continue
		}
		if len(input) > 0 && !httpguts.IsTokenRune(rune(input[0])) && string(input) != "\r" {
			return 0, badRequest("the request line does not begin with a method"), nil
		}
		if end := bytes.LastIndexByte(input, '\n') + 1; end > checked {
			if reason = checkLines(string(input[checked:end]), checked == 0); reason != nil {
				return 0, reason, nil
			}
			checked = end
		}
		if !waiting {
			waiting = true
			limit := c.server.ReadHeaderTimeout
			c.limitRead(limit, limit) // exactly: the current deadline was not for a request head
		}
		if _, err := c.r.Peek(len(input) + 1); err == io.EOF && len(input) > 0 {
			return 0, badRequest("it ends in the middle of its head"), nil
		} else if err != nil {
			return 0, nil, err
		}
	}
}

// headTooLong returns the reason to refuse a head that is longer than MaxHeaderBytes.
func headTooLong(input []byte) *Invalid {
	return &Invalid{Kind: Refused, Status: "431 Request Header Fields Too Large", NoLine: bytes.IndexByte(input, '\n') < 0}
}

// badRequest returns the reason to refuse a request that is malformed. detail completes "This is
// not a well-formed HTTP request: ".
func badRequest(detail string) *Invalid {
	return &Invalid{Kind: Refused, Status: "400 Bad Request", Detail: detail}
}

// checkLines returns what is wrong with whole lines of a head that is not complete yet. first
// says that they start with the request line.
func checkLines(lines string, first bool) *Invalid {
	lines, ok := strings.CutSuffix(lines, "\r\n")
	if !ok {
		return errLineEnd
	}
	if first {
		line, rest, hasFields := strings.Cut(lines, "\r\n")
		if _, reason := parseRequestLine(line); reason != nil || !hasFields {
			return reason
		}
		lines = rest
	}
	_, reason := parseFields(lines)
	return reason
}

// emptyLine is ignored before a request (RFC 9112 §2.2).
var emptyLine = []byte("\r\n")

// errLineEnd refuses bare LF and CR. RFC 9112 §2.2 lets a server accept a bare LF. But an
// intermediary in front may have read the line differently.
var errLineEnd = badRequest("a line does not end with CRLF")

// requestLine is the first line of a request (RFC 9112 §3).
type requestLine struct {
	method, target, version string
}

// isHTTP10 reports whether the request is one of HTTP/1.0. Later minor versions are served as
// HTTP/1.1 (RFC 9110 §2.5).
func (l requestLine) isHTTP10() bool { return l.version == "HTTP/1.0" }

// isForNetHTTP reports whether the request is for this server itself, and not for the proxy, or is
// the beginning of HTTP/2.
func (l requestLine) isForNetHTTP() bool {
	return l.method != http.MethodConnect && (l.target[0] == '/' || l.target == "*")
}

func parseRequestLine(line string) (l requestLine, reason *Invalid) {
	method, rest, _ := strings.Cut(line, " ")
	target, version, found := strings.Cut(rest, " ")
	l = requestLine{method, target, version}
	switch {
	case strings.ContainsAny(line, "\r\n"):
		return l, errLineEnd
	case !found || target == "":
		return l, badRequest("its first line is not a method, a target and a version")
	case !httpguts.ValidHeaderFieldName(method):
		return l, badRequest("its method is not a token")
	case len(version) != len("HTTP/1.1") || version[:5] != "HTTP/" || !isDigit(version[5]) || version[6] != '.' || !isDigit(version[7]):
		return l, badRequest("its first line does not end with a version such as HTTP/1.1")
	case version[5] != '1' && line != http2Preface:
		return l, &Invalid{Kind: Refused, Status: "505 HTTP Version Not Supported", Detail: "unsupported protocol version"}
	}
	return l, nil
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// parse returns the request with the given head, which does not include the empty line, or the
// reason to refuse it. Both are nil if the request is for net/http.
func (c *clientConn) parse(head string) (*http.Request, *Invalid) {
	first, lines, hasFields := strings.Cut(head, "\r\n")
	line, reason := parseRequestLine(first)
	if reason != nil {
		return nil, reason
	}
	if line.isForNetHTTP() {
		return nil, checkOwnFraming(lines)
	}
	var header http.Header
	if !hasFields {
		header = h1.NewHeader()
	} else if header, reason = parseFields(lines); reason != nil {
		return nil, reason
	}
	u, reason := parseTarget(line)
	if reason != nil {
		return nil, reason
	}
	if strings.HasPrefix(u.Path, "/.well-known/") { // perhaps an ACME challenge for Caddy
		return nil, nil
	}
	if reason := checkHost(header["Host"], line.isHTTP10()); reason != nil {
		return nil, reason
	}
	delete(header, "Host")
	r := c.newRequest(line, header)
	r.URL, r.RequestURI, r.Host = u, line.target, u.Host
	r.Close = line.isHTTP10() || wantsClose(header["Connection"])
	return r, c.setFraming(r)
}

// checkOwnFraming refuses a request for the server itself that has two lengths, given its field lines. The
// connection would have to close behind such a request (RFC 9112 §6.1), but net/http gives it back.
func checkOwnFraming(lines string) *Invalid {
	header, reason := parseFields(lines)
	if reason == nil && header["Content-Length"] != nil && header["Transfer-Encoding"] != nil {
		return errTwoLengths
	}
	return nil // net/http refuses what is malformed
}

// parseTarget parses the target of a request for the proxy: an authority for CONNECT, and
// otherwise an absolute URL. The handler responds to other schemes and to authorities that name
// no destination.
func parseTarget(line requestLine) (u *url.URL, reason *Invalid) {
	if line.method == http.MethodConnect {
		if u = connectURL(line.target); u == nil {
			return nil, badRequest("its target is not a host and a port")
		}
		return u, nil
	}
	u, err := parseURL(line.target)
	switch {
	case err != nil:
		return nil, badRequest("its target is not a valid URL")
	case u.Hostname() != "" && strings.Trim(u.Hostname(), ".") == "" || !httpguts.ValidHostHeader(u.Host):
		return nil, badRequest("its target has no valid host")
	}
	return u, nil
}

// checkHost checks the Host fields of a request (RFC 9112 §3.2).
func checkHost(hosts []string, isHTTP10 bool) *Invalid {
	switch {
	case len(hosts) > 1:
		return badRequest("too many Host headers")
	case len(hosts) == 0 && !isHTTP10:
		return badRequest("missing required Host header")
	case len(hosts) == 1 && !httpguts.ValidHostHeader(hosts[0]):
		return badRequest("malformed Host header")
	}
	return nil
}

// connectURL returns the URL that net/http makes of a CONNECT target, or nil if net/http or
// Caddy would refuse the target. It drops user names and passwords.
func connectURL(target string) *url.URL {
	if strings.ContainsFunc(target, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return nil
	}
	host := hostport.WithoutUser(target)
	if name, _, _ := hostport.Split(host); name != "" && !hostport.IsPlain(target) && strings.Trim(name, ".[]") == "" {
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
	scheme, rest, _ := strings.Cut(target, "://")
	end := strings.IndexAny(rest, "/?#")
	if end < 0 || rest[end] != '/' {
		return nil, err
	}
	start := len(scheme) + len("://") + end
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

// maxFields limits how many fields a request may have. Each one takes more memory than the
// client has sent.
const maxFields = 1000

// parseFields parses field lines, which must not be empty. Unlike Caddy, it keeps fields with _
// or . in their names: a proxy has to forward fields that it does not know (RFC 9110 §5.1).
func parseFields(lines string) (http.Header, *Invalid) {
	n := strings.Count(lines, "\r\n") + 1
	if n > maxFields {
		return nil, &Invalid{Kind: Refused, Status: "431 Request Header Fields Too Large", Detail: "it has more than 1000 fields"}
	}
	fields := h1.NewFields(h1.NewHeader(), n)
	for line := range strings.SplitSeq(lines, "\r\n") {
		name, value, found := strings.Cut(line, ":")
		value = strings.Trim(value, " \t")
		if !found || !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
			return nil, badField(line, name, found)
		}
		fields.Add(textproto.CanonicalMIMEHeaderKey(name), value)
	}
	return fields.Header, nil
}

// badField says what is wrong with a field line.
func badField(line, name string, hasColon bool) *Invalid {
	switch {
	case strings.ContainsAny(line, "\r\n"):
		return errLineEnd
	case line != "" && (line[0] == ' ' || line[0] == '\t'): // RFC 9112 §5.2
		return badRequest("a field is folded onto another line, which HTTP no longer allows")
	case !hasColon:
		return badRequest("a field line has no colon")
	case !httpguts.ValidHeaderFieldName(name):
		return badRequest("invalid header name")
	}
	return badRequest("invalid header value")
}
