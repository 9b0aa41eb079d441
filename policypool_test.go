// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

// A pooled connection is used by the policy that opened it and by no other, whose rules about
// addresses could not be asked any more.
func TestPolicyPoolsAreApart(t *testing.T) {
	var accepted atomic.Int64
	secure := func(protocols ...string) *httptest.Server {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		s.TLS = &tls.Config{Certificates: []tls.Certificate{tlsCertificate}, NextProtos: protocols}
		s.EnableHTTP2 = len(protocols) > 1
		s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				accepted.Add(1)
			}
		}
		s.StartTLS()
		t.Cleanup(func() { closeServer(t, s) })
		return s
	}
	plain := newPolicyOrigin(t)
	_, http1, _ := net.SplitHostPort(secure("http/1.1").Listener.Addr().String())
	_, http2, _ := net.SplitHostPort(secure("h2", "http/1.1").Listener.Addr().String())
	const policies = `
		policy closed {
			match {
				header X-Closed 1
			}
			deny 127.0.0.0/8 ::1
		}
		policy same {
			match {
				header X-Same 1
			}
			burst 6
		}`
	w := newWorld(t, "", nil)
	for way, site := range map[string]string{"fast": w.site("burst 1000000" + policies), "ordinary": byCaddy(w.site("burst 1000000" + policies))} {
		w.load(site)
		for _, url := range []string{"http://localhost:" + plain.port + "/", "https://localhost:" + http1 + "/", "https://localhost:" + http2 + "/"} {
			connections := func() int64 { return accepted.Swap(0) + plain.accepted.Swap(0) }
			ask := func(lines string, status int, opened int64) {
				t.Helper()
				c := w.dial()
				c.get(url, lines)
				if res, body := c.response(http.MethodGet); res.StatusCode != status {
					t.Errorf("%s: %s with %q: %s %q, want %d", way, url, lines, res.Status, body, status)
				}
				if n := connections(); n != opened {
					t.Errorf("%s: %s with %q: %d connections, want %d", way, url, lines, n, opened)
				}
			}
			connections()
			ask("", 200, 1)
			ask("", 200, 0)
			ask("X-Closed: 1\n", 403, 0)
			ask("Connection: Upgrade\nUpgrade: x\nX-Closed: 1\n", 403, 0)
			ask("X-Same: 1\n", 200, 1)
			ask("X-Same: 1\n", 200, 0)
			ask("", 200, 0)
		}
	}
}

// A policy has its own parent, or the directive's, or reaches some destinations directly, and its
// rules are asked about each request that a parent gets.
func TestPolicyParents(t *testing.T) {
	const answer = "HTTP/1.1 200 OK\nContent-Length: 0\n\n"
	first, toFirst := startRecordingParent(t, answer)
	second, toSecond := startRecordingParent(t, answer)
	const marked = "match {\nheader X-Policy NAME\n}\n"
	policy := func(name, options string) string {
		return "policy " + name + " {\n" + strings.Replace(marked, "NAME", name, 1) + options + "\n}\n"
	}
	w := newWorld(t, "upstream http://"+first+"\ndeny bad.example\n"+
		policy("other", "upstream http://"+second)+
		policy("closed", "deny good.example")+
		policy("slow", "dial_timeout 9s")+
		policy("open", "allow bad.example")+
		policy("straight", "no_upstream 127.0.0.0/8"), nil)
	origin := w.origin.Listener.Addr().String()
	for _, tc := range []struct {
		policy, authority string
		status            int
		parent            <-chan string
	}{
		{"", "good.example:80", 200, toFirst}, {"other", "good.example:80", 200, toSecond}, {"slow", "good.example:80", 200, toFirst},
		{"closed", "good.example:80", 403, nil}, {"", "good.example:80", 200, toFirst},
		{"", "bad.example:80", 403, nil}, {"other", "bad.example:80", 403, nil}, {"open", "bad.example:80", 200, toFirst},
		{"straight", origin, 200, nil}, {"straight", "good.example:80", 200, toFirst}, {"", origin, 200, toFirst}, {"other", origin, 200, toSecond},
	} {
		for _, method := range []string{http.MethodGet, http.MethodConnect} {
			res, body := policyRequest(t, w.proxy, method, tc.authority, "X-Policy: "+tc.policy+"\n")
			if res.StatusCode != tc.status {
				t.Errorf("%s %s, policy %q: %s %q, want %d", method, tc.authority, tc.policy, res.Status, body, tc.status)
			}
			for parent, name := range map[<-chan string]string{toFirst: "first", toSecond: "second"} {
				asked := len(parent) > 0
				for len(parent) > 0 {
					<-parent
				}
				if asked != (parent == tc.parent) {
					t.Errorf("%s %s, policy %q: the %s parent was asked: %v", method, tc.authority, tc.policy, name, asked)
				}
			}
		}
	}
}

// dial_timeout of a policy holds for the directive's parent, too, be it shorter or longer.
func TestPolicyParentTimeout(t *testing.T) {
	silent := listen(t, func(conn *net.TCPConn) { _, _ = conn.Read(make([]byte, 1)); <-t.Context().Done() })
	w := newWorld(t, "dial_timeout 1h\nupstream https://"+silent+"\npolicy short {\nmatch {\nheader X-Short 1\n}\ndial_timeout 100ms\n}", nil)
	for _, method := range []string{http.MethodGet, http.MethodConnect} {
		if res, body := policyRequest(t, w.proxy, method, "target.example:443", "X-Short: 1\n"); res.StatusCode != http.StatusGatewayTimeout {
			t.Errorf("%s: %s %q", method, res.Status, body)
		}
	}
	p := provisioned(t)[0]
	if p.policies[0].dialer.Parent == p.directive.dialer.Parent {
		t.Error("the policy has the directive's parent, and so its timeout")
	}
}
