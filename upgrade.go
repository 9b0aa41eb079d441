// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http/httpguts"
)

// Bounds on an Upgrade field: protocols in it, and bytes of each. What is beyond them is
// left out.
const (
	maxProtocols    = 8
	maxProtocolName = 64
)

// upgradeProtocols returns the protocols that an Upgrade field names, without h2c, which
// is no longer one to upgrade to (RFC 9113 §3.1) and would hide requests from this proxy.
func upgradeProtocols(values []string) []string {
	var protocols []string
	for _, value := range values {
		for member := range strings.SplitSeq(value, ",") {
			member = strings.Trim(member, " \t")
			name, version, found := strings.Cut(member, "/")
			switch {
			case !httpguts.ValidHeaderFieldName(name) || found && !httpguts.ValidHeaderFieldName(version):
			case strings.EqualFold(name, "h2c") || len(member) > maxProtocolName || len(protocols) == maxProtocols:
			default:
				protocols = append(protocols, member)
			}
		}
	}
	return protocols
}

// isUpgradeTo reports whether each of the protocols that an origin changes to is one of
// those that it was asked for (RFC 9110 §7.8).
func isUpgradeTo(protocols, asked []string) bool {
	return len(protocols) > 0 && !slices.ContainsFunc(protocols, func(protocol string) bool {
		return !slices.ContainsFunc(asked, func(name string) bool { return strings.EqualFold(name, protocol) })
	})
}

// upgrade joins a client and an origin that has agreed to speak another protocol on the
// connection.
func (h *Handler) upgrade(w http.ResponseWriter, r *http.Request, res *http.Response, t *tunnel) (int, error) {
	protocols := upgradeProtocols(res.Header["Upgrade"])
	if !isUpgradeTo(protocols, upgradeProtocols(r.Header["Upgrade"])) {
		_ = t.far.Close()
		return 0, forwardRefusal(r, protocolError("it switches to a protocol that was not requested"))
	}
	header := h.setResponseFields(w, r, res)
	delete(header, "Content-Type")
	header["Connection"] = []string{"Upgrade"}
	header["Upgrade"] = []string{strings.Join(protocols, ", ")}
	conn, early, err := hijack(w)
	if err != nil {
		_ = t.far.Close()
		return 0, caddyhttp.Error(http.StatusInternalServerError, err)
	}
	recordStatus(w, http.StatusSwitchingProtocols)
	head := []byte("HTTP/1.1 101 Switching Protocols\r\n")
	for name, values := range header {
		head = appendValues(head, name, values)
	}
	t.proto = protocols[0]
	t.near, t.early, t.greeting = newConnPeer(conn), early, append(head, "\r\n"...)
	go t.run()
	return http.StatusSwitchingProtocols, nil
}

// keepUpgrade says in a 426 which protocols the origin wants, as it has to (RFC 9110
// §15.5.22). wanted is its Upgrade field.
func keepUpgrade(r *http.Request, header http.Header, status int, wanted []string) {
	if status != http.StatusUpgradeRequired || r.ProtoMajor != 1 || r.ProtoMinor == 0 {
		return
	}
	if protocols := upgradeProtocols(wanted); len(protocols) > 0 {
		header["Upgrade"] = []string{strings.Join(protocols, ", ")}
		header["Connection"] = append(header["Connection"], "Upgrade")
	}
}
