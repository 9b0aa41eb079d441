// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"net/http"

	"github.com/asyncproxy/caddy-async-proxy/internal/policy"
)

// cause says why the proxy itself refused a request. It is more specific than the RFC 9209
// error type in Proxy-Status, which most causes share. Logs, metrics, the snapshot, events
// and placeholders have both.
type cause string

const (
	causeRateLimited        cause = "rate_limited"        // no token left
	causeBlocked            cause = "blocked"             // an operator has blocked the client
	causeLimiterUnavailable cause = "limiter_unavailable" // the shared limiter is unavailable
	causeRule               cause = "rule"                // a deny rule matches the destination
	causeDefault            cause = "default"             // the destination is closed by default
	causePort               cause = "port"                // the destination's port is closed
	causeClient             cause = "client"              // the client is not in the option clients
	causeAuthRequired       cause = "auth_required"       // a challenge: there were no credentials
	causeAuthFailed         cause = "auth_failed"         // the credentials were wrong
	causeFailedLogins       cause = "failed_logins"       // too many logins of the client failed: this one was not checked, or too late
	causeLoginsBusy         cause = "logins_busy"         // too many passwords are waiting to be checked
	causeTunnels            cause = "max_tunnels"         // all tunnels are in use
	causeTunnelsPerClient   cause = "tunnels_per_client"  // the client has all of its tunnels in use
	causeLoop               cause = "loop"                // the request has passed this proxy before
	causeParent             cause = "parent"              // the parent proxy refused
)

// causes maps each cause to its response: the status, the RFC 9209 error type and the
// sentence for the client. The name of a cause is also the value of the metric label cause.
var causes = map[cause]struct {
	status int
	kind   string
	text   string // a format; "" where the sentence depends on more than the cause
}{
	causeRateLimited:        {http.StatusTooManyRequests, policy.DeniedRequest, "Too many requests from your address; try again in %d s."},
	causeBlocked:            {http.StatusTooManyRequests, policy.DeniedRequest, "The operator of this proxy has blocked %s; try again in %d s."},
	causeLimiterUnavailable: {http.StatusServiceUnavailable, "proxy_internal_error", "The rate limiter is unavailable; try again shortly."},
	causeRule:               {http.StatusForbidden, policy.DeniedRequest, ""},
	causeDefault:            {http.StatusForbidden, policy.DeniedAddress, ""},
	causePort:               {http.StatusForbidden, policy.DeniedRequest, ""},
	causeClient:             {http.StatusForbidden, policy.DeniedRequest, "Your address, %s, may not use this proxy."},
	causeAuthRequired:       {http.StatusProxyAuthRequired, policy.DeniedRequest, "This proxy requires a user name and password."},
	causeAuthFailed:         {http.StatusProxyAuthRequired, policy.DeniedRequest, "The user name or password is wrong."},
	causeFailedLogins:       {http.StatusTooManyRequests, policy.DeniedRequest, "Too many failed logins from your address; try again in %d s."},
	causeLoginsBusy:         {http.StatusServiceUnavailable, "proxy_internal_error", "The proxy is busy with other logins; try again in %d s."},
	causeTunnels:            {http.StatusServiceUnavailable, "connection_limit_reached", "This proxy has reached its limit of open tunnels; try again later."},
	causeTunnelsPerClient:   {http.StatusTooManyRequests, "connection_limit_reached", "Your address has reached its limit of open tunnels; close one first."},
	causeLoop:               {http.StatusLoopDetected, "proxy_loop_detected", "Proxy loop: this request has already passed through %s."},
	causeParent:             {http.StatusForbidden, policy.DeniedRequest, ""},
}

// refusal returns the refusal for a cause, with its sentence formatted with args.
func (c cause) refusal(err error, args ...any) *refusal {
	row := causes[c]
	f := newRefusal(row.status, row.kind, err, row.text, args...)
	f.cause = c
	return f
}

// causeOf returns the cause of a refusal, or "" if the refusal is not the proxy's own
// decision, such as when an origin does not respond. If the refusal was not built from
// the table, its error determines the cause.
func causeOf(f *refusal) cause {
	if f.cause != "" {
		return f.cause
	}
	var (
		denied *policy.DeniedError
		parent *parentError
	)
	switch {
	case errors.As(f.err, &denied):
		return causeOfDenied(denied)
	case errors.As(f.err, &parent) && f.status == http.StatusForbidden:
		return causeParent
	}
	return ""
}

// causeOfDenied derives the cause from the name of the rule.
func causeOfDenied(e *policy.DeniedError) cause {
	switch {
	case e.Rule == "":
		return causeDefault
	case e.Rule == "ports" || e.Rule == "connect_ports":
		return causePort
	}
	return causeRule
}
