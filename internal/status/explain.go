// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

// Question is a request that a client might send. Explain says how it would be answered.
type Question struct {
	Client netip.Addr
	User   string // "": none
	Method string
	Target string // host and port for CONNECT; else a URL
}

// ReadQuestion reads a question from the parameters of the API. Without a method it is CONNECT for
// a host and port, and GET for a URL.
func ReadQuestion(values url.Values) (q Question, err error) {
	q = Question{User: values.Get("user"), Method: values.Get("method"), Target: values.Get("target")}
	if q.Target == "" {
		return q, errors.New("target: missing; expected host:port or a URL")
	}
	if values.Get("client") == "" {
		return q, errors.New("client: missing; expected the IP address of the client")
	}
	if q.Client, err = netip.ParseAddr(values.Get("client")); err != nil {
		return q, fmt.Errorf("client %q: expected an IP address", values.Get("client"))
	}
	if q.Method == "" {
		q.Method = http.MethodConnect
		if strings.Contains(q.Target, "://") {
			q.Method = http.MethodGet
		}
	}
	return q, nil
}

// Values returns the parameters that ReadQuestion reads q from.
func (q *Question) Values() url.Values {
	return url.Values{"client": {q.Client.String()}, "user": {q.User}, "method": {q.Method}, "target": {q.Target}}
}

// Explanations is the answer to a question, by site.
type Explanations struct {
	Sites []Explanation `json:"sites"`
}

// Explanation says how one proxy would treat a request, and why.
type Explanation struct {
	Site       string   `json:"site"`
	Client     string   `json:"client"`
	User       string   `json:"user,omitempty"`
	Method     string   `json:"method"`
	Target     string   `json:"target"`
	Decision   Outcome  `json:"decision"`
	Policy     string   `json:"policy"`               // "": the directive's own options
	Conditions []string `json:"conditions,omitempty"` // of the policy; all of them hold
	Checks     []Check  `json:"checks"`               // in the order in which they would be made
	Limits     *Limits  `json:"limits"`
	Parent     string   `json:"parent,omitempty"` // the URL of the parent proxy to connect through
	Notes      []string `json:"notes,omitempty"`
}

// Outcome is the result of a check, or of all checks together.
type Outcome string

// The outcomes.
const (
	Allowed    Outcome = "allowed"
	Denied     Outcome = "denied"
	Reported   Outcome = "reported"   // a denial that report_only suppresses
	Unresolved Outcome = "unresolved" // the name has no addresses
)

// Check is one of the checks of a request.
type Check struct {
	Check   string  `json:"check"`
	Outcome Outcome `json:"outcome"`
	Address string  `json:"address,omitempty"` // that is checked, if it is one
	Rule    string  `json:"rule,omitempty"`    // that decides, or the option that does
	Detail  string  `json:"detail,omitempty"`
	Hint    string  `json:"hint,omitempty"` // how the operator could allow it
}

// CheckAddress names the check of one address of the destination. It is enough if one of them is
// allowed.
const CheckAddress = "address"

// Limits are the limits of a client. Only a running proxy knows how much of them is left: Tokens
// is nil otherwise.
type Limits struct {
	Bucket  string        `json:"bucket"` // its owner: an address, a network, or a user
	Burst   int64         `json:"burst"`
	Refill  float64       `json:"refill"`
	Tokens  *float64      `json:"tokens,omitempty"`
	Tunnels []TunnelLimit `json:"tunnels"` // that are set
}

// TunnelLimit is a limit on open tunnels.
type TunnelLimit struct {
	Of   string `json:"of"` // process, policy or client
	Max  int    `json:"max"`
	Open *int   `json:"open,omitempty"`
}

// Decide sets the decision: the outcome of the first check that the request does not pass, or Allowed.
func (e *Explanation) Decide() {
	e.Decision = Allowed
	var addresses Outcome
	for _, c := range e.Checks {
		switch {
		case c.Outcome != Denied && c.Outcome != Unresolved:
			if c.Check == CheckAddress {
				addresses = Allowed
			}
		case c.Check != CheckAddress:
			e.Decision = c.Outcome
			return
		case addresses == "":
			addresses = Denied
		}
	}
	if addresses == Denied {
		e.Decision = Denied
	}
}

// Explain answers a question about the proxies that run.
func (v *View) Explain(ctx context.Context, values url.Values) (answer Explanations, err error) {
	q, err := ReadQuestion(values)
	if err != nil {
		return answer, err
	}
	if answer.Sites, err = v.in.Explain(ctx, q); err == nil && len(answer.Sites) == 0 {
		err = &APIError{http.StatusNotFound, errors.New("the running config has no async_proxy")}
	}
	return answer, err
}
