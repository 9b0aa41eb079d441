// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"math"
	"slices"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// policyParser parses a policy.
type policyParser struct {
	*caddyfileParser
	at     caddyfile.Dispenser // the position of the policy
	policy *Policy
}

// conditions are what only a policy has.
var conditions = map[string]struct {
	expected string
	parse    func(policyParser) error
}{
	"users":     {expectedUsers, policyParser.users},
	"clients":   {expectedRanges, policyParser.clients},
	"match":     {"request matchers, as in a named matcher", policyParser.match},
	"anonymous": {"no value", policyParser.anonymous},
}

// policyOptionNames returns the names of all that a policy may have, sorted.
func policyOptionNames() []string {
	var names []string
	for _, o := range options {
		if o.inPolicy {
			names = append(names, o.name)
		}
	}
	for name := range conditions {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// policy parses a policy. Its options are parsed as the directive's are.
func (p *caddyfileParser) policy(h *Handler, name string) error {
	if _, err := p.begin(name); err != nil {
		return err
	}
	args, err := p.values(1, 1)
	if err != nil {
		return err
	}
	y := policyParser{
		caddyfileParser: &caddyfileParser{Dispenser: p.Dispenser, seen: make(map[string]caddyfile.Dispenser), inPolicy: true},
		at:              *p.Dispenser, policy: &Policy{Name: args[0]},
	}
	own := new(Handler)
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		if name := p.Val(); y.isCondition(name) {
			err = y.condition(name)
		} else {
			err = y.option(own, name)
		}
		if err != nil {
			return err
		}
	}
	if len(y.seen) == 0 {
		return y.at.Errf("policy %s: there is nothing in it; expected a block of conditions and options", args[0])
	}
	y.policy.Options = own.Options
	h.Policies = append(h.Policies, y.policy)
	p.policies = append(p.policies, y)
	return nil
}

func (p policyParser) isCondition(name string) bool {
	_, ok := conditions[name]
	return ok
}

// condition parses one condition, which a policy may have once.
func (p policyParser) condition(name string) error {
	if first, twice := p.seen[name]; twice {
		return p.Errf("%s: the condition is already set at %s:%d; expected it once, with all its values", name, first.File(), first.Line())
	}
	p.seen[name] = *p.Dispenser
	p.name, p.expected = name, conditions[name].expected
	if err := conditions[name].parse(p); err != nil {
		return err
	}
	return p.noBlock(name, p.expected)
}

func (p policyParser) users() (err error) {
	p.policy.Users, err = p.values(1, math.MaxInt)
	return err
}

func (p policyParser) clients() (err error) {
	p.policy.Clients, err = p.values(1, math.MaxInt)
	return err
}

func (p policyParser) match() (err error) {
	p.policy.MatchRaw, err = caddyhttp.ParseCaddyfileNestedMatcherSet(p.Dispenser)
	if err == nil && len(p.policy.MatchRaw) == 0 {
		at := p.seen["match"]
		return at.Errf("match: there are no matchers; expected %s", p.expected)
	}
	return err
}

func (p policyParser) anonymous() error {
	p.policy.Anonymous = true
	_, err := p.values(0, 0)
	return err
}

// checkPolicies rejects invalid policies.
func (p *caddyfileParser) checkPolicies(h *Handler) error {
	if err := h.checkPolicies(); err != nil {
		y := p.policies[err.index]
		at, given := y.seen[err.option]
		if !given {
			at = y.at
		}
		return at.Errf("policy %s: %v", y.policy.Name, err.error)
	}
	for _, y := range p.policies {
		merged, err := h.optionsOf(y.policy)
		if err != nil {
			return y.at.Errf("policy %s: %v", y.policy.Name, err)
		}
		merged.Rules = y.policy.Rules
		if err := y.checkRules(&Handler{Options: *merged}, h.Rules); err != nil {
			return err
		}
	}
	return nil
}
