// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// headOrigin is an origin that returns each request's head byte for byte.
func headOrigin(t *testing.T) (address string) {
	return listen(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		for {
			var head strings.Builder
			for !strings.HasSuffix(head.String(), "\r\n\r\n") {
				line, err := r.ReadString('\n')
				if err != nil {
					return
				}
				head.WriteString(line)
			}
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", head.Len(), &head)
		}
	})
}

// A path's meaning is up to the origin: a % that begins no escape is passed on unchanged,
// directly and through a parent.
func TestBarePercent(t *testing.T) {
	origin := headOrigin(t)
	parent := headOrigin(t)
	direct := newWorld(t, "", nil)
	check := func(w *world, before string) {
		t.Helper()
		c := w.dialFastPath()
		for _, path := range []string{"/sale/50%", "/a%zz/b", "/%", "/%2", "/%%41%", "/%e4%?q=%&r=50%", "/a?%zz", "/50%%20off"} {
			c.get("http://"+origin+path, "")
			res, head := c.response(http.MethodGet)
			if line, _, _ := strings.Cut(head, "\r\n"); line != "GET "+before+path+" HTTP/1.1" {
				t.Errorf("%s: %s, the next hop got %q", path, res.Status, line)
			}
		}
		if fastPathConns() == 0 {
			t.Error("the connection was handed to net/http")
		}
	}
	check(direct, "")
	for _, target := range []string{"http://127.0.0.1%/", "http://127.0.0.1:1%/", "http://a%zz.example/", "http://%/"} {
		c := direct.dialFastPath()
		c.get(target, "")
		if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", target, res.Status)
		}
	}
	w := newWorld(t, "upstream http://"+parent+"\nno_upstream localhost", nil)
	w.origin.URL = strings.Replace(w.origin.URL, "127.0.0.1", "localhost", 1)
	check(w, "http://"+origin)
}

// A proxy forwards unknown fields, whatever their names.
func TestFieldNamesWithUnderscoresAndDots(t *testing.T) {
	origin := headOrigin(t)
	c := newWorld(t, "", nil).dialFastPath()
	c.get("http://"+origin+"/", "api_key: 1\nX.Trace: 2\n_: 3\n.: 4\n")
	_, head := c.response(http.MethodGet)
	for _, line := range []string{"api_key: 1", "x.trace: 2", "_: 3", ".: 4"} {
		if !strings.Contains(strings.ToLower(head), "\r\n"+line+"\r\n") {
			t.Errorf("the origin got %q, want %q in it", head, line)
		}
	}
}

// Empty lines before a request are ignored (RFC 9112 §2.2), however they are split, also
// before a request that net/http serves.
func TestEmptyLinesBeforeRequests(t *testing.T) {
	w := newWorld(t, "", nil)
	get := "GET " + w.origin.URL + "/ HTTP/1.1\r\nHost: x\r\n\r\n"
	post := "POST " + w.origin.URL + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
	for _, text := range []string{"\r\n" + get, "\r\n\r\n\r\n" + get, get + "\r\n" + get + "\r\n\r\n" + get, "\r\n" + post, get + "\r\n" + post} {
		for _, size := range []int{1, len(text)} {
			c := w.dial()
			sent := writeInPieces(c, text, size)
			for range strings.Count(text, "Host") {
				if res, body := c.response(http.MethodGet); res.StatusCode != http.StatusOK {
					t.Errorf("%q: %s %q", text, res.Status, body)
				}
			}
			<-sent
		}
	}
	c := w.dialFastPath()
	c.send("\r\n")
	if c.gets(w.origin.URL+"/") == "" || fastPathConns() == 0 {
		t.Error("an empty line between two requests hands the connection to net/http")
	}
}

// A CONNECT request has no content in any version: one that announces content is refused
// before anything is dialed.
func TestConnectWithContent(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{})
	dialled := make(chan struct{}, 10)
	target := listen(t, func(*net.TCPConn) { dialled <- struct{}{} })
	if got := framesRequest(t, w.plain, []string{":method", "CONNECT", ":authority", target, "content-length", "5"}, "hello"); got != "400" {
		t.Errorf("over HTTP/2: %s, want 400", got)
	}
	for _, r := range []*http.Request{{ProtoMajor: 3, ContentLength: 5}, {ProtoMajor: 3, ContentLength: -1, Header: http.Header{"Content-Length": {"5"}}}} {
		if !announcesContent(r) {
			t.Errorf("over HTTP/3, %v does not count as announcing content", r)
		}
	}
	if announcesContent(&http.Request{ProtoMajor: 3, ContentLength: -1}) {
		t.Error("over HTTP/3, an ordinary CONNECT counts as announcing content")
	}
	for _, field := range []string{"Content-Length: 5", "Transfer-Encoding: chunked"} {
		c := dialRaw(t, w.plain)
		c.send("CONNECT " + target + " HTTP/1.1\nHost: x\n" + field + "\n\n")
		if res, _ := c.response(http.MethodConnect); res.StatusCode != http.StatusBadRequest {
			t.Errorf("over HTTP/1 with %s: %s", field, res.Status)
		}
	}
	if len(dialled) > 0 {
		t.Errorf("%d connections to the target", len(dialled))
	}
}

