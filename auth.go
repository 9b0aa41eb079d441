// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"

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
