// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/asyncproxy/caddy-async-proxy/internal/bucket"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// A policy keeps its buckets over a reload while it has its name and its limits, wherever it is in
// the list. A client whose policy changes has the new one's bucket.
func TestPolicyBucketsAfterReload(t *testing.T) {
	const (
		poor   = "policy poor {\nmatch {\nheader X-Poor 1\n}\nburst 2\n}\n"
		other  = "policy other {\nclients 192.0.2.0/24\nburst 2\n}\n"
		before = "policy before {\nmatch {\nheader X-Poor 1\n}\nburst 2\n}\n"
	)
	const directive = "zone policy-reload\nburst 3\nrefill 0.00001\n"
	w := newWorld(t, directive+poor+other, nil)
	for i, step := range []struct{ name, options, requests, want string }{
		{"at first", poor + other, "p p p -", "200 200 429 200"},
		{"the same", poor + other, "p -", "429 200"},
		{"in another order", other + poor, "p -", "429 200"},
		{"other rules", other + strings.Replace(poor, "burst", "deny a.example\nburst", 1), "p -", "429 429"},
		{"another policy decides", before + poor, "p p p", "200 200 429"},
		{"the first policy again", poor + before, "p", "429"},
		{"renamed", strings.Replace(poor, "poor", "needy", 1), "p p p", "200 200 429"},
		{"removed", "", "p", "429"}, // the directive's bucket
		{"a new one", poor, "p p p", "200 200 429"},
		{"other limits", strings.Replace(poor, "burst 2", "burst 1", 1), "p p", "200 429"},
	} {
		if i > 0 {
			w.load(w.site(directive + step.options))
		}
		if got := w.asks(t, policyPeople, step.requests); got != step.want {
			t.Errorf("%s: %s gives %s, want %s", step.name, step.requests, got, step.want)
		}
	}
}

// recheck_tunnels applies the policy that a tunnel's request would have now.
func TestPolicyRechecksTunnels(t *testing.T) {
	const users = "user_from {http.request.header.X-User}\n"
	for _, tc := range []struct {
		name, before, after string
		closed              bool // the tunnel of the user robot
	}{
		{"a new policy forbids it", "", "policy robots {\nusers robot\ndeny 127.0.0.0/8\n}", true},
		{"a policy for others forbids it", "", "policy others {\nusers other\ndeny 127.0.0.0/8\n}", false},
		{"the directive forbids it, but not the policy", "", "deny 127.0.0.0/8\npolicy robots {\nusers robot\nallow 127.0.0.0/8\n}", false},
		{"the policy that allowed it is gone", "deny 127.0.0.0/8\npolicy robots {\nusers robot\nallow 127.0.0.0/8\n}", "deny 127.0.0.0/8", true},
		{"an earlier policy forbids it", "policy robots {\nusers robot\n}", "policy locals {\nclients 127.0.0.0/8\ndeny 127.0.0.0/8\n}\npolicy robots {\nusers robot\n}", true},
		{"a later policy forbids it", "", "policy robots {\nusers robot\n}\npolicy locals {\nclients 127.0.0.0/8\ndeny 127.0.0.0/8\n}", false},
		{"the policy has no CONNECT", "", "policy robots {\nusers robot\nmethods GET\n}", true},
		{"the policy would report it", "", "policy robots {\nusers robot\nmethods GET\ndeny 127.0.0.0/8\nreport_only rules\n}", false},
		{"a matcher for CONNECT", "", "policy robots {\nmatch {\nmethod CONNECT\nexpression `{http.auth.user.id} == \"robot\"`\n}\ndeny 127.0.0.0/8\n}", true},
		{"a matcher for other methods", "", "policy robots {\nmatch {\nmethod GET\n}\ndeny 127.0.0.0/8\n}", false},
		{"a matcher that fails", "", "policy robots {\nmatch {\nexpression `int({http.request.header.X-Number}) == 1`\n}\n}", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newTunnelWorld(t, tunnelSetup{options: users + tc.before})
			target := echoTarget(t)
			client := w.client(t, "h1")
			client.header = "X-User: robot\r\n"
			conn := client.open(target)
			hear(t, conn, say(t, conn, "before"))
			w.reload(t, tunnelSetup{options: users + "recheck_tunnels\n" + tc.after})
			if !tc.closed {
				hear(t, conn, say(t, conn, "after"))
				return
			}
			hearReset(t, "h1", conn)
			if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != tunnel.ReasonForbidden {
				t.Errorf("log line %v, want the reason %q", line, tunnel.ReasonForbidden)
			}
		})
	}
}

