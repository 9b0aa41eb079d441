// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// withWrapper is the servers options to add when a server has others.
const withWrapper = `listener_wrappers {
	async_proxy
}
`

// A Caddyfile adds the listener wrapper wherever it can be of use.
func TestListenerWrapperFromCaddyfile(t *testing.T) {
	for _, row := range []struct {
		name, caddyfile string
		want            []int // number of wrappers of each server
	}{
		{"alone", `http://:8080 {
	async_proxy
}`, []int{1}},
		{"two servers", `http://:8080 {
	async_proxy
}
http://:8081 {
	async_proxy
}`, []int{1, 1}},
		{"one of two servers", `http://:8080 {
	async_proxy
}
http://:8081 {
	respond hello
}`, []int{1, 0}},
		{"two sites", `http://a.example:8080 {
	async_proxy
}
http://b.example:8080 {
	async_proxy
}`, []int{2}},
		{"by import", `(proxy) {
	async_proxy
}
http://:8080 {
	import proxy
}`, []int{1}},
		{"a matcher", `http://:8080 {
	@get method GET
	async_proxy @get
}`, []int{1}},
		{"in route", `http://:8080 {
	route {
		async_proxy
	}
}`, []int{0}},
		{"in handle", `http://:8080 {
	handle {
		async_proxy
	}
}`, []int{0}},
		{"in a route and outside", `http://:8080 {
	route /a {
		async_proxy
	}
	async_proxy
}`, []int{1}},
		{"in a named route", `&(proxy) {
	async_proxy
}
http://:8080 {
	invoke proxy
}`, []int{0}},
		{"options of the server", `{
	servers {
		max_header_size 1MB
	}
}
http://:8080 {
	async_proxy
}`, []int{0}},
		{"named in them", "{\nservers {\n" + withWrapper + "}\n}\nhttp://:8080 {\nasync_proxy\n}", []int{1}},
	} {
		t.Run(row.name, func(t *testing.T) {
			config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(row.caddyfile), map[string]any{"filename": "Caddyfile"})
			if err != nil {
				t.Fatal(err)
			}
			var is struct {
				Apps struct {
					HTTP struct {
						Servers map[string]struct {
							Wrappers []struct{ Wrapper string } `json:"listener_wrappers"`
						}
					}
				}
			}
			if err := json.Unmarshal(config, &is); err != nil {
				t.Fatal(err)
			}
			for i, want := range row.want {
				wrappers := is.Apps.HTTP.Servers[fmt.Sprint("srv", i)].Wrappers
				if len(wrappers) != want || want > 0 && wrappers[0].Wrapper != "async_proxy" {
					t.Errorf("server %d has the wrappers %v, want %d", i, wrappers, want)
				}
			}
		})
	}
	for wrapper, want := range map[string]string{
		"async_proxy burst": "wrong argument count or unexpected line ending after 'burst', at Caddyfile:4",
		`async_proxy {
	burst 10
}`: "the listener wrapper async_proxy has no options, at Caddyfile:5",
	} {
		_, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(`{
	servers {
		listener_wrappers {
			`+wrapper+`
		}
	}
}
http://:8080 {
	async_proxy
}`), map[string]any{"filename": "Caddyfile"})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", wrapper, err, want)
		}
	}
}

// Caddy's log mentions where the wrapper would be of use but is missing.
func TestListenerWrapperMissing(t *testing.T) {
	w := newWorld(t, "", nil)
	const missed = "clients are served by Caddy's HTTP server"
	if lines := w.logLines(missed); len(lines) > 0 {
		t.Errorf("with the wrapper: %v", lines)
	}
	w.load(byCaddy(w.site("")))
	if lines := w.logLines(missed); len(lines) != 1 || lines[0]["why"] != "another handler or a matcher comes before async_proxy" || lines[0]["level"] != "debug" {
		t.Errorf("with another handler: %v", lines)
	}
	loadCaddyfile(t, withServers(w.globals()+w.site(""), "max_header_size 1MB"))
	if lines := w.logLines(missed); len(lines) != 2 || lines[1]["level"] != "info" || !strings.Contains(fmt.Sprint(lines[1]["why"]), "listener_wrappers") {
		t.Errorf("without the wrapper: %v", lines)
	}
}

// A connection accepted before a reload, whose first request arrives after it, is served
// whatever that request is.
func TestListenerNewConnsAtReload(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", r.Method, body)
	}))
	echo := echoTarget(t)
	goroutines := runtime.NumGoroutine()
	requests := map[string]string{
		"GET URL HTTP/1.1\nHost: x\n\n":                                            "GET ",
		"POST URL HTTP/1.1\nHost: x\nContent-Length: 2\n\nok":                      "POST ok",
		"CONNECT " + echo + " HTTP/1.1\nHost: x\n\n":                               "",
		"GET URL HTTP/1.1\nHost: x\nX-Long: " + strings.Repeat("x", 5000) + "\n\n": "GET ",
	}
	for _, cut := range []int{0, 1, 10} { // bytes that arrive before the reload
		conns := make(map[string]*rawConn)
		for request := range requests {
			conns[request] = w.dial()
			conns[request].send(strings.ReplaceAll(request, "URL", w.origin.URL+"/")[:cut])
		}
		eventually(t, "all to be accepted", func() bool { return fastPathConns() == len(requests) })
		for _, c := range conns {
			c.awaitRead()
		}
		w.load(w.site(fmt.Sprintf("dial_timeout %ds", 11+cut)))

		for request, want := range requests {
			c := conns[request]
			c.send(strings.ReplaceAll(request, "URL", w.origin.URL+"/")[cut:])
			method, _, _ := strings.Cut(request, " ")
			res, body := c.response(method)
			if res.StatusCode != http.StatusOK || body != want {
				t.Errorf("%d bytes before, %.20q: %s %q", cut, request, res.Status, body)
			}
			if method == http.MethodConnect {
				c.send("hello")
				_ = c.CloseWrite()
				if got := c.readAll(); got != "hello" {
					t.Errorf("%d bytes before: the tunnel echoed %q", cut, got)
				}
			}
			_ = c.Close()
		}
		waitNoTunnels(t)
	}
	w.origin.CloseClientConnections()
	eventually(t, "all connections to be gone", func() bool { return runtime.NumGoroutine() <= goroutines })
}

