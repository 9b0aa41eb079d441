// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// checkThroughParent sends requests and tunnel data through a world with a parent, and checks
// that all of it arrives. Some parents lack half-close, or do not announce that they will
// close a connection.
func checkThroughParent(t *testing.T, options string, halfClose bool) {
	t.Helper()
	var via []string
	w := newWorld(t, options, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		via = r.Header["Via"]
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s", r.Method, r.URL, body)
	}))
	for i := range 3 {
		conn := w.dial()
		for range 2 { // the second time on existing connections
			// tinyproxy closes connections without notice: only requests that can be
			// retried are sure to get through.
			conn.send(fmt.Sprintf("PUT %s/a//b?c=%d HTTP/1.1\nHost: x\nContent-Length: 0\n\n", w.origin.URL, i))
			if res, body := conn.response(http.MethodPut); res.StatusCode != http.StatusOK || body != fmt.Sprintf("PUT /a//b?c=%d ", i) {
				t.Errorf("%s: %q", res.Status, body)
			}
		}
	}
	if len(via) == 0 {
		t.Error("the origin got no Via")
	}
	// The target sends first. The client half-closes first and then reads the rest; without
	// half-close, it reads the rest once the target has read everything.
	target := listen(t, func(conn *net.TCPConn) {
		_, _ = io.WriteString(conn, "welcome ")
		if halfClose {
			_, _ = io.Copy(conn, conn)
		} else {
			_, _ = io.CopyN(conn, conn, 6+int64(len(parentPayload)))
		}
		_, _ = io.WriteString(conn, " and goodbye")
	})
	if halfClose {
		conn := w.dial()
		conn.send("POST " + w.origin.URL + "/ HTTP/1.1\nHost: x\nContent-Length: 5\n\nhello")
		if res, body := conn.response(http.MethodPost); res.StatusCode != http.StatusOK || body != "POST / hello" {
			t.Errorf("%s: %q", res.Status, body)
		}
	}
	conn := w.dial()
	conn.send("CONNECT " + target + " HTTP/1.1\nHost: " + target + "\n\nearly ")
	if res, body := conn.response(http.MethodConnect); res.StatusCode != http.StatusOK {
		t.Fatalf("CONNECT: %s %q", res.Status, body)
	}
	payload := parentPayload
	go func() {
		_, _ = io.WriteString(conn, payload)
		if halfClose {
			_ = conn.CloseWrite()
		}
	}()
	if got := conn.readAll(); got != "welcome early "+payload+" and goodbye" {
		t.Errorf("the tunnel carried %d bytes, want %d: %.40q ... %q", len(got), len(payload)+26, got, got[max(0, len(got)-20):])
	}
	conn.Close()
	if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["bytes_up"] != float64(len(payload)+6) || line["bytes_down"] != float64(len(payload)+26) {
		t.Errorf("line %v", line)
	}
}

var parentPayload = strings.Repeat("0123456789abcdef", 1<<14)

// checkRefusedByParent checks that a GET and a CONNECT both get a response with status and text,
// and that no secret is logged.
func checkRefusedByParent(t *testing.T, options string, status int, text string) {
	t.Helper()
	w := newWorld(t, options, nil)
	for _, method := range []string{http.MethodGet, http.MethodConnect} {
		res, body := policyRequest(t, w.proxy, method, w.origin.Listener.Addr().String(), "")
		if res.StatusCode != status || !strings.Contains(body, text) || res.Header.Get("Proxy-Authenticate") != "" {
			t.Errorf("%s: %s %q, want %d %q", method, res.Status, body, status, text)
		}
	}
	w.waitLog("request", 2)
	w.checkSecretNotLogged("rabbit")
}

// checkSecretNotLogged fails the test if the log contains a secret. Caddy's own DEBUG line with the
// config does not count: it shows what the config spells out.
func (w *world) checkSecretNotLogged(secret string) {
	w.t.Helper()
	data, err := os.ReadFile(w.logs)
	if err != nil {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, secret) && !strings.Contains(line, `"msg":"adjusted config"`) {
			w.t.Errorf("the log contains the password: %s", line)
		}
	}
}

const parentWantsOthers = "The parent proxy does not accept this proxy's credentials"

// parentUsers is a password file for squid: user alice, password rabbit.
const parentUsers = "alice:$apr1$abcdefgh$t7bR9AfmWG/NqwxSupcEr/\n"

