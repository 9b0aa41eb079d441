// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/asyncproxy/caddy-async-proxy/internal/downstream"
	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// authProvider is one of Caddy's authentication providers, with its name.
type authProvider struct {
	name string
	caddyauth.Authenticator
}

// loadAuth provisions the configured providers and sorts them by name.
func (p *proxy) loadAuth(ctx caddy.Context) error {
	modules := make(map[string]any)
	if p.config.AuthRaw != nil {
		if len(p.config.AuthRaw) == 0 {
			return errors.New("authentication: expected a provider, such as http_basic")
		}
		loaded, err := ctx.LoadModule(p.config, "AuthRaw")
		if err != nil {
			return fmt.Errorf("authentication: %w", err)
		}
		modules = loaded.(map[string]any)
	}
	if p.config.UsersFile != "" {
		static, _ := modules["http_basic"].(*caddyauth.HTTPBasicAuth)
		users, err := newUsersFile(ctx, p.config.UsersFile, static, p.logger)
		if err != nil {
			if errors.As(err, new(*fs.PathError)) {
				err = fmt.Errorf("%w; expected a file that the user who runs Caddy can read", err)
			}
			return fmt.Errorf("users_file: %w", err)
		}
		modules["http_basic"] = users
	}
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		module := modules[name]
		provider, ok := module.(caddyauth.Authenticator)
		if !ok {
			return fmt.Errorf("authentication: %s is not an authentication provider", name)
		}
		if basic, ok := module.(*caddyauth.HTTPBasicAuth); ok {
			for _, account := range basic.Accounts { // its placeholders are replaced by now
				if err := checkAccount(account); err != nil {
					return fmt.Errorf("authentication: %w", err)
				}
			}
			if hasher, ok := basic.Hash.(caddyauth.Hasher); ok {
				hideUnknownUsers(basic, hasher.FakeHash())
			}
			p.hasBasicAuth = true
			p.basic = func() *caddyauth.HTTPBasicAuth { return basic }
		}
		if users, ok := module.(*usersFile); ok {
			p.hasBasicAuth = true
			p.basic, p.users = users.current, users
		}
		p.auth = append(p.auth, authProvider{name, provider})
	}
	if len(p.auth) > 1 {
		p.basic = nil
	}
	return nil
}

// evenComparer compares the password of an unknown user with the hash of a known one. Caddy compares it
// with a hash of its own, which usually has another cost than those of the config, so the time that a
// failed login takes would reveal whether its user exists.
type evenComparer struct {
	caddyauth.Comparer
	fake  []byte // what Caddy compares the password of an unknown user with
	known []byte // what takes its place
}

// Compare implements caddyauth.Comparer. Caddy refuses an unknown user whatever the result is.
func (e evenComparer) Compare(hashed, plaintext []byte) (bool, error) {
	if bytes.Equal(hashed, e.fake) {
		hashed = e.known
	}
	return e.Comparer.Compare(hashed, plaintext)
}

// hideUnknownUsers makes a failed login of an unknown user take as long as one of the user whose name
// is the first. fake is what Caddy compares the password of an unknown user with. This does not help
// where the hashes differ in cost among themselves.
func hideUnknownUsers(basic *caddyauth.HTTPBasicAuth, fake []byte) {
	if len(basic.Accounts) == 0 {
		return
	}
	known := []byte(basic.Accounts[slices.Min(slices.Collect(maps.Keys(basic.Accounts)))].Password)
	if decoded, err := base64.StdEncoding.DecodeString(string(known)); err == nil {
		known = decoded
	}
	basic.Hash = evenComparer{basic.Hash, fake, known}
}

// requiresLogin reports whether clients must log in. Loading the providers empties AuthRaw.
func (h *Handler) requiresLogin() bool {
	return h.AuthRaw != nil || h.UsersFile != "" || h.proxy != nil && len(h.proxy.auth) > 0
}

