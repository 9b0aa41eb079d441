// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"golang.org/x/crypto/bcrypt"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// authUsers are options with two users: alice, password wonderland, and bob, password
// builder. The test hash replaces real ones, which are slow.
const authUsers = `basic_auth counting Office {
	alice $wonderland
	bob $builder
}
`

// bcryptUsers is the same for processes without the tests' hash.
var bcryptUsers = func() string {
	hash := func(password string) string {
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
		if err != nil {
			panic(err)
		}
		return string(hash)
	}
	return `basic_auth bcrypt Office {
	alice ` + hash("wonderland") + `
	bob ` + hash("builder") + `
}
`
}()

// login returns a value for Proxy-Authorization.
func login(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// authRefused returns the text for a client whose credentials are refused.
func authRefused(credentials string) string {
	if strings.TrimSpace(credentials) == "" {
		return "This proxy requires a user name and password.\n"
	}
	return "The user name or password is wrong.\n"
}

func TestAuth(t *testing.T) {
	var seen []string
	w := newWorld(t, authUsers+"failed_logins off", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = append(seen, fmt.Sprint(r.Header["Proxy-Authorization"], r.Header["Authorization"]))
	}))
	origin := w.origin.Listener.Addr().String()
	ask := func(method, lines string) (*http.Response, string) {
		return policyRequest(t, w.proxy, method, origin, lines)
	}
	for _, method := range []string{http.MethodGet, http.MethodConnect} {
		var shape string
		for name, credentials := range map[string]string{
			"none": "", "a wrong password": login("alice", "builder"), "no password": login("alice", ""), "a wrong user": login("carol", "wonderland"),
			"another scheme": "Bearer abc", "no base64": "Basic !!!", "no colon": "Basic " + base64.StdEncoding.EncodeToString([]byte("alice")),
			"nothing after the scheme": "Basic", "a space": " ", "an enormous password": login("alice", strings.Repeat("x", 8000)),
			"a password longer than bcrypt's limit": login("alice", "wonderland"+strings.Repeat("x", 100)),
		} {
			lines := "Proxy-Authorization: " + credentials + "\n"
			if strings.TrimSpace(credentials) == "" {
				lines = ""
			}
			// Credentials for the origin are not for the proxy.
			res, body := ask(method, "Authorization: "+login("alice", "wonderland")+"\n"+lines)
			if res.StatusCode != http.StatusProxyAuthRequired || res.Header.Get("Proxy-Authenticate") != `Basic realm="Office"` || body != authRefused(credentials) {
				t.Errorf("%s with %s: %s, Proxy-Authenticate %q, %q", method, name, res.Status, res.Header.Get("Proxy-Authenticate"), body)
			}
			if got, want := ownStatus(t, res.Header)["details"]+".\n", authRefused(credentials); got != want {
				t.Errorf("%s with %s: the details are %q, want %q", method, name, got, want)
			}
			for _, name := range []string{"Date", "Content-Length", "Proxy-Status"} {
				res.Header.Del(name)
			}
			if got := fmt.Sprint(res.Header); shape == "" {
				shape = got
			} else if got != shape {
				t.Errorf("%s with %s: fields %s, want %s", method, name, got, shape)
			}
		}
		for _, user := range []string{"alice wonderland", "bob builder"} {
			name, password, _ := strings.Cut(user, " ")
			res, _ := ask(method, "Authorization: for-the-origin\nProxy-Authorization: "+login(name, password)+"\n")
			if res.StatusCode != http.StatusOK {
				t.Errorf("%s as %s: %s", method, name, res.Status)
			}
		}
	}
	if got, want := strings.Join(seen, " "), "[] [for-the-origin] [] [for-the-origin]"; got != want {
		t.Errorf("the origin got %s, want %s", got, want)
	}
	for _, secret := range []string{"wonderland", "builder", login("alice", "wonderland"), login("bob", "builder")} {
		w.checkSecretNotLogged(secret)
	}
	levels := map[any]int{}
	for _, line := range w.waitLog("request", 24) {
		levels[fmt.Sprint(line["status"], line["level"], line["user"])]++
	}
	// Browsers and curl start without credentials.
	if levels["407info<nil>"] != 4 || levels["407warn<nil>"] != 18 || levels["200infoalice"] != 1 || levels["200infobob"] != 1 {
		t.Errorf("lines %v", levels)
	}
	if line := w.waitLog("CONNECT tunnel", 2)[0]; line["user"] != "alice" {
		t.Errorf("line %v", line)
	}
}