// An upgraded request is judged again as the GET that it was.
func TestPolicyRechecksUpgrades(t *testing.T) {
	origin := upgradeOrigin(t)
	for after, closed := range map[string]bool{"method GET": true, "method CONNECT": false} {
		w := newWorld(t, "", nil)
		conn := w.dial()
		conn.send("GET http://" + origin + "/ HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: x\n\n")
		if res, _ := http.ReadResponse(conn.r, nil); res == nil || res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%v", res)
		}
		hear(t, conn.r, say(t, conn, "before"))
		w.load(w.site("recheck_tunnels\npolicy some {\nmatch {\n" + after + "\n}\ndeny 127.0.0.0/8\n}"))
		if closed {
			hearReset(t, "h1", conn.r)
		} else {
			hear(t, conn.r, say(t, conn, "after"))
		}
	}
}

// upgradeOrigin switches protocols and then echoes.
func upgradeOrigin(t *testing.T) (address string) {
	return listen(t, func(c *net.TCPConn) {
		r := streamRequest(c)
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		_, _ = io.Copy(c, r)
	})
}

// A tunnel keeps the timeouts of the policy that opened it, although the policy is gone.
func TestPolicyTimeoutsAfterReload(t *testing.T) {
	watchOften(t)
	for option, reason := range map[string]string{"tunnel_idle_timeout": tunnel.ReasonIdle, "tunnel_max_duration": tunnel.ReasonMaxDuration} {
		const users = "user_from {http.request.header.X-User}\n"
		w := newTunnelWorld(t, tunnelSetup{options: users + "policy robots {\nusers robot\n" + option + " 300ms\n}"})
		target := echoTarget(t)
		client := w.client(t, "h1")
		stays := client.open(target)
		client.header = "X-User: robot\r\n"
		goes := client.open(target)
		w.reload(t, tunnelSetup{options: users})
		_, _ = io.Copy(io.Discard, goes)
		if line := w.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != reason || line["user"] != "robot" {
			t.Errorf("%s: log line %v, want the reason %q", option, line, reason)
		}
		hear(t, stays, say(t, stays, "the directive has another limit"))
	}
}

// max_tunnels of a policy counts its tunnels, over all reloads, besides the directive's limit. In the
// end nothing is left of them.
func TestPolicyMaxTunnels(t *testing.T) {
	const options = `user_from {http.request.header.X-User}
		max_tunnels 6 per_client 3
		policy robots {
			users robot
			max_tunnels 2 per_client 1
		}
		policy others {
			users other
		}`
	w := newTunnelWorld(t, tunnelSetup{options: options})
	registry := provisioned(t)[0].tunnels
	target := echoTarget(t)
	open := func(user string, host byte) (tunnelConn, int) {
		client := w.client(t, "h1")
		client.local, client.header = netip.AddrFrom4([4]byte{127, 0, 0, host}), "X-User: "+user+"\r\n"
		conn, err := client.try(target, "")
		if err != nil {
			return nil, err.(interface{ Unwrap() []error }).Unwrap()[0].(*refusedError).status
		}
		t.Cleanup(func() { conn.Close() })
		return conn, http.StatusOK
	}
	var conns []tunnelConn
	expect := func(user string, host byte, want int) {
		t.Helper()
		conn, got := open(user, host)
		if got != want {
			t.Errorf("%q from 127.0.0.%d: %d, want %d", user, host, got, want)
		}
		if conn != nil {
			conns = append(conns, conn)
		}
	}
	expect("robot", 1, 200)
	expect("robot", 1, 429)
	expect("robot", 2, 200)
	expect("robot", 3, 503)
	expect("", 1, 200)
	w.reload(t, tunnelSetup{options: options})
	expect("robot", 1, 503)
	expect("robot", 3, 503)
	expect("other", 1, 200)
	w.reload(t, tunnelSetup{options: strings.Replace(options, "max_tunnels 2 per_client 1", "max_tunnels 4 per_client 2", 1)})
	expect("robot", 1, 200)
	expect("robot", 1, 429)
	expect("other", 1, 200)
	expect("other", 1, 503) // the limit of the process
	conns[0].Close()
	eventually(t, "room for another tunnel", func() bool { return registry.Reserved() == 5 })
	expect("other", 1, 200)
	w.reload(t, tunnelSetup{})
	for _, conn := range conns {
		conn.Close()
	}
	eventually(t, "nothing to be left", registry.IsEmpty)
}

