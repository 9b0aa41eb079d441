// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// APIError is the response to a request of the API that has failed.
type APIError struct {
	Status int
	Err    error
}

// Error implements error.
func (e *APIError) Error() string { return e.Err.Error() }

// ServeAPI serves the API below /async_proxy/, which docs/admin-api.md describes. If it
// returns an APIError, the caller must respond with that.
func (v *View) ServeAPI(w http.ResponseWriter, r *http.Request) error {
	now := time.Now()
	// A slash within a name is escaped as %2F.
	collection, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.EscapedPath(), "/async_proxy/"), "/")
	name, verb, _ := strings.Cut(rest, "/")
	// The slash of a network is not escaped.
	if bits, more, _ := strings.Cut(verb, "/"); collection == "clients" && isNumber(bits) {
		name, verb = name+"/"+bits, more
	}
	name, err := url.PathUnescape(name)
	if err != nil {
		return apiError(http.StatusBadRequest, "%w", err)
	}
	switch {
	case collection == "stats" && rest == "":
		return apiGet(w, r, func() (any, error) { return v.Stats(now), nil })
	case collection == "history" && rest == "":
		return apiGet(w, r, func() (any, error) { return v.History(now), nil })
	case collection == "clients" && rest == "":
		return apiGet(w, r, func() (any, error) { return v.Clients(r.URL.Query(), now) })
	case collection == "tunnels" && rest == "":
		return apiGet(w, r, func() (any, error) { return v.Tunnels(r.URL.Query(), now) })
	case collection == "listeners" && rest == "":
		return apiGet(w, r, func() (any, error) { return Listeners{append([]Listener{}, v.in.Listen()...)}, nil })
	case collection == "targets" && rest == "":
		return apiGet(w, r, func() (any, error) { return v.Targets(r.URL.Query()) })
	case collection == "refusals" && rest == "":
		return apiGet(w, r, func() (any, error) { return v.Refusals(r.URL.Query()) })
	case collection == "explain" && rest == "":
		return apiGet(w, r, func() (any, error) { return v.Explain(r.Context(), r.URL.Query()) })
	case collection == "tunnels" && verb == "":
		id, err := strconv.ParseUint(name, 10, 64)
		if err != nil {
			return apiError(http.StatusBadRequest, "%q is not a tunnel id; expected a number", name)
		}
		return apiDo(w, r, http.MethodDelete, func() bool { return v.in.CloseTunnel(id) })
	case collection == "clients" && (verb == "" || verb == "block"):
		return v.serveClient(w, r, name, verb)
	}
	return apiError(http.StatusNotFound, "no endpoint %s; see docs/admin-api.md of async_proxy", r.URL.Path)
}

// serveClient refills or blocks a client.
func (v *View) serveClient(w http.ResponseWriter, r *http.Request, name, verb string) error {
	key, err := v.clientToActOn(name)
	if err != nil {
		return apiError(http.StatusBadRequest, "%w", err)
	}
	if verb == "" {
		query := r.URL.Query()
		return apiDo(w, r, http.MethodDelete, func() bool { return v.in.Refill(key, query.Get("zone"), query.Get("policy")) })
	}
	d, err := v.in.ParseDuration(r.URL.Query().Get("for"))
	if r.Method == http.MethodPut && (err != nil || d <= 0) {
		return apiError(http.StatusBadRequest, "for=%s: expected a positive duration such as 10m", r.URL.Query().Get("for"))
	}
	return apiDo(w, r, http.MethodPut, func() bool { return v.in.Block(key, d) })
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 8)
	return err == nil
}

func apiGet(w http.ResponseWriter, r *http.Request, answer func() (any, error)) error {
	if r.Method != http.MethodGet {
		return apiError(http.StatusMethodNotAllowed, "%s: expected GET", r.Method)
	}
	v, err := answer()
	if errors.As(err, new(*APIError)) {
		return err
	}
	if err != nil {
		return &APIError{http.StatusBadRequest, err}
	}
	w.Header().Set("Content-Type", "application/json")
	return json.NewEncoder(w).Encode(v)
}

func apiDo(w http.ResponseWriter, r *http.Request, method string, action func() bool) error {
	if r.Method != method {
		return apiError(http.StatusMethodNotAllowed, "%s: expected %s", r.Method, method)
	}
	if !action() {
		return &APIError{http.StatusNotFound, errors.New("not found")}
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func apiError(status int, format string, args ...any) error {
	return &APIError{status, fmt.Errorf(format, args...)}
}
