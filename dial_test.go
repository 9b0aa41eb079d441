// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/dnstest"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// The tests in this file cover what happens while a tunnel's target is being dialed.

// A reload affects tunnels that are still being dialed as it does open ones.
func TestReloadDuringADial(t *testing.T) {
	for _, tc := range []struct {
		name, before, after, reason string
	}{
		{"rules that forbid it", "", "recheck_tunnels", tunnel.ReasonForbidden},
		{"rules that still allow it", "", "recheck_tunnels\nallow 127.0.0.1", tunnel.ReasonClient},
		{"no check", "", "", tunnel.ReasonClient},
		{"closed at once", "stream_close_delay 0", "", tunnel.ReasonReload},
	} {
		t.Run(tc.name, func(t *testing.T) {
			asked, answer := make(chan struct{}), make(chan struct{})
			begin := sync.OnceFunc(func() { close(asked) })
			resolver := nameServer(t, func(string, int) []string {
				begin()
				<-answer
				return []string{"127.0.0.1"}
			})
			w := newTunnelWorld(t, tunnelSetup{options: "allow 127.0.0.0/8\nresolvers " + resolver + "\n" + tc.before})
			_, port, _ := net.SplitHostPort(echoTarget(t))
			c := w.dial()
			c.send("CONNECT slow.test:" + port + " HTTP/1.1\nHost: slow.test\nX-Forwarded-For: 8.8.8.8\n\n")
			<-asked
			w.reload(t, tunnelSetup{options: tc.after})
			close(answer)
			if tc.reason == tunnel.ReasonClient {
				c.response(http.MethodConnect)
				c.CloseWrite()
			}
			if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != tc.reason {
				t.Errorf("closing line %v, want the reason %q", line, tc.reason)
			}
		})
	}
}

// deafTarget returns an address that neither accepts nor refuses connections. Port 0 means
// any port.
func deafTarget(t *testing.T, ip string, port uint16) string {
	t.Helper()
	family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(port), Addr: [4]byte{127, 0, 0, 1}})
	if ip == "::1" {
		family, to = unix.AF_INET6, &unix.SockaddrInet6{Port: int(port), Addr: netip.MustParseAddr(ip).As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, to); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		port = uint16(name.Port)
	case *unix.SockaddrInet6:
		port = uint16(name.Port)
	}
	address := netip.AddrPortFrom(netip.MustParseAddr(ip), port).String()
	fillQueue(t, fd, address)
	return address
}

// fillQueue fills the queue of a listener with a backlog of 0, which is one connection.
func fillQueue(t *testing.T, fd int, address string) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	eventually(t, "the queue to be full", func() bool {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			t.Fatal(err)
		}
		return info.Unacked > info.Sacked // a listener has the length of its queue and its backlog there
	})
}

func TestRefusalTime(t *testing.T) {
	refusalResolver(t)
	b := newRefusalBench(t, "dial_timeout 200ms")
	b.place("FULL", deafTarget(t, "127.0.0.1", 0))
	b.place("SILENT", listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) }))
	b.refuses(504, "connection_timeout", "FULL did not accept a connection in time", "CONNECT FULL", "GET http://FULL/", "GET https://FULL/")
	b.refuses(504, "dns_timeout", "could not be resolved in time", "CONNECT silent.invalid:PORT", "GET http://silent.invalid/")
	b.load(b.site("response_header_timeout 200ms")) // long enough to connect, even if the machine stalls
	b.refuses(504, "http_response_timeout", "SILENT did not answer in time", "GET http://SILENT/", "HEAD http://SILENT/", "POST http://SILENT/ HTTP/1.1\nHost: x\nContent-Length: 5\n\nhello")
}

// waitDialling waits until n connections to an address are being dialed.
func waitDialling(t *testing.T, address string, n int) {
	t.Helper()
	const synSent = "02"
	to := fmt.Sprintf(":%04X", netip.MustParseAddrPort(address).Port())
	eventually(t, fmt.Sprintf("%d dials", n), func() bool {
		data, err := os.ReadFile("/proc/net/tcp")
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		for line := range strings.Lines(string(data)) {
			if fields := strings.Fields(line); len(fields) > 3 && strings.HasSuffix(fields[2], to) && fields[3] == synSent {
				found++
			}
		}
		return found == n
	})
}

