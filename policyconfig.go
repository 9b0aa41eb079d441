// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/selection"
)

// Policy sets options for the clients that meet its conditions, in place of the directive's. Of a
// proxy's policies, the first whose conditions all hold decides about a request. If none holds, the
// directive's own options do.
//
// A policy inherits the options that it does not set from the directive. Two options do not replace the
// directive's but add to them: the policy's rules are evaluated before those of the directive, and
// max_tunnels limits the policy's tunnels while the directive's limits all of them. A policy has its own
// buckets and tunnel counts, even if its limits are the same as the directive's.
type Policy struct {
	// The name in logs, metrics and the admin API: letters, digits, dots, hyphens and underscores.
	// It must not be that of an option, nor `default`.
	Name string `json:"name"`

	// The users the policy is for. A pattern may begin or end with `*`, which stands for any
	// characters. Default: all clients, also those without a user.
	Users []string `json:"users,omitempty"`

	// The addresses of the clients the policy is for, as addresses or CIDR ranges;
	// `private_ranges` stands for all private ranges. Default: all clients.
	Clients []string `json:"clients,omitempty"`

	// Request matchers, all of which must match. Default: all requests.
	MatchRaw caddy.ModuleMap `json:"match,omitempty" caddy:"namespace=http.matchers"`

	// Whether these clients need no credentials. Credentials that a client sends are checked
	// nevertheless. If the conditions name neither addresses nor users, only clients that could use
	// the proxy without authentication are served without credentials: by default, those with
	// private addresses. Default: false.
	Anonymous bool `json:"anonymous,omitempty"`

	Options
}

// directivePolicy stands for the directive's own options where a policy has to be named: in metrics
// and in parameters of the admin API.
const directivePolicy = "default"

// reservedPolicyNames are those that would be ambiguous in a log or in the admin API. The names of
// options are reserved, too.
var reservedPolicyNames = []string{directivePolicy, "none", "all", "policy", "users", "match", "anonymous"}

// checkPolicyName returns what is wrong with the name of a policy, if anything.
func checkPolicyName(name string) error {
	invalid := func(c rune) bool {
		return !strings.ContainsRune("-._0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", c)
	}
	if _, isOption := optionNamed(name); isOption || slices.Contains(reservedPolicyNames, name) {
		return fmt.Errorf("the name '%s' is reserved; expected another name", name)
	}
	if name == "" || len(name) > 64 || strings.ContainsFunc(name, invalid) {
		return fmt.Errorf("the name '%s' is not valid; expected up to 64 letters, digits, dots, hyphens and underscores", name)
	}
	return nil
}

// policyError reports what is wrong with a policy.
type policyError struct {
	index  int    // of the policy
	option string // at fault; "": the policy as a whole
	error
}

// Error implements error.
func (e *policyError) Error() string { return fmt.Sprintf("policies[%d]: %v", e.index, e.error) }

func (e *policyError) Unwrap() error { return e.error }

// checkPolicies returns the first mistake in the policies, if there is one.
func (h *Handler) checkPolicies() *policyError {
	conditions, err := h.policyConditions()
	if err != nil {
		return err
	}
	for i, y := range h.Policies {
		if option, err := h.checkPolicy(y, i, conditions[i].IsEmpty()); err != nil {
			return &policyError{i, option, err}
		}
	}
	return nil
}

// checkPolicy returns what is wrong with a policy, if anything, and with which of its options.
func (h *Handler) checkPolicy(y *Policy, i int, matchesAll bool) (option string, err error) {
	if err := checkPolicyName(y.Name); err != nil {
		return "", err
	}
	if slices.ContainsFunc(h.Policies[:i], func(other *Policy) bool { return other.Name == y.Name }) {
		return "", errors.New("there is another policy of this name; expected each name once")
	}
	if matchesAll && i < len(h.Policies)-1 {
		return "", fmt.Errorf("it has no conditions, so policy %s after it never applies; expected users, clients or match, or the policy to be the last", h.Policies[i+1].Name)
	}
	if len(y.Users) > 0 && !h.identifiesUsers() {
		return "users", errors.New("users: clients have no user; expected the option basic_auth, users_file or user_from as well, in the directive")
	}
	if y.Anonymous && !h.requiresLogin() {
		return "anonymous", errors.New("anonymous: no client needs credentials; expected the option basic_auth or users_file as well, in the directive")
	}
	own := &Handler{Options: y.Options}
	for _, o := range options {
		if o.inPolicy {
			if err := o.check(own); err != nil {
				return o.name, err
			}
		}
	}
	for n := range y.Rules {
		if err := y.Rules[n].check(); err != nil {
			return "", fmt.Errorf("rules[%d]: %w", n, err)
		}
	}
	full := *h
	full.setDefaults()
	merged, err := full.optionsOf(y)
	if err != nil {
		return "", err
	}
	full.Options, full.Policies = *merged, nil
	if err := full.checkTogether(); err != nil {
		return err.options[0], err
	}
	return "", nil
}