// TestAuthOfProtocols opens tunnels as a user over each protocol.
func TestAuthOfProtocols(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{options: authUsers, site: "log_append user {http.auth.user.id}\nlog"})
	target := listen(t, func(conn *net.TCPConn) { _, _ = conn.Write([]byte("hello")) })
	for _, protocol := range tunnelProtocols {
		t.Run(protocol, func(t *testing.T) {
			client := w.client(t, protocol)
			for _, credentials := range []string{"", login("alice", "builder")} {
				client.login = credentials
				refused := client.refused(target)
				if refused.status != http.StatusProxyAuthRequired || refused.challenge != `Basic realm="Office"` || refused.body != authRefused(credentials) {
					t.Errorf("as %q: %d, %q, %q", credentials, refused.status, refused.challenge, refused.body)
				}
			}
			client.login = login("alice", "wonderland")
			greeting := make([]byte, 5)
			if _, err := io.ReadFull(client.open(target), greeting); err != nil || string(greeting) != "hello" {
				t.Errorf("%q, %v", greeting, err)
			}
		})
	}
}

// TestAuthOnlyForProxyRequests checks that requests that are not proxy requests reach the
// next handler without a login.
func TestAuthOnlyForProxyRequests(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(strings.Replace(w.site(authUsers), "async_proxy {", "respond \"a site\"\nasync_proxy {", 1))
	conn := w.dial()
	conn.send("GET / HTTP/1.1\nHost: x\n\n")
	if res, body := conn.response(http.MethodGet); res.StatusCode != http.StatusOK || body != "a site" {
		t.Errorf("%s %q", res.Status, body)
	}
}

func TestClients(t *testing.T) {
	w := newWorld(t, "clients 192.0.2.0/24", nil)
	origin := w.origin.Listener.Addr().String()
	for _, method := range []string{http.MethodGet, http.MethodConnect} {
		res, body := policyRequest(t, w.proxy, method, origin, "")
		if want := "Denied by proxy: your address, 127.0.0.1, may not use it.\n"; res.StatusCode != http.StatusForbidden || body != want {
			t.Errorf("%s: %s %q", method, res.Status, body)
		}
	}
	if line := w.waitLog("request", 2)[0]; line["level"] != "warn" || line["rule"] != "clients" {
		t.Errorf("line %v", line)
	}
	w.load(w.site("clients 127.0.0.0/8"))
	for _, method := range []string{http.MethodGet, http.MethodConnect} {
		policyOpen(t, w.proxy, method, origin, "", "hello from the origin")
	}
}

// TestLimitByUser checks that a user has one bucket at all addresses, that a failed login
// costs the user no token, and that a request without credentials costs the client one.
func TestLimitByUser(t *testing.T) {
	for i, tc := range []struct {
		by, logins, want string
	}{
		{"client_ip", "a a a b x -", "200 200 200 429 407 429"},
		{"user", "a a a a b b b b", "200 200 200 429 200 200 200 429"},
		{"user", "x x x x a b", "407 407 407 407 200 200"},
		{"user", "a a a a - - - -", "200 200 200 429 407 407 407 429"},
	} {
		w := newWorld(t, fmt.Sprintf("%sburst 3\nrefill 0.00001\nzone by-%d\nlimit_by %s", authUsers, i, tc.by), nil)
		var got []string
		for client := range strings.FieldsSeq(tc.logins) {
			lines := map[string]string{
				"a": "Proxy-Authorization: " + login("alice", "wonderland") + "\n", "b": "Proxy-Authorization: " + login("bob", "builder") + "\n",
				"x": "Proxy-Authorization: " + login("alice", "?") + "\n", "-": "",
			}[client]
			res, _ := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), lines)
			got = append(got, fmt.Sprint(res.StatusCode))
		}
		if got := strings.Join(got, " "); got != tc.want {
			t.Errorf("by %s: %s got %s, want %s", tc.by, tc.logins, got, tc.want)
		}
	}
}

