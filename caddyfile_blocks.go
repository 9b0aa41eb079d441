// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
)

// blocks are the options that have a block, or may have one.
var blocks map[string]func(p caddyfileParser, h *Handler, name string) error

func init() {
	blocks = map[string]func(caddyfileParser, *Handler, string) error{
		"allow_from": caddyfileParser.ipSource,
		"deny_from":  caddyfileParser.ipSource,
		"basic_auth": caddyfileParser.basicAuth,
		"upstream":   caddyfileParser.upstream,
		"limiter":    caddyfileParser.limiter,
	}
}

// once refuses an option that stands there for the second time.
func (p caddyfileParser) once(name string) error {
	if p.seen[name] {
		return p.Errf("%s: the option is given twice; expected it once", name)
	}
	p.seen[name] = true
	return nil
}

// ipSource reads a rule whose ranges come from one of Caddy's modules.
func (p caddyfileParser) ipSource(h *Handler, name string) error {
	if !p.NextArg() {
		return p.Errf("%s: there is no value; expected %s", name, expectations[name])
	}
	stem := p.Val()
	if _, err := caddy.GetModule("http.ip_sources." + stem); err != nil {
		return p.Errf("%s: there is no module '%s'; expected %s", name, stem, expectations[name])
	}
	module, err := caddyfile.UnmarshalModule(p.Dispenser, "http.ip_sources."+stem)
	if err != nil {
		return err
	}
	source, ok := module.(caddyhttp.IPRangeSource)
	if !ok {
		return p.Errf("%s: the module '%s' is no source of CIDR ranges", name, stem)
	}
	action, _, _ := strings.Cut(name, "_")
	h.Rules = append(h.Rules, Rule{Action: action, SourceRaw: caddyconfig.JSONModuleObject(source, "source", stem, nil)})
	return nil
}

// basicAuth reads what Caddy's basic_auth directive has, without a matcher.
func (p caddyfileParser) basicAuth(h *Handler, name string) error {
	if err := p.once(name); err != nil {
		return err
	}
	algorithm, realm := "bcrypt", ""
	args := p.RemainingArgs()
	switch len(args) {
	case 2:
		realm = args[1]
		fallthrough
	case 1:
		algorithm = args[0]
	case 0:
	default:
		return p.Errf("basic_auth: there is more than an algorithm and a realm, '%s'; expected %s", args[2], expectations[name])
	}
	if _, err := caddy.GetModule("http.authentication.hashes." + algorithm); err != nil {
		return p.Errf("basic_auth: the algorithm '%s' is not known; expected %s", algorithm, expectations[name])
	}
	auth := caddyauth.HTTPBasicAuth{
		HashRaw:   json.RawMessage(`{"algorithm":"` + algorithm + `"}`),
		HashCache: new(caddyauth.Cache),
		Realm:     realm,
	}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		account := caddyauth.Account{Username: p.Val()}
		if !p.Args(&account.Password) || p.NextArg() {
			return p.Errf("basic_auth: the user '%s' has not just a hash behind it; expected a user and a hash, as `caddy hash-password` makes it", account.Username)
		}
		auth.AccountList = append(auth.AccountList, account)
	}
	if len(auth.AccountList) == 0 {
		return p.Errf("basic_auth: there are no users; expected %s", expectations[name])
	}
	h.AuthRaw = caddy.ModuleMap{"http_basic": caddyconfig.JSON(auth, nil)}
	return nil
}

// upstream reads the parent proxy. Its errors do not repeat the URL, in which
// there may be a password.
func (p caddyfileParser) upstream(h *Handler, name string) error {
	if err := p.once(name); err != nil {
		return err
	}
	args := p.RemainingArgs()
	switch len(args) {
	case 0:
		return p.Errf("upstream: there is no value; expected %s", expectations[name])
	case 1:
	default:
		return p.Errf("upstream: there is more than one value; expected %s", expectations[name])
	}
	scheme, _, _, err := splitUpstream(args[0])
	if err != nil {
		return p.Errf("upstream: the value is not valid: %v", err)
	}
	u := &Upstream{URL: args[0]}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		option := p.Val()
		if strings.HasPrefix(option, "tls_") {
			if scheme != "https" {
				return p.Errf("upstream: %s is for https:// only", option)
			}
			if u.TLS == nil {
				u.TLS = new(reverseproxy.TLSConfig)
			}
		}
		switch option {
		case "header":
			args := p.RemainingArgs()
			if len(args) != 2 || scheme == "socks5" {
				return p.Errf("upstream: header: expected a field and a value, in quotes if it has spaces, for http:// and https:// only") // it may be secret
			}
			if u.Headers == nil {
				u.Headers = make(map[string]string)
			}
			u.Headers[args[0]] = args[1]
		case "tls_server_name":
			if !p.Args(&u.TLS.ServerName) || p.NextArg() {
				return p.Errf("upstream: tls_server_name: expected one name")
			}
		case "tls_insecure_skip_verify":
			if p.NextArg() {
				return p.Errf("upstream: tls_insecure_skip_verify: there is a value, '%s'; expected none", p.Val())
			}
			u.TLS.InsecureSkipVerify = true
		case "tls_trust_pool":
			if !p.NextArg() {
				return p.Errf("upstream: tls_trust_pool: there is no value; expected a module, such as file, and what it wants")
			}
			stem := p.Val()
			if _, err := caddy.GetModule("tls.ca_pool.source." + stem); err != nil {
				return p.Errf("upstream: tls_trust_pool: there is no module '%s'; expected one such as file", stem)
			}
			module, err := caddyfile.UnmarshalModule(p.Dispenser, "tls.ca_pool.source."+stem)
			if err != nil {
				return err
			}
			pool, ok := module.(caddytls.CA)
			if !ok {
				return p.Errf("upstream: tls_trust_pool: the module '%s' is no source of certificates", stem)
			}
			u.TLS.CARaw = caddyconfig.JSONModuleObject(pool, "provider", stem, nil)
		default:
			return p.Errf("upstream: unrecognized option '%s'; expected header, tls_server_name, tls_trust_pool or tls_insecure_skip_verify", option)
		}
	}
	h.Upstream = u
	return nil
}
