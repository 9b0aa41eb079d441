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
	"net/netip"
	"net/textproto"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
	"golang.org/x/net/http/httpguts"
)

// hopByHop are the fields that belong to one connection and are never passed
// on: those of RFC 9110 §7.6.1, Proxy-Connection, which old clients send
// instead of Connection, and those of the authentication between a client and
// this proxy (§11.7). Names are in canonical form.
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

// nameSet is a set of field names in canonical form.
type nameSet map[string]struct{}

func (s nameSet) has(name string) bool {
	_, ok := s[name]
	return ok
}

// listedNames returns the names in a list field such as Connection or Trailer.
func listedNames(values []string) nameSet {
	if len(values) == 0 {
		return nil
	}
	names := make(nameSet)
	for _, value := range values {
		for name := range strings.SplitSeq(value, ",") {
			if name = strings.Trim(name, " \t"); name != "" {
				names[textproto.CanonicalMIMEHeaderKey(name)] = struct{}{}
			}
		}
	}
	return names
}

// countLines returns how many lines the fields of h take.
func countLines(h http.Header) (n int) {
	for _, values := range h {
		n += len(values)
	}
	return n
}

// countMembers returns how many members a list field has, empty ones included.
func countMembers(values []string) (n int) {
	for _, value := range values {
		n += strings.Count(value, ",") + 1
	}
	return n
}

// checkFieldNames refuses operations on fields that there cannot be: Caddy would pass
// over them. A name may have placeholders, and * for anything.
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

// checkHeaders is checkFieldNames for both directions.
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

// removeHopByHop removes the fields that are not to be passed on: hopByHop and
// whatever any Connection field nominates. What the proxy adds itself is added
// afterwards, so that nobody can nominate it away.
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

// prepareRequest makes the fields of a request those of the message that goes
// to the next hop: without hop-by-hop fields, but with the upgrade and the
// willingness to take trailers that the client has asked for and this proxy
// passes on.
func prepareRequest(h http.Header, protoMajor, protoMinor int) {
	var upgrade []string
	// RFC 9110 §7.8: Upgrade in an HTTP/1.0 request is to be ignored; later
	// versions than 1.1 have none.
	if protoMajor == 1 && protoMinor == 1 && httpguts.HeaderValuesContainsToken(h["Connection"], "upgrade") {
		upgrade = upgradeProtocols(h["Upgrade"])
	}
	trailers := httpguts.HeaderValuesContainsToken(h["Te"], "trailers")
	if protoMajor == 1 && protoMinor == 0 {
		delete(h, "Expect") // RFC 9110 §10.1.1: to be ignored, and so not said again as HTTP/1.1
	}
	removeHopByHop(h)
	// The options are on one line, as small WebSocket servers read no further.
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

// wireName returns how the name of a field is written in a message. Names have no case,
// but some WebSocket peers know only those of RFC 6455.
func wireName(name string) string {
	if rest, ok := strings.CutPrefix(name, "Sec-Websocket-"); ok {
		return "Sec-WebSocket-" + rest
	}
	return name
}

// pseudonymSeed makes the default pseudonym this process's own, so that two
// proxies in a chain are not taken for a loop.
var pseudonymSeed = rand.Text()

// provisionName gives the proxy its name in Via and Proxy-Status. The default
// stays the same for a server across reloads.
func (h *Handler) provisionName(server *caddyhttp.Server) error {
	var site string
	if server != nil {
		site = server.Name()
	}
	sum := sha256.Sum256([]byte(pseudonymSeed + site))
	h.name = fmt.Sprintf("caddy-async-proxy-%x", sum[:4])
	switch h.Via {
	case "off":
		return nil
	case "":
	default:
		if !validPseudonym(h.Via) {
			return fmt.Errorf("via %q: expected a pseudonym of letters, digits, dots and hyphens that starts with a letter, or off", h.Via)
		}
		h.name = h.Via
	}
	h.via = newVia(h.name)
	return nil
}

// validPseudonym reports whether a name can stand in Via and, which also wants
// a letter first (RFC 8941), in Proxy-Status. Who writes "via on" means no name.
func validPseudonym(name string) bool {
	switch strings.ToLower(name) {
	case "", "on", "true", "yes", "false", "no":
		return false
	}
	c := name[0] | 0x20
	return c >= 'a' && c <= 'z' && httpguts.ValidHeaderFieldName(name)
}

// A via is what this proxy says of itself in Via (RFC 9110 §7.6.3). Its zero
// value says nothing.
type via struct {
	pseudonym string
	http11    string // the member for a message received as HTTP/1.1, by far the most
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

// seen reports whether this proxy is in the Via of a request: it has been here
// before.
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

// setForwarded tells the next hop who the client is. A stranger's
// X-Forwarded-For is replaced; that of a trusted proxy is kept, and the proxy
// that it came from appended. X-Real-Ip is the client. Without a peer address,
// as on a Unix socket, nothing is invented.
func setForwarded(h http.Header, peer, client netip.Addr, trusted bool) {
	if !trusted {
		delete(h, "X-Forwarded-For")
	}
	name := peer.String()
	if peer.IsValid() {
		chain := name
		if prior := h["X-Forwarded-For"]; len(prior) > 0 {
			chain = strings.Join(prior, ", ") + ", " + chain
		}
		h["X-Forwarded-For"] = []string{chain}
	}
	if client != peer {
		name = client.String()
	}
	if h["X-Real-Ip"] = []string{name}; !client.IsValid() {
		delete(h, "X-Real-Ip")
	}
}

// maxForwards reads Max-Forwards (RFC 9110 §7.6.2), which only TRACE and
// OPTIONS heed, and counts it down, to below 2^32. last reports that the request
// is to go no further. A value that is not a number is left as it is.
func maxForwards(method string, h http.Header) (last bool) {
	if method != http.MethodTrace && method != http.MethodOptions {
		return false
	}
	values := h["Max-Forwards"]
	if len(values) != 1 {
		return false
	}
	n, err := strconv.ParseUint(values[0], 10, 32)
	if err != nil && !errors.Is(err, strconv.ErrRange) { // which leaves the most that there is
		return false
	}
	if n == 0 {
		return true
	}
	h["Max-Forwards"] = []string{strconv.FormatUint(n-1, 10)}
	return false
}