// publishedHashes are the hashes in Caddy's documentation, source and tests. Their passwords
// are published with them, or easily found.
var publishedHashes = []string{
	"$2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG",
	"$2a$10$EB6gZ4H6N.bz4LbAw0VagumWq5K0VdFyCuVsKs8BpdOShYYtEdd8W",
	"$2a$14$X3ulqf/iGxnf1k6oMZ.RZeJUoqI9PX2PM4rS5lkIKJXduLGXGPrt6",
	"$2a$14$DCYyqvUO/PWT.UifNF0rbuRkRfjrhHViOfVfJklmqrvWUoYcTiN2q",
	"$argon2id$v=19$m=47104,t=1,p=1$P2nzckEdTZ3bxCiBCkRTyA$xQL3Z32eo5jKl7u5tcIsnEKObYiyNZQQf5/4sAau6Pg",
}

var errPublished = errors.New("a hash from Caddy's documentation, whose password is public; generate your own with `caddy hash-password`")

// checkAccount returns what is wrong with a user and a hash, if anything. The hash may be in base64, and its
// algorithm may be unknown. The error does not quote the hash, in place of which there may be a password.
func checkAccount(account caddyauth.Account) error {
	hash := account.Password
	if decoded, err := base64.StdEncoding.DecodeString(hash); err == nil {
		hash = string(decoded)
	}
	switch algorithm := hashAlgorithm(hash); {
	case checkUserName(account.Username) != nil:
		return checkUserName(account.Username)
	case isPublished(account.Password):
		return fmt.Errorf("the user %q has %w", account.Username, errPublished)
	case algorithm != "" && checkHash(algorithm, hash) != nil:
		return fmt.Errorf("the hash of the user '%s' is not valid; expected one for %s, as `caddy hash-password` prints it", account.Username, algorithm)
	}
	return nil
}

// checkUserName refuses names that are most likely a mistake: a client could hardly send them.
func checkUserName(name string) error {
	if name == "" {
		return errors.New("a user has no name")
	}
	if strings.TrimSpace(name) != name || strings.ContainsFunc(name, unicode.IsControl) || strings.Contains(name, ":") {
		return fmt.Errorf("the user name %q is not valid; expected one without a colon, control characters, and spaces at its ends", name)
	}
	return nil
}

// isPublished reports whether a hash is a published one. It also recognises the base64 form
// that older versions of Caddy print, and the prefix that htpasswd gives to bcrypt hashes.
func isPublished(hash string) bool {
	if decoded, err := base64.StdEncoding.DecodeString(hash); err == nil {
		hash = string(decoded)
	}
	if rest, ok := strings.CutPrefix(hash, "$2y$"); ok {
		hash = "$2a$" + rest
	}
	return slices.Contains(publishedHashes, strings.TrimSpace(hash))
}

// hasCredentials reports whether r carries proxy credentials.
func hasCredentials(r *http.Request) bool {
	values := r.Header["Proxy-Authorization"]
	return len(values) > 0 && strings.TrimSpace(values[0]) != ""
}

// authenticate identifies the user of v (RFC 9110 §11.7). If it refuses the request, it
// returns a refusal, or errRateLimited with v.verdict set.
func (p *proxy) authenticate(w http.ResponseWriter, r *http.Request, v *transaction) error {
	if !hasCredentials(r) { // some providers identify users by other means
		known, _ := p.askProviders(w, r, v)
		if !known {
			return causeAuthRequired.refusal(nil)
		}
		return nil
	}
	credentials := r.Header["Proxy-Authorization"]
	if p.basic == nil {
		key := credentialsKey(append([]string{"others"}, credentials...)...)
		if program.rightCredentials.has(key) {
			if known, err := p.recheckLogin(w, r, v); known || err != nil {
				return err
			}
			program.rightCredentials.remove(key) // revoked or expired
		}
		return p.checkLogin(w, r, v, key)
	}
	login := readBasic(credentials[0])
	key := basicKey(p.basic(), login)
	switch {
	case program.rightCredentials.has(key):
		v.setUser(caddyauth.User{ID: login.user})
		return nil
	case !login.ok || program.wrongCredentials.has(key):
		return p.refuseKnownWrong(w, r, v)
	}
	return p.checkLogin(w, r, v, key)
}

