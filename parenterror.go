// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

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

// passedOn returns what of the parent's answer the client is told: the members of its
// Proxy-Status and its Retry-After, if they are valid, or "".
func (e *parentError) passedOn() (proxyStatus, retry string) {
	return proxyStatusMembers(e.header["Proxy-Status"]), retryAfter(e.header["Retry-After"])
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
