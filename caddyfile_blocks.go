// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"io/fs"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"github.com/caddyserver/caddy/v2/modules/caddytls"
	"golang.org/x/crypto/bcrypt"
	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
)

// rule parses a rule that lists destinations.
func (p *caddyfileParser) rule(h *Handler) error {
	args, err := p.values(1, math.MaxInt)
	if err != nil {
		return err
	}
	rule := Rule{Action: p.name, Destinations: args}
	if err := rule.check(); err != nil {
		return p.Errf("%v", err)
	}
	p.addRule(h, rule)
	return nil
}

// ruleFiles parses a rule that names files of destinations. It checks the files as well,
// so that a mistake in one is reported now and not only when the config is loaded.
func (p *caddyfileParser) ruleFiles(h *Handler) error {
	args, err := p.values(1, math.MaxInt)
	if err != nil {
		return err
	}
	for _, file := range args {
		// The user that adapts a config may not be the one that runs Caddy, and may lack
		// permission to read the file.
		if err := access.ReadList(file, checkListed); err != nil && !errors.Is(err, fs.ErrPermission) {
			return p.expectedErr("%v", err)
		}
	}
	action, _, _ := strings.Cut(p.name, "_")
	p.addRule(h, Rule{Action: action, Files: args, FilesHash: hashFiles(args)})
	return nil
}

func (p *caddyfileParser) addRule(h *Handler, rule Rule) {
	h.Rules = append(h.Rules, rule)
	p.rules = append(p.rules, *p.Dispenser)
}

// checkRules rejects allow rules that can have no effect. The rules in later are asked after those
// of h.
func (p *caddyfileParser) checkRules(h *Handler, later []Rule) error {
	u, err := uselessRule(h, later)
	if u != nil {
		return p.rules[u.Rule].Errf("allow: %s", u.Text())
	}
	return err
}

// uselessRule returns the first allow rule of h that can have no effect. The rules in later are
// asked after those of h.
func uselessRule(h *Handler, later []Rule) (*access.Useless, error) {
	var p access.Control
	var err, err2 error
	p.Ports, err = access.ParsePortList("ports", h.Ports)
	p.Connect, err2 = access.ParsePortList("connect_ports", h.ConnectPorts)
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	check := &access.RuleCheck{Open: p.OpenPorts(), SkipFiles: true}
	rules := compileRules(caddy.Context{}, slices.Concat(h.Rules, later))
	sets, err := access.NewRuleSets(rules, check)
	if err != nil {
		return nil, err
	}
	for _, u := range check.Useless(rules, sets) {
		if u.All && u.Rule < len(h.Rules) {
			return &u, nil
		}
	}
	return nil, nil
}

// checkListed checks a destination in a file. Bits beyond the length of a range are
// ignored there.
func checkListed(text string) error {
	err := checkDestination(text)
	if bits := new(access.HostBitsError); errors.As(err, &bits) {
		return nil
	}
	return err
}

// ruleSource parses a rule whose ranges come from one of Caddy's IP source modules.
func (p *caddyfileParser) ruleSource(h *Handler) error {
	stem, module, err := p.module("http.ip_sources")
	if err != nil {
		return err
	}
	source, ok := module.(caddyhttp.IPRangeSource)
	if !ok {
		return p.expectedErr("the module '%s' is not a source of CIDR ranges", stem)
	}
	if static, ok := module.(*caddyhttp.StaticIPRange); ok {
		if len(static.Ranges) == 0 {
			return p.expectedErr("static has no ranges")
		}
		for _, r := range static.Ranges {
			if _, err := access.ParsePrefix(r); err != nil {
				return p.invalid(r)
			}
		}
	}
	action, _, _ := strings.Cut(p.name, "_")
	p.addRule(h, Rule{Action: action, SourceRaw: caddyconfig.JSONModuleObject(source, "source", stem, nil)})
	return nil
}

