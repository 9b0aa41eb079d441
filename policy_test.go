// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/quic-go/quic-go/http3"
)

// policyClient sends one request after the other over a connection, with additional lines in its
// head, and returns the status and the name of the policy in the response.
type policyClient func(method, lines string) (status int, policy string)

// namesPolicy makes responses to forwarded requests name the policy that decided.
const namesPolicy = "header_down X-Policy {http.async_proxy.policy}-\n"

// newPolicyClient returns a client on a new connection.
func newPolicyClient(t *testing.T, w *tunnelWorld, protocol, origin string) policyClient {
	t.Helper()
	if protocol == "h1" || protocol == "h1-tls" {
		c := dialRaw(t, w.address(protocol))
		if protocol == "h1-tls" {
			c.startTLS(clientTLS("http/1.1"))
		}
		return func(method, lines string) (int, string) {
			t.Helper()
			c.send(method + " http://" + origin + "/ HTTP/1.1\nHost: " + origin + "\n" + lines + "\n")
			res, _ := c.response(method)
			return res.StatusCode, res.Header.Get("X-Policy")
		}
	}
	transport := http.RoundTripper(nil)
	if protocol == "h3" {
		h3 := &http3.Transport{TLSClientConfig: clientTLS(http3.NextProtoH3)}
		t.Cleanup(func() { h3.Close() })
		transport = h3
	} else {
		_, conn, err := w.client(t, protocol).dial(t.Context(), map[string]string{"h2": "h2"}[protocol])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		h2, err := newH2Conn(conn)
		if err != nil {
			t.Fatal(err)
		}
		transport = h2
	}
	return func(method, lines string) (int, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, "https://"+w.tls+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = origin
		for line := range strings.Lines(lines) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			r.Header.Set(name, value)
		}
		res, err := transport.RoundTrip(r)
		if err != nil {
			t.Fatalf("%s over %s with %q: %v", method, protocol, lines, err)
		}
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		return res.StatusCode, res.Header.Get("X-Policy")
	}
}

// trustsLoopback makes the address in X-Forwarded-For the client's.
const trustsLoopback = "trusted_proxies static 127.0.0.1\ntrusted_proxies_strict\n"

// as returns the line with the credentials of a user.
func as(user, password string) string { return "Proxy-Authorization: " + login(user, password) + "\n" }

// from returns the line with the address of a client that a trusted proxy names.
func from(address string) string { return "X-Forwarded-For: " + address + "\n" }

// selectionPolicies are policies with all kinds of conditions.
const selectionPolicies = authUsers + namesPolicy + `allow 127.0.0.0/8
	failed_logins off
	hosts localhost
	user_from {http.request.header.X-Nobody} {http.request.header.X-User}
	policy robots {
		users *-bot robot-* *xx*
		anonymous
	}
	policy near {
		users alice
		clients 10.0.0.0/8 127.0.0.0/8
	}
	policy far {
		users ali*
		clients 2001:db8::/32
	}
	policy posts {
		match {
			method POST PUT
		}
		anonymous
		clients 127.0.0.0/8 10.0.0.0/8
	}
	policy blue {
		users *
		match {
			expression ` + "`" + `{http.request.header.X-Team} == "blue" && {http.async_proxy.user} != "carol"` + "`" + `
		}
	}
	policy guests {
		clients 10.20.0.0/16
		match {
			header X-Kind guest
		}
		anonymous
	}
	policy net {
		clients 10.20.0.0/16 2001:db8:1::/48
		anonymous
	}
`

