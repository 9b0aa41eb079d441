// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// fastPathConns returns the number of connections on the fast path.
func fastPathConns() (n int) {
	for _, l := range program.listeners.All() {
		n += len(l.Clients())
	}
	return n
}

// expectFastPath fails the test unless the given number of connections is on the fast path. One that
// has just moved to net/http still counts for a moment.
func expectFastPath(t testing.TB, what string, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s: the fast path to serve %d connections", what, want), func() bool { return fastPathConns() == want })
}

// oneIf returns 1 if there is a connection, and 0 if not.
func oneIf(there bool) int {
	if there {
		return 1
	}
	return 0
}

// get sends a request for a URL, followed by the given lines.
func (c *rawConn) get(url, more string) {
	c.t.Helper()
	c.send("GET " + url + " HTTP/1.1\nHost: x\n" + more + "\n")
}

// gets sends a request for a URL and returns the response body.
func (c *rawConn) gets(url string) string {
	c.t.Helper()
	c.get(url, "")
	_, body := c.response(http.MethodGet)
	return body
}

// dialFastPath opens a connection that the fast path serves.
func (w *world) dialFastPath() *rawConn {
	w.t.Helper()
	return w.dialFastPathOver(forms[0])
}

// dialFastPathOver is dialFastPath in a form.
func (w *world) dialFastPathOver(f form) *rawConn {
	w.t.Helper()
	c := f.dial(w.t, w.proxy)
	c.gets(w.origin.URL + "/")
	port := func(addr net.Addr) int { return addr.(*net.TCPAddr).Port }
	for _, l := range program.listeners.All() {
		if slices.ContainsFunc(l.Clients(), func(remote net.Addr) bool { return port(remote) == port(c.LocalAddr()) }) {
			return c
		}
	}
	w.t.Fatal("the connection is not on the fast path")
	return nil
}

// withServers adds a servers option to a Caddyfile's global options.
func withServers(caddyfile, lines string) string {
	return "{\nservers {\n" + lines + "\n}\n" + strings.TrimPrefix(caddyfile, "{\n")
}