// TestLoginsOfTheSharedLimiter checks that all processes count a client's failed logins
// together, and that a successful login asks the shared limiter nothing about the client.
func TestLoginsOfTheSharedLimiter(t *testing.T) {
	w := newWorld(t, authUsers+"limiter test\nlimit_by user\nburst 10\nrefill 0.5\nzone logins\nfailed_logins 4 per 1m", nil)
	ask := func(password string, status int, buckets ...Bucket) {
		t.Helper()
		askedBuckets()
		res, _ := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "Proxy-Authorization: "+login("alice", password)+"\n")
		if got := askedBuckets(); res.StatusCode != status || !slices.Equal(got, buckets) {
			t.Errorf("with %q: %s, want %d; asked for %+v, want %+v", password, res.Status, status, got, buckets)
		}
		if res.StatusCode == http.StatusTooManyRequests && res.Header.Get("Proxy-Authenticate") != "" {
			t.Errorf("with %q: %v", password, res.Header)
		}
	}
	user := Bucket{Zone: "logins", User: "alice", Burst: 10, Interval: 2 * time.Second}
	failures := Bucket{Zone: "logins failed_logins", Client: netip.MustParsePrefix("127.0.0.1/32"), Burst: 4, Interval: 15 * time.Second}
	answer(t, 0, nil, false)
	ask("wonderland", 200, user)
	ask("guess", 407, failures)
	ask("guess", 407) // known to be wrong
	answer(t, 100*time.Second, nil, false)
	ask("another guess", 429, failures)
	ask("a third one", 429) // this process has learned that the client is out of tokens
	answer(t, 0, nil, false)
	ask("wonderland", 200, user)
	answer(t, 0, nil, true)
	ask("wonderland", 200)
}

// TestBlockedUser checks that a blocked user is told so.
func TestBlockedUser(t *testing.T) {
	w := newWorld(t, authUsers+"limit_by user", nil)
	if !currentProcess().blockClient(client.User("alice"), time.Hour) {
		t.Fatal("the block failed")
	}
	res, body := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "Proxy-Authorization: "+login("alice", "wonderland")+"\n")
	if res.StatusCode != http.StatusTooManyRequests || !strings.HasPrefix(body, "The operator of this proxy has blocked this user; try again in ") {
		t.Errorf("%s %q", res.Status, body)
	}
}

func TestAuthByCurl(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("there is no curl; apt-get install curl")
	}
	w := newWorld(t, authUsers, nil)
	w.load(w.site(bcryptUsers))
	for _, tc := range []struct{ user, want string }{{"alice:wonderland", "200"}, {"alice:?", "407"}, {"", "407"}} {
		args := []string{"-s", "-o", os.DevNull, "-w", "%{http_code}", "-x", "http://" + w.proxy, "--proxy-anyauth", "--noproxy", "", w.origin.URL}
		if tc.user != "" {
			args = append(args, "--proxy-user", tc.user)
		}
		out, err := exec.Command(curl, args...).Output()
		if err != nil || string(out) != tc.want {
			t.Errorf("as %q: %s, %v, want %s", tc.user, out, err, tc.want)
		}
	}
}

// TestAuthByChromium checks that a browser asks for credentials, sends them, and loads the
// page.
func TestAuthByChromium(t *testing.T) {
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("there is no chromium; apt-get install chromium")
	}
	w := newWorld(t, authUsers, nil)
	profile, err := os.MkdirTemp("", "async-proxy-test-chromium")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		eventually(t, "the browser's profile to be removed", func() bool { return os.RemoveAll(profile) == nil })
	})
	browser := newCDP(t, chromium, "--user-data-dir="+profile, "--proxy-bypass-list=<-loopback>", "--proxy-server=http://"+w.proxy)
	asked := false
	browser.on("Fetch.authRequired", func(session string, params map[string]any) {
		asked = params["authChallenge"].(map[string]any)["source"] == "Proxy"
		browser.send(session, "Fetch.continueWithAuth", map[string]any{"requestId": params["requestId"],
			"authChallengeResponse": map[string]any{"response": "ProvideCredentials", "username": "alice", "password": "wonderland"}})
	})
	browser.on("Fetch.requestPaused", func(session string, params map[string]any) {
		browser.send(session, "Fetch.continueRequest", map[string]any{"requestId": params["requestId"]})
	})
	target := browser.call("", "Target.createTarget", map[string]any{"url": "about:blank"})
	session := browser.call("", "Target.attachToTarget", map[string]any{"targetId": target["targetId"], "flatten": true})["sessionId"].(string)
	browser.call(session, "Fetch.enable", map[string]any{"handleAuthRequests": true})
	browser.call(session, "Page.navigate", map[string]any{"url": w.origin.URL + "/page"})
	eventually(t, "the page", func() bool {
		text := browser.call(session, "Runtime.evaluate", map[string]any{"expression": "document.body.innerText"})
		return text["result"].(map[string]any)["value"] == "hello from the origin"
	})
	if !asked {
		t.Error("the browser got no request for credentials")
	}
	for _, line := range w.waitLog("request", 2) {
		if line["path"] == "/page" && line["status"] == 200.0 && line["user"] == "alice" {
			return
		}
	}
	t.Errorf("lines %v", w.logLines("request"))
}

