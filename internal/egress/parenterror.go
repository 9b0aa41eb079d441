// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"bufio"
	"errors"
	"net/http"
	"strings"
	"time"
)

// parentPhase is the phase in which an attempt to use the parent failed.
type parentPhase int

const (
	parentConnecting  parentPhase = iota // resolving its name, connecting
	parentHandshaking                    // the TLS handshake
	ParentAnswering                      // waiting for its answer
)

// ParentError is a failure of the parent, not of the target.
type ParentError struct {
	Phase  parentPhase
	Status int         // the status of the parent's answer; 0: there is none
	Header http.Header // the header of that answer; may be nil
	socks  bool        // the parent is a SOCKS proxy
	Err    error
}

func (e *ParentError) Error() string { return "the parent proxy: " + e.Err.Error() }
func (e *ParentError) Unwrap() error { return e.Err }

// errParentWantsTLS reports that the parent answered a plain-text request with a TLS
// alert.
var errParentWantsTLS = errors.New("it speaks TLS: the URL of the option upstream should begin with https://, not http://")

// AsAnswerError wraps an error that occurred while reading the parent's answer from r.
// r may be nil.
func AsAnswerError(err error, r *bufio.Reader) *ParentError {
	// An alert of TLS 1.0 to 1.3 begins with these bytes (RFC 8446 §5.1).
	if r != nil && r.Buffered() >= 2 {
		if start, _ := r.Peek(2); start[0] == 0x15 && start[1] == 3 {
			err = errParentWantsTLS
		}
	}
	return &ParentError{Phase: ParentAnswering, Err: err}
}

// PassedOn returns the parts of the parent's answer that are passed on to the client: the members of
// its Proxy-Status, and its Retry-After. Each is "" if the answer has no valid one.
func (e *ParentError) PassedOn() (proxyStatus, retry string) {
	return proxyStatusMembers(e.Header["Proxy-Status"]), retryAfter(e.Header["Retry-After"])
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