// identifiesUsers reports whether clients can have a user.
func (h *Handler) identifiesUsers() bool { return h.requiresLogin() || len(h.UserFrom) > 0 }

// policyConditions returns the conditions of the policies.
func (h *Handler) policyConditions() ([]selection.Conditions, *policyError) {
	all := make([]selection.Conditions, len(h.Policies))
	for i, y := range h.Policies {
		if y == nil { // null in JSON
			return nil, &policyError{i, "", errors.New("there is nothing in it; expected a name, conditions and options")}
		}
		for _, pattern := range y.Users {
			if !selection.ValidPattern(pattern) {
				return nil, &policyError{i, "users", invalidValue("users", expectedUsers, pattern)}
			}
		}
		all[i].Users = y.Users
		for _, text := range y.Clients {
			for _, cidr := range access.ExpandRanges(text) {
				prefix, err := access.ParsePrefix(cidr)
				if bits := access.CheckHostBits(cidr); err != nil || bits != nil {
					return nil, &policyError{i, "clients", invalidValue("clients", expectedRanges, text)}
				}
				all[i].Clients = append(all[i].Clients, prefix)
			}
		}
		if len(y.MatchRaw) > 0 {
			text, err := json.Marshal(y.MatchRaw)
			if err != nil {
				return nil, &policyError{i, "match", err}
			}
			all[i].Match = string(text)
		}
	}
	return all, nil
}

// describe returns the policy's conditions as an operator reads them. match are its matchers.
func (y *Policy) describe(match string) (conditions []string) {
	if len(y.Users) > 0 {
		conditions = append(conditions, "users "+strings.Join(y.Users, " "))
	}
	if len(y.Clients) > 0 {
		conditions = append(conditions, "clients "+strings.Join(y.Clients, " "))
	}
	if match != "" {
		conditions = append(conditions, "match "+match)
	}
	return conditions
}

const expectedUsers = "names of users, in which * at the beginning or the end stands for any characters"

// optionsOf returns the options in effect for a policy: its own, and those of the directive that it
// does not set, except for rules and max_tunnels. Neither may have been provisioned yet.
func (h *Handler) optionsOf(y *Policy) (*Options, error) {
	merged, err := optionFields(&h.Options)
	if err != nil {
		return nil, err
	}
	delete(merged, "rules")
	delete(merged, "max_tunnels")
	own, err := optionFields(&y.Options)
	if err != nil {
		return nil, err
	}
	if y.Upstream != nil && y.Upstream.URL == off {
		delete(merged, "no_upstream") // it has nothing to be an exception from
	}
	headers := merged["headers"]
	maps.Copy(merged, own)
	if merged["headers"], err = mergeHeaders(headers, own["headers"]); err != nil {
		return nil, err
	}
	if merged["headers"] == nil {
		delete(merged, "headers")
	}
	text, err := json.Marshal(merged)
	if err != nil {
		return nil, err
	}
	all := new(Options)
	err = json.Unmarshal(text, all)
	all.clearUndone()
	return all, err
}

// The values with which a policy resets an option of the directive to its default, such as no limit,
// no parent or no text.
const (
	off        = "off"
	allMethods = "all"
)

// clearUndone resets the options whose value is off, or for methods all, to their defaults.
func (o *Options) clearUndone() {
	if o.Upstream != nil && o.Upstream.URL == off {
		o.Upstream = nil
	}
	if slices.Contains(o.Methods, allMethods) {
		o.Methods = nil
	}
	if slices.Contains(o.ReportOnly, off) {
		o.ReportOnly = nil
	}
	if o.DenyHint == off {
		o.DenyHint = ""
	}
	o.TunnelMaxDuration = max(o.TunnelMaxDuration, 0)
}

// mergeHeaders returns the directive's headers, but with a policy's changes to requests or to
// responses, or both, in place of the directive's.
func mergeHeaders(directive, own json.RawMessage) (json.RawMessage, error) {
	if directive == nil || own == nil {
		return slices.Concat(directive, own), nil
	}
	fields := make(map[string]json.RawMessage)
	if err := errors.Join(json.Unmarshal(directive, &fields), json.Unmarshal(own, &fields)); err != nil {
		return nil, err
	}
	return json.Marshal(fields)
}

// optionFields returns the options that are set, by their names in JSON.
func optionFields(o *Options) (fields map[string]json.RawMessage, err error) {
	text, err := json.Marshal(o)
	if err == nil {
		err = json.Unmarshal(text, &fields)
	}
	return fields, err
}