// TestPolicySelection has requests of all kinds decided by the policies above, over each protocol
// and served in both ways.
func TestPolicySelection(t *testing.T) {
	origin := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer origin.Close()
	address := origin.Listener.Addr().String()
	rows := []struct {
		name, method, lines, want string // want is the status, and the policy of a 200
	}{
		{"a user", "GET", as("alice", "wonderland"), "200 near-"},
		{"a user elsewhere", "GET", as("alice", "wonderland") + from("192.0.2.1"), "200 -"},
		{"a user with an IPv6 address", "GET", as("alice", "wonderland") + from("2001:db8::7"), "200 far-"},
		{"a user with a mapped address", "GET", as("alice", "wonderland") + from("::ffff:10.1.1.1"), "200 near-"},
		{"another user", "GET", as("bob", "builder"), "200 -"},
		{"another user's POST", "POST", as("bob", "builder"), "200 posts-"},
		{"the first of two", "POST", as("alice", "wonderland"), "200 near-"},
		{"a matcher after the login", "GET", as("bob", "builder") + "X-Team: blue\n", "200 blue-"},
		{"another value", "GET", as("bob", "builder") + "X-Team: red\n", "200 -"},
		{"no user", "GET", "", "407"},
		{"a matcher that holds without a user", "GET", "X-Team: blue\n", "407"},
		{"a wrong password", "GET", as("alice", "builder"), "407"},
		{"no user, elsewhere", "GET", from("192.0.2.1"), "407"},
		{"anonymous, by method", "POST", "", "200 posts-"},
		{"anonymous, with another address", "POST", from("192.0.2.1"), "407"},
		{"anonymous, by address", "GET", from("10.20.3.4"), "200 net-"},
		{"anonymous, by IPv6 address", "GET", from("2001:db8:1:2::3"), "200 net-"},
		{"anonymous, by header", "GET", from("10.20.3.4") + "X-Kind: guest\n", "200 guests-"},
		{"anonymous, but logged in", "GET", from("10.20.3.4") + as("bob", "builder"), "200 net-"},
		{"anonymous, but logged in for another policy", "GET", from("10.20.3.4") + as("alice", "wonderland"), "200 near-"},
		{"anonymous, but a wrong password", "GET", from("10.20.3.4") + as("alice", "builder"), "407"},
		{"anonymous, but another scheme", "GET", from("10.20.3.4") + "Proxy-Authorization: Bearer x\n", "407"},
		{"a robot, by prefix", "GET", "X-User: robot-7\n", "200 robots-"},
		{"a robot, by suffix", "GET", "X-User: a-bot\n" + from("192.0.2.1"), "200 robots-"},
		{"a robot, by part", "GET", "X-User: axxb\n", "200 robots-"},
		{"no robot", "GET", "X-User: robo\n", "407"},
		{"a robot, by the first of user_from", "GET", "X-Nobody: b-bot\nX-User: carol\n", "200 robots-"},
		{"credentials come before user_from", "GET", "X-User: robot-7\n" + as("bob", "builder"), "200 -"},
		{"wrong credentials of a robot", "GET", "X-User: robot-7\n" + as("bob", "wonderland"), "407"},
	}
	for way, servers := range map[string]string{"fast": withWrapper, "ordinary": withoutWrapper} {
		w := newTunnelWorld(t, tunnelSetup{options: selectionPolicies, servers: servers + trustsLoopback})
		for _, protocol := range tunnelProtocols {
			t.Run(way+" "+protocol, func(t *testing.T) {
				forgetCredentials()
				ask := newPolicyClient(t, w, protocol, address)
				for _, row := range rows {
					status, policy := ask(row.method, row.lines)
					if got := strings.TrimSpace(fmt.Sprint(status, " ", policy)); got != row.want {
						t.Errorf("%s: %s, want %s", row.name, got, row.want)
					}
				}
				if protocol != "h1" && protocol != "h1-tls" {
					return
				}
				for _, row := range rows {
					if row.method != http.MethodGet {
						continue
					}
					client := w.client(t, protocol)
					client.header = strings.ReplaceAll(row.lines, "\n", "\r\n")
					got := ""
					if conn, err := client.try(address, ""); err != nil {
						got = fmt.Sprint(err.(interface{ Unwrap() []error }).Unwrap()[0].(*refusedError).status)
					} else {
						eventually(t, "the tunnel to be listed", func() bool { return len(openTunnels()) == 1 })
						got = "200 " + openTunnels()[0].Owner.Policy + "-"
						conn.Close()
						waitNoTunnels(t)
					}
					if got != row.want {
						t.Errorf("CONNECT, %s: %s, want %s", row.name, got, row.want)
					}
				}
			})
		}
	}
}

// TestPolicyOfEachRequest has several users share a connection of HTTP/1, and streams of a
// connection of HTTP/2 and HTTP/3 that are open together.
func TestPolicyOfEachRequest(t *testing.T) {
	var together atomic.Pointer[sync.WaitGroup] // requests that wait for each other at the origin
	origin := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Wait") != "" {
			all := together.Load()
			all.Done()
			all.Wait()
		}
	}))
	defer origin.Close()
	users := map[string]string{as("alice", "wonderland"): "200 a-", as("bob", "builder"): "200 b-", "": "407 ", as("alice", "x"): "407 "}
	for way, servers := range map[string]string{"fast": withWrapper, "ordinary": withoutWrapper} {
		w := newTunnelWorld(t, tunnelSetup{servers: servers, options: authUsers + namesPolicy + `hosts localhost
			failed_logins off
			policy a {
				users alice
			}
			policy b {
				users bob
			}`})
		for _, protocol := range tunnelProtocols {
			t.Run(way+" "+protocol, func(t *testing.T) {
				forgetCredentials()
				ask := newPolicyClient(t, w, protocol, origin.Listener.Addr().String())
				for _, lines := range []string{as("alice", "wonderland"), "", as("bob", "builder"), as("alice", "x"), as("bob", "builder"), as("alice", "wonderland"), as("alice", "x")} {
					status, policy := ask("GET", lines)
					if got := fmt.Sprint(status, " ", policy); got != users[lines] {
						t.Errorf("one after the other, %q: %s, want %s", lines, got, users[lines])
					}
				}
				if protocol == "h1" || protocol == "h1-tls" {
					return
				}
				const each = 8
				var all, done sync.WaitGroup
				all.Add(2 * each)
				together.Store(&all)
				for lines, want := range users {
					for range each {
						done.Go(func() {
							status, policy := ask("GET", lines+"X-Wait: yes\n")
							if got := fmt.Sprint(status, " ", policy); got != want {
								t.Errorf("at once, %q: %s, want %s", lines, got, want)
							}
						})
					}
				}
				done.Wait()
			})
		}
	}
}
