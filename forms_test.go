// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// form is one of the forms in which the connections of HTTP/1.1 clients arrive.
type form struct {
	name     string
	overTLS  bool
	wrappers string // before async_proxy
	deployed bool   // with an access log, metrics and error routes

	directives string // in the block of the directive tls
}

// forms are all that the fast path serves. The first one needs no options of the server.
var forms = []form{
	{name: "plain"},
	{name: "TLS", overTLS: true},
	{name: "PROXY", wrappers: useProxyProtocol},
	{name: "PROXY and TLS", overTLS: true, wrappers: useProxyProtocol + "tls\n"},
	{name: "deployed", deployed: true},
}

// takes reports whether the case of a table with this number is tested in the form. Under the race
// detector, which makes the tables slow, each case is tested in one form, in the next one's turn.
func (f form) takes(number int) bool {
	return !conntest.Race || f == forms[number%len(forms)]
}

// useProxyProtocol has the addresses of clients taken from the PROXY protocol.
const useProxyProtocol = "proxy_protocol {\nallow 127.0.0.0/8\n}\n"

// proxiedClient is the address of clients that the PROXY protocol names.
const proxiedClient = "127.0.0.77"

// site returns the Caddyfile of a site whose clients connect in this form.
func (f form) site(t testing.TB, site string) string {
	if f.deployed {
		site = strings.Replace(site, "{\n", "{\n\tlog {\n\t\toutput discard\n\t}\n\thandle_errors {\n\t\trespond \"{err.status_code}: {err.message}\"\n\t}\n", 1)
	}
	if !f.overTLS {
		return site
	}
	certificate, key := conntest.CertificateFiles(t)
	site = strings.Replace(site, "http://", "https://", 1)
	return strings.Replace(site, "{\n", fmt.Sprintf("{\n\ttls %s %s {\n%s\n}\n", certificate, key, f.directives), 1)
}

// servers returns the options of a server whose clients the fast path serves, or Caddy's server.
func (f form) servers(fast bool) string {
	switch {
	case fast:
		return "listener_wrappers {\n" + f.wrappers + "async_proxy\n}\n"
	case f.wrappers == "":
		return withoutWrapper
	}
	return "listener_wrappers {\n" + f.wrappers + "}\n"
}

// global returns the global options of the form.
func (f form) global() string {
	if f.deployed {
		return "metrics\n"
	}
	return ""
}

// dial connects to a proxy.
func (f form) dial(t testing.TB, address string) *rawConn {
	t.Helper()
	return f.dialFrom(t, address, proxiedClient)
}

// dialFrom connects to a proxy. The PROXY protocol, if it is used, names the client.
func (f form) dialFrom(t testing.TB, address, client string) *rawConn {
	t.Helper()
	c := dialRaw(t, address)
	if f.wrappers != "" {
		_, port, _ := net.SplitHostPort(c.LocalAddr().String())
		_, _ = io.WriteString(c, "PROXY TCP4 "+client+" 127.0.0.1 "+port+" 80\r\n")
	}
	if f.overTLS {
		c.startTLS(clientTLS("http/1.1"))
	}
	return c
}

// startTLS makes the client speak TLS from now on.
func (c *rawConn) startTLS(config *tls.Config) {
	c.t.Helper()
	over := tls.Client(c.TCPConn, config)
	if err := over.Handshake(); err != nil {
		c.t.Fatalf("the TLS handshake: %v", err)
	}
	c.over, c.r = over, bufio.NewReader(over)
}

// peer returns what the client's bytes go through: TLS, or the socket.
func (c *rawConn) peer() interface {
	io.ReadWriteCloser
	CloseWrite() error
} {
	if c.over != nil {
		return c.over
	}
	return c.TCPConn
}

func (c *rawConn) Read(p []byte) (int, error)  { return c.peer().Read(p) }
func (c *rawConn) Write(p []byte) (int, error) { return c.peer().Write(p) }
func (c *rawConn) CloseWrite() error           { return c.peer().CloseWrite() }
func (c *rawConn) Close() error                { return c.peer().Close() }
