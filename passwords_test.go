// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// forgetCredentials resets the credential caches, as in a new process.
func forgetCredentials() {
	for _, s := range []*credentialSet{program.rightCredentials, program.wrongCredentials} {
		s.gens.Store(newCredentialSet(0).gens.Load())
	}
}

// TestLoginGate checks which clients may enter, and that waiting is bounded.
func TestLoginGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newLoginGate(2, time.Minute)
		key := func(n byte) client.Key { return client.Address(netip.AddrFrom4([4]byte{192, 0, 2, n})) }
		var inside, waiting atomic.Int64
		enter := func(ctx context.Context, n byte, done func(error)) {
			waiting.Add(1)
			go func() {
				err := g.enter(ctx, key(n))
				waiting.Add(-1)
				if err == nil {
					inside.Add(1)
				}
				done(err)
			}()
			synctest.Wait()
		}
		ignore := func(error) {}
		want := func(in, wait int64) {
			t.Helper()
			if synctest.Wait(); inside.Load() != in || waiting.Load() != wait {
				t.Fatalf("%d entered and %d wait, want %d and %d", inside.Load(), waiting.Load(), in, wait)
			}
		}
		leave := func(n byte) { inside.Add(-1); g.leave(key(n)) }

		for range 3 {
			enter(t.Context(), 1, ignore) // each client has one slot
		}
		want(1, 2)
		enter(t.Context(), 2, ignore)
		enter(t.Context(), 3, ignore) // there are two slots in total
		want(2, 3)
		leave(1)
		want(2, 2)
		leave(2)
		want(2, 1)

		ctx, cancel := context.WithCancelCause(t.Context())
		left := errors.New("left")
		got := make(chan error, 2)
		enter(ctx, 4, func(err error) { got <- err })
		cancel(left)
		if err := <-got; err != left {
			t.Errorf("a client that disconnects: %v", err)
		}
		enter(t.Context(), 5, func(err error) { got <- err })
		if err := <-got; err != errLoginsBusy { // after a minute of synthetic time
			t.Errorf("a client that timed out: %v", err)
		}
		want(2, 0) // the first client's last login has timed out too
		for range maxLoginLine - 1 {
			enter(t.Context(), 1, ignore)
		}
		enter(t.Context(), 1, func(err error) { got <- err })
		if err := <-got; err != errLoginsBusy {
			t.Errorf("one login too many: %v", err)
		}
		time.Sleep(2 * time.Minute)
		want(2, 0)
		leave(1)
		leave(3)
		if len(g.lines) != 0 || len(g.slots) != 0 {
			t.Errorf("%d queues and %d slots are left", len(g.lines), len(g.slots))
		}
	})
}

// TestCredentialSet checks that the set is bounded and keeps entries that are looked up.
func TestCredentialSet(t *testing.T) {
	s := newCredentialSet(20)
	key := func(n int) credentialKey { return credentialsKey(fmt.Sprint(n)) }
	for n := range 1000 {
		s.add(key(n))
		if !s.has(key(0)) || !s.has(key(n)) {
			t.Fatalf("after %d: the first %v, the last %v", n, s.has(key(0)), s.has(key(n)))
		}
	}
	kept := 0
	for n := range 1000 {
		if g := s.gens.Load(); func() bool { _, a := g[0].Load(key(n)); _, b := g[1].Load(key(n)); return a || b }() {
			kept++
		}
	}
	if kept > 22 || s.has(key(1)) {
		t.Errorf("%d of 20 entries are kept", kept)
	}
	s.remove(key(0))
	if s.has(key(0)) {
		t.Error("the entry was removed")
	}
	if credentialsKey("a", "bc") == credentialsKey("ab", "c") {
		t.Error("different parts have the same key")
	}
}

// loginWorld is a world in which every request logs in.
type loginWorld struct {
	*world
	t *testing.T
}

// newLoginWorld starts a world that serves clients in one of the two ways.
func newLoginWorld(t *testing.T, way, options string) *loginWorld {
	w := newWorld(t, "", nil)
	site := w.site(authUsers + "zone " + strings.ReplaceAll(t.Name(), "#", "") + "\n" + options)
	if way == "ordinary" {
		site = byCaddy(site)
	}
	loadCaddyfile(t, strings.Replace(w.globals(), "{\n", "{\nservers {\ntrusted_proxies static 127.0.0.0/8\n}\n", 1)+site)
	compared.Store(0)
	return &loginWorld{w, t}
}