func TestParentSquid(t *testing.T) {
	address := startPeer(t, "squid", peerProxies[0].args, peerProxies[0].config+"half_closed_clients on\n")
	checkThroughParent(t, "upstream http://"+address, false)
	users := t.TempDir() + "/users"
	for path := users; path != "/tmp" && path != "/"; path = path[:strings.LastIndexByte(path, '/')] {
		if path != users {
			_ = os.Chmod(path, 0o755) // squid changes to another user
		}
	}
	if err := os.WriteFile(users, []byte(parentUsers), 0o644); err != nil {
		t.Fatal(err)
	}
	address = startPeer(t, "squid", []string{"--foreground", "-n", "pPORT", "-f", "DIR/config"}, strings.Replace(peerProxies[0].config, "acl loop src 127.0.0.0/8\nhttp_access allow loop",
		"auth_param basic program /usr/lib/squid/basic_ncsa_auth "+users+"\nacl known proxy_auth REQUIRED\nhttp_access allow known\nhttp_access deny all", 1))
	checkThroughParent(t, "upstream http://alice:rabbit@"+address, false)
	t.Setenv("PARENT_PASSWORD", "rabbit")
	checkThroughParent(t, "upstream http://alice:{env.PARENT_PASSWORD}@"+address, false)
	checkRefusedByParent(t, "upstream http://alice:rabbits@"+address, http.StatusBadGateway, parentWantsOthers)
	checkRefusedByParent(t, "upstream http://"+address, http.StatusBadGateway, parentWantsOthers)
}

func TestParentTinyproxy(t *testing.T) {
	address := startPeer(t, "tinyproxy", peerProxies[2].args, peerProxies[2].config)
	checkThroughParent(t, "upstream http://"+address, false)
	address = startPeer(t, "tinyproxy", []string{"-d", "-c", "DIR/config"}, peerProxies[2].config+"BasicAuth alice rabbit\n")
	checkThroughParent(t, "upstream http://alice:rabbit@"+address, false)
	w := newWorld(t, "upstream http://alice:rabbits@"+address, nil)
	if res, body := policyRequest(t, w.proxy, http.MethodConnect, "target.example:443", ""); res.StatusCode != http.StatusBadGateway || !strings.HasPrefix(body, parentWantsOthers) {
		t.Errorf("%s %q", res.Status, body) // the parent answers a GET with 401, like an origin
	}
}

func TestParentMicrosocks(t *testing.T) {
	address := startPeer(t, "microsocks", []string{"-i", "127.0.0.1", "-p", "PORT"}, "")
	checkThroughParent(t, "upstream socks5://"+address, false)
	address = startPeer(t, "microsocks", []string{"-i", "127.0.0.1", "-p", "PORT", "-u", "alice", "-P", "rabbit"}, "")
	checkThroughParent(t, "upstream socks5://alice:rabbit@"+address, false)
	checkRefusedByParent(t, "upstream socks5://alice:rabbits@"+address, http.StatusBadGateway, parentWantsOthers)
	checkRefusedByParent(t, "upstream socks5://"+address, http.StatusBadGateway, "")
}

// startRecordingParent runs a parent that sends answer in response to each head, and
// records the head.
func startRecordingParent(t *testing.T, answer string) (address string, heads <-chan string) {
	seen := make(chan string, 10)
	return listen(t, func(conn *net.TCPConn) {
		r := bufio.NewReader(conn)
		var head []string
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			if line = strings.TrimRight(line, "\r\n"); line != "" {
				head = append(head, line)
				continue
			}
			slices.Sort(head[1:])
			seen <- strings.Join(head, "\n")
			head = nil
			_, _ = io.WriteString(conn, strings.ReplaceAll(answer, "\n", "\r\n"))
		}
	}), seen
}