// The fast path serves a connection where no other module has a part in it.
func TestClientConnFastPath(t *testing.T) {
	w := newWorld(t, "", nil)
	_, port, _ := strings.Cut(w.proxy, ":")
	_, other, _ := strings.Cut(freeAddress(t), ":")
	socket := filepath.Join(t.TempDir(), "socket")
	const site = `http://:PORT {
	async_proxy {
		burst 1000000
		refill 1000000
	}
}
`
	with := func(lines string) string { return strings.Replace(site, "{\n", "{\n"+lines+"\n", 1) }
	servers := func(lines string) string {
		return `{
	servers {
		` + lines + `
	}
}
` + site
	}
	for _, row := range []struct {
		name, caddyfile string // PORT stands for the port
		want            int
	}{
		{"alone", site, 1},
		{"a handler after it", with("respond hello"), 1},
		{"another port", site + "http://www.example.com:" + other + ` {
	respond hello
}
`, 1},
		{"options of the server", servers(withWrapper + "protocols h1 h2 h2c"), 1},
		{"the wrapper twice", servers(strings.Replace(withWrapper, "async_proxy", "async_proxy\nasync_proxy", 1)), 1},
		{"the wrapper before TLS", servers(strings.Replace(withWrapper, "async_proxy", "async_proxy\ntls", 1)), 1},
		{"in a route", `{
	servers {
		` + withWrapper + `
	}
}
` + inRoute(strings.Replace(site, "async", "\tasync", 1)), 1},
		{"HTTP/1.1 alone", servers(withWrapper + "protocols h1"), 1},

		{"no wrapper", servers("protocols h1 h2"), 0},
		{"in a route, where there is none", inRoute(strings.Replace(site, "async", "\tasync", 1)), 0},
		{"access log", with("log"), 1},
		{"metrics", `{
	metrics
}
` + site, 1},
		{"metrics of the server", servers(withWrapper + "metrics"), 1},
		{"handle_errors", with(`handle_errors {
	respond no
}`), 1},
		{"a matcher", strings.Replace(with("@get method GET"), "async_proxy", "async_proxy @get", 1), 0},
		{"a matcher, and the wrapper", `{
	servers {
		` + withWrapper + `
	}
}
` + strings.Replace(with("@get method GET"), "async_proxy", "async_proxy @get", 1), 0},
		{"a matcher around it", `{
	servers {
		` + withWrapper + `
	}
}
` + strings.Replace(with("@get method GET"), "async_proxy", "handle @get {\nasync_proxy", 1) + `}
`, 0},
		{"a handler before it", with("request_header X-Y z"), 0},
		{"another site", site + `http://www.example.com:PORT {
	respond hello
}
`, 0},
		{"a timeout for content", servers(withWrapper + `timeouts {
	read_body 1m
}`), 0},
		{"a timeout for responses", servers(withWrapper + `timeouts {
	write 1m
}`), 0},
		{"a rate for content", servers(withWrapper + `timeouts {
	read_body_idle 1m 100
}`), 0},
		{"a rate for responses", servers(withWrapper + `timeouts {
	write_idle 1m 100
}`), 0},
		{"names with an underscore", servers(withWrapper + "expected_underscore_headers A_b"), 0},
		{"names with a dot", servers(withWrapper + "expected_dot_headers A.b"), 0},
		{"an address without HTTP/1.1", with(`bind 127.0.0.1 {
	protocols h1
}
bind 127.0.0.2 {
	protocols h2c
}`), 0},
		{"PROXY protocol", servers(`listener_wrappers {
	proxy_protocol
	async_proxy
}`), 1},
		{"PROXY protocol after the wrapper", servers(`listener_wrappers {
	async_proxy
	proxy_protocol
}`), 0},
		{"another wrapper", servers(strings.Replace(withWrapper, "async_proxy", "async_proxy\ntls\nhttp_redirect", 1)), 0},
		{"a Unix socket", with("bind unix/" + socket), 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			caddyfile := strings.ReplaceAll(row.caddyfile, "PORT", port)
			if rest, ok := strings.CutPrefix(caddyfile, "{\n"); ok {
				caddyfile = strings.TrimSuffix(w.globals(), "}\n") + rest
			} else {
				caddyfile = w.globals() + caddyfile
			}
			loadCaddyfile(t, caddyfile)
			var conn net.Conn
			var err error
			if strings.Contains(caddyfile, "unix/") {
				conn, err = net.Dial("unix", socket)
			} else {
				conn, err = net.Dial("tcp4", w.proxy)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			r := bufio.NewReader(conn)
			for i := range 2 {
				fmt.Fprintf(conn, "GET %s/ HTTP/1.1\r\nHost: x\r\n\r\n", w.origin.URL)
				res, err := http.ReadResponse(r, nil)
				if err != nil {
					t.Fatal(err)
				}
				body, _ := io.ReadAll(res.Body)
				if denied := conn.RemoteAddr().Network() == "unix"; !denied && string(body) != "hello from the origin" {
					t.Errorf("%s: %q", res.Status, body)
				}
				eventually(t, fmt.Sprintf("%d connections on the fast path after request %d", row.want, i+1), func() bool { return fastPathConns() == row.want })
			}
		})
	}
}

// The fast path serves requests with content, from HTTP/1.0, and with an upgrade, with TLS or
// without. Other protocols are net/http's.
func TestClientConnServes(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{options: "hosts proxy.example"})
	var fast atomic.Int64 // connections on the fast path while the origin had the last request
	w.origin = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fast.Store(int64(fastPathConns()))
		_, _ = io.Copy(w, r.Body)
	}))
	t.Cleanup(func() { closeServer(t, w.origin) })
	eventually(t, "the connections of earlier tests to end", func() bool { return fastPathConns() == 0 })
	for _, request := range []string{
		"POST URL HTTP/1.1\nHost: x\nContent-Length: 2\n\nok",
		"POST URL HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n",
		"POST URL HTTP/1.1\nHost: x\nContent-Length: 0\n\n",
		"GET URL HTTP/1.0\nHost: x\nConnection: keep-alive\n\n",
		"GET URL HTTP/1.1\nHost: x\nUpgrade: other\nConnection: Upgrade\n\n",
	} {
		for _, f := range forms[:2] {
			c := f.dial(t, map[bool]string{false: w.plain, true: w.tls}[f.overTLS])
			for range 3 {
				c.send(strings.ReplaceAll(request, "URL", w.origin.URL+"/"))
				res, _ := c.response(http.MethodGet)
				if res.StatusCode != http.StatusOK || fast.Load() != 1 {
					t.Errorf("%s, %q: %s, with %d connections on the fast path", f.name, request, res.Status, fast.Load())
				}
				if res.Close {
					break
				}
			}
			_ = c.Close()
			eventually(t, "the connection to end", func() bool { return fastPathConns() == 0 })
		}
	}
	h2c := new(http.Protocols)
	h2c.SetUnencryptedHTTP2(true)
	client := &http.Client{Transport: &http.Transport{Protocols: h2c, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp4", w.plain)
	}}}
	for range 3 {
		res, err := client.Get(w.origin.URL + "/")
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusOK {
			t.Errorf("h2c: %s", res.Status)
		}
		eventually(t, "h2c to be served by net/http", func() bool { return fastPathConns() == 0 })
	}
	client.CloseIdleConnections()
}