// The server's head timeout applies to new connections from their start. A partial head
// then gets a response.
func TestListenerNewConnsTimeOut(t *testing.T) {
	w := newWorld(t, "", nil)
	loadCaddyfile(t, withServers(w.globals()+w.site(""), withWrapper+`timeouts {
	read_header 500ms
}`))
	start := time.Now() // the earliest start of their timeouts
	silent, half, bytewise := w.dial(), w.dial(), w.dial()
	half.send("GET http://a")
	go func() {
		for range 20 {
			_, _ = bytewise.Write([]byte("G"))
			time.Sleep(50 * time.Millisecond)
		}
	}()
	for name, c := range map[string]*rawConn{"silent": silent, "half a head": half, "byte by byte": bytewise} {
		got, err := io.ReadAll(c)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) || len(got) > 0 && (c == silent || !strings.HasPrefix(string(got), "HTTP/1.1 408 ")) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if took := time.Since(start); took < 450*time.Millisecond {
		t.Errorf("the connections were closed after %v", took)
	}
	eventually(t, "the connections to end", func() bool { return fastPathConns() == 0 })
}

// Where clients must use TLS, nothing is served in clear, wherever TLS is among the
// wrappers. A plain HTTP site next to it is unaffected.
func TestListenerOfTLS(t *testing.T) {
	for wrappers, fast := range map[string]int{"async_proxy\ntls": 0, "async_proxy": 1} {
		w := newTunnelWorld(t, tunnelSetup{servers: `listener_wrappers {
	` + wrappers + `
}`})
		w.origin = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
		t.Cleanup(func() { closeServer(t, w.origin) })
		for request, method := range map[string]string{
			"GET " + w.origin.URL + "/ HTTP/1.1\nHost: x\n\n": http.MethodGet,
			"CONNECT 127.0.0.1:1 HTTP/1.1\nHost: x\n\n":       http.MethodConnect,
		} {
			c := dialRaw(t, w.tls)
			c.send(request)
			if got := c.readAll(); !strings.HasPrefix(got, "HTTP/1.1 400 ") {
				t.Errorf("%q: in clear, %s got %q", wrappers, method, got)
			}
		}
		eventually(t, "those to be gone", func() bool { return fastPathConns() == 0 })
		for _, alpn := range []string{"http/1.1", "", "h2"} {
			config := clientTLS(alpn)
			if alpn == "" {
				config.NextProtos = nil
			}
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, Proxy: http.ProxyURL(&url.URL{Scheme: "https", Host: w.tls})}}
			if alpn == "h2" {
				w.client(t, "h2").open(echoTarget(t)) // a client of net/http speaks HTTP/1.1 to a proxy
			} else if res, err := client.Get(w.origin.URL + "/"); err != nil || res.StatusCode != http.StatusOK {
				t.Errorf("%q: over TLS, %v, %v", wrappers, res, err)
			}
			want := fast
			if alpn == "h2" {
				want = 0
			}
			expectFastPath(t, fmt.Sprintf("%q, the protocol %q", wrappers, alpn), want)
			client.CloseIdleConnections()
			eventually(t, "the client to be gone", func() bool { return fastPathConns() == 0 })
		}
		c := dialRaw(t, w.plain)
		c.gets(w.origin.URL + "/")
		eventually(t, "the plain HTTP client to be on the fast path", func() bool { return fastPathConns() == 1 })
		c.Close()
	}
}

// trusted_proxies works on these connections, too.
func TestListenerTrustedProxies(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header["X-Forwarded-For"], r.Header["X-Real-Ip"], r.Header["X-Client"])
	}))
	for _, row := range []struct{ servers, fields, want string }{
		{"", "", "[127.0.0.1] [127.0.0.1] [127.0.0.1]"},
		{"", "X-Forwarded-For: 192.0.2.1\n", "[127.0.0.1] [127.0.0.1] [127.0.0.1]"},
		{"trusted_proxies static 127.0.0.1", "", "[127.0.0.1] [127.0.0.1] [127.0.0.1]"},
		{"trusted_proxies static 127.0.0.1", "X-Forwarded-For: 192.0.2.1\n", "[192.0.2.1, 127.0.0.1] [192.0.2.1] [192.0.2.1]"},
		{"trusted_proxies static 127.0.0.1\nclient_ip_headers X-Who", "X-Who: 192.0.2.1\n", "[127.0.0.1] [192.0.2.1] [192.0.2.1]"},
		{"trusted_proxies static 127.0.0.2", "X-Forwarded-For: 192.0.2.1\n", "[127.0.0.1] [127.0.0.1] [127.0.0.1]"},
	} {
		loadCaddyfile(t, withServers(w.globals()+w.site("clients 127.0.0.0/8 192.0.2.0/24\nallow 127.0.0.0/8\nheader_up X-Client {http.vars.client_ip}"), withWrapper+row.servers))
		c := w.dialFastPath()
		for range 2 {
			c.get(w.origin.URL+"/", row.fields)
			if _, body := c.response(http.MethodGet); body != row.want {
				t.Errorf("%q, %q: %s, want %s", row.servers, row.fields, body, row.want)
			}
		}
	}
}
