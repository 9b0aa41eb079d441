// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// Cause says why there is no connection to a destination, unless the rules deny it.
type Cause string

// Causes of failures, by what failed.
const (
	// The connection itself.
	DialNoResources Cause = "dial_no_resources" // this machine has no descriptors or local ports left
	DialTimeout     Cause = "dial_timeout"      // no address accepted a connection in time
	DialRefused     Cause = "dial_refused"      // an address refused it
	DialUnroutable  Cause = "dial_unroutable"   // there is no route to any address
	DialFailed      Cause = "dial_failed"       // for another reason

	// Name resolution.
	DNSTimeout   Cause = "dns_timeout"
	DNSNoAddress Cause = "dns_no_address" // the name exists
	DNSNoName    Cause = "dns_no_name"    // the name does not exist
	DNSSilent    Cause = "dns_silent"     // no DNS server could be asked
	DNSFailed    Cause = "dns_failed"     // a DNS server answers with an error

	// The TLS handshake with an origin.
	TLSUntrusted Cause = "tls_untrusted" // the certificate is not trusted
	TLSAlerted   Cause = "tls_alerted"   // the server sent an alert
	TLSFailed    Cause = "tls_failed"    // for another reason

	// What the parent says about its attempt to connect.
	ParentDenies      Cause = "parent"
	ParentLimits      Cause = "parent_limits" // too many requests
	ParentBusy        Cause = "parent_busy"
	ParentDialTimeout Cause = "parent_dial_timeout"
	ParentDialFailed  Cause = "parent_dial_failed"
	ParentCredentials Cause = "parent_credentials" // it rejects this proxy's credentials

	// What is wrong with the parent itself.
	ParentHandshakeTimeout Cause = "parent_handshake_timeout"
	ParentHandshakeCutOff  Cause = "parent_handshake_cut_off"
	ParentWantsTLS         Cause = "parent_wants_tls"
	ParentTimeout          Cause = "parent_timeout"
	ParentHead             Cause = "parent_head" // the head of its answer is too large
	ParentFull             Cause = "parent_full" // it accepts no more HTTP/2 streams
	ParentCutOff           Cause = "parent_cut_off"
	ParentNotHTTP          Cause = "parent_not_http"
	ParentSOCKSTimeout     Cause = "parent_socks_timeout"
	ParentSOCKSCutOff      Cause = "parent_socks_cut_off"
	ParentNotSOCKS         Cause = "parent_not_socks"
)

// CauseOf returns the cause of a failed attempt to connect.
func CauseOf(err error) Cause {
	var (
		parent     *ParentError
		unresolved *ResolveError
	)
	switch {
	case errors.As(err, &parent):
		return parent.Cause()
	case IsTLSError(err):
		return TLSCause(err)
	case noDescriptors(err):
		return DialNoResources
	case errors.As(err, &unresolved):
		return unresolved.cause()
	case IsTimeout(err):
		return DialTimeout
	case errors.Is(err, syscall.ECONNREFUSED):
		return DialRefused
	case isUnroutable(err):
		return DialUnroutable
	case errors.Is(err, syscall.EADDRNOTAVAIL): // all local ports are in use
		return DialNoResources
	}
	return DialFailed
}

// cause returns the cause of a failed look-up.
func (e *ResolveError) cause() Cause {
	answered := e.Failure() != ""
	switch {
	case e.timeout():
		return DNSTimeout
	case e.notFound() && answered:
		return DNSNoName
	case e.notFound():
		return DNSNoAddress
	case answered:
		return DNSFailed
	}
	return DNSSilent
}

// IsTLSError reports whether err is a TLS error. It checks the text, because most errors
// of crypto/tls have no type.
func IsTLSError(err error) bool { return strings.Contains(err.Error(), "tls: ") }

// TLSCause returns the cause of a TLS error.
func TLSCause(err error) Cause {
	var (
		untrusted *tls.CertificateVerificationError
		remote    *net.OpError
	)
	switch {
	case errors.As(err, &untrusted):
		return TLSUntrusted
	case errors.As(err, &remote) && remote.Op == "remote error":
		return TLSAlerted
	}
	return TLSFailed
}

// IsTimeout reports whether err is a timeout.
func IsTimeout(err error) bool {
	var timeout net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// IsClosed reports whether err says that the peer closed or reset the connection.
func IsClosed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || tcpconn.IsReset(err) || errors.Is(err, syscall.EPIPE)
}

// IsStale reports whether err, the failure of a request, means that its connection was stale:
// the peer was closing the connection while it was idle, or had silently died. reused says
// that the connection had served an earlier request.
func IsStale(err error, reused bool) bool {
	return reused && IsClosed(err) || errors.As(err, new(SilentError))
}

// SilentError reports that the peer of a connection has silently died: pings go unanswered.
type SilentError string

func (e SilentError) Error() string { return string(e) }

// Timeout implements net.Error.
func (SilentError) Timeout() bool { return true }

// Temporary implements net.Error.
func (SilentError) Temporary() bool { return true }

// parentAnswers maps the status of a parent's answer to its cause. Every other status means
// ParentDialFailed.
var parentAnswers = map[int]Cause{
	http.StatusForbidden:          ParentDenies,
	http.StatusProxyAuthRequired:  ParentCredentials,
	http.StatusUnauthorized:       ParentCredentials, // tinyproxy sends it
	http.StatusTooManyRequests:    ParentLimits,
	http.StatusServiceUnavailable: ParentBusy,
	http.StatusGatewayTimeout:     ParentDialTimeout,
}

// ConcernsParent reports whether e is a failure of the connection to the parent, with a cause
// that a connection to any other host could have as well.
func (e *ParentError) ConcernsParent() bool {
	return e.Status == 0 && (e.Phase == parentConnecting || IsTLSError(e.Err)) // in TLS 1.3 the parent rejects our certificate after the handshake
}

// Cause returns the cause of a failure of the parent.
func (e *ParentError) Cause() Cause {
	switch {
	case e.Status != 0:
		if c, ok := parentAnswers[e.Status]; ok {
			return c
		}
		return ParentDialFailed
	case e.ConcernsParent():
		return CauseOf(e.Err)
	case e.Phase == parentHandshaking && IsTimeout(e.Err):
		return ParentHandshakeTimeout
	case e.Phase == parentHandshaking:
		return ParentHandshakeCutOff
	case e.socks:
		return e.socksCause()
	}
	return e.httpCause()
}

// httpCause returns the cause for which an HTTP parent gave no valid answer.
func (e *ParentError) httpCause() Cause {
	switch {
	case errors.Is(e.Err, errParentWantsTLS):
		return ParentWantsTLS
	case IsTimeout(e.Err):
		return ParentTimeout
	case errors.Is(e.Err, h1.ErrHeadTooLarge), errors.Is(e.Err, h1.ErrTooManyFields):
		return ParentHead
	case errors.Is(e.Err, errUnprocessed):
		return ParentFull
	case IsClosed(e.Err):
		return ParentCutOff
	}
	return ParentNotHTTP
}

// socksCause returns the cause for which a SOCKS parent gave no valid answer.
func (e *ParentError) socksCause() Cause {
	switch {
	case IsTimeout(e.Err):
		return ParentSOCKSTimeout
	case IsClosed(e.Err):
		return ParentSOCKSCutOff
	}
	return ParentNotSOCKS
}