// Leading zeros in a port change nothing, rules included (RFC 3986 §3.2.3).
func TestPortWithZeros(t *testing.T) {
	w := newWorld(t, "", nil)
	_, port, _ := net.SplitHostPort(w.origin.Listener.Addr().String())
	for rules, want := range map[string]int{"": 200, "deny 127.0.0.1:" + port: 403} {
		for _, site := range []string{w.site(rules), inRoute(w.site(rules))} {
			w.load(site)
			c := w.dial()
			c.get("http://127.0.0.1:00"+port+"/", "")
			if res, body := c.response(http.MethodGet); res.StatusCode != want {
				t.Errorf("%q: %s %q", rules, res.Status, body)
			}
			c.send("CONNECT 127.0.0.1:0000000" + port + " HTTP/1.1\nHost: x\n\n")
			if res, body := c.response(http.MethodConnect); res.StatusCode != want {
				t.Errorf("%q: CONNECT: %s %q", rules, res.Status, body)
			}
		}
	}
}

// The proxy's own response names the error in a CONNECT target. It is logged without
// passwords.
func TestMalformedConnect(t *testing.T) {
	w := newWorld(t, "", nil)
	const secret = "pa55w0rd"
	n := 0
	for _, target := range []string{
		"exa%mple.com:443", "[::1:443", "a#b:443", "%31:1", "::1:443", "ü.example:443", "a:http", "a:+1", "{http.request.host}:1", "a\\b:1", "\"a\":1",
		"bob:" + secret + "@exa%mple.com:443", "bob:" + secret + "@127.0.0.1:1", "bob:" + secret + "@host", "http://bob:" + secret + "@127.0.0.1:1/", "bob:" + secret + "%@host:1",
	} {
		c := w.dialFastPath()
		n++ // the previous request's line
		c.send("CONNECT " + target + " HTTP/1.1\nHost: x\n\n")
		res, body := c.response(http.MethodConnect)
		if res.StatusCode != http.StatusBadRequest || !strings.Contains(res.Header.Get("Proxy-Status"), "error=http_request_error") || strings.Contains(body, secret) {
			t.Errorf("%s: %s %q %q", target, res.Status, res.Header.Get("Proxy-Status"), body)
		}
		n++
		lines := w.waitLog("request", n)
		if line := lines[n-1]; line["method"] != "CONNECT" || line["status"] != 400.0 {
			t.Errorf("%s: the log has %v", target, line)
		}
	}
	for _, request := range []string{
		"GET http://bob:" + secret + "@127.0.0.1:1/ HTTP/1.1", "GET http://bob:" + secret + "%@127.0.0.1:1/ HTTP/1.1", "GET //bob:" + secret + "@127.0.0.1:1/ HTTP/1.1",
		"GET bob:" + secret + "@127.0.0.1 HTTP/1.1", "GET http://127.0.0.1:1/http://bob:" + secret + "@a.example/ HTTP/1.1",
	} {
		c := w.dial()
		c.send(request + "\nHost: x\n\n")
		if res, _ := c.response(http.MethodGet); res.StatusCode < 400 {
			t.Errorf("%s: %s", request, res.Status)
		}
	}
	files := []string{w.logs}
	h2 := newTunnelWorld(t, tunnelSetup{})
	if got := framesRequest(t, h2.plain, []string{":method", "CONNECT", ":authority", "bob:" + secret + "@127.0.0.1:1"}, ""); got == "200" {
		t.Errorf("over HTTP/2: %s", got)
	}
	files = append(files, h2.logs)
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if i := strings.Index(string(data), secret); i >= 0 {
			t.Errorf("the log has %.300s", data[max(0, i-200):])
		}
	}
}

