// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// cause says why the proxy responds itself, in place of an origin. Each cause has a row in
// the table causes. Packages egress and origin have causes of their own, for connection
// attempts and exchanges that fail.
type cause string

// Causes that logs, metrics, the snapshot, events and placeholders name.
const (
	causeRateLimited        cause = "rate_limited"             // no token left
	causeBlocked            cause = "blocked"                  // an operator has blocked the client
	causeLimiterUnavailable cause = "limiter_unavailable"      // the shared limiter is unavailable
	causeRule               cause = "rule"                     // a deny rule matches the destination
	causeNoRule             cause = "no_rule"                  // only "deny all" matches it; labelled as causeRule
	causeDefault            cause = "default"                  // the destination is closed by default
	causePort               cause = "port"                     // the destination's port is closed
	causeMethod             cause = "method"                   // the option methods does not list the method
	causeClient             cause = "client"                   // the client is not in the option clients
	causeAuthRequired       cause = "auth_required"            // a challenge: there were no credentials
	causeAuthFailed         cause = "auth_failed"              // the credentials were wrong
	causeFailedLogins       cause = "failed_logins"            // too many logins of the client failed: this one was not checked, or too late
	causeLoginsBusy         cause = "logins_busy"              // too many passwords are waiting to be checked
	causeTunnels            cause = "max_tunnels"              // all tunnels are in use
	causeTunnelsPerPolicy   cause = "tunnels_per_policy"       // all tunnels of the policy are in use
	causeTunnelsPerClient   cause = "tunnels_per_client"       // the client has all of its tunnels in use
	causeLoop               cause = "loop"                     // the request has passed this proxy before
	causeParent             cause = cause(egress.ParentDenies) // the parent proxy refused
)

// Causes without a label of their own: logs and metrics name only their error type, or a wider cause.
const (
	causeClientLeft      cause = "client_left"       // only for logs: the client has gone
	causeShuttingDown    cause = "shutting_down"     // Caddy exits
	causeConnectTarget   cause = "connect_target"    // CONNECT without a valid host and port
	causeConnectContent  cause = "connect_content"   // CONNECT with content
	causeTraceContent    cause = "trace_content"     // TRACE with content
	causeTarget          cause = "target"            // a request that cannot be forwarded
	causeHostField       cause = "host_field"        // header_up has made the Host field invalid
	causeHeaderLines     cause = "header_lines"      // too many of them
	causeEchoMethod      cause = "echo_method"       // the parent might reveal fields that are for it alone
	causeEchoMaxForwards cause = "echo_max_forwards" // the same
	causeEchoParent      cause = "echo_parent"       // the same
	causeNoProtocol      cause = "no_protocol"       // an extended CONNECT that no handler answers
	causeNoHosts         cause = "no_hosts"          // no handler answers, and the option hosts is not set
	causeNoHandler       cause = "no_handler"        // no handler answers
)

// Error types of denials.
const (
	deniedAddress = "destination_ip_prohibited"
	deniedRequest = "http_request_denied"
)

// localReply is the response to a cause.
type localReply struct {
	status    int
	errorType string // of RFC 9209 §2.3, for the Proxy-Status field
	label     cause  // the cause in logs and metrics; "": they name only the error type
	outcome   string // of the dial, for the metric; "": there was no dial
	text      string // the sentence for the client, a format
}

