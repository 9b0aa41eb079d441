// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/binary"
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
	invalidTLS       invalidReason = "tls"            // TLS on a port without TLS
	invalidSOCKS     invalidReason = "socks"          // SOCKS 4 or 5
	invalidSSH       invalidReason = "ssh"            // SSH
	invalidPROXY     invalidReason = "proxy_protocol" // a header of the PROXY protocol, which nothing has read
	invalidHTTP2     invalidReason = "http2"          // HTTP/2 on a port without TLS
	invalidPlainHTTP invalidReason = "plain_http"     // HTTP without TLS on a port with TLS
	invalidMalformed invalidReason = "malformed"      // not a well-formed request
	invalidTooLarge  invalidReason = "too_large"      // request head over max_header_size
	invalidUnknown   invalidReason = "unknown"        // unsupported version, coding or expectation
)

// invalidLogs has the log level and message for each reason.
var invalidLogs = map[invalidReason]struct {
	level   zapcore.Level
	message string
}{
	invalidTLS:       {zapcore.WarnLevel, "TLS client on a port without TLS: use http:// in the proxy URL"},
	invalidSOCKS:     {zapcore.WarnLevel, "SOCKS client: this is an HTTP proxy, use http:// in the proxy URL"},
	invalidSSH:       {zapcore.WarnLevel, "SSH client: this is an HTTP proxy, connect through it, with a ProxyCommand that sends CONNECT"},
	invalidPROXY:     {zapcore.WarnLevel, "PROXY protocol header: add the listener wrapper proxy_protocol, or switch the header off in the load balancer"},
	invalidHTTP2:     {zapcore.WarnLevel, "HTTP/2 client on a port without TLS: use HTTP/1.1, or add h2c to the server option protocols"},
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
	n, ok := program.invalidLines.count(invalidLine{p.directive.limiter.Key(addr), conn.LocalAddr().String(), reason}, time.Now())
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
	reason  invalidReason
}

// lineLimit lets one line of a kind through each minute. It tracks a limited number of kinds. While
// that many are recent, lines of new kinds are dropped. The zero value is ready for use.
type lineLimit struct {
	mu    sync.Mutex
	lines map[invalidLine]*lineCount
	swept time.Time
}

type lineCount struct {
	next    time.Time // when the next line may follow
	skipped int64     // since the last line
}

const (
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
	if now.Before(c.next) {
		c.skipped++
		return 0, false
	}
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

// answerInvalid counts and logs invalid input of a client, and returns the response, or nil for none.
// As far as the client's protocol allows, the response says that it is from the proxy, and what is
// wrong.
func (p *proxy) answerInvalid(conn net.Conn, what downstream.Invalid) []byte {
	reason, status, text := describeInvalid(what)
	p.recordInvalid(conn, reason, status, what.Detail)
	switch what.Kind {
	case downstream.SOCKS4, downstream.SOCKS5, downstream.SSH, downstream.PriorHTTP2:
		return foreignAnswers[what.Kind]
	case downstream.PlainHTTP: // Go's clients, for example, show nothing of a refused CONNECT but the reason phrase
		return p.invalidAnswer("400 "+reasonPhrase(useTLS), text)
	}
	return p.invalidAnswer(status, text)
}

// useTLS tells a client without TLS what to do at a port with TLS.
const useTLS = "This proxy speaks TLS on this port: use https:// in the proxy URL."

// foreignAnswers are responses in protocols other than HTTP/1. A client that speaks TLS on a port
// without TLS gets a response in HTTP/1 nevertheless: OpenSSL then reports a wrong version number, and
// Go that the first record does not look like TLS. After an alert, both would blame the client's TLS.
var foreignAnswers = map[downstream.InvalidKind][]byte{
	downstream.SOCKS4: {0, 91, 0, 0, 0, 0, 0, 0}, // request rejected
	downstream.SOCKS5: {5, 0xff},                 // no acceptable methods (RFC 1928 §3)
	downstream.SSH:    sshDisconnect("This is an HTTP proxy. Connect through it, with a ProxyCommand that sends CONNECT."),
	// SETTINGS, and GOAWAY with HTTP_1_1_REQUIRED (RFC 9113 §7).
	downstream.PriorHTTP2: append([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 8 + byte(len(useHTTP1)), 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xd}, useHTTP1...),
}

const useHTTP1 = "This proxy speaks HTTP/1.1 on this port."

// sshDisconnect returns the identification of a server and a message that ends the connection, which
// clients show (RFC 4253 §4.2, §6, §11.1).
func sshDisconnect(text string) []byte {
	const protocolError = 2
	payload := binary.BigEndian.AppendUint32([]byte{1}, protocolError)
	payload = binary.BigEndian.AppendUint32(payload, uint32(len(text)))
	payload = append(payload, text...)
	payload = append(payload, 0, 0, 0, 0) // no language
	padding := 4                          // at least
	for (5+len(payload)+padding)%8 != 0 {
		padding++
	}
	b := binary.BigEndian.AppendUint32([]byte("SSH-2.0-async_proxy\r\n"), uint32(1+len(payload)+padding))
	b = append(append(b, byte(padding)), payload...)
	return append(b, make([]byte, padding)...)
}

// describeInvalid returns why a client is refused, and the status and the text of the response in
// HTTP/1; both are "" if the response is in another protocol.
func describeInvalid(what downstream.Invalid) (reason invalidReason, status, text string) {
	const badRequest = "400 Bad Request"
	switch what.Kind {
	case downstream.SOCKS4, downstream.SOCKS5:
		return invalidSOCKS, "", ""
	case downstream.SSH:
		return invalidSSH, "", ""
	case downstream.PriorHTTP2:
		return invalidHTTP2, "", ""
	case downstream.ProxyProtocol:
		return invalidPROXY, badRequest, "This connection begins with a header of the PROXY protocol, which this proxy does not expect."
	case downstream.TLS:
		return invalidTLS, badRequest, "This proxy does not speak TLS on this port: use http:// in the proxy URL."
	case downstream.PlainHTTP:
		return invalidPlainHTTP, badRequest, "Client sent an HTTP request to an HTTPS server. " + useTLS
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
