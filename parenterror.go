// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/policy"
)

// parentPhase is the phase in which an attempt to use the parent failed.
type parentPhase int

const (
	parentConnecting  parentPhase = iota // resolving its name, connecting
	parentHandshaking                    // the TLS handshake
	parentAnswering                      // waiting for its answer
)

// parentError is a failure of the parent, not of the target.
type parentError struct {
	phase  parentPhase
	status int         // the status of the parent's answer; 0: there is none
	header http.Header // the header of that answer; may be nil
	socks  bool        // the parent is a SOCKS proxy
	err    error
}

func (e *parentError) Error() string { return "the parent proxy: " + e.err.Error() }
func (e *parentError) Unwrap() error { return e.err }

// errParentWantsTLS reports that the parent answered a plain-text request with a TLS
// alert.
var errParentWantsTLS = errors.New("it speaks TLS: the URL of the option upstream should begin with https://, not http://")

// asAnswerError wraps an error that occurred while reading the parent's answer from r.
// r may be nil.
func asAnswerError(err error, r *bufio.Reader) *parentError {
	// An alert of TLS 1.0 to 1.3 begins with these bytes (RFC 8446 §5.1).
	if r != nil && r.Buffered() >= 2 {
		if start, _ := r.Peek(2); start[0] == 0x15 && start[1] == 3 {
			err = errParentWantsTLS
		}
	}
	return &parentError{phase: parentAnswering, err: err}
}

// asParentError wraps a failure of an exchange with the parent as a parentError, unless
// the client caused it or there was no connection.
func (x *exchange) asParentError(err error) error {
	if errors.As(err, new(*bodyError)) || errors.As(err, new(*dialError)) || x.conn == nil {
		return err
	}
	return asAnswerError(err, x.conn.r)
}

// refusal returns the response that tells the client why the parent could not connect to
// host. ctx is the request's.
func (e *parentError) refusal(ctx context.Context, host string) *refusal {
	var f *refusal
	switch {
	case e.status != 0:
		f = e.answerRefusal(host)
	case e.phase == parentConnecting:
		f = dialRefusal(ctx, e.err, "the parent proxy")
		f.text = strings.ToUpper(f.text[:1]) + f.text[1:]
	case isTLSError(e.err): // in TLS 1.3 the parent rejects our certificate after the handshake
		f = tlsRefusal(e.err, "the parent proxy")
		f.text = strings.ToUpper(f.text[:1]) + f.text[1:]
	case e.phase == parentHandshaking:
		f = e.handshakeRefusal()
	case e.socks:
		f = e.socksRefusal()
	default:
		f = e.exchangeRefusal()
	}
	f.err = e
	return f
}

// isTimeout reports whether err is a timeout.
func isTimeout(err error) bool {
	var timeout net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// isClosed reports whether err says that the peer closed or reset the connection.
func isClosed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// handshakeRefusal returns the response for a TLS handshake that timed out or whose
// connection was closed.
func (e *parentError) handshakeRefusal() *refusal {
	if isTimeout(e.err) {
		return newRefusal(http.StatusGatewayTimeout, "connection_timeout", nil, "The parent proxy did not complete the TLS handshake in time.")
	}
	return newRefusal(http.StatusBadGateway, "tls_protocol_error", nil, "The parent proxy closed the connection during the TLS handshake.")
}

// exchangeRefusal returns the response for an HTTP parent that gave no valid answer.
func (e *parentError) exchangeRefusal() *refusal {
	switch {
	case errors.Is(e.err, errParentWantsTLS):
		return newRefusal(http.StatusBadGateway, "http_protocol_error", nil, "The parent proxy expects https://, but this proxy uses http://.")
	case isTimeout(e.err):
		return newRefusal(http.StatusGatewayTimeout, "http_response_timeout", nil, "The parent proxy did not answer in time.")
	case errors.Is(e.err, errHeadTooLarge), errors.Is(e.err, errTooManyFields):
		return newRefusal(http.StatusBadGateway, "http_response_header_section_size", nil, "The parent proxy did not answer with a valid HTTP response: %v.", e.err)
	case errors.Is(e.err, errUnprocessed):
		return newRefusal(http.StatusServiceUnavailable, "destination_unavailable", nil, "The parent proxy accepts no more requests; try again later.")
	case isClosed(e.err):
		return newRefusal(http.StatusBadGateway, "http_response_incomplete", nil, "The parent proxy closed the connection before its answer was complete.")
	}
	return newRefusal(http.StatusBadGateway, "http_protocol_error", nil, "The parent proxy did not answer with a valid HTTP response.")
}

// socksRefusal returns the response for a SOCKS parent that gave no valid answer.
func (e *parentError) socksRefusal() *refusal {
	switch {
	case isTimeout(e.err):
		return newRefusal(http.StatusGatewayTimeout, "connection_read_timeout", nil, "The parent proxy did not answer in time.")
	case isClosed(e.err):
		return newRefusal(http.StatusBadGateway, "connection_terminated", nil, "The parent proxy closed the connection before its answer was complete.")
	}
	return newRefusal(http.StatusBadGateway, "destination_unavailable", nil, "The parent proxy did not give a valid SOCKS answer.")
}

// answerRefusal returns the response for a parent that refused the connection. It passes
// on the parent's Proxy-Status and Retry-After.
func (e *parentError) answerRefusal(host string) *refusal {
	var f *refusal
	switch e.status {
	case http.StatusForbidden:
		f = newRefusal(http.StatusForbidden, policy.DeniedRequest, nil, "The parent proxy does not allow this proxy to connect to %s.", host)
	case http.StatusProxyAuthRequired, http.StatusUnauthorized: // tinyproxy sends 401
		f = newRefusal(http.StatusBadGateway, "proxy_configuration_error", nil, "The parent proxy does not accept this proxy's credentials.")
	case http.StatusTooManyRequests:
		f = newRefusal(http.StatusTooManyRequests, "destination_unavailable", nil, "The parent proxy has received too many requests and did not connect to %s; try again later.", host)
		f.cause = causeParent
	case http.StatusServiceUnavailable:
		f = newRefusal(http.StatusServiceUnavailable, "destination_unavailable", nil, "The parent proxy is too busy to connect to %s; try again later.", host)
	case http.StatusGatewayTimeout:
		f = newRefusal(http.StatusGatewayTimeout, "connection_timeout", nil, "The parent proxy could not connect to %s in time.", host)
	default:
		f = newRefusal(http.StatusBadGateway, "destination_unavailable", nil, "The parent proxy could not connect to %s.", host)
	}
	f.priorMembers = proxyStatusMembers(e.header["Proxy-Status"])
	if f.status == http.StatusTooManyRequests || f.status == http.StatusServiceUnavailable {
		f.retryAfter = retryAfter(e.header["Retry-After"])
	}
	return f
}

// retryAfter returns the value of a Retry-After field (RFC 9110 §10.2.3), or ""
// if there is no valid one.
func retryAfter(values []string) string {
	if len(values) != 1 {
		return ""
	}
	value := values[0]
	if _, err := http.ParseTime(value); err == nil && len(value) <= len(time.RFC1123)+len("Wednes") {
		return value
	}
	if value == "" || len(value) > 10 || strings.Trim(value, "0123456789") != "" {
		return ""
	}
	return value
}