// A request that no handler answers is refused, never answered with the site's empty 200.
// Another handler's response is passed on, empty or not.
func TestUnansweredRequests(t *testing.T) {
	for name, tc := range map[string]struct {
		site   string
		status int
		body   string
	}{
		"no handler responds":       {"", http.StatusMisdirectedRequest, ""},
		"content":                   {"respond here", http.StatusOK, "here"},
		"an empty 200":              {"respond 200", http.StatusOK, ""},
		"an empty 204":              {"respond 204", http.StatusNoContent, ""},
		"fields without a response": {"header X-A b", http.StatusMisdirectedRequest, ""},
		"an error":                  {"error 503", http.StatusServiceUnavailable, ""},
		"a file server":             {"file_server browse", http.StatusOK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newTunnelWorld(t, tunnelSetup{site: tc.site})
			check := func(how string, res *http.Response, err error) {
				t.Helper()
				if err != nil {
					t.Fatalf("%s: %v", how, err)
				}
				body, _ := io.ReadAll(res.Body)
				refused := tc.status == http.StatusMisdirectedRequest
				if res.StatusCode != tc.status || tc.body != "" && string(body) != tc.body || refused != strings.Contains(res.Header.Get("Proxy-Status"), "error=http_request_error") || refused && len(body) == 0 {
					t.Errorf("%s: %s %q %q", how, res.Status, res.Header.Get("Proxy-Status"), body)
				}
			}
			for _, address := range []string{w.plain, w.tls} {
				scheme := map[bool]string{true: "http", false: "https"}[address == w.plain]
				client := &http.Client{Transport: &http.Transport{TLSClientConfig: clientTLS("http/1.1")}}
				res, err := client.Get(scheme + "://" + address + "/")
				check(scheme, res, err)
				client.CloseIdleConnections()
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			conn, err := w.client(t, "h2").h2Conn(ctx)
			if err != nil {
				t.Fatal(err)
			}
			r, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://example.com/", nil)
			res, err := conn.RoundTrip(r)
			check("HTTP/2", res, err)
			if tc.status == http.StatusMisdirectedRequest {
				if lines := w.waitLog("request", 3); lines[2]["status"] != 421.0 || !strings.Contains(fmt.Sprint(lines[2]["error"]), "hosts") {
					t.Errorf("the log has %v", lines[2])
				}
			}
		})
	}
}

// With hosts, the proxy tells its own requests from others over HTTP/2, too, and must not say that it
// does not forward them.
func TestUnansweredRequestWithHosts(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{options: "hosts example.com"})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := w.client(t, "h2").h2Conn(ctx)
	if err != nil {
		t.Fatal(err)
	}
	r, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://example.com/", nil)
	res, err := conn.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(res.Body)
	if res.StatusCode != http.StatusMisdirectedRequest || strings.Contains(string(body), "does not forward") {
		t.Errorf("%s: %s", res.Status, body)
	}
	if line := w.waitLog("request", 1)[0]; line["error"] != errNoHandler.Error() {
		t.Errorf("the log says %v", line["error"])
	}
}

// A handler may respond with a flush alone, or by hijacking the connection.
func TestResponsesWithoutStatus(t *testing.T) {
	for name, answer := range map[string]func(w http.ResponseWriter) error{
		"a flush":    func(w http.ResponseWriter) error { return http.NewResponseController(w).Flush() },
		"no content": func(w http.ResponseWriter) error { _, err := w.Write(nil); return err },
		"a hijacked connection": func(w http.ResponseWriter) error {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_, err = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
				_ = conn.Close()
			}
			return err
		},
	} {
		p := new(proxy)
		from := clientIdentity{policy: &policy{options: &Options{ForwardedFor: "off"}}}
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, err := p.passOn(w, r, from, caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error { return answer(w) }))
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}))
		res, err := http.Get(server.URL)
		if err != nil || res.StatusCode != http.StatusOK {
			t.Errorf("%s: %v, %v", name, res, err)
		}
		server.Close()
	}
}

// A proxy with TLS but without its own host names causes a warning.
func TestWarnsAboutMissingHosts(t *testing.T) {
	const warning = "this proxy uses TLS, but the option hosts"
	count := func(w *world) (n int) {
		data, err := os.ReadFile(w.logs)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(data), warning)
	}
	w := newTunnelWorld(t, tunnelSetup{})
	eventually(t, "the warning", func() bool { return count(w.world) == 1 }) // and no second one for the plain site
	w = newTunnelWorld(t, tunnelSetup{options: "hosts localhost"})
	w.waitLog("async-proxy listening", 2)
	if n := count(w.world); n != 0 {
		t.Errorf("%d warnings with hosts", n)
	}
}

// Once a reload has returned, the old config serves no request, on connections that it has
// accepted neither.
func TestReloadIsAtOnce(t *testing.T) {
	w := newWorld(t, "", nil)
	c := w.dialFastPath()
	startCaddyfile(t, strings.Replace(w.globals(), "{\n", "{\ngrace_period 5s\n", 1)+w.site("deny all"))
	c.get(w.origin.URL+"/", "")
	res, body := c.response(http.MethodGet)
	if res.StatusCode != http.StatusForbidden {
		t.Errorf("after a reload with deny all: %s %q", res.Status, body)
	}
	c.get(w.origin.URL+"/", "")
	if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusForbidden {
		t.Errorf("then: %s", res.Status)
	}
}