// refuseKnownWrong refuses credentials that are known to be wrong.
func (p *proxy) refuseKnownWrong(w http.ResponseWriter, r *http.Request, v *transaction) error {
	program.metrics.AuthFailed()
	if p.failedLogins != nil {
		now := monotime.Of(time.Now())
		if wait, ok := p.failedLogins.Reserve(repeatsKey(v.limitKey), now, 0); !ok {
			return p.refuseLogin(v, wait, errFailedLogins)
		}
	}
	p.challenge(w, r, v)
	return causeAuthFailed.refusal(errBadCredentials)
}

// challenge sets Proxy-Authenticate without checking the credentials.
func (p *proxy) challenge(w http.ResponseWriter, r *http.Request, v *transaction) {
	anonymous := *r
	anonymous.Header = make(http.Header)
	_, _ = p.askProviders(w, &anonymous, v)
}

// checkLogin asks the providers about credentials that are not cached. It first waits for a
// failed-login token and for the client's turn. The token is refunded unless the login
// fails.
func (p *proxy) checkLogin(w http.ResponseWriter, r *http.Request, v *transaction, key credentialKey) error {
	var wait time.Duration
	refund := func() {}
	if p.failedLogins != nil {
		now, ok := monotime.Of(time.Now()), false
		if wait, ok = p.failedLogins.Reserve(v.limitKey, now, loginPatience); !ok {
			return p.refuseLogin(v, wait, errFailedLogins)
		}
		refund = func() { p.failedLogins.Refund(v.limitKey, monotime.Of(time.Now())) }
	}
	err := sleep(r.Context(), wait)
	if err == nil {
		err = program.logins.enter(r.Context(), v.limitKey)
	}
	if err != nil {
		refund()
		return p.notChecked(v, err)
	}
	result := p.checkInTurn(w, r, v, key)
	if result != loginWrong {
		refund()
	}
	if result == loginRight {
		return nil
	}
	program.metrics.AuthFailed()
	if result == loginRepeated || p.failedLogins == nil {
		return causeAuthFailed.refusal(errBadCredentials)
	}
	if limited := p.chargeSharedFailure(r, v); limited > 0 || wait > 0 {
		delete(w.Header(), "Proxy-Authenticate") // logging in would not help now
		return p.refuseLogin(v, max(limited, p.failedLogins.WaitTime(v.limitKey, monotime.Of(time.Now()))), errFailedLogins)
	}
	return causeAuthFailed.refusal(errBadCredentials)
}

// notChecked returns the error for a login that was not checked: err says whether the client has
// disconnected, or too many passwords are waiting to be checked.
func (p *proxy) notChecked(v *transaction, err error) error {
	if err == errLoginsBusy {
		return p.refuseLogin(v, loginRetry, err)
	}
	return clientDisconnected(err)
}

// recheckLogin asks the providers about credentials that they accepted before. If one of the
// providers is http_basic, it hashes the password again, so a request with a password waits
// for its client's turn.
func (p *proxy) recheckLogin(w http.ResponseWriter, r *http.Request, v *transaction) (known bool, err error) {
	if p.hasBasicAuth && readBasic(r.Header["Proxy-Authorization"][0]).ok {
		key := v.limitKey
		if err := program.logins.enter(r.Context(), key); err != nil {
			return false, p.notChecked(v, err)
		}
		defer program.logins.leave(key)
	}
	known, _ = p.askProviders(w, r, v)
	return known, nil
}

// loginResult is the outcome of a login.
type loginResult int

const (
	loginRight    loginResult = iota
	loginWrong                // the providers rejected the credentials, or returned an error
	loginRepeated             // the same credentials were rejected while this login waited
)