// TestParentHeads compares the heads that a parent gets byte for byte.
func TestParentHeads(t *testing.T) {
	address, heads := startRecordingParent(t, "HTTP/1.1 200 OK\nContent-Length: 0\n\n")
	w := newWorld(t, `via tester
upstream http://al%69ce:r%40bbit@`+address+` {
	header X-Team crawler
}`, nil)
	const added = "Proxy-Authorization: Basic YWxpY2U6ckBiYml0\n%sVia: 1.1 tester\nX-Forwarded-For: 127.0.0.1\nX-Real-Ip: 127.0.0.1\nX-Team: crawler"
	for _, tc := range []struct{ request, want string }{
		{"CONNECT target.example:443 HTTP/1.1\nHost: target.example:443\nProxy-Authorization: mine\nUser-Agent: u\n\n",
			"CONNECT target.example:443 HTTP/1.1\nHost: target.example:443\n" + fmt.Sprintf(added, "")},
		{"GET http://Target.example/a//b?{} HTTP/1.1\nHost: x\nUser-Agent: u\nProxy-Authorization: mine\n\n",
			"GET http://Target.example/a//b?{} HTTP/1.1\nHost: Target.example\n" + fmt.Sprintf(added, "User-Agent: u\n")},
		{"GET http://target.example:8080 HTTP/1.1\nHost: x\n\n", "GET http://target.example:8080/ HTTP/1.1\nHost: target.example:8080\n" + fmt.Sprintf(added, "")},
		{"OPTIONS http://target.example HTTP/1.1\nHost: x\n\n", "OPTIONS http://target.example HTTP/1.1\nHost: target.example\n" + fmt.Sprintf(added, "")},
	} {
		conn := w.dial()
		conn.send(tc.request)
		if res, body := conn.response(strings.Fields(tc.request)[0]); res.StatusCode != http.StatusOK {
			t.Errorf("%q: got %s %q", tc.request, res.Status, body)
		}
		conn.Close()
		if got := <-heads; got != tc.want {
			t.Errorf("%q: the parent got\n%s\nwant\n%s", tc.request, got, tc.want)
		}
	}
}

// TestParentHost checks that Host may be rewritten without changing the destination.
func TestParentHost(t *testing.T) {
	address, heads := startRecordingParent(t, "HTTP/1.1 200 OK\nContent-Length: 0\n\n")
	w := newWorld(t, "via off\nforwarded_for off\ndeny internal.example\nheader_up Host internal.example\nupstream http://"+address, nil)
	if res, _ := policyRequest(t, w.proxy, http.MethodGet, "good.example:8080", ""); res.StatusCode != http.StatusOK {
		t.Error(res.Status)
	}
	if got, want := <-heads, "GET http://good.example:8080/ HTTP/1.1\nHost: good.example:8080"; got != want {
		t.Errorf("the parent got\n%s\nwant\n%s", got, want)
	}
}

// TestParentSecrets checks that no request shows the parent's credentials to anyone else,
// and that errors do not repeat a malformed option.
func TestParentSecrets(t *testing.T) {
	t.Setenv("PARENT_KEY", "rabbit")
	address, heads := startRecordingParent(t, "HTTP/1.1 200 OK\nContent-Length: 0\n\n")
	w := newWorld(t, "", nil)
	w.load(strings.Replace(w.site("upstream http://alice:{env.PARENT_KEY}@"+address+` {
	header X-Key {env.PARENT_KEY}
}`), "async_proxy {",
		"log\nlog_append key {http.request.header.X-Key}\nlog_append login {http.request.header.Proxy-Authorization}\nasync_proxy {", 1))
	if res, _ := policyRequest(t, w.proxy, http.MethodGet, "a.example:80", ""); res.StatusCode != http.StatusOK {
		t.Error(res.Status)
	}
	if head := <-heads; !strings.Contains(head, "X-Key: rabbit") {
		t.Errorf("the parent got %s", head)
	}
	w.waitLog("handled request", 1)
	w.checkSecretNotLogged("rabbit")
	w.checkSecretNotLogged(login("alice", "rabbit"))
	for _, option := range []string{"upstream http://alice:rabbit", "upstream http://alice:9rabbit@", `upstream http://p.example {
	header Proxy-Authorization Basic rabbit
}`,
		"upstream http://alice:rab{rabbit}bit@p.example"} {
		config, _, err := adapt(`:8080 {
	async_proxy {
		`+option+`
	}
}
`, "Caddyfile")
		if err == nil {
			var loaded caddy.Config
			if err = json.Unmarshal(config, &loaded); err == nil {
				err = caddy.Validate(&loaded)
			}
		}
		if err == nil || strings.Contains(err.Error(), "rabbit") {
			t.Errorf("%s: %v", option, err)
		}
	}
}