// causes maps each cause to its response. In the texts of failed connection attempts and
// exchanges, %[1]s is the host that failed, and %[2]s a detail.
var causes = map[cause]localReply{
	causeRateLimited:        {429, deniedRequest, causeRateLimited, "", "Too many requests from your address; try again in %d s."},
	causeBlocked:            {429, deniedRequest, causeBlocked, "", "The operator of this proxy has blocked %s; try again in %d s."},
	causeLimiterUnavailable: {503, "proxy_internal_error", causeLimiterUnavailable, "", "The rate limiter is unavailable; try again shortly."},
	causeRule:               {403, deniedRequest, causeRule, "denied", "Denied by proxy: a rule denies %s."},
	causeNoRule:             {403, deniedRequest, causeRule, "denied", "Denied by proxy: no rule allows %s."},
	causeDefault:            {403, deniedAddress, causeDefault, "denied", "Denied by proxy: no rule allows %s."},
	causePort:               {403, deniedRequest, causePort, "denied", "Denied by proxy: %s is closed."},
	causeMethod:             {403, deniedRequest, causeMethod, "", "Denied by proxy: the method %s is not allowed."},
	causeClient:             {403, deniedRequest, causeClient, "", "Denied by proxy: your address, %s, may not use it."},
	causeAuthRequired:       {407, deniedRequest, causeAuthRequired, "", "This proxy requires a user name and password."},
	causeAuthFailed:         {407, deniedRequest, causeAuthFailed, "", "The user name or password is wrong."},
	causeFailedLogins:       {429, deniedRequest, causeFailedLogins, "", "Too many failed logins from your address; try again in %d s."},
	causeLoginsBusy:         {503, "proxy_internal_error", causeLoginsBusy, "", "The proxy is busy with other logins; try again in %d s."},
	causeTunnels:            {503, "connection_limit_reached", causeTunnels, "", "This proxy has reached its limit of open tunnels; try again later."},
	causeTunnelsPerPolicy:   {503, "connection_limit_reached", causeTunnelsPerPolicy, "", "All tunnels of your policy are in use; try again later."},
	causeTunnelsPerClient:   {429, "connection_limit_reached", causeTunnelsPerClient, "", "Your address has reached its limit of open tunnels; close one first."},
	causeLoop:               {508, "proxy_loop_detected", causeLoop, "", "Proxy loop: this request has already passed through %s."},

	causeClientLeft:              {statusClientClosedRequest, "connection_terminated", "", "", "the client left"},
	causeShuttingDown:            {503, "proxy_internal_error", "", "", "This proxy is shutting down; try again later."},
	causeConnectTarget:           {400, "http_request_error", "", "", "CONNECT needs a host and a port, such as example.com:443: %v."},
	causeConnectContent:          {400, "http_request_error", "", "", "A CONNECT request must not have content."},
	causeTraceContent:            {400, "http_request_error", "", "", "A TRACE request must not have content."},
	causeTarget:                  {400, "http_request_error", "", "", "This request cannot be forwarded: %v."},
	causeHostField:               {400, "http_request_error", "", "", "This request cannot be forwarded: its Host field would be invalid."},
	causeHeaderLines:             {431, "http_request_error", "", "", "This request has more than %d header lines."},
	cause(origin.ContentTimeout): {408, "http_request_error", "", "", "The content of the request did not arrive in time."},
	cause(origin.ContentInvalid): {400, "http_request_error", "", "", "The content of the request is incomplete or malformed."},
	causeEchoMethod:              {403, deniedRequest, causeDefault, "", "Denied by proxy: the answer to %s would reveal what this proxy tells only its parent proxy."},
	causeEchoMaxForwards:         {403, deniedRequest, causeDefault, "", "Denied by proxy: the answer to OPTIONS with Max-Forwards could reveal what this proxy tells only its parent proxy."},
	causeEchoParent:              {403, deniedRequest, causeDefault, "", "Denied by proxy: the parent proxy itself, %s, cannot be a destination."},
	causeNoProtocol:              {501, "proxy_internal_response", "", "", "The protocol of this CONNECT request is not supported here."},
	causeNoHosts:                 {421, "http_request_error", "", "", "This is a proxy. It has no page of its own here, and it does not forward http:// URLs over HTTP/%d."},
	causeNoHandler:               {421, "http_request_error", "", "", "This is a proxy, and it has no page of its own here. A proxy request must name a full URL."},

	cause(egress.DialNoResources): {503, "proxy_internal_error", "", "failed", "This proxy cannot open another connection now; try again later."},
	cause(egress.DialTimeout):     {504, "connection_timeout", "", "timeout", "%[1]s did not accept a connection in time."},
	cause(egress.DialRefused):     {502, "connection_refused", "", "refused", "%[1]s refused the connection."},
	cause(egress.DialUnroutable):  {502, "destination_ip_unroutable", "", "failed", "There is no route to %[1]s."},
	cause(egress.DialFailed):      {502, "destination_unavailable", "", "failed", "Could not connect to %[1]s."},
	cause(egress.DNSTimeout):      {504, "dns_timeout", "", "timeout", "%[1]s could not be resolved in time."},
	cause(egress.DNSNoAddress):    {502, "dns_error", "", "dns", "%[1]s could not be resolved: the name has no address."},
	cause(egress.DNSNoName):       {502, "dns_error", "", "dns", "%[1]s could not be resolved: there is no such name."},
	cause(egress.DNSSilent):       {503, "dns_error", "", "dns", "%[1]s could not be resolved: no DNS server answers."},
	cause(egress.DNSFailed):       {503, "dns_error", "", "dns", "%[1]s could not be resolved: the DNS server answers %[2]s."},
	cause(egress.TLSUntrusted):    {502, "tls_certificate_error", "", "failed", "The certificate of %[1]s is not trusted."},
	cause(egress.TLSAlerted):      {502, "tls_alert_received", "", "failed", "%[1]s ended the TLS connection with %[2]s."},
	cause(egress.TLSFailed):       {502, "tls_protocol_error", "", "failed", "%[1]s does not speak TLS, or only insecure versions of it."},

	causeParent:                          {403, deniedRequest, causeParent, "failed", "Denied by the parent proxy: it does not connect this proxy to %[1]s."},
	cause(egress.ParentLimits):           {429, "destination_unavailable", causeParent, "failed", "The parent proxy limits requests, and did not connect to %[1]s; try again later."},
	cause(egress.ParentBusy):             {503, "destination_unavailable", "", "failed", "The parent proxy is too busy to connect to %[1]s; try again later."},
	cause(egress.ParentDialTimeout):      {504, "connection_timeout", "", "failed", "The parent proxy could not connect to %[1]s in time."},
	cause(egress.ParentDialFailed):       {502, "destination_unavailable", "", "failed", "The parent proxy could not connect to %[1]s."},
	cause(egress.ParentCredentials):      {502, "proxy_configuration_error", "", "failed", "The parent proxy does not accept this proxy's credentials."},
	cause(egress.ParentHandshakeTimeout): {504, "connection_timeout", "", "timeout", "The parent proxy did not complete the TLS handshake in time."},
	cause(egress.ParentHandshakeCutOff):  {502, "tls_protocol_error", "", "failed", "The parent proxy closed the connection during the TLS handshake."},
	cause(egress.ParentWantsTLS):         {502, "http_protocol_error", "", "failed", "The parent proxy expects https://, but this proxy uses http://."},
	cause(egress.ParentTimeout):          {504, "http_response_timeout", "", "timeout", "The parent proxy did not answer in time."},
	cause(egress.ParentHead):             {502, "http_response_header_section_size", "", "failed", "The parent proxy did not answer with a valid HTTP response: %[2]s."},
	cause(egress.ParentFull):             {503, "destination_unavailable", "", "failed", "The parent proxy accepts no more requests; try again later."},
	cause(egress.ParentCutOff):           {502, "http_response_incomplete", "", "failed", "The parent proxy closed the connection before its answer was complete."},
	cause(egress.ParentNotHTTP):          {502, "http_protocol_error", "", "failed", "The parent proxy did not answer with a valid HTTP response."},
	cause(egress.ParentSOCKSTimeout):     {504, "connection_read_timeout", "", "timeout", "The parent proxy did not answer in time."},
	cause(egress.ParentSOCKSCutOff):      {502, "connection_terminated", "", "failed", "The parent proxy closed the connection before its answer was complete."},
	cause(egress.ParentNotSOCKS):         {502, "destination_unavailable", "", "failed", "The parent proxy did not give a valid SOCKS answer."},

	cause(origin.ResponseInvalid):  {502, "http_protocol_error", "", "", "%[1]s did not answer with a valid HTTP response: %[2]s."},
	cause(origin.ResponseNotHTTP):  {502, "http_protocol_error", "", "", "%[1]s did not answer with a valid HTTP response."},
	cause(origin.ResponseHead):     {502, "http_response_header_section_size", "", "", "%[1]s did not answer with a valid HTTP response: %[2]s."},
	cause(origin.ResponseTimeout):  {504, "http_response_timeout", "", "", "%[1]s did not answer in time."},
	cause(origin.ResponseCutOff):   {502, "http_response_incomplete", "", "", "%[1]s closed the connection before its response was complete."},
	cause(origin.ConnectionSilent): {504, "connection_read_timeout", "", "", "%[1]s has stopped answering on its connection; try again."},
}