// checkInTurn asks the providers, unless the same credentials were checked while this login
// waited. An error from a provider counts as a failed login, because some providers return
// an error for each wrong token.
func (p *proxy) checkInTurn(w http.ResponseWriter, r *http.Request, v *transaction, key credentialKey) loginResult {
	defer program.logins.leave(v.limitKey)
	if p.basic != nil {
		if program.rightCredentials.has(key) {
			v.setUser(caddyauth.User{ID: readBasic(r.Header["Proxy-Authorization"][0]).user})
			return loginRight
		}
		if program.wrongCredentials.has(key) {
			p.challenge(w, r, v)
			return loginRepeated
		}
	}
	known, broken := p.askProviders(w, r, v)
	switch {
	case known:
		if p.basic == nil || basicKey(p.basic(), readBasic(r.Header["Proxy-Authorization"][0])) == key { // or the user's hash has changed meanwhile
			program.rightCredentials.add(key)
		}
		return loginRight
	case p.basic != nil && !broken:
		program.wrongCredentials.add(key)
	}
	return loginWrong
}

// refuseLogin sets the verdict for a login that is not checked now.
func (p *proxy) refuseLogin(v *transaction, wait time.Duration, err error) error {
	now := monotime.Of(time.Now())
	v.verdict = v.policy.limiter.Deny(v.limitKey, now, wait, err)
	return errRateLimited
}

// chargeSharedFailure charges the shared limiter's failed-login bucket, so that a client that
// guesses at several processes has no more guesses than at one. If the bucket is empty, it
// returns how long the client has to wait, and empties the local bucket for as long.
func (p *proxy) chargeSharedFailure(r *http.Request, v *transaction) time.Duration {
	if p.shared == nil || p.failedLogins == nil || p.shared.Suspended() {
		return 0
	}
	shared := sharedBucket(p.failedLogins, v.limitKey)
	shared.Zone += " failed_logins" // cannot collide: configured zones have no spaces
	downstream.Keep(r.Context())
	wait, err := p.shared.Take(r.Context(), shared)
	if err != nil || wait <= 0 {
		return 0 // the local bucket has counted the failure
	}
	p.failedLogins.Drain(v.limitKey, monotime.Of(time.Now()), wait)
	return wait
}

// askProviders asks the providers one after the other. They read Authorization and set
// WWW-Authenticate, as for a site, so each gets a copy of the request with
// Proxy-Authorization as Authorization, and its challenges become Proxy-Authenticate. broken
// reports whether a provider returned an error.
func (p *proxy) askProviders(w http.ResponseWriter, r *http.Request, v *transaction) (known, broken bool) {
	downstream.Keep(r.Context())
	siteRequest := *r
	siteRequest.Header = r.Header.Clone()
	delete(siteRequest.Header, "Authorization")
	if hasCredentials(r) {
		siteRequest.Header["Authorization"] = r.Header["Proxy-Authorization"]
	}
	answer := headerOnly{make(http.Header)}
	for _, provider := range p.auth {
		user, ok, err := provider.Authenticate(answer, &siteRequest)
		if err != nil {
			if c := p.logger.Check(zapcore.ErrorLevel, "auth provider returned error"); c != nil {
				c.Write(zap.String("provider", provider.name), errorField(err))
			}
			broken = true
			continue
		}
		if ok {
			v.setUser(user)
			return true, broken
		}
	}
	if challenges := answer.fields["Www-Authenticate"]; len(challenges) > 0 {
		w.Header()["Proxy-Authenticate"] = challenges
	} else {
		w.Header()["Proxy-Authenticate"] = []string{`Basic realm="restricted"`} // required in a 407
	}
	return false, broken
}

// setUser records the user of v, and sets the placeholders that Caddy's own authentication
// handler sets.
func (v *transaction) setUser(user caddyauth.User) {
	v.user = user.ID
	if repl, _ := v.r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); repl != nil {
		repl.Set("http.auth.user.id", user.ID)
		for name, value := range user.Metadata {
			repl.Set("http.auth.user."+name, value)
		}
	}
}

// errBadCredentials distinguishes a failed login from a request without credentials.
var errBadCredentials = errors.New("the credentials are wrong")

// headerOnly is a ResponseWriter that keeps only the header.
type headerOnly struct{ fields http.Header }

func (w headerOnly) Header() http.Header         { return w.fields }
func (w headerOnly) Write(b []byte) (int, error) { return len(b), nil }
func (w headerOnly) WriteHeader(int)             {}
