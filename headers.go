// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"golang.org/x/net/http/httpguts"
)

// hopByHop are the fields that are never forwarded because they apply to one connection:
// those of RFC 9110 §7.6.1, Proxy-Connection, which old clients send instead of
// Connection, and those for authentication between a client and this proxy (§11.7). Names
// are in canonical form.
var hopByHop = [...]string{
	"Connection",
	"Keep-Alive",
	"Proxy-Connection",
	"Te",
	"Transfer-Encoding",
	"Upgrade",
	"Http2-Settings", // RFC 9113 §3.1
	"Proxy-Authenticate",
	"Proxy-Authentication-Info",
	"Proxy-Authorization",
}

// checkFieldNames returns an error for operations on invalid field names, which Caddy
// would silently ignore. A name may contain placeholders and the wildcard *.
func checkFieldNames(ops *headers.HeaderOps) error {
	names := slices.Concat(slices.Collect(maps.Keys(ops.Add)), slices.Collect(maps.Keys(ops.Set)), ops.Delete, slices.Collect(maps.Keys(ops.Replace)))
	slices.Sort(names)
	for _, name := range names {
		if !httpguts.ValidHeaderFieldName(name) && !strings.Contains(name, "{") {
			return notAFieldName(name)
		}
	}
	return nil
}

// checkHeaders applies checkFieldNames to the operations on requests and responses.
func checkHeaders(h *headers.Handler) error {
	var errs []error
	if h.Request != nil {
		errs = append(errs, checkFieldNames(h.Request))
	}
	if h.Response != nil && h.Response.HeaderOps != nil {
		errs = append(errs, checkFieldNames(h.Response.HeaderOps))
	}
	return errors.Join(errs...)
}

func notAFieldName(name string) error { return fmt.Errorf("'%s' is not a field name", name) }

// removeHopByHop removes the fields in hopByHop and those that a Connection field lists.
// The proxy adds its own fields afterwards, so that a client cannot strip them by listing
// them.
func removeHopByHop(h http.Header) {
	for _, value := range h["Connection"] {
		for name := range strings.SplitSeq(value, ",") {
			if name = strings.Trim(name, " \t"); name != "" {
				h.Del(name)
			}
		}
	}
	for _, name := range hopByHop {
		delete(h, name)
	}
}

// prepareRequest turns the fields of a request into those for the next hop. It removes the
// hop-by-hop fields, and sets Connection, Upgrade and TE again for upgrades and trailers,
// which this proxy supports.
func prepareRequest(h http.Header, protoMajor, protoMinor int) {
	var upgrade []string
	// RFC 9110 §7.8: Upgrade in an HTTP/1.0 request must be ignored. HTTP/2 and 3 have no
	// Upgrade.
	if protoMajor == 1 && protoMinor == 1 && httpguts.HeaderValuesContainsToken(h["Connection"], "upgrade") {
		upgrade = upgradeProtocols(h["Upgrade"])
	}
	trailers := httpguts.HeaderValuesContainsToken(h["Te"], "trailers")
	if protoMajor == 1 && protoMinor == 0 {
		delete(h, "Expect") // RFC 9110 §10.1.1: ignored in HTTP/1.0, so not to be forwarded as HTTP/1.1
	}
	removeHopByHop(h)
	// Write the options on one line: small WebSocket servers read only the first.
	option := ""
	if len(upgrade) > 0 {
		h["Upgrade"] = []string{strings.Join(upgrade, ", ")}
		option = "Upgrade"
	}
	if trailers {
		h["Te"] = []string{"trailers"}
		if option != "" {
			option += ", "
		}
		option += "TE"
	}
	if option != "" {
		h["Connection"] = []string{option}
	}
}

// pseudonymSeed makes the default pseudonym unique to this process, so that two proxies in
// a chain are not mistaken for a loop.
var pseudonymSeed = rand.Text()