// module parses the name of a module in a namespace, and the module's own tokens.
func (p *caddyfileParser) module(namespace string) (stem string, module caddyfile.Unmarshaler, err error) {
	if !p.NextArg() {
		return "", nil, p.expectedErr("missing value")
	}
	stem = p.Val()
	if _, err := caddy.GetModule(namespace + "." + stem); err != nil {
		return "", nil, p.expectedErr("this build has no module %s.%s", namespace, stem)
	}
	module, err = caddyfile.UnmarshalModule(p.Dispenser, namespace+"."+stem)
	return stem, module, err
}

// limiter parses the limiter that several processes share.
func (p *caddyfileParser) limiter(h *Handler) error {
	stem, module, err := p.module(limiterNamespace)
	if err != nil {
		return err
	}
	h.LimiterRaw = caddyconfig.JSONModuleObject(module, "module", stem, nil)
	return nil
}

// maxTunnels parses the limits on open tunnels.
func (p *caddyfileParser) maxTunnels(h *Handler) error {
	args, err := p.values(1, 3)
	if err != nil {
		return err
	}
	var ok bool
	if h.MaxTunnels, ok = parseInt(args[0], 1, maxCount); !ok {
		return p.invalid(args[0])
	}
	switch {
	case len(args) == 1:
		return nil
	case args[1] != "per_client":
		return p.expectedErr("unexpected value '%s'", args[1])
	case len(args) == 2:
		return p.expectedErr("missing value after per_client")
	}
	if h.MaxTunnelsPerClient, ok = parseInt(args[2], 1, maxCount); !ok {
		return p.invalid(args[2])
	}
	if h.MaxTunnelsPerClient > h.MaxTunnels {
		return p.expectedErr("one client may open %s tunnels, and all clients together only %s", args[2], args[0])
	}
	return nil
}

// servePAC parses the path of the PAC script and the destinations that bypass the proxy.
func (p *caddyfileParser) servePAC(h *Handler) error {
	args, err := p.values(0, 1)
	if err != nil {
		return err
	}
	if h.ServePAC = defaultPACPath; len(args) > 0 {
		h.ServePAC = args[0]
	}
	if path, invalid := invalidPACPath(h); invalid {
		return p.invalid(path)
	}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		if name := p.Val(); name != "direct" {
			return p.Errf("serve_pac: unrecognized option '%s'; expected direct", name)
		}
		p.name, p.expected = "serve_pac: direct", "addresses, CIDR ranges, names or *.names, without ports"
		args, err := p.values(1, math.MaxInt)
		if err != nil {
			return err
		}
		for _, arg := range args {
			if _, err := access.NewPACDirect([]string{arg}); err != nil {
				return p.invalid(arg)
			}
		}
		h.PACDirect = append(h.PACDirect, args...)
	}
	return nil
}

func (p *caddyfileParser) headerUp(h *Handler) error {
	if h.Headers == nil {
		h.Headers = new(headers.Handler)
	}
	if h.Headers.Request == nil {
		h.Headers.Request = new(headers.HeaderOps)
	}
	return p.headerOp(h.Headers.Request)
}

func (p *caddyfileParser) headerDown(h *Handler) error {
	if h.Headers == nil {
		h.Headers = new(headers.Handler)
	}
	if h.Headers.Response == nil {
		h.Headers.Response = &headers.RespHeaderOps{HeaderOps: new(headers.HeaderOps)}
	}
	return p.headerOp(h.Headers.Response.HeaderOps)
}

// headerOp parses an operation on a header field, in reverse_proxy's syntax.
func (p *caddyfileParser) headerOp(ops *headers.HeaderOps) error {
	args, err := p.values(1, 3)
	if err != nil {
		return err
	}
	value, replacement := "", (*string)(nil)
	if len(args) > 1 {
		value = args[1]
	}
	if len(args) > 2 {
		replacement = &args[2]
	}
	// Provision compiles the regular expression, but it modifies its receiver: check
	// the operation on a scratch value.
	scratch := new(headers.HeaderOps)
	if strings.HasPrefix(args[0], "?") { // only the header directive has this prefix
		err = notAFieldName(args[0])
	} else if err = headers.CaddyfileHeaderOp(scratch, args[0], value, replacement); err == nil {
		err = errors.Join(checkFieldNames(scratch), scratch.Provision(caddy.Context{}))
	}
	if err != nil {
		return p.expectedErr("the values '%s' are not valid: %v", strings.Join(args, " "), err)
	}
	return headers.CaddyfileHeaderOp(ops, args[0], value, replacement)
}