// slowOrigin is an origin that starts its response with a part of the content, and completes
// it, when told to.
type slowOrigin struct{ asked, begin, end chan struct{} }

func newSlowOrigin() *slowOrigin {
	return &slowOrigin{make(chan struct{}, 10), make(chan struct{}, 10), make(chan struct{}, 10)}
}

func (s *slowOrigin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/slow" {
		s.asked <- struct{}{}
		select {
		case <-s.begin:
		case <-r.Context().Done():
			return
		}
		_, _ = io.WriteString(w, "first ")
		_ = http.NewResponseController(w).Flush()
		select {
		case <-s.end:
		case <-r.Context().Done():
			return
		}
	}
	_, _ = io.WriteString(w, "last")
}

// A request during a reload is answered completely, and its connection stays open. Only a
// connection that was not yet accepted may be closed with the old config's socket.
func TestClientConnReloadUnderTraffic(t *testing.T) {
	w := newWorld(t, "", nil)
	ctx, cancel := context.WithCancel(t.Context())
	var served, lost atomic.Int64
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for ctx.Err() == nil {
				conn, err := net.Dial("tcp4", w.proxy)
				if err != nil {
					continue // the listener is being replaced
				}
				r := bufio.NewReader(conn)
				for n := 0; ctx.Err() == nil; n++ {
					_ = conn.SetDeadline(time.Now().Add(patience))
					_, err := fmt.Fprintf(conn, "GET %s/ HTTP/1.1\r\n", w.origin.URL)
					time.Sleep(time.Millisecond)
					if err == nil {
						_, err = io.WriteString(conn, "Host: x\r\n\r\n")
					}
					if err == nil {
						_, err = r.Peek(1)
					}
					if err != nil {
						if lost.Add(1); n > 0 {
							t.Errorf("a connection closed after %d responses: %v", n, err)
						}
						break
					}
					res, err := http.ReadResponse(r, nil)
					if err != nil {
						t.Errorf("a truncated response: %v", err)
						break
					}
					if body, err := io.ReadAll(res.Body); err != nil || string(body) != "hello from the origin" {
						t.Errorf("%s: %q, %v", res.Status, body, err)
					}
					served.Add(1)
					if res.Close {
						t.Errorf("response %d closes the connection", n)
						break
					}
				}
				_ = conn.Close()
			}
		})
	}
	for i := range 20 {
		w.load(w.site(fmt.Sprintf("dial_timeout %ds", 10+i)))
		eventually(t, "connections to be served", func() bool { return fastPathConns() > 0 })
	}
	for i := range 40 { // overlapping reloads
		startCaddyfile(t, w.globals()+w.site(fmt.Sprintf("dial_timeout %ds", 10+i)))
	}
	cancel()
	wg.Wait()
	t.Logf("%d requests were served, %d connections lost before their first request", served.Load(), lost.Load())
	eventually(t, "all connections to end", func() bool { return fastPathConns() == 0 })
}

// A request's duration counts from its start, whenever the placeholder is first read.
func TestClientConnDuration(t *testing.T) {
	w := newWorld(t, "header_down X-Took {http.request.duration_ms}", http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		time.Sleep(50 * time.Millisecond)
	}))
	c := w.dialFastPath()
	for range 2 {
		c.get(w.origin.URL+"/", "")
		res, _ := c.response(http.MethodGet)
		if took, err := strconv.ParseFloat(res.Header.Get("X-Took"), 64); err != nil || took < 50 {
			t.Errorf("duration = %v ms, %v", took, err)
		}
	}
}

