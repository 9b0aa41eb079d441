// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//lint:file-ignore SA1019 net/http offers no way to ping an HTTP/2 connection, or to ask for its state

package asyncproxy

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/http2"
)

// loginOrigin is an origin whose logins take three requests and are then bound to the
// connection, as with NTLM.
type loginOrigin struct {
	*httptest.Server
	open, last atomic.Int64
}

// loginState is the login state of a connection to a loginOrigin.
type loginState struct {
	number int64
	user   string
}

type loginStateKey struct{}

func newLoginOrigin(t *testing.T, secure bool) *loginOrigin {
	o := new(loginOrigin)
	o.Server = httptest.NewUnstartedServer(http.HandlerFunc(o.answer))
	o.Config.ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
		return context.WithValue(ctx, loginStateKey{}, &loginState{number: o.last.Add(1)})
	}
	o.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			o.open.Add(1)
		case http.StateClosed, http.StateHijacked:
			o.open.Add(-1)
		}
	}
	if secure {
		o.EnableHTTP2 = true
		o.TLS = &tls.Config{Certificates: []tls.Certificate{tlsCertificate}}
		o.StartTLS()
	} else {
		o.Start()
	}
	t.Cleanup(func() { closeServer(t, o.Server) })
	return o
}

func (o *loginOrigin) answer(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	state := r.Context().Value(loginStateKey{}).(*loginState)
	challenge := fmt.Sprintf("challenge-%d", state.number)
	token := ""
	if values := r.Header["Authorization"]; len(values) > 0 {
		_, token, _ = strings.Cut(values[len(values)-1], " ")
	}
	switch user, answer, _ := strings.Cut(token, "/"); {
	case token == "hello":
		w.Header()["WWW-Authenticate"] = []string{"Basic realm=\"x\"", "ntlm " + challenge}
	case answer == challenge:
		state.user = user
	default:
		w.Header()["WWW-Authenticate"] = []string{"Basic realm=\"x\", NTLM"}
	}
	if state.user == "" || token == "hello" {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	_, _ = io.WriteString(w, state.user)
}

// loginClient sends requests to a proxy on one connection.
type loginClient func(method, url, authorization string) (*http.Response, string)

// begin logs a user in, up to the challenge.
func (ask loginClient) begin(t *testing.T, url string) (challenge string) {
	t.Helper()
	if res, _ := ask("GET", url, ""); res.StatusCode != http.StatusUnauthorized {
		t.Fatalf("%s, want a challenge", res.Status)
	}
	res, _ := ask("GET", url, "NTLM hello")
	for _, value := range res.Header["Www-Authenticate"] {
		if rest, ok := strings.CutPrefix(value, "ntlm "); ok {
			challenge = rest
		}
	}
	if challenge == "" {
		t.Fatalf("%s, %v: got no challenge", res.Status, res.Header)
	}
	return challenge
}

func (ask loginClient) finish(t *testing.T, url, user, challenge string) {
	t.Helper()
	if res, body := ask("GET", url, "NTLM "+user+"/"+challenge); body != user {
		t.Fatalf("%s %q: %s cannot log in", res.Status, body, user)
	}
}

// rawLoginClient speaks HTTP/1 on a connection. Each request carries the additional lines.
func rawLoginClient(t *testing.T, conn net.Conn, lines ...string) loginClient {
	raw := &rawConn{t: t, r: bufio.NewReader(conn)}
	return func(method, url, authorization string) (*http.Response, string) {
		t.Helper()
		host := strings.Split(url, "/")[2]
		more := strings.Join(lines, "")
		if authorization != "" {
			more += "Authorization: Basic eA==\r\nAuthorization: " + authorization + "\r\n"
		}
		if method == "POST" {
			more += "Content-Length: 5\r\n\r\nhello"
		} else {
			more += "\r\n"
		}
		if _, err := io.WriteString(conn, method+" "+url+" HTTP/1.1\r\nHost: "+host+"\r\n"+more); err != nil {
			t.Fatal(err)
		}
		return raw.response(method)
	}
}

// loginBy sends a request with a credential, or without one if that is empty.
func loginBy(t *testing.T, transport http.RoundTripper, r *http.Request, authorization string) (*http.Response, string) {
	t.Helper()
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	res, err := transport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

// http2LoginClient speaks HTTP/2 on a connection.
func http2LoginClient(t *testing.T, conn net.Conn) loginClient {
	c, err := new(http2.Transport).NewClientConn(conn)
	if err != nil {
		t.Fatal(err)
	}
	return func(method, url, authorization string) (*http.Response, string) {
		t.Helper()
		r, _ := http.NewRequestWithContext(t.Context(), method, strings.Replace(url, "http://", "https://", 1), nil)
		return loginBy(t, c, r, authorization)
	}
}

// http3LoginClient speaks HTTP/3 on its own connection.
func http3LoginClient(t *testing.T, proxy string) loginClient {
	transport := &http3.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "localhost"}}
	t.Cleanup(func() { transport.Close() })
	return func(method, url, authorization string) (*http.Response, string) {
		t.Helper()
		r, _ := http.NewRequestWithContext(t.Context(), method, "https://"+proxy+"/", nil)
		r.Host = strings.Split(url, "/")[2]
		return loginBy(t, transport, r, authorization)
	}
}