// statusClientClosedRequest is for logs only: the client disconnected before it had the
// complete response. The number is nginx's.
const statusClientClosedRequest = 499

// refusal is a response that the proxy generates itself, in place of one from an origin.
type refusal struct {
	status    int
	errorType string // the error type of RFC 9209 §2.3, for the Proxy-Status field
	text      string // one sentence for the user, without internals
	hint      string // what follows the sentence of a denial: the option deny_hint; "": nothing
	err       error  // what happened, for the log; may be nil
	cause     cause  // what logs and metrics name as the cause; may be ""
	params    string // parameters of the Proxy-Status field for the error type, each preceded by "; "
	setup     bool   // the response says how to use the proxy

	priorMembers string // members of Proxy-Status that precede ours; "": none
	retryAfter   string // the Retry-After field; "": none
}

// Error returns the text for the client. Error routes show it as {err.message}, so it does not
// contain internals; those are in the log line.
func (f *refusal) Error() string {
	if f.hint == "" {
		return f.text
	}
	return f.text + " " + f.hint
}

// isDenial reports whether this proxy's own config, and not its parent, denies the request.
func (f *refusal) isDenial() bool { return f.status == http.StatusForbidden && f.cause != causeParent }

// rule returns the rule that denied the destination, as in the log line, or "" if none did.
func (f *refusal) rule() string {
	var denied *access.DeniedError
	if !errors.As(f.err, &denied) {
		return ""
	}
	return ruleOf(denied)
}

