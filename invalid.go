// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// invalidReason is a reason to refuse a client before any handler sees a request.
type invalidReason string

const (
	invalidTLS       invalidReason = "tls"        // TLS on a port without TLS
	invalidSOCKS     invalidReason = "socks"      // SOCKS 4 or 5
	invalidPlainHTTP invalidReason = "plain_http" // HTTP without TLS on a port with TLS
	invalidMalformed invalidReason = "malformed"  // not a well-formed request
	invalidTooLarge  invalidReason = "too_large"  // request head over max_header_size
	invalidUnknown   invalidReason = "unknown"    // unsupported version, coding or expectation
)

// invalidLogs has the log level and message for each reason.
var invalidLogs = map[invalidReason]struct {
	level   zapcore.Level
	message string
}{
	invalidTLS:       {zapcore.WarnLevel, "TLS client on a port without TLS: use http:// in the proxy URL"},
	invalidSOCKS:     {zapcore.WarnLevel, "SOCKS client: this is an HTTP proxy, use http:// in the proxy URL"},
	invalidPlainHTTP: {zapcore.WarnLevel, "HTTP client on a port with TLS: use https:// in the proxy URL"},
	invalidMalformed: {zapcore.InfoLevel, "malformed request"},
	invalidTooLarge:  {zapcore.WarnLevel, "request head too large: the server option max_header_size limits it"},
	invalidUnknown:   {zapcore.InfoLevel, "unsupported request"},
}

// recordInvalid counts and logs a refused client. status is empty if the client got no
// response. detail may say more about the cause.
func (h *Handler) recordInvalid(conn net.Conn, reason invalidReason, status, detail string) {
	program.metrics.Invalid(string(reason))
	remote, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
	addr := remote.Addr().Unmap().WithZone("")
	n, ok := invalidLines.count(invalidLine{h.limiter.Key(addr), conn.LocalAddr().String(), string(reason) + status + detail}, time.Now())
	if !ok {
		return
	}
	entry := invalidLogs[reason]
	c := h.logger.Check(entry.level, entry.message)
	if c == nil {
		return
	}
	fields := []zap.Field{clientField(addr), zap.Stringer("address", conn.LocalAddr()), zap.String("reason", string(reason)), zap.Int64("refused", n)}
	if status != "" {
		fields = append(fields, zap.String("status", status))
	}
	if detail != "" {
		fields = append(fields, zap.String("error", detail))
	}
	c.Write(fields...)
}

// invalidLine identifies a kind of log line that is limited for each client.
type invalidLine struct {
	client  client.Key
	address string // local address that the client connected to
	kind    string
}

// lineLimit lets the first lines of a kind through, and then one a minute until a minute
// passes without a line. It tracks a limited number of kinds. While that many are recent,
// lines of new kinds are dropped.
type lineLimit struct {
	mu    sync.Mutex
	lines map[invalidLine]*lineCount
	swept time.Time
}

type lineCount struct {
	lines   int       // written since the last quiet minute
	next    time.Time // when a line may follow the first ones
	skipped int64
}

const (
	invalidBurst    = 10
	invalidInterval = time.Minute
	maxInvalidLines = 4096
)

var invalidLines = lineLimit{lines: make(map[invalidLine]*lineCount)}

// count reports whether to write a line now, and how many refusals it stands for.
func (l *lineLimit) count(line invalidLine, now time.Time) (n int64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.lines[line]
	if c == nil {
		if len(l.lines) >= maxInvalidLines && !l.sweep(now) {
			return 0, false
		}
		c = new(lineCount)
		l.lines[line] = c
	}
	if !now.Before(c.next) && c.skipped == 0 {
		c.lines = 0
	}
	if c.lines >= invalidBurst && now.Before(c.next) {
		c.skipped++
		return 0, false
	}
	c.lines++
	n, c.skipped, c.next = c.skipped+1, 0, now.Add(invalidInterval)
	return n, true
}

// sweep drops the kinds whose minute is over, and reports whether there is room. It visits
// all of them, so it does that at most once a second.
func (l *lineLimit) sweep(now time.Time) bool {
	if now.Sub(l.swept) >= time.Second {
		l.swept = now
		for line, c := range l.lines {
			if !now.Before(c.next) {
				delete(l.lines, line)
			}
		}
	}
	return len(l.lines) < maxInvalidLines
}

