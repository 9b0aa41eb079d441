// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/internal/printable"
)

// problemType is the media type of problem details.
const problemType = "application/problem+json"

// problem is a refusal as problem details (RFC 9457), for clients that ask for JSON. Members that do
// not apply are absent.
type problem struct {
	Status     int    `json:"status"`
	Title      string `json:"title"`  // the status in words
	Detail     string `json:"detail"` // the sentence that other clients get
	Error      string `json:"error"`  // the error type in Proxy-Status
	Target     string `json:"target,omitempty"`
	Policy     string `json:"policy,omitempty"` // the name of the policy for the client
	Rule       string `json:"rule,omitempty"`   // what denies the target
	Hint       string `json:"hint,omitempty"`   // the option deny_hint
	RetryAfter int64  `json:"retry_after,omitempty"`
}

// problemOf returns the problem details of f. header is that of the response so far. A client that
// has not logged in, where it must, learns nothing of rules and policies.
func problemOf(v *transaction, f *refusal, header http.Header) problem {
	d := problem{
		Status: f.status, Title: http.StatusText(f.status), Detail: f.text, Error: f.errorType,
		Target: printable.Text(v.r.Host), Hint: f.hint,
	}
	if v.admitted {
		d.Policy, d.Rule = v.policy.name, f.rule()
	}
	if values := header["Retry-After"]; len(values) > 0 {
		d.RetryAfter, _ = strconv.ParseInt(values[0], 10, 64) // a parent's may be a date
	}
	return d
}

// encode returns the problem as JSON.
func (d problem) encode() []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // & and < are common in hints and details, and harmless in JSON
	_ = e.Encode(d)        // never fails: there are only strings and numbers
	return b.Bytes()
}

// prefersProblem reports whether an Accept field asks for JSON by name, and does not prefer plain
// text to it (RFC 9110 §12.5.1).
func prefersProblem(accept []string) bool {
	namesJSON := func(value string) bool { return strings.Contains(strings.ToLower(value), "json") }
	if !slices.ContainsFunc(accept, namesJSON) {
		return false
	}
	quality := make(map[string]float64)
	for _, value := range accept {
		for element := range strings.SplitSeq(value, ",") {
			name, q := acceptElement(element)
			quality[name] = max(quality[name], q)
		}
	}
	first := func(names ...string) float64 {
		for _, name := range names {
			if q, ok := quality[name]; ok {
				return q
			}
		}
		return 0
	}
	wanted := first(problemType, "application/json")
	return wanted > 0 && wanted >= first("text/plain", "text/*", "*/*")
}

// acceptElement returns the media range of an element of Accept, without parameters, and its quality.
// A malformed quality counts as 0.
func acceptElement(element string) (name string, q float64) {
	name, params, _ := strings.Cut(element, ";")
	q = 1
	for param := range strings.SplitSeq(params, ";") {
		if key, value, ok := strings.Cut(strings.TrimSpace(param), "="); ok && strings.EqualFold(key, "q") {
			var err error
			if q, err = strconv.ParseFloat(value, 64); err != nil || !(q >= 0 && q <= 1) {
				q = 0
			}
		}
	}
	return strings.ToLower(strings.TrimSpace(name)), q
}