func (f *refusal) Unwrap() error { return f.err }

// refusal returns the refusal for a cause, with its sentence formatted with args. err is what
// happened, for the log; it may be nil.
func (c cause) refusal(err error, args ...any) *refusal {
	row := causes[c]
	f := &refusal{status: row.status, errorType: row.errorType, err: err, cause: row.label, text: row.text}
	if strings.Contains(row.text, "%") {
		f.text = fmt.Sprintf(row.text, printableArgs(args)...)
	}
	return f
}

// printableArgs makes the texts among args printable and bounds their length: they may be what a peer
// has sent.
func printableArgs(args []any) []any {
	for i, arg := range args {
		switch arg := arg.(type) {
		case string:
			if text := printable.Long(arg); text != arg {
				args[i] = text
			}
		case error:
			args[i] = printable.Error(arg)
		}
	}
	return args
}

// failure returns the refusal for a cause that concerns host: a failed connection attempt or
// exchange. err is what happened. Its details go into the sentence and into the parameters of
// Proxy-Status.
func (c cause) failure(err error, host string) *refusal {
	var (
		unresolved *egress.ResolveError
		wrong      h1.ProtocolError
	)
	detail, params := "", ""
	switch {
	case c == cause(egress.TLSAlerted):
		detail, params = alertDetail(err)
	case errors.As(err, &unresolved):
		host, _, _ = hostport.Split(host)
		if detail = unresolved.Failure(); detail != "" {
			params = fmt.Sprintf("; rcode=%q", detail)
		}
	case errors.As(err, &wrong): // its text may quote what the origin sent
		detail = wrong.Error()
	default:
		detail = err.Error()
	}
	f := c.refusal(err, host, detail)
	f.params = params
	return f
}

// clientDisconnected returns the refusal for a client that has disconnected. It is only logged.
func clientDisconnected(err error) *refusal { return causeClientLeft.refusal(err) }

// causeOfDenied derives the cause from the name of the rule.
func causeOfDenied(e *access.DeniedError) cause {
	switch {
	case e.DeniesAll():
		return causeNoRule
	case e.Rule == "":
		return causeDefault
	case e.Rule == "ports" || e.Rule == "connect_ports":
		return causePort
	}
	return causeRule
}

