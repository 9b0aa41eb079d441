// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// authProvider asks one of Caddy's authentication providers.
type authProvider struct {
	name string
	caddyauth.Authenticator
}

// loadAuth makes the configured providers, in the order of their names.
func (h *Handler) loadAuth(ctx caddy.Context) error {
	if h.AuthRaw == nil {
		return nil
	}
	if len(h.AuthRaw) == 0 {
		return errors.New("authentication: expected a provider, such as http_basic")
	}
	modules, err := ctx.LoadModule(h, "AuthRaw")
	if err != nil {
		return fmt.Errorf("authentication: %w", err)
	}
	for name, module := range modules.(map[string]any) {
		provider, ok := module.(caddyauth.Authenticator)
		if !ok {
			return fmt.Errorf("authentication: %s is no provider", name)
		}
		if basic, ok := module.(*caddyauth.HTTPBasicAuth); ok {
			for _, account := range basic.Accounts { // in which placeholders are replaced
				if isPublished(account.Password) {
					return fmt.Errorf("authentication: the user %q has %w", account.Username, errPublished)
				}
			}
		}
		h.auth = append(h.auth, authProvider{name, provider})
	}
	slices.SortFunc(h.auth, func(a, b authProvider) int {
		if a.name < b.name {
			return -1
		}
		return 1
	})
	return nil
}

// publishedHashes are in the documentation, the source and the tests of Caddy,
// together with their passwords or for anybody to find them.
var publishedHashes = []string{
	"$2a$14$Zkx19XLiW6VYouLHR5NmfOFU0z2GTNmpkT/5qqR7hx4IjWJPDhjvG",
	"$2a$10$EB6gZ4H6N.bz4LbAw0VagumWq5K0VdFyCuVsKs8BpdOShYYtEdd8W",
	"$2a$14$X3ulqf/iGxnf1k6oMZ.RZeJUoqI9PX2PM4rS5lkIKJXduLGXGPrt6",
	"$2a$14$DCYyqvUO/PWT.UifNF0rbuRkRfjrhHViOfVfJklmqrvWUoYcTiN2q",
	"$argon2id$v=19$m=47104,t=1,p=1$P2nzckEdTZ3bxCiBCkRTyA$xQL3Z32eo5jKl7u5tcIsnEKObYiyNZQQf5/4sAau6Pg",
}

var errPublished = errors.New("a hash from Caddy's documentation, whose password is public; expected one of your own, as `caddy hash-password` prints it")

// isPublished reports whether a hash is a published sample, also if it is
// encoded in base64, as older versions of Caddy print it, or has the prefix that
// htpasswd gives to bcrypt.
func isPublished(hash string) bool {
	if decoded, err := base64.StdEncoding.DecodeString(hash); err == nil {
		hash = string(decoded)
	}
	if rest, ok := strings.CutPrefix(hash, "$2y$"); ok {
		hash = "$2a$" + rest
	}
	return slices.Contains(publishedHashes, strings.TrimSpace(hash))
}

// authenticate finds out who the user is (RFC 9110 §11.7). The providers read
// Authorization and answer with WWW-Authenticate, as for a site: they get a
// request with the proxy's fields in the place of these, and what they answer
// goes the other way.
func (h *Handler) authenticate(w http.ResponseWriter, r *http.Request) (user string, f *refusal) {
	if len(h.auth) == 0 {
		return "", nil
	}
	asked := *r
	asked.Header = r.Header.Clone()
	delete(asked.Header, "Authorization")
	credentials, tried := r.Header["Proxy-Authorization"]
	if tried {
		asked.Header["Authorization"] = credentials
	}
	answer := headerOnly{make(http.Header)}
	repl, _ := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	for _, provider := range h.auth {
		u, ok, err := provider.Authenticate(answer, &asked)
		if err != nil {
			if c := h.logger.Check(zapcore.ErrorLevel, "auth provider returned error"); c != nil {
				c.Write(zap.String("provider", provider.name), errorField(err))
			}
			continue
		}
		if !ok {
			continue
		}
		if repl != nil { // as Caddy's own handler does
			repl.Set("http.auth.user.id", u.ID)
			for name, value := range u.Metadata {
				repl.Set("http.auth.user."+name, value)
			}
		}
		return u.ID, nil
	}
	if challenges := answer.fields["Www-Authenticate"]; len(challenges) > 0 {
		w.Header()["Proxy-Authenticate"] = challenges
	} else {
		w.Header()["Proxy-Authenticate"] = []string{`Basic realm="restricted"`} // there must be one
	}
	if tried {
		return "", causeAuthFailed.refusal(errBadCredentials)
	}
	return "", causeAuthRequired.refusal(nil)
}

// errBadCredentials tells a login that failed from one that was not tried.
var errBadCredentials = errors.New("the credentials are wrong")

// headerOnly keeps the fields of an answer and nothing else of it.
type headerOnly struct{ fields http.Header }

func (w headerOnly) Header() http.Header         { return w.fields }
func (w headerOnly) Write(b []byte) (int, error) { return len(b), nil }
func (w headerOnly) WriteHeader(int)             {}

// userKey is the limiter's key of a user. No client has such an address.
func userKey(user string) netip.Addr { return netip.IPv6Unspecified().WithZone(user) }
