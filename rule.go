// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
)

// Rule allows or denies destinations. The first rule that matches a destination decides.
type Rule struct {
	// What to do with the destinations: "allow" or "deny".
	Action string `json:"action"`

	// The destinations: an address (192.0.2.1), a CIDR range (10.0.0.0/8), a host name
	// (example.com), all names below one (*.example.com), `public` addresses, `private`
	// addresses (those that by default only a client on this machine may reach), or
	// `all`. Each may be followed by a colon and a port or a range of ports
	// (example.com:443, all:8000-8999, [2001:db8::]:443). Default: all ports.
	//
	// A name is compared with the name that the client asks for; it is not resolved, and
	// this machine's DNS search list does not apply. An address is compared with the
	// address that the proxy is about to connect to. Allowing a name, or `all`, does not
	// allow addresses that are denied otherwise. Allowing a range of IPv6 addresses does
	// not allow private IPv4 addresses embedded in them.
	Destinations []string `json:"destinations,omitempty"`

	// Files that list destinations, one per line; # starts a comment. They are read when
	// the config is loaded.
	Files []string `json:"files,omitempty"`

	// A hash of the contents of Files. The Caddyfile adapter sets it, because Caddy does
	// not load a config that equals the running one: with the hash, a changed file makes
	// a different config. Nothing else depends on it.
	FilesHash string `json:"files_hash,omitempty"`

	// A source of CIDR ranges: a module as for trusted_proxies.
	SourceRaw json.RawMessage `json:"source,omitempty" caddy:"namespace=http.ip_sources inline_key=source"`
}

// check returns an error unless the rule's action and destinations are valid.
func (r *Rule) check() error {
	if r.Action != "allow" && r.Action != "deny" {
		return fmt.Errorf("action: the value '%s' is not valid; expected allow or deny", r.Action)
	}
	if len(r.Destinations) == 0 && len(r.Files) == 0 && r.SourceRaw == nil {
		return fmt.Errorf("%s: missing destination; expected %s", r.Action, expectedDestinations)
	}
	for _, destination := range r.Destinations {
		if checkDestination(destination) != nil {
			return invalidValue(r.Action, expectedDestinations, destination)
		}
	}
	return nil
}

// hashFiles returns a hash of the contents of files, or "" if one of them cannot
// be read.
func hashFiles(paths []string) string {
	all := sha256.New()
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return ""
		}
		sum := sha256.Sum256(data)
		all.Write(sum[:])
	}
	return hex.EncodeToString(all.Sum(nil)[:16])
}

// compileRules returns the rules of access control for those of the config.
func compileRules(ctx caddy.Context, config []Rule) []access.Rule {
	rules := make([]access.Rule, len(config))
	for i := range config {
		c := &config[i]
		rules[i] = access.Rule{Action: c.Action, Destinations: c.Destinations, Files: c.Files}
		if c.SourceRaw != nil {
			rules[i].Source = func() (*access.RangeSource, error) { return loadSource(ctx, c) }
		}
	}
	return rules
}

// loadSource loads the source module of a rule. Without Caddy's context, as in the
// Caddyfile adapter, it returns a source without ranges.
func loadSource(ctx caddy.Context, rule *Rule) (*access.RangeSource, error) {
	if ctx.Context == nil {
		return new(access.RangeSource), nil
	}
	module, err := ctx.LoadModule(rule, "SourceRaw")
	if err != nil {
		return nil, err
	}
	source := module.(caddyhttp.IPRangeSource)
	return &access.RangeSource{
		Name: string(module.(caddy.Module).CaddyModule().ID),
		List: func(ctx context.Context) []netip.Prefix { return source.GetIPRanges(requestOf(ctx)) },
	}, nil
}

// reportRules returns an error for the first allow rule that has no effect at all, and logs
// warnings about the other findings.
func reportRules(c *access.RuleCheck, rules []access.Rule, sets []*access.RuleSet, logger *zap.Logger) error {
	for _, n := range c.Never {
		destinations := strings.Join(n.Texts, " ")
		if more := n.Count - len(n.Texts); more > 0 {
			destinations += fmt.Sprintf(" and %d more", more)
		}
		logger.Warn("a rule can never match", zap.String("rule", rules[n.Rule].Action+" "+destinations), zap.String("why", n.Why))
	}
	if n := len(c.Inexact); n > 0 {
		logger.Warn("ranges in a file have bits set beyond their length, which are ignored",
			zap.Strings("ranges", c.Inexact[:min(n, access.MaxRuleTexts)]), zap.Int("count", n))
	}
	for _, u := range c.Useless(rules, sets) {
		if u.All {
			return fmt.Errorf("rules[%d]: allow: %s", u.Rule, u.Text())
		}
		logger.Warn("a rule has no effect", zap.String("rule", "allow "+strings.Join(u.Texts, " ")), zap.String("why", u.Text()))
	}
	return nil
}

// requestOf returns the request of a context, as the client sent it, or an empty one.
func requestOf(ctx context.Context) *http.Request {
	if r, ok := ctx.Value(caddyhttp.OriginalRequestCtxKey).(http.Request); ok {
		return &r
	}
	return new(http.Request)
}
