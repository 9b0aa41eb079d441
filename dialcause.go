// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

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

// dialCause says why there is no connection to a destination, unless the policy denies it.
type dialCause string

const (
	dialNoResources dialCause = "dial_no_resources" // this machine has no descriptors or local ports left
	dialTimeout     dialCause = "dial_timeout"
	dialRefused     dialCause = "dial_refused"
	dialUnroutable  dialCause = "dial_unroutable"
	dialFailed      dialCause = "dial_failed" // for another reason

	dnsTimeout   dialCause = "dns_timeout"
	dnsNoAddress dialCause = "dns_no_address" // the name exists
	dnsNoName    dialCause = "dns_no_name"    // the name does not exist
	dnsSilent    dialCause = "dns_silent"     // no DNS server could be asked
	dnsFailed    dialCause = "dns_failed"     // a DNS server answers with an error

	tlsUntrusted dialCause = "tls_untrusted" // the certificate is not trusted
	tlsAlerted   dialCause = "tls_alerted"   // the server sent an alert
	tlsFailed    dialCause = "tls_failed"    // for another reason

	// What the parent says about its attempt to connect.
	parentDenies      dialCause = "parent"
	parentLimits      dialCause = "parent_limits" // too many requests
	parentBusy        dialCause = "parent_busy"
	parentDialTimeout dialCause = "parent_dial_timeout"
	parentDialFailed  dialCause = "parent_dial_failed"
	parentCredentials dialCause = "parent_credentials" // it does not accept ours

	// What is wrong with the parent itself.
	parentHandshakeTimeout dialCause = "parent_handshake_timeout"
	parentHandshakeCutOff  dialCause = "parent_handshake_cut_off"
	parentWantsTLS         dialCause = "parent_wants_tls"
	parentTimeout          dialCause = "parent_timeout"
	parentHead             dialCause = "parent_head" // the head of its answer is too large
	parentFull             dialCause = "parent_full" // it accepts no more HTTP/2 streams
	parentCutOff           dialCause = "parent_cut_off"
	parentNotHTTP          dialCause = "parent_not_http"
	parentSOCKSTimeout     dialCause = "parent_socks_timeout"
	parentSOCKSCutOff      dialCause = "parent_socks_cut_off"
	parentNotSOCKS         dialCause = "parent_not_socks"
)

// dialCauseOf returns the cause of a failed attempt to connect.
func dialCauseOf(err error) dialCause {
	var (
		parent     *parentError
		unresolved *resolveError
	)
	switch {
	case errors.As(err, &parent):
		return parent.cause()
	case isTLSError(err):
		return tlsCause(err)
	case noDescriptors(err):
		return dialNoResources
	case errors.As(err, &unresolved):
		return unresolved.cause()
	case isTimeout(err):
		return dialTimeout
	case errors.Is(err, syscall.ECONNREFUSED):
		return dialRefused
	case isUnroutable(err):
		return dialUnroutable
	case errors.Is(err, syscall.EADDRNOTAVAIL): // all local ports are in use
		return dialNoResources
	}
	return dialFailed
}

// cause returns the cause of a failed look-up.
func (e *resolveError) cause() dialCause {
	answered := e.failure() != ""
	switch {
	case e.timeout():
		return dnsTimeout
	case e.notFound() && answered:
		return dnsNoName
	case e.notFound():
		return dnsNoAddress
	case answered:
		return dnsFailed
	}
	return dnsSilent
}

// isTLSError reports whether err is a TLS error. It checks the text, because most errors
// of crypto/tls have no type.
func isTLSError(err error) bool { return strings.Contains(err.Error(), "tls: ") }

// tlsCause returns the cause of a TLS error.
func tlsCause(err error) dialCause {
	var (
		untrusted *tls.CertificateVerificationError
		remote    *net.OpError
	)
	switch {
	case errors.As(err, &untrusted):
		return tlsUntrusted
	case errors.As(err, &remote) && remote.Op == "remote error":
		return tlsAlerted
	}
	return tlsFailed
}

// isTimeout reports whether err is a timeout.
func isTimeout(err error) bool {
	var timeout net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// isClosed reports whether err says that the peer closed or reset the connection.
func isClosed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || tcpconn.IsReset(err) || errors.Is(err, syscall.EPIPE)
}

// parentAnswers maps the status of a parent's answer to its cause. All others are
// parentDialFailed.
var parentAnswers = map[int]dialCause{
	http.StatusForbidden:          parentDenies,
	http.StatusProxyAuthRequired:  parentCredentials,
	http.StatusUnauthorized:       parentCredentials, // tinyproxy sends it
	http.StatusTooManyRequests:    parentLimits,
	http.StatusServiceUnavailable: parentBusy,
	http.StatusGatewayTimeout:     parentDialTimeout,
}

// concernsParent reports whether the cause of e is one of a connection to the parent
// itself, as to any other host.
func (e *parentError) concernsParent() bool {
	return e.status == 0 && (e.phase == parentConnecting || isTLSError(e.err)) // in TLS 1.3 the parent rejects our certificate after the handshake
}

// cause returns the cause of a failure of the parent.
func (e *parentError) cause() dialCause {
	switch {
	case e.status != 0:
		if c, ok := parentAnswers[e.status]; ok {
			return c
		}
		return parentDialFailed
	case e.concernsParent():
		return dialCauseOf(e.err)
	case e.phase == parentHandshaking && isTimeout(e.err):
		return parentHandshakeTimeout
	case e.phase == parentHandshaking:
		return parentHandshakeCutOff
	case e.socks:
		return e.socksCause()
	}
	return e.httpCause()
}

// httpCause returns the cause for which an HTTP parent gave no valid answer.
func (e *parentError) httpCause() dialCause {
	switch {
	case errors.Is(e.err, errParentWantsTLS):
		return parentWantsTLS
	case isTimeout(e.err):
		return parentTimeout
	case errors.Is(e.err, h1.ErrHeadTooLarge), errors.Is(e.err, h1.ErrTooManyFields):
		return parentHead
	case errors.Is(e.err, errUnprocessed):
		return parentFull
	case isClosed(e.err):
		return parentCutOff
	}
	return parentNotHTTP
}

// socksCause returns the cause for which a SOCKS parent gave no valid answer.
func (e *parentError) socksCause() dialCause {
	switch {
	case isTimeout(e.err):
		return parentSOCKSTimeout
	case isClosed(e.err):
		return parentSOCKSCutOff
	}
	return parentNotSOCKS
}