func onBothLoginPaths(t *testing.T, test func(t *testing.T, way string)) {
	for _, way := range []string{"fast", "ordinary"} {
		t.Run(way, func(t *testing.T) { test(t, way) })
	}
}

// ask logs in from an address; "" means the test's own.
func (w *loginWorld) ask(from, user, password string) (*http.Response, string) {
	w.t.Helper()
	lines := "Proxy-Authorization: " + login(user, password) + "\n"
	if user == "" {
		lines = ""
	}
	if from != "" {
		lines += "X-Forwarded-For: " + from + "\n"
	}
	return policyRequest(w.t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), lines)
}

// gets logs in and checks the response's status.
func (w *loginWorld) gets(status int, from, user, password string) {
	w.t.Helper()
	if res, body := w.ask(from, user, password); res.StatusCode != status {
		w.t.Errorf("%s from %q with %q: %s, want %d: %q", user, from, password, res.Status, status, body)
	}
}

// TestFailedLogins checks that a client that guesses passwords is refused without a check,
// for other users too, while earlier logins and other clients are not affected.
func TestFailedLogins(t *testing.T) {
	onBothLoginPaths(t, func(t *testing.T, way string) {
		w := newLoginWorld(t, way, "failed_logins 3 per 1h\nburst 4\nrefill 0.00001\nallow 127.0.0.0/8")
		before := gatherMetrics(t)["auth_failures_total"]
		w.gets(200, "", "alice", "wonderland")
		for i := range 3 {
			w.gets(407, "", "alice", fmt.Sprint("guess", i))
		}
		for i := range 5 {
			res, body := w.ask("", fmt.Sprint("user", i), "guess")
			if res.StatusCode != 429 || res.Header.Get("Retry-After") == "" || res.Header.Get("Proxy-Authenticate") != "" ||
				!strings.HasPrefix(body, "Too many failed logins from your address; try again in 1") {
				t.Errorf("%s %v %q", res.Status, res.Header, body)
			}
		}
		if n := compared.Load(); n != 4 {
			t.Errorf("%d passwords were checked, want 4", n)
		}
		if n := gatherMetrics(t)["auth_failures_total"] - before; n != 3 {
			t.Errorf("%v failures were counted, want 3", n)
		}
		w.gets(407, "192.0.2.7", "alice", "guess0")
		w.gets(407, "192.0.2.7", "alice", "another guess")

		// Requests that were let in took the client's own tokens.
		for _, status := range []int{200, 200, 200, 429} {
			w.gets(status, "", "alice", "wonderland")
		}
		for _, line := range w.waitLog("request", 8) {
			if line["status"] == 429.0 && (line["cause"] != "failed_logins" || line["refused"] != 1.0) {
				t.Errorf("line %v", line)
			}
		}
		if !currentProcess().refillClient(keyOf("127.0.0.1"), "", "") {
			t.Error("nothing was refilled")
		}
		w.gets(407, "", "alice", "one more guess")
	})
}

// TestRightPasswordAmongGuesses checks that a client with the right password gets in from
// an address that others guess from, the first time as well.
func TestRightPasswordAmongGuesses(t *testing.T) {
	onBothLoginPaths(t, func(t *testing.T, way string) {
		w := newLoginWorld(t, way, "failed_logins 20 per 2s\nallow 127.0.0.0/8")
		limited := 0
		for i := 0; limited < 3; i++ {
			if i == 1000 {
				t.Fatal("guesses are not limited")
			}
			if res, _ := w.ask("", "alice", fmt.Sprint("guess", i)); res.StatusCode == 429 {
				limited++
			}
		}
		w.gets(200, "", "alice", "wonderland")
		w.gets(200, "", "bob", "builder")
	})
}

// TestRepeatedOldPassword checks that a job that keeps using an outdated password costs a
// single check, and does not lock out other clients at its address.
func TestRepeatedOldPassword(t *testing.T) {
	for _, by := range []string{"client_ip", "user"} {
		t.Run(by, func(t *testing.T) {
			onBothLoginPaths(t, func(t *testing.T, way string) {
				w := newLoginWorld(t, way, "failed_logins 3 per 1h\nburst 4\nrefill 0.00001\nallow 127.0.0.0/8\nlimit_by "+by)
				for i := range 20 {
					want := 407
					if i > 3 {
						want = 429
					}
					w.gets(want, "", "alice", "old")
				}
				if n := compared.Load(); n != 1 {
					t.Errorf("%d passwords were checked, want 1", n)
				}
				w.gets(407, "", "carol", "a mistake")
				for range 4 {
					w.gets(200, "", "alice", "wonderland")
				}
				w.gets(407, "", "bob", "another mistake")
			})
		})
	}
}