// Pipelined bytes are not a disconnect. Pipelined requests are answered in order, even if
// the client then half-closes.
func TestClientConnPipelined(t *testing.T) {
	for _, half := range []bool{false, true} {
		origin := newSlowOrigin()
		w := newWorld(t, "", origin)
		c := w.dialFastPath()
		c.get(w.origin.URL+"/slow", "")
		<-origin.asked
		time.Sleep(2 * disconnectWatchDelay) // until the disconnect watch has started
		const more = 5
		for range more {
			c.get(w.origin.URL+"/", "")
		}
		if half {
			_ = c.CloseWrite()
		} else { // a request that hands the connection to net/http
			c.send("POST " + w.origin.URL + "/ HTTP/1.1\nHost: x\nContent-Length: 4\n\nmore")
		}
		time.Sleep(disconnectWatchDelay) // until the watch has seen it
		origin.begin <- struct{}{}
		origin.end <- struct{}{}
		if _, body := c.response(http.MethodGet); body != "first last" {
			t.Errorf("half-closed: %t: %q", half, body)
		}
		for range more {
			if _, body := c.response(http.MethodGet); body != "last" {
				t.Errorf("half-closed: %t: the next response: %q", half, body)
			}
		}
		if half {
			c.readAll()
		} else if _, body := c.response(http.MethodPost); body != "last" {
			t.Errorf("the last response: %q", body)
		}
	}
}

// More pipelined bytes than the buffer holds are neither lost nor taken for a disconnect.
func TestClientConnPipelinedMuch(t *testing.T) {
	origin := newSlowOrigin()
	w := newWorld(t, "", origin)
	c := w.dialFastPath()
	c.get(w.origin.URL+"/slow", "")
	<-origin.asked
	const more = 200
	for range more {
		c.get(w.origin.URL+"/", "X-More: "+strings.Repeat("x", 100)+"\n")
	}
	time.Sleep(2 * disconnectWatchDelay)
	origin.begin <- struct{}{}
	origin.end <- struct{}{}
	for i := range more + 1 {
		if _, body := c.response(http.MethodGet); !strings.HasSuffix(body, "last") {
			t.Errorf("response %d: %q", i, body)
		}
	}
}

// A truncated response closes its connection, and nothing of it stays in memory.
func TestClientConnBrokenOff(t *testing.T) {
	w := newWorld(t, "", nil)
	for _, answer := range []string{"Content-Length: 9\n\nshort", "Transfer-Encoding: chunked\n\n5\nshort\n"} {
		origin := newRuleOrigin(t, "HTTP/1.1 200 OK\n"+answer+"CLOSE")
		c := w.dialFastPath()
		c.get("http://"+origin.address+"/", "")
		if res, err := http.ReadResponse(c.r, nil); err != nil {
			t.Error(err)
		} else if body, err := io.ReadAll(res.Body); string(body) != "short" || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q, %v, want a part and an error", body, err)
		}
		eventually(t, "the connection to end", func() bool { return fastPathConns() == 0 })
	}
}

// A connection goes to net/http with a request for the server itself, with every byte of it, and
// comes back with the next request for the proxy.
func TestClientConnHandOff(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", r.Method, body)
	}))
	w.load(strings.TrimSuffix(strings.TrimSpace(w.site("")), "}") + "respond /here \"at home\"\n}\n")
	large := strings.Repeat("x", 100_000)
	for _, row := range []struct{ request, want string }{
		{"POST URL HTTP/1.1\nHost: x\nContent-Length: 2\n\nok", "POST ok"},
		{"PUT URL HTTP/1.1\nHost: x\nContent-Length: 100000\n\n" + large, "PUT " + large},
		{"POST URL HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n", "POST ok"},
		{"GET URL HTTP/1.1\nHost: x\nPragma: no-cache\nX-Large: " + large[:10_000] + "\n\n", "GET "},
		{"GET /here HTTP/1.1\nHost: x\n\n", "at home"},
	} {
		c := w.dialFastPath()
		for range 2 { // the second time behind an ordinary request
			c.send(strings.ReplaceAll(row.request+"GET URL HTTP/1.1\nHost: x\n\n", "URL", w.origin.URL+"/"))
			for _, want := range []string{row.want, "GET "} {
				res, body := c.response(http.MethodGet)
				if body != want || res.Close {
					t.Errorf("%.30q: %s, %.30q, want %.30q; it closes: %t", row.request, res.Status, body, want, res.Close)
				}
			}
			eventually(t, "the connection to be on the fast path", func() bool {
				c.gets(w.origin.URL + "/") // net/http may have read a part of it ahead
				return fastPathConns() == 1
			})
		}
		_ = c.Close()
		eventually(t, "the connection to end", func() bool { return fastPathConns() == 0 })
	}
}