func dialTLS(t *testing.T, address, protocol string) net.Conn {
	t.Helper()
	conn, err := tls.Dial("tcp", address, clientTLS(protocol))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// A connection-bound login works for its own client and no other, over every protocol to
// the proxy and to the origin. When the client disconnects, the origin's connection closes.
func TestConnectionLogins(t *testing.T) {
	w, secure := framesWorld(t)
	frames := func() (net.Conn, loginClient) {
		conn := dialTLS(t, secure, "h2")
		return conn, http2LoginClient(t, conn)
	}
	overTLS := func() (net.Conn, loginClient) {
		conn := dialTLS(t, secure, "http/1.1")
		return conn, rawLoginClient(t, conn)
	}
	plain := func() (net.Conn, loginClient) {
		conn := dialRaw(t, w.proxy)
		return conn.TCPConn, rawLoginClient(t, conn.TCPConn)
	}
	run := func(name string, secureOrigin bool, dial func() (net.Conn, loginClient)) {
		t.Run(name, func(t *testing.T) { testConnectionLogins(t, newLoginOrigin(t, secureOrigin), dial) })
	}
	run("HTTP/2", false, frames)
	t.Run("HTTP/3", func(t *testing.T) {
		o := newLoginOrigin(t, false)
		testConnectionLogins(t, o, func() (net.Conn, loginClient) { return nil, http3LoginClient(t, secure) })
		if o.open.Load() == 0 {
			t.Error("no connections to the origin are open")
		}
	})
	run("TLS", false, overTLS)
	run("TLS, https", true, overTLS)
	for _, way := range []string{"fast", "ordinary"} {
		site := w.site("")
		if way == "ordinary" {
			site = inRoute(site)
		}
		w.load(site)
		run(way, false, plain)
		run(way+", https", true, plain)
	}
	parent := freeAddress(t)
	parentSite := strings.Replace(w.site("allow 127.0.0.0/8"), w.proxy[len("127.0.0.1"):], parent[len("127.0.0.1"):], 1)
	w.load(w.site("upstream http://"+parent) + parentSite)
	run("parent", false, plain)
	run("parent, https", true, plain)
}

func testConnectionLogins(t *testing.T, o *loginOrigin, dial func() (net.Conn, loginClient)) {
	url := o.URL + "/"
	aliceConn, alice := dial()
	bobConn, bob := dial()
	otherConn, other := dial()

	first, second := alice.begin(t, url), bob.begin(t, url)
	alice.finish(t, url, "alice", first)
	bob.finish(t, url, "bob", second)
	if res, body := other("GET", url, ""); res.StatusCode != http.StatusUnauthorized {
		t.Errorf("a client without credentials: %s %q", res.Status, body)
	}
	for range 2 {
		for name, ask := range map[string]loginClient{"alice": alice, "bob": bob} {
			if res, body := ask("GET", url, ""); body != name {
				t.Errorf("%s, logged in: %s %q", name, res.Status, body)
			}
		}
	}
	if res, body := alice("POST", url, ""); body != "alice" {
		t.Errorf("alice posts: %s %q", res.Status, body)
	}
	if aliceConn == nil {
		return
	}
	before := o.open.Load()
	aliceConn.Close()
	eventually(t, "alice's connection to the origin to end", func() bool { return o.open.Load() < before })
	if res, body := bob("GET", url, ""); body != "bob" {
		t.Errorf("bob, after alice has disconnected: %s %q", res.Status, body)
	}
	if _, body := other("GET", url, ""); body != "" {
		t.Errorf("another client is %q", body)
	}
	bobConn.Close()
	otherConn.Close()
	shared := int64(0)
	if o.TLS != nil {
		shared = 1 // over HTTP/2, a connection without logins
	}
	eventually(t, "all but the shared connection to the origin to close", func() bool { return o.open.Load() <= shared })
}

// Proxy users, or a load balancer's clients, that share a connection do not share the
// logins on it.
func TestConnectionLoginsOnSharedConnections(t *testing.T) {
	onBothLoginPaths(t, func(t *testing.T, way string) {
		w := newLoginWorld(t, way, "allow 127.0.0.0/8")
		proxyLogin := func(user, password string) string {
			return "Proxy-Authorization: " + login(user, password) + "\r\n"
		}
		const balanced = "X-Forwarded-For: 192.0.2.1\r\n"
		url := newLoginOrigin(t, false).URL + "/"
		conn := dialRaw(t, w.proxy)
		alice := rawLoginClient(t, conn.TCPConn, proxyLogin("alice", "wonderland"))
		bob := rawLoginClient(t, conn.TCPConn, proxyLogin("bob", "builder"))
		away := rawLoginClient(t, conn.TCPConn, proxyLogin("alice", "wonderland"), balanced)
		alice.finish(t, url, "alice", alice.begin(t, url))
		for name, ask := range map[string]loginClient{"another user": bob, "another client": away} {
			if res, body := ask("GET", url, ""); res.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s: %s %q", name, res.Status, body)
			}
		}
		bob.finish(t, url, "bob", bob.begin(t, url))
		for name, ask := range map[string]loginClient{"alice": alice, "bob": bob} {
			if _, body := ask("GET", url, ""); body != name {
				t.Errorf("%s is %q", name, body)
			}
		}
	})
}
