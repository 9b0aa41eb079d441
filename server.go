// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"cmp"
	"net"
	"reflect"
	"slices"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// This file reads from a server of Caddy what its clients speak, whom it trusts, and from where it can
// be reached. Where Caddy exports nothing, it reads unexported fields.

// usesTLS reports whether Caddy expects TLS from the clients of a listener. Connections without
// TLS must not be served there, wherever TLS is among the listener wrappers.
func usesTLS(app *caddyhttp.App, server *caddyhttp.Server, ln net.Listener) bool {
	tcp, ok := ln.Addr().(*net.TCPAddr)
	return len(server.TLSConnPolicies) > 0 && (!ok || tcp.Port != cmp.Or(app.HTTPPort, caddyhttp.DefaultHTTPPort))
}

// speaksHTTP1Only reports whether Caddy closes connections without TLS that begin with HTTP/2. With h2,
// it serves them even without h2c.
func speaksHTTP1Only(server *caddyhttp.Server) bool {
	return !slices.ContainsFunc(append(slices.Clone(server.ListenProtocols), server.Protocols), func(protocols []string) bool {
		return slices.Contains(protocols, "h2") || slices.Contains(protocols, "h2c")
	})
}

// speaksHTTP2 reports whether a server accepts HTTP/2 or HTTP/3 over TLS.
func speaksHTTP2(app *caddyhttp.App, server *caddyhttp.Server) bool {
	if len(server.TLSConnPolicies) == 0 || !slices.ContainsFunc(server.Protocols, func(p string) bool { return p == "h2" || p == "h3" }) {
		return false
	}
	return slices.ContainsFunc(server.Listen, func(address string) bool {
		addr, err := caddy.ParseNetworkAddress(address)
		return err == nil && int(addr.StartPort) != cmp.Or(app.HTTPPort, caddyhttp.DefaultHTTPPort)
	})
}

// trustsProxies reports whether trusted_proxies is set. It reads an unexported field,
// because Caddy has no other way to tell once it has loaded the module.
func trustsProxies(server *caddyhttp.Server) bool {
	field := reflect.ValueOf(server).Elem().FieldByName("trustedProxies")
	return field.IsValid() && field.Kind() == reflect.Interface && !field.IsNil()
}

// plainAddresses returns the listener addresses that other machines may connect to without
// TLS. It asks the listeners, because the config does not contain the address of an
// inherited socket (fd/3).
func (p *proxy) plainAddresses(ctx caddy.Context, server *caddyhttp.Server) (plain []string) {
	app, err := ctx.AppIfConfigured("http")
	if err != nil {
		return nil
	}
	for _, ln := range server.Listeners() {
		if isBeyondLoopback(ln.Addr()) && !usesTLS(app.(*caddyhttp.App), server, ln) {
			plain = append(plain, ln.Addr().String())
		}
	}
	return plain
}

// speaksProxyProtocol reports whether clients of a server may have to begin with a header of the
// PROXY protocol. It reads an unexported field, because Caddy has no other way to tell once it has
// loaded the listener wrappers.
func speaksProxyProtocol(server *caddyhttp.Server) bool {
	wrappers := reflect.ValueOf(server).Elem().FieldByName("listenerWrappers")
	if !wrappers.IsValid() || wrappers.Kind() != reflect.Slice {
		return false
	}
	for i := range wrappers.Len() {
		if wrappers.Index(i).Elem().Type().String() == "*proxyprotocol.ListenerWrapper" {
			return true
		}
	}
	return false
}

// isBeyondLoopback reports whether a listener's address is a TCP address that other
// machines may be able to reach.
func isBeyondLoopback(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && !tcp.IP.IsLoopback()
}

// minHeadLimit is the smallest size limit for request heads that suits a proxy: as much as
// Chromium sends. Kerberos tickets alone may take 64 KiB.
const minHeadLimit = 256 << 10

// caddyHeadLimit is Caddy's default size limit for request heads. It suits applications.
const caddyHeadLimit = 16 << 10

// raiseHeadLimit raises a server's limit to minHeadLimit unless the operator has set one.
func raiseHeadLimit(server *caddyhttp.Server) {
	if server != nil && server.MaxHeaderBytes == caddyHeadLimit {
		server.MaxHeaderBytes = minHeadLimit
	}
}