// Tunnels use the bare socket, include bytes sent early, and keep nothing alive of what
// served earlier requests.
func TestClientConnTunnels(t *testing.T) {
	w := newWorld(t, "", nil)
	upgraded, echo := streamUpgrade(t), echoTarget(t)
	for _, f := range forms {
		loadCaddyfile(t, withServers(w.globals()+f.site(t, w.site("")), f.servers(true)))
		testClientConnTunnels(t, w, f, map[string]string{
			"CONNECT " + echo + " HTTP/1.1\nHost: x\n\n":                                             "",
			"GET http://" + upgraded + "/ HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: echo\n\n": "hello ",
		})
	}
}

func testClientConnTunnels(t *testing.T, w *world, f form, requests map[string]string) {
	for request, want := range requests {
		for _, early := range []string{"early ", strings.Repeat("e", 10_000)} {
			c := w.dialFastPathOver(f)
			c.send(request + early)
			c.readUntil("\r\n\r\n")
			var near *tunnel.ConnEnd
			eventually(t, "a tunnel", func() bool {
				for _, t := range openTunnels() {
					near = t.Near.(*tunnel.ConnEnd)
				}
				return near != nil
			})
			if _, ok := near.Conn.(*net.TCPConn); !ok && !f.overTLS {
				t.Errorf("%s: the client's end of the tunnel is %T, want the socket", f.name, near.Conn)
			}
			eventually(t, "the connection to be handed to net/http", func() bool { return fastPathConns() == 0 })
			c.send("late")
			_ = c.CloseWrite()
			if got := c.readAll(); got != want+early+"late" {
				t.Errorf("%s, %.20q: got %d bytes, %.30q", f.name, request, len(got), got)
			}
			waitNoTunnels(t)
		}
	}
}