// tunnelRefusal returns the response for when a limit does not allow another tunnel.
func tunnelRefusal(err *tunnel.LimitError) *refusal {
	if err.PerClient {
		return causeTunnelsPerClient.refusal(&access.DeniedError{Rule: "max_tunnels per_client", Reason: err.Error(), Hint: "raise max_tunnels per_client"})
	}
	if err.PerPolicy {
		return causeTunnelsPerPolicy.refusal(&access.DeniedError{Rule: "max_tunnels", Reason: err.Error(), Hint: "raise max_tunnels of the policy"})
	}
	return causeTunnels.refusal(&access.DeniedError{Rule: "max_tunnels", Reason: err.Error(), Hint: "raise max_tunnels"})
}

// dialRefusal returns the response that tells the client why there is no connection to
// host. ctx is the request's.
func dialRefusal(ctx context.Context, err error, host string) *refusal {
	var (
		denied *access.DeniedError
		parent *egress.ParentError
	)
	switch {
	case ctx.Err() != nil:
		return clientDisconnected(context.Cause(ctx))
	case errors.As(err, &denied):
		return causeOfDenied(denied).refusal(err, denied.Subject(host))
	case errors.As(err, &parent):
		return parentRefusal(parent, host)
	}
	return cause(egress.CauseOf(err)).failure(err, host)
}

// parentRefusal returns the response that tells the client why the parent could not connect
// to host. It passes on the parent's Proxy-Status and Retry-After.
func parentRefusal(e *egress.ParentError, host string) *refusal {
	if e.ConcernsParent() {
		host = "the parent proxy"
	}
	f := cause(e.Cause()).failure(e.Err, host)
	f.text = strings.ToUpper(f.text[:1]) + f.text[1:]
	f.err = e
	prior, retry := e.PassedOn()
	f.priorMembers = prior
	if f.status == http.StatusTooManyRequests || f.status == http.StatusServiceUnavailable {
		f.retryAfter = retry
	}
	return f
}

// dialOutcome returns the outcome of an attempt to connect, for the metric. ctx is that of
// the attempt.
func dialOutcome(ctx context.Context, err error) string {
	if err == nil {
		return "ok" // the fast path
	}
	var denied *access.DeniedError
	switch {
	case ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded): // an exceeded deadline is the dial timeout
		return "canceled"
	case errors.As(err, &denied):
		return causes[causeOfDenied(denied)].outcome
	}
	return causes[cause(egress.CauseOf(err))].outcome
}

// forwardRefusal returns the refusal for a request that got no response from the origin.
func forwardRefusal(r *http.Request, err error) *refusal {
	switch {
	case errors.As(err, new(*origin.RequestBodyError)) && hasLeft(err):
		return clientDisconnected(err)
	case errors.As(err, new(*origin.RequestBodyError)):
		return cause(origin.CauseOf(err)).refusal(err)
	case r.Context().Err() != nil, errors.As(err, new(*origin.DialError)), errors.As(err, new(*egress.ParentError)):
		return dialRefusal(r.Context(), err, r.Host)
	}
	return cause(origin.CauseOf(err)).failure(err, r.Host)
}

// hasLeft reports whether err, from reading the content of a request, says that no response can reach the
// client any longer: it has reset its connection or its stream, or its HTTP/2 or HTTP/3 connection has ended.
func hasLeft(err error) bool {
	var h3 *http3.Error
	return tcpconn.IsReset(err) || errors.As(err, new(http2.StreamError)) || errors.As(err, &h3) && h3.Remote ||
		errors.Is(err, net.ErrClosed) || // quic-go's errors of connections
		strings.HasSuffix(err.Error(), "client disconnected") // the HTTP/2 server does not export this error
}

// alertDetail returns the name of a TLS alert, and parameters for the Proxy-Status field.
// crypto/tls does not export the type of a received alert, but its text equals that of the
// AlertError.
func alertDetail(err error) (detail, params string) {
	var remote *net.OpError
	if !errors.As(err, &remote) {
		return "an alert", ""
	}
	for id := range 256 {
		if tls.AlertError(id).Error() == remote.Err.Error() {
			name := cmp.Or(tlsAlerts[uint8(id)], "unknown alert "+strconv.Itoa(id))
			return "the alert " + name, fmt.Sprintf("; alert-id=%d; alert-message=%q", id, name)
		}
	}
	return "an alert", ""
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