// foreignProtocol tells from the first byte of a connection whether the client speaks a protocol
// other than the port's, and which.
func foreignProtocol(b byte, overTLS bool) (reason invalidReason, found bool) {
	switch {
	case b == 4 || b == 5:
		return invalidSOCKS, true
	case b == 0x16 && !overTLS: // a TLS handshake record
		return invalidTLS, true
	case overTLS && (b >= 'A' && b <= 'Z' || b >= 'a' && b <= 'z'): // a method: no TLS record starts so
		return invalidPlainHTTP, true
	}
	return "", false
}

// answerFirstByte responds to a client of another protocol, if it may understand the
// response. The caller closes the connection in stages.
func (h *Handler) answerFirstByte(conn *net.TCPConn, reason invalidReason) {
	switch reason {
	case invalidTLS:
		h.answerInvalid(conn, reason, "400 Bad Request", "This proxy does not speak TLS on this port: use http:// in the proxy URL.")
	case invalidPlainHTTP:
		h.answerInvalid(conn, reason, "400 Bad Request", "Client sent an HTTP request to an HTTPS server. This proxy speaks TLS on this port: use https:// in the proxy URL.")
	default:
		h.recordInvalid(conn, reason, "", "")
	}
}

// answerInvalid responds to a request that no handler has seen. The caller closes the
// connection in stages.
func (h *Handler) answerInvalid(conn *net.TCPConn, reason invalidReason, status, text string) {
	h.recordInvalid(conn, reason, status, "")
	_ = conn.SetWriteDeadline(time.Now().Add(lingerIdle))
	_, _ = conn.Write(h.invalidAnswer(status, text))
}

// invalidAnswer returns the whole response to a request that no handler has seen.
func (h *Handler) invalidAnswer(status, text string) []byte {
	return fmt.Appendf(nil, "HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\nContent-Type: text/plain; charset=utf-8\r\nProxy-Status: %s\r\n\r\n%s\n",
		status, len(text)+1, h.proxyStatus("http_request_error"), text)
}

// net/http sends its own refusals in one write of this form. The first write of a handler's
// response never has it.
var (
	errorFields       = []byte("\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n")
	expectationFailed = []byte("417 Expectation Failed\r\nConnection: close\r\nDate: ")
	noContent         = []byte("GMT\r\nContent-Length: 0\r\n\r\n")
)

// isNetHTTPRefusal reports whether p is net/http's refusal of a request that no handler has
// seen. It returns the status, and what net/http says about the cause.
func isNetHTTPRefusal(p []byte) (status, detail string, ok bool) {
	p, found := bytes.CutPrefix(p, []byte("HTTP/1.1 "))
	if !found || len(p) == 0 || p[0] != '4' && p[0] != '5' {
		return "", "", false // the usual case: cheap
	}
	if bytes.HasPrefix(p, expectationFailed) && bytes.HasSuffix(p, noContent) && len(p) < len(expectationFailed)+len(noContent)+40 {
		return "417 Expectation Failed", "", true
	}
	line, text, found := bytes.Cut(p, errorFields)
	if !found || !bytes.Equal(line, text) && !bytes.HasPrefix(line, []byte("501 ")) {
		return "", "", false
	}
	status, detail, _ = strings.Cut(string(line), ": ")
	return status, detail, len(status) >= len("400")
}

// replaceRefusal counts and logs a request that net/http refuses, and returns a response
// that says more than net/http's: that it is from the proxy, and what is wrong. It returns
// nil if p is something else. noLine says that not even the request line was complete.
func (h *Handler) replaceRefusal(conn net.Conn, p []byte, noLine bool) []byte {
	status, detail, ok := isNetHTTPRefusal(p)
	if !ok {
		return nil
	}
	reason, text := invalidUnknown, "This proxy does not support the expectation of this request."
	switch status[:3] {
	case "400":
		reason, text = invalidMalformed, "This is not a well-formed HTTP request."
		if detail != "" {
			text = "This is not a well-formed HTTP request: " + detail + "."
		}
	case "431":
		reason, text = invalidTooLarge, "The header fields of this request are too large for this proxy."
		if noLine {
			status, text = "414 URI Too Long", "The URL of this request is too long for this proxy."
		}
	case "501":
		text = "This proxy does not support the transfer coding of this request."
	case "505":
		text = "This proxy does not support the HTTP version of this request."
	}
	h.recordInvalid(conn, reason, status, detail)
	return h.invalidAnswer(status, text)
}
