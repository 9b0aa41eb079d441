// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// refusal is a response that the proxy generates itself, in place of one from an origin.
type refusal struct {
	status    int
	errorType string // the error type of RFC 9209 §2.3, for the Proxy-Status field
	text      string // one sentence for the user, without internals
	err       error  // what happened, for the log; may be nil
	cause     cause  // ""; causeOf derives it from err
	params    string // further parameters of the Proxy-Status field, each preceded by "; "

	priorMembers string // members of Proxy-Status that precede ours; "": none
	retryAfter   string // the Retry-After field; "": none
}

// newRefusal returns a refusal with a formatted text.
func newRefusal(status int, kind string, err error, format string, args ...any) *refusal {
	return &refusal{status: status, errorType: kind, err: err, text: fmt.Sprintf(format, args...)}
}

// Error returns the sentence for the client. Error routes show it as {err.message}, so it
// does not contain internals; those are in the log line.
func (f *refusal) Error() string { return f.text }

func (f *refusal) Unwrap() error { return f.err }

// sendRefusal sends f to the client: through the site's error routes if there are any,
// otherwise directly as one line of text. The machine-readable fields are set in both
// cases.
func (h *Handler) sendRefusal(w http.ResponseWriter, r *http.Request, f *refusal) error {
	status := h.proxyStatus(f.errorType) + f.params
	if f.priorMembers != "" {
		status = f.priorMembers + ", " + status
	}
	if f.retryAfter != "" {
		w.Header()["Retry-After"] = []string{f.retryAfter}
	}
	return h.writeRefusal(w, r, f, status, append([]byte(f.text), '\n'))
}

// proxyStatus returns the value of the Proxy-Status field (RFC 9209).
func (h *Handler) proxyStatus(kind string) string { return h.name + "; error=" + kind }

// writeRefusal is answer with a prepared Proxy-Status value and body. Each response gets
// field values of its own, because Caddy's header directive modifies values in place.
func (h *Handler) writeRefusal(w http.ResponseWriter, r *http.Request, f *refusal, proxyStatus string, body []byte) error {
	header := w.Header()
	header["Proxy-Status"] = []string{proxyStatus}
	closes := hasUnreadInput(r)
	if closes {
		header["Connection"] = []string{"close"}
	}
	if hasErrorRoutes(r) {
		h.tunnels.lingering.dropContent(w, r)
		return caddyhttp.Error(f.status, f)
	}
	if closes { // for closeInStages
		header["Content-Length"] = []string{strconv.Itoa(len(body))}
	}
	header["Content-Type"] = []string{"text/plain; charset=utf-8"}
	startWriteIdleTimeout(r)
	w.WriteHeader(f.status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // fails only if the client has disconnected
	}
	return nil
}

// hasUnreadInput reports whether an HTTP/1 connection must close after a response to r because
// the client may have sent data that nothing reads: the request's content, or bytes after
// a CONNECT for a tunnel that was not opened. They would be parsed as another request, or
// read before the response is sent. An HTTP/1.0 connection closes in any case (RFC 9112
// §9.3).
func hasUnreadInput(r *http.Request) bool {
	return r.ProtoMajor == 1 && (r.ContentLength != 0 || r.Method == http.MethodConnect || r.ProtoMinor == 0)
}

// forwardRefusal returns the refusal for a request that got no response from the origin.
func forwardRefusal(r *http.Request, err error) *refusal {
	host := r.Host
	var (
		body     *bodyError
		dial     *dialError
		parent   *parentError
		timeout  net.Error
		wrong    protocolError
		answered = "%s did not answer with a valid HTTP response"
	)
	switch {
	case errors.As(err, &body) && errors.Is(body, os.ErrDeadlineExceeded):
		return newRefusal(http.StatusRequestTimeout, "http_request_error", err, "The content of the request did not arrive in time.")
	case errors.As(err, &body):
		return newRefusal(http.StatusBadRequest, "http_request_error", err, "The content of the request is incomplete or malformed.")
	case r.Context().Err() != nil:
		return clientDisconnected(context.Cause(r.Context()))
	case errors.As(err, &dial):
		return dialRefusal(r.Context(), err, host)
	case errors.As(err, &parent):
		return parent.refusal(r.Context(), host)
	case errors.As(err, &wrong): // its text may quote what the origin sent
		return newRefusal(http.StatusBadGateway, "http_protocol_error", err, answered+": %v.", host, wrong)
	case isTLSError(err):
		return tlsRefusal(err, host)
	case errors.Is(err, errHeadTooLarge), errors.Is(err, errTooManyFields), errors.Is(err, errHeldHeads):
		return newRefusal(http.StatusBadGateway, "http_response_header_section_size", err, answered+": %v.", host, err)
	case errors.Is(err, errServerSilent):
		return newRefusal(http.StatusGatewayTimeout, "connection_read_timeout", err, "%s has stopped answering on its connection; try again.", host)
	case errors.As(err, &timeout) && timeout.Timeout():
		return newRefusal(http.StatusGatewayTimeout, "http_response_timeout", err, "%s did not answer in time.", host)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return newRefusal(http.StatusBadGateway, "http_response_incomplete", err, "%s closed the connection before its response was complete.", host)
	default:
		return newRefusal(http.StatusBadGateway, "http_protocol_error", err, answered+".", host)
	}
}