// cdp speaks the DevTools protocol to a browser through a pipe.
type cdp struct {
	t        *testing.T
	to       *os.File
	from     *bufio.Reader
	last     int
	handlers map[string]func(session string, params map[string]any)
}

// newCDP runs a headless browser until the test ends.
func newCDP(t *testing.T, chromium string, args ...string) *cdp {
	t.Helper()
	theirs, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	from, theirs2, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	command := exec.Command(chromium, append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"}, args...)...)
	command.ExtraFiles = []*os.File{theirs, theirs2}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	theirs2.Close()
	from.SetReadDeadline(time.Now().Add(90 * time.Second))
	t.Cleanup(func() {
		_ = command.Process.Kill()
		_ = command.Wait()
		to.Close()
		from.Close()
	})
	return &cdp{t: t, to: to, from: bufio.NewReader(from), handlers: map[string]func(string, map[string]any){}}
}

func (c *cdp) on(event string, handler func(session string, params map[string]any)) {
	c.handlers[event] = handler
}

// send calls a method without waiting for the result.
func (c *cdp) send(session, method string, params map[string]any) (id int) {
	c.t.Helper()
	c.last++
	message := map[string]any{"id": c.last, "method": method, "params": params}
	if session != "" {
		message["sessionId"] = session
	}
	data, err := json.Marshal(message)
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.to.Write(append(data, 0)); err != nil {
		c.t.Fatal(err)
	}
	return c.last
}

// call calls a method and returns its result. It handles events meanwhile.
func (c *cdp) call(session, method string, params map[string]any) map[string]any {
	c.t.Helper()
	id := c.send(session, method, params)
	for {
		data, err := c.from.ReadBytes(0)
		if err != nil {
			c.t.Fatalf("%s: %v", method, err)
		}
		var got struct {
			ID        int
			Method    string
			SessionID string
			Params    map[string]any
			Result    map[string]any
			Error     any
		}
		if err := json.Unmarshal(data[:len(data)-1], &got); err != nil {
			c.t.Fatal(err)
		}
		if handler := c.handlers[got.Method]; handler != nil {
			handler(got.SessionID, got.Params)
		}
		if got.ID == id {
			if got.Error != nil {
				c.t.Fatalf("%s: %v", method, got.Error)
			}
			return got.Result
		}
	}
}

// countingHash counts password comparisons.
type countingHash struct{}

var (
	compared atomic.Int64
	holding  atomic.Pointer[chan struct{}] // if not nil, comparisons block until it is closed
)

func init() { caddy.RegisterModule(countingHash{}) }

func (countingHash) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.authentication.hashes.counting", New: func() caddy.Module { return new(countingHash) }}
}
func (countingHash) Hash(b []byte) ([]byte, error) { return b, nil }
func (countingHash) FakeHash() []byte              { return []byte("$fake") }
func (countingHash) Compare(hash, password []byte) (bool, error) {
	compared.Add(1)
	if hold := holding.Load(); hold != nil {
		<-*hold
	}
	return string(hash) == "$"+string(password), nil
}

// TestAuthDoesNotRevealUsers checks that an unknown user takes as long as a wrong password.
func TestAuthDoesNotRevealUsers(t *testing.T) {
	w := newWorld(t, authUsers, nil)
	for _, tc := range []struct {
		user, password string
		status         int
	}{{"alice", "wonderland", 200}, {"alice", "guess", 407}, {"carol", "guess", 407}, {"", "another", 407}} {
		compared.Store(0)
		lines := "Proxy-Authorization: " + login(tc.user, tc.password) + "\n"
		if res, _ := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), lines); res.StatusCode != tc.status || compared.Load() != 1 {
			t.Errorf("as %q: %s, %d comparisons, want 1", tc.user, res.Status, compared.Load())
		}
	}
}

