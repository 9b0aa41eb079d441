// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"net/http"
	"net/netip"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// Request is a request as it is sent to an origin.
type Request struct {
	Method    string
	OverTLS   bool   // the origin is an https one
	Authority string // the host and port of the origin
	Target    string // the request target, as the client wrote it
	Host      string
	Header    http.Header

	Body          *RequestBody // nil: none
	NeedsContinue bool         // 100 (Continue) must be sent to the client before the body is read
	TrailerNames  []string     // names of the trailers that may follow a chunked body
	Trailer       http.Header  // their values, valid once the body has been read
	StopBody      func()       // aborts a read of the body that is waiting for the client

	// Interim passes on an interim response that arrived over the given HTTP version. It is
	// not called concurrently.
	Interim func(status int, header http.Header, major, minor int)

	LimitKey   client.Key // the key of the client's limits
	ClientConn any        // identifies the client's connection; nil: unknown
	ClientAddr netip.Addr
	User       string // the client's authenticated user; "": none
}

// repeatable reports whether the request is idempotent and has no body.
func (out *Request) repeatable() bool {
	switch out.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return out.Body == nil
	}
	return false
}
