// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"strconv"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// sendRefusal sends f to the client of v: through the site's error routes if there are any, otherwise
// directly, as one line of text or as problem details. The machine-readable fields are set in
// all cases.
func (p *proxy) sendRefusal(w http.ResponseWriter, r *http.Request, v *transaction, f *refusal) error {
	status := p.proxyStatus(f.errorType+f.params, f.text)
	if f.priorMembers != "" {
		status = f.priorMembers + ", " + status
	}
	if f.retryAfter != "" {
		w.Header()["Retry-After"] = []string{f.retryAfter}
	}
	return p.writeRefusal(w, r, v, f, status, append([]byte(f.Error()), '\n'))
}

// proxyStatus returns the value of the Proxy-Status field (RFC 9209). errorType may be followed by
// parameters. The details parameter has the sentence as it would be in a status line.
func (p *proxy) proxyStatus(errorType, sentence string) string {
	return p.name + "; error=" + errorType + "; details=" + quoted(reasonPhrase(sentence))
}

// writeRefusal is sendRefusal with a prepared Proxy-Status value and text. Each response gets
// field values of its own, because Caddy's header directive modifies values in place.
func (p *proxy) writeRefusal(w http.ResponseWriter, r *http.Request, v *transaction, f *refusal, proxyStatus string, body []byte) error {
	toEnd := p.giveReason(w, r, f)
	header := w.Header()
	header["Proxy-Status"] = []string{proxyStatus}
	closes := hasUnreadInput(r)
	if closes {
		header["Connection"] = []string{"close"}
	}
	if hasErrorRoutes(r) && toEnd == nil {
		p.beforeErrorRoutes(w, r)
		return caddyhttp.Error(f.status, f)
	}
	header["Content-Type"] = []string{"text/plain; charset=utf-8"}
	if f.setup {
		header["Cache-Control"], header["X-Content-Type-Options"] = []string{"no-store"}, []string{"nosniff"}
	}
	if prefersProblem(r.Header["Accept"]) {
		header["Content-Type"] = []string{problemType}
		body = problemOf(v, f, header).encode()
	} else if f.setup {
		body = p.describeSetup(header, r, f)
	}
	if closes { // for CloseInStages
		header["Content-Length"] = []string{strconv.Itoa(len(body))}
	}
	startWriteIdleTimeout(r)
	w.WriteHeader(f.status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // fails only if the client has disconnected
	}
	if toEnd != nil {
		toEnd.CloseInStages(v.addr)
		toEnd.EndHijacked()
	}
	return nil
}