func TestDisconnectDuringDial(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{options: "dial_timeout 1h"})
	target := deafTarget(t, "127.0.0.1", 0)
	for protocol, ask := range map[string]func(ctx context.Context, c *tunnelClient) (leave func(), err error){
		"h1": func(context.Context, *tunnelClient) (func(), error) {
			c := w.dial()
			c.send("CONNECT " + target + " HTTP/1.1\nHost: " + target + "\n\n")
			return func() { c.Close() }, nil
		},
		"h2": func(ctx context.Context, c *tunnelClient) (func(), error) {
			conn, err := c.h2Conn(ctx)
			if err != nil {
				return nil, err
			}
			ctx, cancel := context.WithCancel(ctx)
			body, _ := io.Pipe()
			req, err := http.NewRequestWithContext(ctx, http.MethodConnect, "https://"+target, body)
			go conn.RoundTrip(req)
			return cancel, err
		},
		"h3": func(ctx context.Context, c *tunnelClient) (func(), error) {
			conn, err := c.h3Conn(ctx)
			if err != nil {
				return nil, err
			}
			stream, err := conn.OpenRequestStream(ctx)
			if err != nil {
				return nil, err
			}
			return (&h3Tunnel{stream}).Reset, stream.SendRequestHeader(&http.Request{
				Method: http.MethodConnect, Host: target, URL: &url.URL{Host: target}, Header: http.Header{}})
		},
	} {
		t.Run(protocol, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), tunnelPatience)
			defer cancel()
			leave, err := ask(ctx, w.client(t, protocol))
			if err != nil {
				t.Fatal(err)
			}
			waitDialling(t, target, 1)
			leave()
			waitNoTunnels(t)
			waitDialling(t, target, 0)
		})
	}
}

func TestProcessExitsDuringDials(t *testing.T) {
	c := binaryStart(t, binaryOptions{global: everyProtocol, site: "dial_timeout 1h", secure: true})
	target := deafTarget(t, "127.0.0.1", 0)
	var answers sync.WaitGroup
	for _, protocol := range tunnelProtocols {
		client := c.tunnels(t, protocol)
		answers.Go(func() {
			_, err := client.try(target, "")
			if refused := new(refusedError); !errors.As(err, &refused) || refused.status != http.StatusServiceUnavailable {
				t.Errorf("%s: %v, want 503", protocol, err)
			}
		})
	}
	waitDialling(t, target, len(tunnelProtocols))
	c.timeExit(t, answers.Wait)
}

// If IPv6 does not respond, IPv4 is tried in parallel (RFC 8305), not after IPv6 has used
// up the timeout of half an hour.
func TestDialOfTwoFamilies(t *testing.T) {
	alive := netip.MustParseAddrPort(echoTarget(t))
	deafTarget(t, "::1", alive.Port())
	w := newWorld(t, "dial_timeout 1h\nresolvers "+nameServer(t, func(string, int) []string { return []string{"::1", "127.0.0.1"} }), nil)
	c := w.dial()
	c.connect(fmt.Sprintf("both.test:%d", alive.Port()))
	hear(t, c, say(t, c, "hello"))
}

// The death of a target is detected, by a tunnel that lasts and by an idle origin
// connection.
func TestTargetsAreKeptAlive(t *testing.T) {
	w := newWorld(t, "", nil)
	w.dial().connect(echoTarget(t))
	eventually(t, "a tunnel with keep-alive", func() bool {
		open := openTunnels()
		return len(open) == 1 && keepAliveEnabled(t, descriptorsTo(t, open[0].Target))
	})
	origin := w.origin.Listener.Addr().String()
	c := w.dial()
	c.send("GET http://" + origin + "/ HTTP/1.1\r\nHost: " + origin + "\r\n\r\n")
	c.response("GET")
	eventually(t, "an idle connection with keep-alive", func() bool {
		return provisioned(t)[0].idleConnections() == 1 && keepAliveEnabled(t, descriptorsTo(t, origin))
	})
}

// descriptorsTo returns the descriptors of this process's connections to an address.
func descriptorsTo(t *testing.T, address string) (fds []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		fd, _ := strconv.Atoi(entry.Name())
		peer, _ := unix.Getpeername(fd)
		if to, ok := peer.(*unix.SockaddrInet4); ok && netip.AddrPortFrom(netip.AddrFrom4(to.Addr), uint16(to.Port)).String() == address {
			fds = append(fds, fd)
		}
	}
	return fds
}

// keepAliveEnabled reports whether there is one socket, on which keep-alive is set as intended.
func keepAliveEnabled(t *testing.T, fds []int) bool {
	t.Helper()
	for _, fd := range fds {
		for _, option := range [...][3]int{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 60},
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
			{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 4},
		} {
			if got, err := unix.GetsockoptInt(fd, option[0], option[1]); err != nil || got != option[2] {
				return false
			}
		}
	}
	return len(fds) == 1
}