// A thousand policies load, serve and go, without a goroutine for each of them.
func TestPolicyThousands(t *testing.T) {
	var options strings.Builder
	options.WriteString("user_from {http.request.header.X-User}\n" + namesPolicy + "deny b.example\n")
	for i := range 1000 {
		fmt.Fprintf(&options, "policy team%d {\nusers team%d-* lead%d\nburst %d\ndeny ads%d.example\n}\n", i, i, i, 10+i, i)
	}
	w := newWorld(t, "", nil)
	site := w.site(options.String())
	w.load(w.site(""))
	goroutines, heap := runtime.NumGoroutine(), heapInUse()
	w.load(site)
	if n := runtime.NumGoroutine(); n > goroutines+20 {
		t.Errorf("%d goroutines, %d without policies", n, goroutines)
	}
	grown := heapInUse() - heap
	t.Logf("%d KiB for 1000 policies", grown>>10)
	if grown > 64<<20 { // they take about 30 KiB each
		t.Errorf("the policies take %d bytes", grown)
	}
	for user, want := range map[string]string{"lead0": "team0-", "team999-a": "team999-", "team9999-a": "-"} {
		res, _ := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "X-User: "+user+"\n")
		if got := res.Header.Get("X-Policy"); got != want {
			t.Errorf("%s: %s, want %s", user, got, want)
		}
	}
	w.load(site)
	w.load(w.site(""))
	eventually(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= goroutines+5 })
	if n := tablesInUse(t); n != 1 {
		t.Errorf("%d tables are left", n)
	}
}

// heapInUse returns the size of live objects.
func heapInUse() int64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// tablesInUse returns the number of tables of clients.
func tablesInUse(t *testing.T) (n int) {
	for range provisioned(t)[0].process.eachTable {
		n++
	}
	return n
}

// A config whose second policy fails leaves nothing behind, and the running one serves on.
func TestPolicyFailsToLoad(t *testing.T) {
	w := newWorld(t, "policy first {\nclients 192.0.2.0/24\nburst 3\n}", nil)
	before := tablesInUse(t)
	bad := w.site("policy a {\nclients 192.0.2.0/24\nburst 4\n}\npolicy b {\nmatch {\nexpression `1 +`\n}\nburst 5\n}\npolicy c {\nburst 6\n}")
	config, _, err := adapt(w.globals()+bad, "Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Load(config, true); err == nil || !strings.Contains(err.Error(), "policy b: match: ") {
		t.Errorf("loading gives %v", err)
	}
	if n, tables := len(provisioned(t)), tablesInUse(t); n != 1 || tables != before {
		t.Errorf("%d proxies and %d tables, want 1 and %d", n, tables, before)
	}
	w.gets(w.proxy, http.StatusOK)
}

// Buckets of policies in the shared limiter are those of the policies.
func TestPolicySharedBuckets(t *testing.T) {
	answer(t, 0, nil, false)
	w := newWorld(t, "limiter test\nburst 1000000\npolicy poor {\nmatch {\nheader X-Poor 1\n}\nlimit_by user\nburst 7\n}\nuser_from {http.request.header.X-User}", nil)
	askedBuckets()
	policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "X-Poor: 1\nX-User: robot\n")
	policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "X-User: robot\n")
	limits := bucket.Limits{Refill: 1000000}
	want := []Bucket{
		{Zone: "default", Policy: "poor", User: "robot", Burst: 7, Interval: limits.Interval()},
		{Zone: "default", Client: netip.MustParsePrefix("127.0.0.1/32"), Burst: 1000000, Interval: limits.Interval()},
	}
	if got := askedBuckets(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("asked for %v, want %v", got, want)
	}
}
