// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// Headers of the PROXY protocol for a client at 192.0.2.7, or at the balancer itself.
const (
	proxyV1    = "PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r\n"
	proxyV2    = "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x07\xc0\x00\x02\x01\x12\x67\x00\x50"
	proxyLocal = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"
)

// The fast path reads the PROXY protocol's header as the wrapper is configured, and knows the
// client from it, as Caddy's server does.
func TestProxyProtocol(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprint(w, r.Header["X-Who"], string(body))
	}))
	const named, unnamed, refused = `[192.0.2.7 192.0.2.1:80]`, `[127.0.0.1 PROXY]`, "nothing"
	for policy, wants := range map[string]map[string]string{ // by what comes before the request
		"allow 127.0.0.0/8":       {proxyV1: named, proxyV2: named, proxyLocal: unnamed, "": unnamed, "PROXY nonsense\r\n": refused, "PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\n": refused},
		"fallback_policy use":     {proxyV1: named, "": unnamed},
		"fallback_policy require": {proxyV1: named, "": refused},
		"fallback_policy reject":  {proxyV1: refused, proxyV2: refused, "": unnamed},
		"fallback_policy ignore":  {proxyV1: unnamed, "": unnamed},
		"fallback_policy skip":    {proxyV1: "This connection begins with a header of the PROXY protocol", "": unnamed},
		"deny 127.0.0.0/8":        {proxyV1: refused, "": unnamed},
	} {
		f := form{wrappers: "proxy_protocol {\n" + policy + "\n}\n"}
		for _, fast := range []bool{true, false} {
			site := w.site("clients all\nallow 127.0.0.0/8\nheader_up X-Who \"{http.async_proxy.client} {http.request.local}\"")
			if !fast {
				site = byCaddy(site)
			}
			loadCaddyfile(t, withServers(w.globals()+site, f.servers(true)))
			for before, want := range wants {
				for _, size := range []int{1, 1000} {
					c := dialRaw(t, w.proxy)
					request := crlf("POST " + w.origin.URL + "/ HTTP/1.1\nHost: x\nContent-Length: 500\n\n" + strings.Repeat("x", 500))
					if size == 1 { // the wrapper wants the header of version 1 in one piece
						_, _ = io.WriteString(c, before)
					} else {
						request = before + request
					}
					sent := writeInPieces(c, request, size)
					got := refused
					if res, err := http.ReadResponse(c.r, nil); err == nil {
						body, _ := io.ReadAll(res.Body)
						got = strings.ReplaceAll(strings.TrimSuffix(string(body), strings.Repeat("x", 500)), w.proxy, "PROXY")
					} else if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.ECONNRESET) {
						t.Error(err)
					}
					if !strings.HasPrefix(got, want) {
						t.Errorf("%s, by the fast path: %t, %q in pieces of %d: %q, want %q", policy, fast, before, size, got, want)
					}
					if strings.HasPrefix(want, "[") {
						expectFastPath(t, fmt.Sprintf("%s, %q", policy, before), oneIf(fast))
					}
					<-sent
					_ = c.Close()
					eventually(t, "the connection to end", func() bool { return fastPathConns() == 0 })
				}
			}
		}
	}
}

// A client that sends its header late, or none, holds up no other clients, and leaves nothing behind.
// A reload in between changes nothing for it.
func TestProxyProtocolIsSlow(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Header["X-Who"]) }))
	load := func(options string) {
		loadCaddyfile(t, withServers(w.globals()+w.site("clients all\nallow 127.0.0.0/8\nheader_up X-Who {http.async_proxy.client}\n"+options), forms[2].servers(true)))
	}
	load("")
	once := func() {
		c := w.dialFastPathOver(forms[2])
		_ = c.Close()
		eventually(t, "the connection to end", func() bool { return fastPathConns() == 0 })
		w.origin.CloseClientConnections()
	}
	once()
	files, goroutines := descriptors(t, "self"), runtime.NumGoroutine()
	silent, half := dialRaw(t, w.proxy), dialRaw(t, w.proxy)
	_, _ = io.WriteString(half, proxyV2[:20])
	half.awaitRead()
	gone := dialRaw(t, w.proxy)
	_, _ = io.WriteString(gone, proxyV2[:20])
	_ = gone.Close()
	c := w.dialFastPathOver(forms[2])
	eventually(t, "the others to wait", func() bool { return fastPathConns() == 3 })
	_ = c.Close()

	load("dial_timeout 9s")
	for rest, c := range map[string]*rawConn{proxyV1: silent, proxyV2[20:]: half} {
		_, _ = io.WriteString(c, rest)
		if got := c.gets(w.origin.URL + "/"); got != "[192.0.2.7]" {
			t.Errorf("after the reload, the client is %s", got)
		}
	}
	expectFastPath(t, "after the reload", 2)
	_, _ = silent.Close(), half.Close()
	once()
	eventually(t, "all connections to be gone", func() bool {
		return descriptors(t, "self") <= files && runtime.NumGoroutine() <= goroutines
	})
}

// Clients that speak another protocol than the port's are refused and logged by the addresses from
// the PROXY protocol.
func TestProxyProtocolAndInvalidClients(t *testing.T) {
	for _, f := range forms[2:4] {
		w := newWorld(t, "", nil)
		loadCaddyfile(t, withServers(w.globals()+f.site(t, w.site("")), f.servers(true)))
		forgetInvalidLines()
		c := dialRaw(t, w.proxy)
		_, _ = io.WriteString(c, proxyV1+"\x05\x01\x00")
		if got := c.readAll(); got != "\x05\xff" {
			t.Errorf("%s: SOCKS got %q", f.name, got)
		}
		line := w.waitLog(invalidLogs[invalidSOCKS].message, 1)[0]
		if line["client"] != "192.0.2.7" || line["address"] != "192.0.2.1:80" {
			t.Errorf("%s: %v", f.name, line)
		}
	}
}