// TestLoginsAreRemembered checks that a login is remembered while the hash is the same,
// across reloads.
func TestLoginsAreRemembered(t *testing.T) {
	onBothLoginPaths(t, func(t *testing.T, way string) {
		options := "allow 127.0.0.0/8\n"
		w := newLoginWorld(t, way, options)
		for range 2 {
			w.gets(200, "", "alice", "wonderland")
			w.gets(407, "", "bob", "wonderland")
		}
		w.load(w.site(authUsers + "dial_timeout 9s\n" + options))
		w.gets(200, "", "alice", "wonderland")
		w.gets(407, "", "bob", "wonderland")
		if n := compared.Load(); n != 2 {
			t.Errorf("%d passwords were checked, want 2", n)
		}
		w.load(w.site(strings.Replace(strings.Replace(authUsers, "$wonderland", "$other", 1), "$builder", "$wonderland", 1) + options))
		w.gets(407, "", "alice", "wonderland")
		w.gets(200, "", "alice", "other")
		w.gets(200, "", "bob", "wonderland")
	})
}

// TestPasswordsAreCheckedOneByOne checks that each client's passwords are checked one at a
// time, on at most half of the processors in total.
func TestPasswordsAreCheckedOneByOne(t *testing.T) {
	onBothLoginPaths(t, func(t *testing.T, way string) {
		const guesses, tokens, clients = 20, 5, 3
		w := newLoginWorld(t, way, fmt.Sprintf("allow 127.0.0.0/8\nfailed_logins %d per 1h", tokens))
		hold := make(chan struct{})
		holding.Store(&hold)
		defer holding.Store(nil)
		statuses := make(chan int, guesses*clients)
		for i := range guesses * clients {
			conn := w.dial()
			conn.send(fmt.Sprintf("GET %s/ HTTP/1.1\nHost: x\nProxy-Authorization: %s\nX-Forwarded-For: 192.0.2.%d\n\n", w.origin.URL, login("alice", fmt.Sprint("guess", i)), i%clients))
			go func() {
				if res, err := http.ReadResponse(conn.r, nil); err == nil {
					statuses <- res.StatusCode
				} else {
					statuses <- 0
				}
			}()
		}
		slots := min(clients, max(1, runtime.GOMAXPROCS(0)/2))
		eventually(t, "each login to be answered or held", func() bool {
			return len(statuses) == (guesses-tokens)*clients && compared.Load() == int64(slots)
		})
		// Requests that need no check do not wait.
		w.gets(407, "192.0.2.99", "", "")
		if n := compared.Load(); n != int64(slots) {
			t.Errorf("%d passwords are checked at once, want %d", n, slots)
		}
		holding.Store(nil)
		close(hold)
		got := map[int]int{}
		for range guesses * clients {
			got[<-statuses]++
		}
		if n := compared.Load(); n != tokens*clients || got[407] != tokens*clients || got[429] != (guesses-tokens)*clients {
			t.Errorf("%d passwords were checked, want %d; answers %v", n, tokens*clients, got)
		}
	})
}

// TestDisconnectDuringLogin checks that a client that disconnects in the queue is
// charged no token.
func TestDisconnectDuringLogin(t *testing.T) {
	onBothLoginPaths(t, func(t *testing.T, way string) {
		w := newLoginWorld(t, way, "failed_logins 2 per 1h\nallow 127.0.0.0/8")
		hold := make(chan struct{})
		holding.Store(&hold)
		defer holding.Store(nil)
		send := func(password string) *rawConn {
			conn := w.dial()
			conn.send("GET " + w.origin.URL + "/ HTTP/1.1\nHost: x\nProxy-Authorization: " + login("alice", password) + "\n\n")
			return conn
		}
		first := send("first")
		eventually(t, "the first login to be checked", func() bool { return compared.Load() == 1 })
		second := send("second")
		eventually(t, "the second login to wait", func() bool {
			program.logins.mu.Lock()
			defer program.logins.mu.Unlock()
			return len(program.logins.lines) == 1 && program.logins.lines[keyOf("127.0.0.1")].n == 2
		})
		second.Close()
		if line := w.waitLog("request", 1)[0]; line["status"] != 499.0 {
			t.Errorf("line %v", line)
		}
		holding.Store(nil)
		close(hold)
		if res, _ := first.response(http.MethodGet); res.StatusCode != 407 {
			t.Errorf("the first: %s", res.Status)
		}
		w.gets(407, "", "alice", "third")
		w.gets(429, "", "alice", "fourth")
	})
}