// TestParentOnThisMachine covers parents on this machine, which could resolve a name to an
// address that is closed here.
func TestParentOnThisMachine(t *testing.T) {
	refusalResolver(t)
	address, heads := startRecordingParent(t, "HTTP/1.1 200 OK\nContent-Length: 0\n\n")
	_, parentPort, _ := hostport.Split(address)
	for _, host := range []string{"127.0.0.1", "localhost"} {
		w := newWorld(t, "no_upstream direct.invalid\nupstream http://"+host+":"+parentPort, nil)
		_, port, _ := hostport.Split(w.proxy)
		for _, method := range []string{http.MethodConnect, http.MethodGet} {
			for target, want := range map[string]int{"a.example:" + port: 403, "a.example:443": 200, "a.example:" + parentPort: 200, "8.8.8.8:" + port: 200, "direct.invalid:" + port: 502} {
				res, body := policyRequest(t, w.proxy, method, target, policyRemote)
				if res.StatusCode != want || want == 403 && !strings.Contains(body, "(its port is reserved).") {
					t.Errorf("%s %s: %s %q, want %d", method, target, res.Status, body, want)
				}
				if asked := len(heads) > 0; asked != (want == 200) {
					t.Errorf("%s %s: the parent was asked: %v", method, target, asked)
				}
				for len(heads) > 0 {
					<-heads
				}
			}
		}
	}
}

func TestParentFailures(t *testing.T) {
	refusalResolver(t)
	closed := freeAddress(t)
	for _, tc := range []struct {
		name, answer string // "": nothing listens at the address
		status       int
		text         string
	}{
		{"credentials", "HTTP/1.1 407 Proxy Authentication Required\nProxy-Authenticate: Basic realm=\"x\"\nContent-Length: 0\n\n", 502, parentWantsOthers},
		{"denied", "HTTP/1.1 403 Forbidden\nContent-Length: 0\n\n", 403, "Denied by the parent proxy: it does not connect this proxy to target.example:443"},
		{"too many", "HTTP/1.1 429 Too Many Requests\nContent-Length: 0\n\n", 429, "The parent proxy limits requests"},
		{"busy", "HTTP/1.1 503 Service Unavailable\nContent-Length: 0\n\n", 503, "The parent proxy is too busy"},
		{"no target", "HTTP/1.1 502 Bad Gateway\nContent-Length: 0\n\n", 502, "The parent proxy could not connect to target.example:443"},
		{"target silent", "HTTP/1.1 504 Gateway Timeout\nContent-Length: 0\n\n", 504, "The parent proxy could not connect to target.example:443 in time"},
		{"anything else", "HTTP/1.1 302 Found\nContent-Length: 0\n\n", 502, "The parent proxy could not connect to target.example:443"},
		{"no HTTP", "SSH-2.0-x\n", 502, "The parent proxy did not answer with a valid HTTP response"},
		{"silent", "", 504, "The parent proxy did not answer in time"},
		{"refused", "refused", 502, "The parent proxy refused the connection"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			address, _ := startRecordingParent(t, tc.answer)
			options := ""
			switch tc.answer {
			case "":
				options = "dial_timeout 200ms\n"
			case "refused":
				address = closed
			}
			w := newWorld(t, options+"upstream http://alice:rabbit@"+address, nil)
			res, body := policyRequest(t, w.proxy, http.MethodConnect, "target.example:443", "")
			if res.StatusCode != tc.status || !strings.HasPrefix(body, tc.text) || res.Header.Get("Proxy-Authenticate") != "" {
				t.Errorf("%s %q, want %d %q", res.Status, body, tc.status, tc.text)
			}
			w.waitLog("request", 1)
			w.checkSecretNotLogged("rabbit")
		})
	}
	w := newWorld(t, "upstream http://nowhere.invalid", nil)
	if res, body := policyRequest(t, w.proxy, http.MethodConnect, "target.example:443", ""); res.StatusCode != 502 || !strings.HasPrefix(body, "The parent proxy could not be resolved") {
		t.Errorf("%s %q", res.Status, body)
	}
}

