// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// Limits for an Upgrade field: the number of protocols, and the length of each in bytes.
// Protocols beyond the limits are dropped.
const (
	maxProtocols    = 8
	maxProtocolName = 64
)

// upgradeProtocols returns the protocols in an Upgrade field. It drops h2c, which is
// obsolete (RFC 9113 §3.1) and would hide requests from this proxy.
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

// isUpgradeTo reports whether all protocols that an origin switches to were requested (RFC
// 9110 §7.8).
func isUpgradeTo(protocols, requested []string) bool {
	return len(protocols) > 0 && !slices.ContainsFunc(protocols, func(protocol string) bool {
		return !slices.ContainsFunc(requested, func(name string) bool { return strings.EqualFold(name, protocol) })
	})
}

// upgrade sends the client the origin's 101 (Switching Protocols), and turns the two
// connections into a tunnel.
func (y *policy) upgrade(w http.ResponseWriter, r *http.Request, res *http.Response, t *tunnel.Tunnel) (int, error) {
	protocols := upgradeProtocols(res.Header["Upgrade"])
	if !isUpgradeTo(protocols, upgradeProtocols(r.Header["Upgrade"])) {
		_ = t.Far.Close()
		return 0, forwardRefusal(r, h1.ProtocolError("it switches to a protocol that was not requested"))
	}
	header := y.setResponseFields(w, r, res)
	delete(header, "Content-Type")
	header["Connection"] = []string{"Upgrade"}
	header["Upgrade"] = []string{strings.Join(protocols, ", ")}
	conn, early, err := hijack(w)
	if err != nil {
		_ = t.Far.Close()
		return 0, caddyhttp.Error(http.StatusInternalServerError, err)
	}
	recordStatus(w, http.StatusSwitchingProtocols)
	head := []byte("HTTP/1.1 101 Switching Protocols\r\n")
	for name, values := range header {
		head = h1.AppendValues(head, name, values)
	}
	t.Proto = protocols[0]
	t.Near, t.ClientPrefix, t.ResponseHead = tunnel.NewConnEnd(conn), early, append(head, "\r\n"...)
	go t.Run()
	return http.StatusSwitchingProtocols, nil
}

// keepUpgrade keeps the Upgrade field of a 426 (Upgrade Required), which must say which
// protocols the origin requires (RFC 9110 §15.5.22). wanted is the origin's field.
func keepUpgrade(r *http.Request, header http.Header, status int, wanted []string) {
	if status != http.StatusUpgradeRequired || r.ProtoMajor != 1 || r.ProtoMinor == 0 {
		return
	}
	if protocols := upgradeProtocols(wanted); len(protocols) > 0 {
		header["Upgrade"] = []string{strings.Join(protocols, ", ")}
		header["Connection"] = append(header["Connection"], "Upgrade")
	}
}
