// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/egress"
)

// policyOrigin is a loopback server that counts its connections.
type policyOrigin struct {
	address, port string
	accepted      atomic.Int64
}

func newPolicyOrigin(t *testing.T) *policyOrigin {
	o := &policyOrigin{}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "counted")
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			o.accepted.Add(1)
		}
	}
	server.Start()
	t.Cleanup(func() { closeServer(t, server) })
	o.address = server.Listener.Addr().String()
	_, o.port, _ = net.SplitHostPort(o.address)
	return o
}

// connections returns the number of connections since the last call. It connects once
// itself: connections are accepted in order, so all earlier ones have been counted by then.
func (o *policyOrigin) connections(t testing.TB) int64 {
	t.Helper()
	conn := dialRaw(t, o.address)
	conn.send("GET / HTTP/1.1\nHost: origin\nConnection: close\n\n")
	conn.response(http.MethodGet)
	return o.accepted.Swap(0) - 1
}

// policyRequest sends one request for an authority, with additional head lines. method is
// GET or CONNECT.
func policyRequest(t *testing.T, proxy, method, authority, lines string) (*http.Response, string) {
	t.Helper()
	target := authority
	if method != http.MethodConnect {
		target = "http://" + authority + "/"
	}
	conn := dialRaw(t, proxy)
	conn.send(method + " " + target + " HTTP/1.1\nHost: " + authority + "\n" + lines + "\n")
	return conn.response(method)
}

// policyRemote makes a loopback client count as one from elsewhere.
const policyRemote = "X-Forwarded-For: 8.8.8.8\n"

// accessDenied checks that the rules refuse a request for authority.
func accessDenied(t *testing.T, proxy, method, authority, lines string) {
	t.Helper()
	res, body := policyRequest(t, proxy, method, authority, lines)
	if got := ownStatus(t, res.Header)["error"]; res.StatusCode != http.StatusForbidden || got != "destination_ip_prohibited" {
		t.Errorf("%s %s: %s, Proxy-Status %q, body %q; want 403 destination_ip_prohibited", method, authority, res.Status, got, body)
	}
	if !strings.HasPrefix(body, "Denied by proxy: no rule allows "+authority) || strings.Count(body, "\n") != 1 || !strings.HasSuffix(body, ".\n") {
		t.Errorf("%s %s: body %q", method, authority, body)
	}
}

// policyOpen checks that a request for authority gets the response want.
func policyOpen(t *testing.T, proxy, method, authority, lines, want string) {
	t.Helper()
	res, body := policyRequest(t, proxy, method, authority, lines)
	if res.StatusCode != http.StatusOK || method != http.MethodConnect && body != want {
		t.Errorf("%s %s: %s, Proxy-Status %q, body %q; want 200 %q", method, authority, res.Status, res.Header.Get("Proxy-Status"), body, want)
	}
}