// basicAuth parses the syntax of Caddy's basic_auth directive, without a matcher. Its
// errors do not quote the hash, because the user may have written a password instead.
func (p *caddyfileParser) basicAuth(h *Handler) error {
	algorithm, realm := "bcrypt", ""
	args, err := p.values(0, 2)
	if err != nil {
		return err
	}
	if len(args) > 0 {
		algorithm = args[0]
	}
	if len(args) > 1 {
		realm = args[1]
	}
	if _, err := caddy.GetModule("http.authentication.hashes." + algorithm); err != nil {
		return p.expectedErr("unknown algorithm '%s'", algorithm)
	}
	auth := caddyauth.HTTPBasicAuth{
		HashRaw:   json.RawMessage(`{"algorithm":"` + algorithm + `"}`),
		HashCache: new(caddyauth.Cache),
		Realm:     realm,
	}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		account := caddyauth.Account{Username: p.Val()}
		if !p.AllArgs(&account.Password) {
			return p.Errf("basic_auth: the user '%s' must be followed by exactly one hash, as `caddy hash-password` prints it", account.Username)
		}
		if isPublished(account.Password) {
			return p.Errf("basic_auth: the user '%s' has %v", account.Username, errPublished)
		}
		if err := checkUserName(account.Username); err != nil && !strings.Contains(account.Username, "{") {
			return p.Errf("basic_auth: %v", err)
		}
		if err := checkHash(algorithm, account.Password); err != nil {
			return p.Errf("basic_auth: the hash of the user '%s' is not valid; expected one for %s, as `caddy hash-password` prints it", account.Username, algorithm)
		}
		if slices.ContainsFunc(auth.AccountList, func(a caddyauth.Account) bool { return a.Username == account.Username }) {
			return p.Errf("basic_auth: the user '%s' is listed twice; expected each user once", account.Username)
		}
		auth.AccountList = append(auth.AccountList, account)
	}
	if len(auth.AccountList) == 0 {
		return p.expectedErr("there are no users")
	}
	h.AuthRaw = caddy.ModuleMap{"http_basic": caddyconfig.JSON(auth, nil)}
	return nil
}

// usersFile parses the path of a file of users, and checks the file, so that a mistake in it is
// reported now and not only when the config is loaded.
func (p *caddyfileParser) usersFile(h *Handler) error {
	args, err := p.values(1, 1)
	if err != nil {
		return err
	}
	h.UsersFile = args[0]
	// The user that adapts a config may not be the one that runs Caddy.
	if _, err := readUsers(args[0]); err != nil && !errors.Is(err, fs.ErrPermission) {
		return p.expectedErr("%v", err)
	}
	return nil
}

// failedLogins parses how many logins may fail per period.
func (p *caddyfileParser) failedLogins(h *Handler) error {
	args, err := p.values(1, 3)
	if err != nil {
		return err
	}
	if len(args) == 1 && args[0] == "off" {
		h.FailedLogins = -1
		return nil
	}
	if len(args) < 3 {
		return p.expectedErr("the value '%s' is incomplete", strings.Join(args, " "))
	}
	var ok, ok2 bool
	h.FailedLogins, ok = parseInt(args[0], 1, maxFailedLogins)
	h.FailedLoginsPer, ok2 = parseDuration(args[2])
	if _, invalid := h.invalidFailedLogins(); invalid || !ok || !ok2 || h.FailedLoginsPer == 0 || args[1] != "per" {
		return p.invalid(strings.Join(args, " "))
	}
	return nil
}