// TestLoginsOfOtherProviders checks that other providers are asked every time, because
// their answer may change.
func TestLoginsOfOtherProviders(t *testing.T) {
	w := newWorld(t, "", nil)
	config, _, err := adapt(w.globals()+w.site("via tester"), "Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	reloadAndWait(t, func() {
		json := strings.Replace(string(config), `"handler":"async_proxy"`, `"handler":"async_proxy","failed_logins":2,"failed_logins_per":"1h","authentication":{"token":{}}`, 1)
		if err := caddy.Load([]byte(json), true); err != nil {
			t.Fatal(err)
		}
	})
	gets := func(status int, credentials string) {
		t.Helper()
		res, body := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "Proxy-Authorization: "+credentials+"\n")
		if res.StatusCode != status {
			t.Errorf("%s: %s, want %d: %q", credentials, res.Status, status, body)
		}
	}
	gets(200, "Bearer abc")
	gets(407, "Bearer broken") // some providers return an error for an invalid token
	gets(407, "Bearer x")
	gets(429, "Bearer y")
	gets(200, "Bearer abc")
	refusing.Store(true)
	defer refusing.Store(false)
	gets(429, "Bearer abc")
}

// TestPasswordsOfSeveralProvidersTakeTurns checks that passwords which http_basic
// hashes for each request, because there are other providers, are also checked one at a
// time.
func TestPasswordsOfSeveralProvidersTakeTurns(t *testing.T) {
	w := newLoginWorld(t, "fast", "allow 127.0.0.0/8")
	config, _, err := adapt(w.globals()+w.site(authUsers), "Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	reloadAndWait(t, func() {
		json := strings.NewReplacer(`"authentication":{`, `"authentication":{"token":{},`, `"hash_cache":{},`, "").Replace(string(config))
		if err := caddy.Load([]byte(json), true); err != nil {
			t.Fatal(err)
		}
	})
	w.gets(200, "", "alice", "wonderland")
	before := compared.Load()
	hold := make(chan struct{})
	holding.Store(&hold)
	defer holding.Store(nil)
	const requests = 3
	statuses := make(chan int, requests)
	for range requests {
		conn := w.dial()
		conn.send(fmt.Sprintf("GET %s/ HTTP/1.1\nHost: x\nProxy-Authorization: %s\n\n", w.origin.URL, login("alice", "wonderland")))
		go func() {
			res, err := http.ReadResponse(conn.r, nil)
			if err != nil {
				statuses <- 0
				return
			}
			statuses <- res.StatusCode
		}()
	}
	eventually(t, "one login to be checked and the others to wait", func() bool {
		program.logins.mu.Lock()
		defer program.logins.mu.Unlock()
		line := program.logins.lines[keyOf("127.0.0.1")]
		return line != nil && line.n == requests && compared.Load() == before+1
	})
	holding.Store(nil)
	close(hold)
	for range requests {
		if status := <-statuses; status != 200 {
			t.Errorf("status %d", status)
		}
	}
}

// TestFailedLoginsOptions checks that invalid values are refused.
func TestFailedLoginsOptions(t *testing.T) {
	for _, row := range []struct {
		n    int
		per  time.Duration
		want string
	}{
		{10, time.Minute, ""}, {-1, time.Minute, ""}, {maxFailedLogins, time.Duration(maxFailedLoginsPer), ""}, {1, time.Second, ""},
		{-2, time.Minute, "failed_logins: the value '-2 per 1m' is not valid; expected <n> per <duration>"}, {maxFailedLogins + 1, time.Minute, "the value '1000001 per 1m' is not valid"},
		{10, time.Millisecond, "the value '10 per 1ms' is not valid"}, {10, time.Duration(maxFailedLoginsPer) + 1, "with 1 to 1000000 logins per 1s to 8760h"},
		{10, -time.Second, "the value '10 per -1s' is not valid"},
	} {
		var h Handler
		h.FailedLogins, h.FailedLoginsPer = row.n, caddy.Duration(row.per)
		err := h.Validate()
		if row.want == "" && err != nil || row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)) {
			t.Errorf("%d per %v: %v", row.n, row.per, err)
		}
	}
}
