// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
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
func (p *proxy) recordInvalid(conn net.Conn, reason invalidReason, status, detail string) {
	program.metrics.Invalid(string(reason))
	remote, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
	addr := remote.Addr().Unmap().WithZone("")
	n, ok := program.invalidLines.count(invalidLine{p.directive.limiter.Key(addr), conn.LocalAddr().String(), string(reason) + status + detail}, time.Now())
	if !ok {
		return
	}
	entry := invalidLogs[reason]
	c := p.logger.Check(entry.level, entry.message)
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
// lines of new kinds are dropped. The zero value is ready for use.
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

// count reports whether to write a line now, and how many refusals it stands for.
func (l *lineLimit) count(line invalidLine, now time.Time) (n int64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.lines[line]
	if c == nil {
		if len(l.lines) >= maxInvalidLines && !l.sweep(now) {
			return 0, false
		}
		if l.lines == nil {
			l.lines = make(map[invalidLine]*lineCount)
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

// invalidAnswer returns the whole response to a request that no handler has seen.
func (p *proxy) invalidAnswer(status, text string) []byte {
	return fmt.Appendf(nil, "HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\nContent-Type: text/plain; charset=utf-8\r\nProxy-Status: %s\r\n\r\n%s\n",
		status, len(text)+1, p.proxyStatus("http_request_error", text), text)
}

// answerInvalid counts and logs what a client has sent instead of a request, and returns the
// response: that it is from the proxy, and what is wrong. It returns nil if the client would not
// understand one.
func (p *proxy) answerInvalid(conn net.Conn, what downstream.Invalid) []byte {
	reason, status, text := describeInvalid(what)
	p.recordInvalid(conn, reason, status, what.Detail)
	if status == "" {
		return nil
	}
	return p.invalidAnswer(status, text)
}

// describeInvalid returns why a client is refused, and the response, if it gets one.
func describeInvalid(what downstream.Invalid) (reason invalidReason, status, text string) {
	const badRequest = "400 Bad Request"
	switch what.Kind {
	case downstream.SOCKS:
		return invalidSOCKS, "", ""
	case downstream.TLS:
		return invalidTLS, badRequest, "This proxy does not speak TLS on this port: use http:// in the proxy URL."
	case downstream.PlainHTTP:
		return invalidPlainHTTP, badRequest, "Client sent an HTTP request to an HTTPS server. This proxy speaks TLS on this port: use https:// in the proxy URL."
	case downstream.LateHTTP2:
		return invalidMalformed, badRequest, "HTTP/2 cannot start after HTTP/1 requests on the same connection."
	}
	return describeRefusal(what)
}

// describeRefusal is describeInvalid for requests that are malformed, too large or not supported.
func describeRefusal(what downstream.Invalid) (reason invalidReason, status, text string) {
	reason, status = invalidUnknown, what.Status
	switch status[:3] {
	case "400":
		reason, text = invalidMalformed, "This is not a well-formed HTTP request."
		if what.Detail != "" {
			text = "This is not a well-formed HTTP request: " + what.Detail + "."
		}
	case "408":
		reason, text = invalidMalformed, "The head of this request has not arrived in time."
	case "431":
		reason, text = invalidTooLarge, "The header fields of this request are too large for this proxy."
		if what.NoLine {
			status, text = "414 URI Too Long", "The URL of this request is too long for this proxy."
		}
	case "501":
		text = "This proxy does not support the transfer coding of this request."
	case "505":
		text = "This proxy does not support the HTTP version of this request."
	default:
		text = "This proxy does not support the expectation of this request."
	}
	return reason, status, text
}