// checkHash returns what is wrong with a password hash, if anything. It accepts
// placeholders, whose values are known only when the config is loaded, and the hashes of
// other modules, whose format it does not know.
func checkHash(algorithm, hash string) error {
	var err error
	switch {
	case hash == "":
		err = errors.New("there is no hash")
	case strings.Contains(hash, "{"):
	case algorithm == "bcrypt":
		if _, err = bcrypt.Cost([]byte(hash)); err == nil && !bcryptForm.MatchString(hash) {
			err = errors.New("it does not have the form of a bcrypt hash")
		}
	case algorithm == "argon2id":
		var key []byte
		if _, key, err = caddyauth.DecodeHash([]byte(hash)); err == nil && len(key) < minArgonKey {
			err = errors.New("it is cut short")
		}
	}
	return err
}

// bcryptForm is the form of a whole bcrypt hash. The bcrypt package reads the salt and the key from what may
// be longer, such as two lines of a file that lack the line end between them.
var bcryptForm = regexp.MustCompile(`^\$2[abxy]?\$[0-9]{2}\$[./A-Za-z0-9]{53}$`)

// minArgonKey is the length of the shortest keys of argon2id that programs make, in bytes.
const minArgonKey = 16

// upstream parses the parent proxy. Its errors do not quote the URL, which may contain a
// password.
func (p *caddyfileParser) upstream(h *Handler) error {
	args := p.RemainingArgs()
	switch len(args) {
	case 0:
		return p.expectedErr("missing value")
	case 1:
	default:
		return p.expectedErr("more than one value")
	}
	h.Upstream = &Upstream{URL: args[0]}
	if args[0] == off {
		return p.noBlock("upstream", "no block after off")
	}
	scheme, credentials, _, err := splitUpstream(args[0])
	if err == nil && !strings.Contains(credentials, "{") {
		_, err = readCredentials(credentials)
	}
	if err != nil {
		return p.Errf("upstream: the value is not valid: %v", err)
	}
	for nesting := p.Nesting(); p.NextBlock(nesting); {
		if err := p.upstreamOption(h.Upstream, scheme); err != nil {
			return err
		}
	}
	return nil
}

func (p *caddyfileParser) upstreamOption(u *Upstream, scheme string) error {
	name := p.Val()
	p.name = "upstream: " + name
	if strings.HasPrefix(name, "tls_") {
		if scheme != "https" {
			return p.Errf("upstream: %s is for https:// only", name)
		}
		if u.TLS == nil {
			u.TLS = new(reverseproxy.TLSConfig)
		}
	}
	switch name {
	case "header":
		p.expected = "a field and a value, in quotes if it has spaces, for http:// and https:// only"
		args := p.RemainingArgs()
		if len(args) != 2 || scheme == "socks5" || !httpguts.ValidHeaderFieldName(args[0]) || !httpguts.ValidHeaderFieldValue(args[1]) {
			return p.expectedErr("the values are not valid") // they may be secret
		}
		if u.Headers == nil {
			u.Headers = make(map[string]string)
		}
		u.Headers[args[0]] = args[1]
	case "tls_server_name":
		p.expected = "one name"
		args, err := p.values(1, 1)
		if err != nil {
			return err
		}
		u.TLS.ServerName = args[0]
	case "tls_insecure_skip_verify":
		p.expected = "no value"
		_, err := p.values(0, 0)
		u.TLS.InsecureSkipVerify = true
		return err
	case "tls_trust_pool":
		p.expected = "a source of certificates, such as file"
		stem, module, err := p.module("tls.ca_pool.source")
		if err != nil {
			return err
		}
		pool, ok := module.(caddytls.CA)
		if !ok {
			return p.expectedErr("the module '%s' is not a source of certificates", stem)
		}
		u.TLS.CARaw = caddyconfig.JSONModuleObject(pool, "provider", stem, nil)
	default:
		return p.Errf("upstream: unrecognized option '%s'; expected header, tls_server_name, tls_trust_pool or tls_insecure_skip_verify", name)
	}
	return nil
}
