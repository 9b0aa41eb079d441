// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"slices"

	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// neverTrailers are fields that must not be trailers although httpguts accepts them: fields for
// routing, authentication and response handling (RFC 9110 §6.5.1), and the fields in which
// proxies describe the client and the path of a message, so that they cannot be forged
// after the head.
var neverTrailers = h1.NameSet{
	"Age": {}, "Alt-Svc": {}, "Cookie": {}, "Date": {}, "Expires": {}, "Location": {}, "Retry-After": {}, "Set-Cookie": {}, "Vary": {}, "Warning": {},
	"Forwarded": {}, "Via": {}, "X-Forwarded-For": {}, "X-Real-Ip": {},
}

// mayTrail reports whether a field, named in canonical form, may be forwarded as a trailer.
// Fields that a Connection option lists apply to this connection only.
func mayTrail(name string, options h1.NameSet) bool {
	return httpguts.ValidHeaderFieldName(name) && httpguts.ValidTrailerHeader(name) &&
		!slices.Contains(hopByHop[:], name) && !options.Has(name) && !neverTrailers.Has(name)
}

// requestTrailers returns the names of the announced trailers of r that may be forwarded.
func requestTrailers(r *http.Request) []string {
	return trailingNames(r.Trailer, r.Header["Connection"])
}

// trailingNames returns the sorted names of the trailers that may be forwarded, for a head
// with the given Connection options.
func trailingNames(trailer http.Header, connection []string) []string {
	if len(trailer) == 0 {
		return nil
	}
	var names []string
	options := h1.ListedNames(connection)
	for name := range trailer {
		if mayTrail(name, options) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// passTrailers forwards the trailers of a response after its content, both announced and
// unannounced ones.
func passTrailers(w http.ResponseWriter, res *http.Response, announced, connection []string) error {
	if h1.CountLines(res.Trailer) > h1.MaxFields {
		return cutOffError{h1.ErrTooManyFields}
	}
	names := trailingNames(res.Trailer, connection)
	if len(names) == 0 && len(announced) == 0 {
		return nil
	}
	_ = http.NewResponseController(w).Flush() // makes an empty body chunked, so that trailers can follow
	header := w.Header()
	for _, name := range names {
		values := res.Trailer[name] // nil if announced but not sent, so that no value of the head is used
		if _, found := slices.BinarySearch(announced, name); !found {
			name = http.TrailerPrefix + name
		}
		header[name] = values
	}
	return nil
}