// TestParentRules checks that rules apply with a parent, and that the parent's own address
// needs no rule.
func TestParentRules(t *testing.T) {
	address, heads := startRecordingParent(t, "HTTP/1.1 200 OK\nContent-Length: 0\n\n")
	w := newWorld(t, "deny bad.example *.bad.example\nno_upstream direct.example 127.0.0.0/8\nupstream http://"+address, nil)
	for _, tc := range []struct {
		authority string
		status    int // 0: not from the parent
	}{
		{"good.example:80", 200}, {"bad.example:80", 403}, {"x.bad.example:80", 403}, {"BAD.example.:80", 403}, {"good.example:25", 403},
		{"10.0.0.1:80", 403}, {"localhost:80", 403}, {"[::1]:80", 403}, {"169.254.169.254:80", 403}, {"8.8.8.8:80", 200},
		{"2130706433:80", 400}, {"0x7f.1:80", 400},
		{w.origin.Listener.Addr().String(), 403}, // direct, and closed to remote clients
	} {
		for _, method := range []string{http.MethodConnect, http.MethodGet} {
			res, body := policyRequest(t, w.proxy, method, tc.authority, policyRemote)
			if res.StatusCode != tc.status {
				t.Errorf("%s %s: %s %q, want %d", method, tc.authority, res.Status, body, tc.status)
			}
			if asked := len(heads) > 0; asked != (tc.status == 200) {
				t.Errorf("%s %s: the parent was asked: %v", method, tc.authority, asked)
			}
			for len(heads) > 0 {
				<-heads
			}
		}
	}
	policyOpen(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "", "hello from the origin")
	policyOpen(t, w.proxy, http.MethodConnect, w.origin.Listener.Addr().String(), "", "")
	if len(heads) > 0 {
		t.Errorf("the parent was asked: %q", <-heads)
	}
	for _, mistake := range []string{`"upstream": {"url": "http://alice:{env.THERE_IS_NO_SUCH}@proxy.example"}`, `"no_upstream": ["a.example"]`,
		`"upstream": {"url": "proxy.example:80"}`, `"upstream": {"url": "http://a.example", "tls": {}}`, `"upstream": {"url": "http://a.example", "headers": {"a b": "c"}}`} {
		if err := validate(t, `{"handler": "async_proxy", `+mistake+`}`); err == nil {
			t.Errorf("the config %q is accepted", mistake)
		}
	}
}

// TestParentPlaceholderIsNamed checks that the error names a placeholder that is unknown, but no text
// that may be part of a password.
func TestParentPlaceholderIsNamed(t *testing.T) {
	for credentials, want := range map[string]string{
		"alice:{env.THERE_IS_NO_SUCH}":     "upstream: the placeholder {env.THERE_IS_NO_SUCH} is unknown or empty",
		"{file./there/is/no/such}":         "upstream: the placeholder {file./there/is/no/such} is unknown or empty",
		"alice:open{env.THERE_IS_NO_SUCH}": "upstream: a placeholder in the user or the password is unknown or empty",
		"alice:{sesame}":                   "upstream: a placeholder in the user or the password is unknown or empty",
		"alice:{env.OPEN}{env.SESAME}":     "upstream: a placeholder in the user or the password is unknown or empty",
	} {
		err := validate(t, `{"handler": "async_proxy", "upstream": {"url": "http://`+credentials+`@proxy.example"}}`)
		if err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v\nwant %s at the end", credentials, err, want)
		}
	}
}

// TestParentDisconnect checks that a client's disconnect ends the attempt to reach a slow
// parent, and that nothing of it remains.
func TestParentDisconnect(t *testing.T) {
	address, heads := startRecordingParent(t, "")
	w := newWorld(t, "upstream http://"+address, nil)
	before := runtime.NumGoroutine()
	conn := w.dial()
	conn.send("CONNECT target.example:443 HTTP/1.1\nHost: x\n\n")
	<-heads
	conn.Close()
	if line := w.waitLog("request", 1)[0]; line["status"] != 499.0 {
		t.Errorf("line %v", line)
	}
	eventually(t, "goroutines to end", func() bool { return runtime.NumGoroutine() <= before })
}

// TestParentTimeouts checks that a single timeout bounds the whole attempt.
func TestParentTimeouts(t *testing.T) {
	silent := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) })
	for _, scheme := range []string{"http", "https", "socks5"} {
		w := newWorld(t, "dial_timeout 100ms\nupstream "+scheme+"://"+silent, nil)
		if res, body := policyRequest(t, w.proxy, http.MethodConnect, "target.example:443", ""); res.StatusCode != http.StatusGatewayTimeout {
			t.Errorf("%s: %s %q", scheme, res.Status, body)
		}
	}
}