// When the head timeout expires, a partial head gets a 408, wherever it stops.
func TestClientConnStalledHead(t *testing.T) {
	w := newWorld(t, "", nil)
	loadCaddyfile(t, withServers(w.globals()+w.site(""), withWrapper+"timeouts {\nread_header 1500ms\n}"))
	request := "GET " + w.origin.URL + "/ HTTP/1.1\r\nHost: x\r\nX-One: 1\r\n\r\n"
	stall := func(cut int, behind bool) string {
		conn, err := net.DialTimeout("tcp4", w.proxy, patience)
		if err != nil {
			return err.Error()
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		r := bufio.NewReader(conn)
		if behind {
			_, _ = io.WriteString(conn, request)
			res, err := http.ReadResponse(r, nil)
			if err != nil {
				return err.Error()
			}
			_, _ = io.Copy(io.Discard, res.Body)
		}
		_, _ = io.WriteString(conn, request[:cut])
		answer, err := io.ReadAll(r)
		return fmt.Sprint(string(answer), err)
	}
	w.dialFastPath()
	var all sync.WaitGroup
	defer all.Wait()
	for cut := 1; cut < len(request); cut++ {
		for _, behind := range []bool{false, true} {
			if behind && cut < 4 { // the idle timeout applies
				continue
			}
			all.Go(func() {
				got := stall(cut, behind)
				if !strings.HasPrefix(got, "HTTP/1.1 408 Request Timeout\r\n") || !strings.HasSuffix(got, "\nThe head of this request has not arrived in time.\n<nil>") {
					t.Errorf("%q, behind a request: %t: %s", request[:cut], behind, got)
				}
			})
		}
	}
}

// The server's idle and head timeouts apply.
func TestClientConnTimeouts(t *testing.T) {
	w := newWorld(t, "", nil)
	type server struct {
		*world
		origin *slowOrigin
	}
	config := strings.TrimPrefix(w.globals(), "{\n")
	serves := func(timeouts string) server {
		one := server{&world{t: t, proxy: freeAddress(t), logs: w.logs}, newSlowOrigin()}
		one.world.origin = httptest.NewServer(one.origin)
		t.Cleanup(func() { closeServer(t, one.world.origin) })
		config = "servers " + one.proxy + ` {
	` + withWrapper + `timeouts {
		` + timeouts + `
	}
}
` + config + one.site("zone "+strings.ReplaceAll(one.proxy, ":", "-"))
		return one
	}
	idle, header, none := serves("idle 1500ms"), serves("read_header 1500ms"), serves("read_header -1s\nidle -1s")
	loadCaddyfile(t, "{\n"+config)
	meanwhile := func(name string, s server, test func(t *testing.T, s server, head string)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := *s.world
			w.t = t
			test(t, server{&w, s.origin}, "GET "+w.origin.URL+"/ HTTP/1.1\r\nHost: x\r\n\r\n")
		})
	}
	meanwhile("idle", idle, func(t *testing.T, s server, _ string) {
		if rest := s.dialFastPath().readAll(); rest != "" {
			t.Errorf("an idle connection got %q before its end", rest)
		}
	})
	meanwhile("not idle", idle, func(t *testing.T, s server, head string) {
		c := s.dialFastPath()
		c.get(s.world.origin.URL+"/slow", "")
		<-s.origin.asked
		time.Sleep(1800 * time.Millisecond) // not idle: a response is under way
		s.origin.begin <- struct{}{}
		s.origin.end <- struct{}{}
		if _, body := c.response(http.MethodGet); body != "first last" {
			t.Errorf("a request for longer than idle: %q", body)
		}
		c.send(head[:20])
		time.Sleep(1800 * time.Millisecond) // not idle: a head has begun
		c.send(head[20:])
		if _, body := c.response(http.MethodGet); body != "last" {
			t.Errorf("a head for longer than idle: %q", body)
		}
	})
	meanwhile("slow heads", header, func(t *testing.T, s server, head string) {
		c := s.dialFastPath()
		time.Sleep(1800 * time.Millisecond)
		for i := range head {
			_, _ = io.WriteString(c, head[i:i+1])
		}
		if _, body := c.response(http.MethodGet); body != "last" {
			t.Errorf("a head in pieces: %q", body)
		}
		c.send(head[:20])
		if rest := c.readAll(); !strings.HasPrefix(rest, "HTTP/1.1 408 ") {
			t.Errorf("half a head: got %q", rest)
		}
	})
	meanwhile("no timeouts", none, func(t *testing.T, s server, head string) {
		c := s.dialFastPath()
		c.get(s.world.origin.URL+"/slow", "")
		<-s.origin.asked
		c.send(head[:20])
		time.Sleep(2 * disconnectWatchDelay)
		s.origin.begin <- struct{}{}
		s.origin.end <- struct{}{}
		c.response(http.MethodGet)
		time.Sleep(disconnectWatchDelay)
		c.send(head[20:])
		if _, body := c.response(http.MethodGet); body != "last" {
			t.Errorf("half a head after a slow response, with no timeouts: %q", body)
		}
	})
}

// Caddy's write-idle timeout restarts when a client reads something, and applies to each
// response separately.
func TestClientConnStalledWrites(t *testing.T) {
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/large":
			_, _ = io.CopyN(w, zeros{}, 64<<20)
		case "/none":
			w.WriteHeader(http.StatusNoContent)
		case "/slow":
			_, _ = io.WriteString(w, "first ")
			_ = http.NewResponseController(w).Flush()
			time.Sleep(400 * time.Millisecond)
		}
	}))
	loadCaddyfile(t, withServers(w.globals()+w.site(""), withWrapper+`timeouts {
	write_idle 200ms
}`))
	c := w.dial()
	for i := range 2 { // the first one by net/http
		if body := c.gets(w.origin.URL + "/slow"); body != "first " {
			t.Errorf("request %d: %q", i, body)
		}
		time.Sleep(300 * time.Millisecond)
		c.get(w.origin.URL+"/none", "")
		if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusNoContent {
			t.Errorf("request %d: %s", i, res.Status)
		}
	}
	c.get(w.origin.URL+"/large", "")
	eventually(t, "the client that does not read to be disconnected", func() bool { return fastPathConns() == 0 })
	if n, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) || n >= 64<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
}
