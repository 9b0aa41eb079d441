// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"net/http"
)

// cause says why the proxy itself refused a request. It is finer than the error
// type of RFC 9209 in Proxy-Status, which is the same for most of them. Logs,
// metrics, the snapshot, events and placeholders have both.
type cause string

const (
	causeRateLimited      cause = "rate_limited"        // no token left
	causeBlocked          cause = "blocked"             // an operator has blocked the client
	causeUncounted        cause = "limiter_unavailable" // the shared limiter does not answer
	causeRule             cause = "rule"                // a deny rule names the destination
	causeDefault          cause = "default"             // the destination is closed by default
	causePort             cause = "port"                // the destination's port is closed
	causeClient           cause = "client"              // the client is not in the option clients
	causeAuthRequired     cause = "auth_required"       // a challenge: there were no credentials
	causeAuthFailed       cause = "auth_failed"         // the credentials were wrong
	causeFailedLogins     cause = "failed_logins"       // so many logins of the client have failed that this one was not checked, or too late
	causeLoginsBusy       cause = "logins_busy"         // too many passwords wait to be checked
	causeTunnels          cause = "max_tunnels"         // all tunnels are in use
	causeTunnelsPerClient cause = "tunnels_per_client"  // the client has all of its tunnels in use
	causeLoop             cause = "loop"                // the request has passed this proxy before
	causeParent           cause = "parent"              // the parent proxy refused
)

// causes maps each cause to the answer: the status, the error type of RFC 9209
// and the sentence for the client. The name of a cause is also the value of the
// label cause in the metrics.
var causes = map[cause]struct {
	status int
	kind   string
	text   string // a format; "" where the sentence depends on more than the cause
}{
	causeRateLimited:      {http.StatusTooManyRequests, deniedRequest, "Too many requests from your address; try again in %d s."},
	causeBlocked:          {http.StatusTooManyRequests, deniedRequest, "The operator of this proxy has blocked %s; try again in %d s."},
	causeUncounted:        {http.StatusServiceUnavailable, "proxy_internal_error", "The rate limiter is unavailable; try again shortly."},
	causeRule:             {http.StatusForbidden, deniedRequest, ""},
	causeDefault:          {http.StatusForbidden, deniedAddress, ""},
	causePort:             {http.StatusForbidden, deniedRequest, ""},
	causeClient:           {http.StatusForbidden, deniedRequest, "Your address, %s, may not use this proxy."},
	causeAuthRequired:     {http.StatusProxyAuthRequired, deniedRequest, "This proxy requires a user name and password."},
	causeAuthFailed:       {http.StatusProxyAuthRequired, deniedRequest, "The user name or password is wrong."},
	causeFailedLogins:     {http.StatusTooManyRequests, deniedRequest, "Too many failed logins from your address; try again in %d s."},
	causeLoginsBusy:       {http.StatusServiceUnavailable, "proxy_internal_error", "The proxy is busy with other logins; try again in %d s."},
	causeTunnels:          {http.StatusServiceUnavailable, "connection_limit_reached", "This proxy has reached its limit of open tunnels; try again later."},
	causeTunnelsPerClient: {http.StatusTooManyRequests, "connection_limit_reached", "Your address has reached its limit of open tunnels; close one first."},
	causeLoop:             {http.StatusLoopDetected, "proxy_loop_detected", "Proxy loop: this request has already passed through %s."},
	causeParent:           {http.StatusForbidden, deniedRequest, ""},
}

// refusal makes the refusal of a cause, whose sentence is formatted with args.
func (c cause) refusal(err error, args ...any) *refusal {
	row := causes[c]
	f := refuse(row.status, row.kind, err, row.text, args...)
	f.cause = c
	return f
}

// causeOf returns the cause of a refusal, or "" if it is not the proxy's own
// decision, such as when an origin does not answer. A refusal that was not made
// from the table is told by its error.
func causeOf(f *refusal) cause {
	if f.cause != "" {
		return f.cause
	}
	var (
		denied *deniedError
		parent *parentError
	)
	switch {
	case errors.As(f.err, &denied):
		return denied.cause()
	case errors.As(f.err, &parent) && f.status == http.StatusForbidden:
		return causeParent
	}
	return ""
}

// cause tells by the name of the rule.
func (e *deniedError) cause() cause {
	switch {
	case e.rule == "":
		return causeDefault
	case e.rule == "ports" || e.rule == "connect_ports":
		return causePort
	}
	return causeRule
}