// policyOf makes a policy from rules in Caddyfile syntax, one per line. It adds a rule
// about a port that no test uses, because an allow rule without a deny rule has no effect.
func policyOf(t testing.TB, rules string) *access.Control {
	t.Helper()
	p := &proxy{config: new(Handler), logger: zap.NewNop()}
	if err := p.config.UnmarshalCaddyfile(caddyfile.NewTestDispenser(`async_proxy {
	` + rules + `
	deny all:1
}`)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	p.resolver = egress.NewResolver(nil)
	y := &policy{proxy: p, options: &p.config.Options, own: &p.config.Options}
	if err := y.provisionDialer(ctx); err != nil {
		t.Fatal(err)
	}
	y.dialer.Access.IsSelf = nil
	return y.dialer.Access
}

// policyPrivate are spellings of this machine and its networks.
var policyPrivate = []string{"127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "10.0.0.1", "169.254.169.254", "0.0.0.0", "[::]", "[fd00::1]", "[2002:7f00:1::]", "LOCALHOST", "127.0.0.2"}

func TestAccessReach(t *testing.T) {
	w := newWorld(t, "", nil)
	o := newPolicyOrigin(t)
	policyOpen(t, w.proxy, http.MethodGet, o.address, "", "counted")
	policyOpen(t, w.proxy, http.MethodConnect, o.address, "", "")
	conn := w.dial()
	conn.connect(o.address)
	conn.send("GET / HTTP/1.1\nHost: origin\nConnection: close\n\n")
	if _, body := conn.response(http.MethodGet); body != "counted" {
		t.Errorf("through a tunnel: %q", body)
	}
	if n := o.connections(t); n != 3 {
		t.Errorf("%d connections, want 3", n)
	}
	// The first GET's connection is idle, and no other client may use it.
	for _, method := range []string{http.MethodConnect, http.MethodGet} {
		for _, host := range policyPrivate {
			accessDenied(t, w.proxy, method, host+":"+o.port, policyRemote)
		}
		for _, lines := range []string{"Forwarded: for=8.8.8.8\n", "Via: 1.1 other\n", "X-Forwarded-For:\n", "X-Forwarded-For: 127.0.0.1\n"} {
			accessDenied(t, w.proxy, method, o.address, lines)
		}
		for _, host := range []string{"169.254.169.254", "0.0.0.0", "[fe80::1]", "224.0.0.1", "255.255.255.255", "[::]"} {
			accessDenied(t, w.proxy, method, host+":"+o.port, "") // closed even to local clients
		}
	}
	if n := o.connections(t); n != 0 {
		t.Errorf("%d connections for refused requests", n)
	}
	policyOpen(t, w.proxy, http.MethodGet, o.address, "", "counted")
	if n := o.connections(t); n > 1 {
		t.Errorf("%d connections for one request", n)
	}

	w.load(w.site("allow 127.0.0.0/8"))
	policyOpen(t, w.proxy, http.MethodGet, o.address, policyRemote, "counted")
	policyOpen(t, w.proxy, http.MethodConnect, o.address, policyRemote, "")
	policyOpen(t, w.proxy, http.MethodGet, "[::ffff:127.0.0.1]:"+o.port, policyRemote, "counted")
	for _, host := range []string{"[::1]", "10.0.0.1", "0.0.0.0", "169.254.169.254"} {
		accessDenied(t, w.proxy, http.MethodConnect, host+":"+o.port, policyRemote)
		accessDenied(t, w.proxy, http.MethodGet, host+":"+o.port, policyRemote)
	}
}

// TestAccessListeners checks that Caddy's admin endpoint and the proxy itself are closed to
// all clients even if everything is allowed, and that another site is not.
func TestAccessListeners(t *testing.T) {
	admin, proxy, other := freeAddress(t), freeAddress(t), freeAddress(t)
	port := func(address string) string { return address[strings.LastIndexByte(address, ':')+1:] }
	for _, options := range []string{"", "allow 0.0.0.0/0 ::/0"} {
		loadCaddyfile(t, fmt.Sprintf(`{
	admin %s
	persist_config off
	skip_install_trust
	grace_period 5s
	default_bind 127.0.0.1
	log {
		output discard
	}
}
http://:%s {
	async_proxy {
		burst 1000000
		refill 1000000
		%s
	}
}
http://:%s {
	respond "another site"
}
`, admin, port(proxy), options, port(other)))
		conn := dialRaw(t, admin) // the endpoint does exist
		conn.send("GET /config/ HTTP/1.1\nHost: " + admin + "\nConnection: close\n\n")
		if res, _ := conn.response(http.MethodGet); res.StatusCode != http.StatusOK {
			t.Fatalf("admin endpoint: %s", res.Status)
		}
		for _, method := range []string{http.MethodConnect, http.MethodGet} {
			for _, lines := range []string{"", policyRemote} {
				for _, host := range []string{"127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "[::]", "[64:ff9b::7f00:1]"} {
					if host == "localhost" && lines == "" && !policyOnlyIPv4(t) {
						continue // ::1 may refuse the connection before 127.0.0.1 is denied
					}
					accessDenied(t, proxy, method, host+":"+port(admin), lines)
					accessDenied(t, proxy, method, host+":"+port(proxy), lines)
				}
			}
			policyOpen(t, proxy, method, other, "", "another site")
		}
		if options != "" {
			policyOpen(t, proxy, http.MethodGet, other, policyRemote, "another site")
		} else {
			accessDenied(t, proxy, http.MethodGet, other, policyRemote)
		}
	}
}

func policyOnlyIPv4(t *testing.T) bool {
	addrs, err := net.DefaultResolver.LookupHost(t.Context(), "localhost")
	return err == nil && slices.Equal(addrs, []string{"127.0.0.1"})
}

// TestAccessListenersSpelled checks that Caddy's listeners are closed however the config
// spells them, and also if the socket is inherited.
func TestAccessListenersSpelled(t *testing.T) {
	for _, listen := range strings.Fields("localhost LOCALHOST 127.0.0.1 [::ffff:127.0.0.1] [::1] [0:0:0:0:0:0:0:1] [0::1] 0.0.0.0 [::] [0::0] tcp6/[::0] tcp4/0.0.0.0") {
		admin, proxy := freeAddress(t), freeAddress(t)
		port := admin[strings.LastIndexByte(admin, ':'):]
		loadCaddyfile(t, fmt.Sprintf(`{
	admin %s%s
	persist_config off
	skip_install_trust
	default_bind 127.0.0.1
	log {
		output discard
	}
}
http://%s {
	async_proxy {
		burst 1000000
		refill 1000000
		allow 0.0.0.0/0 ::/0
	}
}
`, listen, port, strings.TrimPrefix(proxy, "127.0.0.1")))
		refused := 0
		for _, host := range []string{"127.0.0.1", "[::1]"} {
			conn, err := net.Dial("tcp", host+port)
			if err != nil {
				continue // nothing listens there
			}
			conn.Close()
			refused++
			accessDenied(t, proxy, http.MethodConnect, host+port, policyRemote)
		}
		if refused == 0 {
			t.Errorf("admin %s%s found no address to check", listen, port)
		}
	}
}

// TestAccessListenersWhileReloading checks that the admin endpoint stays closed while a
// config is loaded that reopens it, on the same port or another, and after a config that
// failed to load.
func TestAccessListenersWhileReloading(t *testing.T) {
	admins, proxy := []string{freeAddress(t), freeAddress(t)}, freeAddress(t)
	config := func(admin, sites string) string {
		return fmt.Sprintf(`{
	admin %s
	persist_config off
	skip_install_trust
	default_bind 127.0.0.1
	log {
		output discard
	}
}
http://:%s {
	async_proxy {
		burst 1000000
		refill 1000000
		allow private
	}
}
%s`,
			admin, proxy[strings.LastIndexByte(proxy, ':')+1:], sites)
	}
	loadCaddyfile(t, config(admins[0], ""))
	var tried, open atomic.Int64
	attack := func(stop <-chan struct{}) {
		for {
			for _, admin := range admins {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := net.Dial("tcp", proxy)
				if err != nil {
					continue // the old listener has just closed
				}
				_ = conn.SetDeadline(time.Now().Add(patience))
				fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: x\r\n%s\r\n", admin, policyRemote)
				answer := make([]byte, 16)
				n, _ := conn.Read(answer)
				_ = conn.Close()
				tried.Add(1)
				if strings.HasPrefix(string(answer[:n]), "HTTP/1.1 200") {
					open.Add(1)
				}
			}
		}
	}
	stop := make(chan struct{})
	var attackers sync.WaitGroup
	for range 2 {
		attackers.Go(func() { attack(stop) })
	}
	for i := range 10 {
		startCaddyfile(t, config(admins[i%2], fmt.Sprintf(`http://:%d {
	respond x
}
`, 1024+i)))
		failing, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(config(admins[(i+1)%2], `http://:1 {
	bind 203.0.113.99
	respond x
}
`)), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := caddy.Load(failing, true); err == nil {
			t.Fatal("the config with an address of another machine was loaded")
		}
		before := tried.Load()
		eventually(t, "attempts after the failed reload", func() bool { return tried.Load() > before+20 })
	}
	close(stop)
	attackers.Wait()
	if open.Load() != 0 {
		t.Errorf("%d of %d connections to the admin endpoint succeeded", open.Load(), tried.Load())
	}
}

// TestAccessPool checks that an idle connection dialed for a client on this machine is
// reused only for such clients, in any protocol.
func TestAccessPool(t *testing.T) {
	w := newWorld(t, "", nil)
	o := newPolicyOrigin(t)
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{tlsCertificate}}
	secure.StartTLS()
	defer secure.Close()
	for _, tc := range []struct{ url, lines string }{{"http://" + o.address, ""}, {secure.URL, ""}, {secure.URL, "Connection: Upgrade\nUpgrade: x\n"}} {
		conn := w.dial()
		for i, lines := range []string{"", policyRemote, "", policyRemote} {
			conn.send("GET " + tc.url + "/ HTTP/1.1\nHost: x\n" + tc.lines + lines + "\n")
			want := []int{http.StatusOK, http.StatusForbidden}[i%2]
			if res, body := conn.response(http.MethodGet); res.StatusCode != want {
				t.Errorf("%s, request %d: %s %q, want %d", tc.url, i, res.Status, body, want)
			}
		}
	}
	if n := o.connections(t); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}