// The proxy accepts heads as large as browsers and Kerberos send, unless the operator has
// set another limit.
func TestHeadLimit(t *testing.T) {
	origin := headOrigin(t)
	w := newWorld(t, "", nil)
	ask := func(target, fields string) int {
		t.Helper()
		c := w.dial()
		c.get(target, fields)
		res, _ := c.response(http.MethodGet)
		return res.StatusCode
	}
	ticket, path := "Authorization: Negotiate "+strings.Repeat("x", 200_000)+"\n", "http://"+origin+"/?"+strings.Repeat("x", 30_000)
	for _, site := range []string{w.site(""), inRoute(w.site("")), strings.Replace(w.site(""), "{\n", "{\nlog\n", 1), byCaddy(w.site(""))} {
		w.load(site)
		if got := ask("http://"+origin+"/", ticket); got != http.StatusOK {
			t.Errorf("a ticket of 200 kB: %d", got)
		}
		if got := ask(path, ""); got != http.StatusOK {
			t.Errorf("a URL of 30 kB: %d", got)
		}
	}
	loadCaddyfile(t, withServers(w.globals()+w.site(""), withWrapper+"max_header_size 50KB"))
	if got := ask("http://"+origin+"/", ticket); got != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a ticket of 200 kB with max_header_size 50KB: %d", got)
	}
	if got := ask(path, ""); got != http.StatusOK {
		t.Errorf("a URL of 30 kB with max_header_size 50KB: %d", got)
	}
}

// A large field over HTTP/2 does not end the connection.
func TestHeadLimitOverHTTP2(t *testing.T) {
	origin := headOrigin(t)
	w := newTunnelWorld(t, tunnelSetup{options: "hosts localhost"})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	client := w.client(t, "h2")
	client.shared = 10
	conn, err := client.h2Conn(ctx)
	if err != nil {
		t.Fatal(err)
	}
	tunnel := client.open(echoTarget(t))
	r, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+origin+"/", nil)
	r.Header.Set("Authorization", "Negotiate "+strings.Repeat("x", 200_000))
	res, err := conn.RoundTrip(r)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("a ticket of 200 kB: %v, %v", res, err)
	}
	_, _ = io.WriteString(tunnel, "ping")
	got := make([]byte, 4)
	if _, err := io.ReadFull(tunnel, got); err != nil || string(got) != "ping" {
		t.Errorf("the tunnel beside it: %q, %v", got, err)
	}
}

// Passwords are not logged either when no async_proxy handles a request.
func TestUnclaimedConnectWithPassword(t *testing.T) {
	w := newWorld(t, "", nil)
	site := strings.Replace(w.site(""), "async_proxy {", "@none remote_ip 192.0.2.1\nasync_proxy @none {", 1)
	loadCaddyfile(t, withServers(w.globals()+site, withWrapper+"protocols h1 h2c"))
	if got := framesRequest(t, w.proxy, []string{":method", "CONNECT", ":authority", "bob:pa55w0rd@127.0.0.1:1"}, ""); got == "200" {
		t.Errorf("CONNECT: %s", got)
	}
	c := w.dial()
	c.send("CONNECT bob:pa55w0rd@127.0.0.1:1 HTTP/1.1\nHost: x\n\n")
	c.response(http.MethodConnect)
	data, err := os.ReadFile(w.logs)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(data), "pa55w0rd") {
		t.Errorf("the log has %s", data)
	}
}

// Requests with long heads are served on the fast path, as long as the server allows them, and
// leave no long buffer behind.
func TestLongHeadsStayOnTheFastPath(t *testing.T) {
	if *byNetHTTP {
		return
	}
	w := newWorld(t, "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, len(r.Header.Get("Cookie")))
	}))
	c := w.dialFastPath()
	for _, length := range []int{100, 5_000, 20_000, 100, 70_000, 250_000, 10} {
		c.get(w.origin.URL+"/", "Cookie: "+strings.Repeat("c", length)+"\n")
		if _, body := c.response(http.MethodGet); body != fmt.Sprint(length) {
			t.Errorf("a cookie of %d bytes arrived with %s", length, body)
		}
		if n := fastPathConns(); n != 1 {
			t.Errorf("%d connections on the fast path after a head with %d bytes", n, length)
		}
	}
	// Two at once, the second one in pieces.
	long := "GET " + w.origin.URL + "/ HTTP/1.1\nHost: x\nCookie: " + strings.Repeat("c", 30_000) + "\n\n"
	c.send(long + long[:20_000])
	c.response(http.MethodGet)
	c.send(long[20_000:])
	if _, body := c.response(http.MethodGet); body != "30000" || fastPathConns() != 1 {
		t.Errorf("the second of two requests arrived with a cookie of %s bytes, %d connections on the fast path", body, fastPathConns())
	}
	c.get(w.origin.URL+"/", "Cookie: "+strings.Repeat("c", 300_000)+"\n")
	if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("%s for a head that is too long", res.Status)
	}
}