// provisionName sets the proxy's name for Via and Proxy-Status. The default name of a
// server stays the same across reloads.
func (p *proxy) provisionName(server *caddyhttp.Server) error {
	var site string
	if server != nil {
		site = server.Name()
	}
	sum := sha256.Sum256([]byte(pseudonymSeed + site))
	p.name = fmt.Sprintf("caddy-async-proxy-%x", sum[:4])
	switch p.config.Via {
	case "off":
		return nil
	case "":
	default:
		p.name = p.config.Via
	}
	p.via = newVia(p.name)
	return nil
}

// validPseudonym reports whether a name is valid in Via and in Proxy-Status, where it must
// start with a letter (RFC 8941). Words such as on are rejected: an operator who writes
// "via on" does not mean a name.
func validPseudonym(name string) bool {
	switch strings.ToLower(name) {
	case "", "on", "true", "yes", "false", "no":
		return false
	}
	c := name[0] | 0x20
	return c >= 'a' && c <= 'z' && httpguts.ValidHeaderFieldName(name)
}

// A via adds this proxy to Via fields (RFC 9110 §7.6.3). The zero value adds nothing.
type via struct {
	pseudonym string
	http11    string // the member for messages received over HTTP/1.1, by far the most
}

func newVia(pseudonym string) via { return via{pseudonym, "1.1 " + pseudonym} }

// add appends this proxy to the Via of a message that was received in the given
// version.
func (v via) add(h http.Header, major, minor int) {
	if v.pseudonym == "" {
		return
	}
	member := v.http11
	if major != 1 || minor != 1 {
		member = strconv.Itoa(major) + "." + strconv.Itoa(minor) + " " + v.pseudonym
	}
	h["Via"] = append(h["Via"], member)
}

// seen reports whether a request's Via names this proxy, so that the request has been
// here before.
func (v via) seen(h http.Header) bool {
	if v.pseudonym == "" {
		return false
	}
	for _, value := range h["Via"] {
		for member := range strings.SplitSeq(value, ",") {
			// member = received-protocol RWS received-by [ RWS comment ]
			fields := strings.Fields(member)
			if len(fields) > 1 && strings.EqualFold(fields[1], v.pseudonym) {
				return true
			}
		}
	}
	return false
}

// setForwarded sets X-Forwarded-For and X-Real-Ip for the next hop. It replaces the
// X-Forwarded-For of an untrusted peer; to that of a trusted proxy it appends the proxy's
// address. X-Real-Ip is the client's address. Without a peer address, as on a Unix
// socket, it does not make one up.
func setForwarded(h http.Header, from clientIdentity) {
	if !from.trusted {
		delete(h, "X-Forwarded-For")
	}
	peer, chain := from.peer.Addr(), ""
	if peer.IsValid() {
		if chain = from.name; peer != from.addr {
			chain = peer.String()
		}
		if prior := h["X-Forwarded-For"]; len(prior) > 0 {
			chain = strings.Join(prior, ", ") + ", " + chain
		}
	}
	values := [...]string{chain, from.name} // one allocation for both
	if chain != "" {
		h["X-Forwarded-For"] = values[:1:1]
	}
	if h["X-Real-Ip"] = values[1:]; !from.addr.IsValid() {
		delete(h, "X-Real-Ip")
	}
}

// maxForwards decrements Max-Forwards (RFC 9110 §7.6.2) of TRACE and OPTIONS requests, and
// caps it below 2^32. It returns true if the value is 0, so that the request must not be
// forwarded. A value that is not a number is left unchanged.
func maxForwards(method string, h http.Header) (last bool) {
	if method != http.MethodTrace && method != http.MethodOptions {
		return false
	}
	values := h["Max-Forwards"]
	if len(values) != 1 {
		return false
	}
	n, err := strconv.ParseUint(values[0], 10, 32)
	if err != nil && !errors.Is(err, strconv.ErrRange) { // with ErrRange, n is the maximum
		return false
	}
	if n == 0 {
		return true
	}
	h["Max-Forwards"] = []string{strconv.FormatUint(n-1, 10)}
	return false
}