// TestAuthPlaceholders checks that Caddy's access log and other handlers know the user.
func TestAuthPlaceholders(t *testing.T) {
	w := newWorld(t, "", nil)
	w.load(strings.Replace(w.site(authUsers), "async_proxy {", "log\nlog_append user {http.async_proxy.user}\nasync_proxy {", 1))
	res, _ := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "Proxy-Authorization: "+login("alice", "wonderland")+"\n")
	if res.StatusCode != http.StatusOK {
		t.Fatal(res.Status)
	}
	if line := w.waitLog("handled request", 1)[0]; line["user_id"] != "alice" || line["user"] != "alice" {
		t.Errorf("line %v", line)
	}
	w.checkSecretNotLogged("wonderland")
}

// tokenAuth is an example of a third-party provider.
type tokenAuth struct{}

var refusing atomic.Bool // makes tokenAuth reject every user

func init() { caddy.RegisterModule(tokenAuth{}) }

func (tokenAuth) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.authentication.providers.token", New: func() caddy.Module { return new(tokenAuth) }}
}

func (tokenAuth) Authenticate(w http.ResponseWriter, r *http.Request) (caddyauth.User, bool, error) {
	switch r.Header.Get("Authorization") {
	case "Bearer abc":
		if refusing.Load() {
			return caddyauth.User{}, false, nil
		}
		return caddyauth.User{ID: "robot", Metadata: map[string]string{"team": "crawlers"}}, true, nil
	case "Bearer broken":
		return caddyauth.User{}, false, errors.New("the directory is down")
	}
	w.WriteHeader(http.StatusTeapot) // must not reach the client
	_, _ = io.WriteString(w, "nor that")
	return caddyauth.User{}, false, nil
}

// TestAuthByOtherProviders checks that JSON configs accept any provider, and several.
func TestAuthByOtherProviders(t *testing.T) {
	w := newWorld(t, "", nil)
	config, _, err := adapt(w.globals()+w.site("via tester"), "Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	with := strings.Replace(string(config), `"handler":"async_proxy"`, `"handler":"async_proxy","authentication":{"token":{},"http_basic":{"realm":"both","accounts":[{"username":"alice","password":"`+
		strings.TrimSpace(strings.Fields(bcryptUsers)[5])+`"}]}}`, 1)
	reloadAndWait(t, func() {
		if err := caddy.Load([]byte(with), true); err != nil {
			t.Fatal(err)
		}
	})
	for _, tc := range []struct {
		credentials string
		status      int
	}{{"Bearer abc", 200}, {"Bearer abd", 407}, {"Bearer broken", 407}, {login("alice", "wonderland"), 200}, {login("alice", "?"), 407}} {
		res, body := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "Proxy-Authorization: "+tc.credentials+"\n")
		if res.StatusCode != tc.status || tc.status == 407 && (body != authRefused(tc.credentials) || res.Header.Get("Proxy-Authenticate") != `Basic realm="both"`) {
			t.Errorf("%s: %s %q, %q", tc.credentials, res.Status, body, res.Header)
		}
	}
	w.waitLog("auth provider returned error", 1)
}

// Hashes from Caddy's documentation are refused everywhere: their passwords are public.
func TestPublishedHashes(t *testing.T) {
	published := func(hash string) []string {
		list := []string{hash, base64.StdEncoding.EncodeToString([]byte(hash))}
		if rest, ok := strings.CutPrefix(hash, "$2a$"); ok {
			list = append(list, "$2y$"+rest)
		}
		return list
	}
	const text = "a hash from Caddy's documentation, whose password is public; generate your own with `caddy hash-password`"
	for _, hash := range publishedHashes {
		algorithm := "bcrypt"
		if strings.HasPrefix(hash, "$argon2id$") {
			algorithm = "argon2id"
		}
		for _, spelling := range published(hash) {
			_, _, err := adapt(`:8080 {
	async_proxy {
		basic_auth `+algorithm+` {
			alice `+spelling+`
		}
	}
}`, "Caddyfile")
			if want := "basic_auth: the user 'alice' has " + text + ", at Caddyfile:4"; err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %s", spelling, err, want)
			}
			t.Setenv("PUBLISHED_HASH", spelling)
			for _, value := range []string{spelling, "{env.PUBLISHED_HASH}"} {
				err := validateJSON(t, fmt.Appendf(nil, `{"apps": {"http": {"servers": {"s": {"listen": ["127.0.0.1:0"], "routes": [{"handle": [{
					"handler": "async_proxy", "authentication": {"http_basic": {"hash": {"algorithm": %q}, "accounts": [{"username": "alice", "password": %q}]}}}]}]}}}}}`, algorithm, value))
				if want := `authentication: the user "alice" has ` + text; err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %v, want %s", value, err, want)
				}
			}
		}
	}
}