// isTLSError reports whether err is a TLS error. It checks the text, because most errors
// of crypto/tls have no type.
func isTLSError(err error) bool { return strings.Contains(err.Error(), "tls: ") }

// tlsRefusal returns the refusal for a failed TLS connection to host.
func tlsRefusal(err error, host string) *refusal {
	var (
		cert   *tls.CertificateVerificationError
		remote *net.OpError
	)
	switch {
	case errors.As(err, &cert):
		return newRefusal(http.StatusBadGateway, "tls_certificate_error", err, "The certificate of %s is not trusted.", host)
	case errors.As(err, &remote) && remote.Op == "remote error":
		return alertRefusal(err, remote.Err.Error(), host)
	}
	return newRefusal(http.StatusBadGateway, "tls_protocol_error", err, "%s does not speak TLS, or only insecure versions of it.", host)
}

// alertRefusal returns the refusal for a TLS alert from host. crypto/tls does not export
// the type of a received alert, but its text equals that of the AlertError.
func alertRefusal(err error, text, host string) *refusal {
	for id := range 256 {
		if tls.AlertError(id).Error() != text {
			continue
		}
		name := cmp.Or(tlsAlerts[uint8(id)], "unknown alert "+strconv.Itoa(id))
		f := newRefusal(http.StatusBadGateway, "tls_alert_received", err, "%s ended the TLS connection with the alert %s.", host, name)
		f.params = fmt.Sprintf("; alert-id=%d; alert-message=%q", id, name)
		return f
	}
	return newRefusal(http.StatusBadGateway, "tls_alert_received", err, "%s ended the TLS connection with an alert.", host)
}

// tlsAlerts maps TLS alerts to their names in IANA's registry.
var tlsAlerts = map[uint8]string{
	0: "close_notify", 10: "unexpected_message", 20: "bad_record_mac", 21: "decryption_failed", 22: "record_overflow",
	30: "decompression_failure", 40: "handshake_failure", 41: "no_certificate", 42: "bad_certificate",
	43: "unsupported_certificate", 44: "certificate_revoked", 45: "certificate_expired", 46: "certificate_unknown",
	47: "illegal_parameter", 48: "unknown_ca", 49: "access_denied", 50: "decode_error", 51: "decrypt_error",
	52: "too_many_cids_requested", 60: "export_restriction", 70: "protocol_version", 71: "insufficient_security",
	80: "internal_error", 86: "inappropriate_fallback", 90: "user_canceled", 100: "no_renegotiation",
	109: "missing_extension", 110: "unsupported_extension", 111: "certificate_unobtainable", 112: "unrecognized_name",
	113: "bad_certificate_status_response", 114: "bad_certificate_hash_value", 115: "unknown_psk_identity",
	116: "certificate_required", 117: "general_error", 120: "no_application_protocol", 121: "ech_required",
}

// answerMaxForwards responds to a TRACE or OPTIONS request whose Max-Forwards is used up.
func answerMaxForwards(w http.ResponseWriter, r *http.Request) (int, error) {
	if hasUnreadInput(r) {
		w.Header()["Connection"] = []string{"close"}
	}
	startWriteIdleTimeout(r)
	if r.Method == http.MethodOptions {
		w.Header()["Allow"] = []string{"CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, TRACE"}
		w.Header()["Content-Length"] = []string{"0"}
		w.WriteHeader(http.StatusOK)
		return http.StatusOK, nil
	}
	if r.ContentLength != 0 {
		return 0, newRefusal(http.StatusBadRequest, "http_request_error", nil, "A TRACE request must not have content.")
	}
	// RFC 9110 §9.3.8: the request as it was received, without secrets.
	for _, name := range []string{"Authorization", "Cookie", "Proxy-Authorization"} {
		delete(r.Header, name)
	}
	w.Header()["Content-Type"] = []string{"message/http"}
	w.WriteHeader(http.StatusOK)
	_, _ = fmt.Fprintf(w, "TRACE %s %s\r\nHost: %s\r\n", r.RequestURI, r.Proto, r.Host)
	_ = r.Header.Write(w)
	_, _ = io.WriteString(w, "\r\n")
	return http.StatusOK, nil
}
