// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"slices"

	"golang.org/x/net/http/httpguts"
)

// headOnly are fields that must not come as trailers although httpguts lets them:
// those that describe routing, authentication and how a response is to be handled
// (RFC 9110 §6.5.1), and what a proxy says of a message's way and of its client,
// which nobody else is to say again.
var headOnly = nameSet{
	"Age": {}, "Alt-Svc": {}, "Cookie": {}, "Date": {}, "Expires": {}, "Location": {}, "Retry-After": {}, "Set-Cookie": {}, "Vary": {}, "Warning": {},
	"Forwarded": {}, "Via": {}, "X-Forwarded-For": {}, "X-Real-Ip": {},
}

// mayTrail reports whether a field, named in canonical form, may go to the next hop
// behind a body. One that a Connection option names belongs to this connection only.
func mayTrail(name string, options nameSet) bool {
	return httpguts.ValidHeaderFieldName(name) && httpguts.ValidTrailerHeader(name) &&
		!slices.Contains(hopByHop[:], name) && !options.has(name) && !headOnly.has(name)
}

// requestTrailers returns the names of those trailers that r has announced and
// that may go to the next hop.
func requestTrailers(r *http.Request) []string {
	return trailingNames(r.Trailer, r.Header["Connection"])
}

// trailingNames returns the names of the trailers that may go to the next hop, in
// order, behind a head with the given Connection options.
func trailingNames(trailer http.Header, connection []string) []string {
	if len(trailer) == 0 {
		return nil
	}
	var names []string
	options := listedNames(connection)
	for name := range trailer {
		if mayTrail(name, options) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// passTrailers passes on the trailers of a response, whose content has been passed
// on: those that were announced, and others that have come.
func passTrailers(w http.ResponseWriter, res *http.Response, announced, connection []string) error {
	if countLines(res.Trailer) > maxFields {
		return brokenOff{errTooManyFields}
	}
	names := trailingNames(res.Trailer, connection)
	if len(names) == 0 && len(announced) == 0 {
		return nil
	}
	_ = http.NewResponseController(w).Flush() // puts an empty body into chunks, behind which trailers can be
	header := w.Header()
	for _, name := range names {
		values := res.Trailer[name] // none if it was announced and has not come: that of the head is no trailer
		if _, found := slices.BinarySearch(announced, name); !found {
			name = http.TrailerPrefix + name
		}
		header[name] = values
	}
	return nil
}