// A DNS error and the lack of any DNS answer are reported differently (RFC 9209 §2.3.2).
func TestDNSFailures(t *testing.T) {
	server := dnstest.Serve(t, func(q dnstest.Query) dnstest.Reply {
		rcodes := map[string]dnsmessage.RCode{"nxdomain": 3, "servfail": 2, "refused": 5, "notimp": 4, "formerr": 1, "twelve": 12}
		name, _, _ := strings.Cut(q.Name, ".")
		if rest, ok := strings.CutPrefix(name, "long-"); ok { // the server answers these over TCP
			if q.Network == "udp" {
				return dnstest.Reply{Truncated: true}
			}
			name = rest
		}
		switch name {
		case "silent":
			return dnstest.Reply{Silent: true}
		case "aaaa-fails":
			if q.IPv6 {
				return dnstest.Reply{RCode: dnsmessage.RCodeServerFailure}
			}
			return dnstest.Reply{}
		}
		return dnstest.Reply{RCode: rcodes[name]}
	})
	w := newWorld(t, "", nil)
	for _, resolver := range []string{server, "tcp/" + server, dnstest.Closed(t), "tcp/" + freeAddress(t)} {
		w.load(w.site("dial_timeout 500ms\nresolvers " + resolver))
		for name, want := range map[string]struct {
			status     int
			kind, text string
		}{
			"nxdomain":      {502, `dns_error; rcode="NXDOMAIN"`, "nxdomain.test could not be resolved: there is no such name."},
			"servfail":      {503, `dns_error; rcode="SERVFAIL"`, "servfail.test could not be resolved: the DNS server answers SERVFAIL."},
			"long-servfail": {503, `dns_error; rcode="SERVFAIL"`, "long-servfail.test could not be resolved: the DNS server answers SERVFAIL."},
			"refused":       {503, `dns_error; rcode="REFUSED"`, "refused.test could not be resolved: the DNS server answers REFUSED."},
			"notimp":        {503, `dns_error; rcode="NOTIMP"`, "notimp.test could not be resolved: the DNS server answers NOTIMP."},
			"formerr":       {503, `dns_error; rcode="FORMERR"`, "formerr.test could not be resolved: the DNS server answers FORMERR."},
			"twelve":        {503, `dns_error; rcode="RCODE12"`, "twelve.test could not be resolved: the DNS server answers RCODE12."},
			"aaaa-fails":    {503, `dns_error; rcode="SERVFAIL"`, "aaaa-fails.test could not be resolved: the DNS server answers SERVFAIL."},
			"empty":         {502, `dns_error`, "empty.test could not be resolved: the name has no address."},
			"silent":        {504, `dns_timeout`, "silent.test could not be resolved in time."},
		} {
			if !strings.HasSuffix(resolver, server) {
				want.status, want.kind = 503, "dns_error"
				want.text = name + ".test could not be resolved: no DNS server answers."
			}
			clients := map[string]*rawConn{}
			for _, request := range []string{"CONNECT " + name + ".test:443", "GET http://" + name + ".test:8080/", "GET https://" + name + ".test/"} {
				clients[request] = w.dial()
				clients[request].send(request + " HTTP/1.1\nHost: x\nConnection: close\n\n")
			}
			for request, c := range clients {
				res, body := c.response(http.MethodGet)
				status := ownStatus(t, res.Header)
				got := status["error"]
				if code := status["rcode"]; code != "" {
					got += `; rcode="` + code + `"`
				}
				if res.StatusCode != want.status || got != want.kind || body != want.text+"\n" {
					t.Errorf("%s by %s: %d, %s, %q; want %v", request, resolver, res.StatusCode, got, body, want)
				}
			}
		}
	}
}

// If DNS answers for one family never arrive, the other family's address is used without
// delay, and a dead address delays only the first request.
func TestDialWithOneSilentDNSFamily(t *testing.T) {
	echo := echoTarget(t)
	_, port, _ := net.SplitHostPort(echo)
	server := dnstest.Serve(t, func(q dnstest.Query) dnstest.Reply {
		return dnstest.Reply{Silent: q.IPv6, Addrs: []string{"127.0.0.1"}}
	})
	w := newWorld(t, "dial_timeout 1h\nresolvers "+server, nil)
	c := w.dial()
	c.connect("half.test:" + port)
	hear(t, c, say(t, c, "hello"))
	_, origin, _ := net.SplitHostPort(w.origin.Listener.Addr().String())
	c = w.dial()
	c.send("GET http://half.test:" + origin + "/ HTTP/1.1\nHost: x\n\n")
	if res, body := c.response(http.MethodGet); res.StatusCode != http.StatusOK {
		t.Errorf("%s %q", res.Status, body)
	}
}
