// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"errors"
	"os"

	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// Cause says why there is no usable response from an origin to which there was a connection.
// It may be a cause of package egress, such as egress.TLSFailed.
type Cause string

// Causes of failures, by the party that caused them.
const (
	// The client.
	ContentTimeout Cause = "content_timeout" // the client has stopped sending
	ContentInvalid Cause = "content_invalid" // the request's content is cut off or malformed

	// The origin.
	ResponseInvalid  Cause = "response_invalid"  // not valid HTTP, and the error says why
	ResponseNotHTTP  Cause = "response_not_http" // not valid HTTP, for an unknown reason
	ResponseHead     Cause = "response_head"     // the head is too large
	ResponseTimeout  Cause = "response_timeout"  // the head did not arrive in time
	ResponseCutOff   Cause = "response_cut_off"  // the origin has closed the connection
	ConnectionSilent Cause = "connection_silent" // an HTTP/2 origin has stopped responding
)

// CauseOf returns the cause of a failed exchange, other than a DialError.
func CauseOf(err error) Cause {
	var body *RequestBodyError
	switch {
	case errors.As(err, &body) && errors.Is(body, os.ErrDeadlineExceeded):
		return ContentTimeout
	case errors.As(err, &body):
		return ContentInvalid
	case errors.As(err, new(h1.ProtocolError)):
		return ResponseInvalid
	case egress.IsTLSError(err):
		return Cause(egress.TLSCause(err))
	case errors.Is(err, h1.ErrHeadTooLarge), errors.Is(err, h1.ErrTooManyFields), errors.Is(err, errHeldHeads):
		return ResponseHead
	case errors.As(err, new(egress.SilentError)):
		return ConnectionSilent
	case egress.IsTimeout(err):
		return ResponseTimeout
	case egress.IsClosed(err):
		return ResponseCutOff
	}
	return ResponseNotHTTP
}
