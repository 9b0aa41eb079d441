// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// api calls the admin API and decodes the response.
func (c *binaryCaddy) api(method, path string, want int, into any) string {
	c.t.Helper()
	status, text := c.ask(method, "/async_proxy/"+path, "")
	if status != want {
		c.t.Errorf("%s %s: %d %s, want %d", method, path, status, text, want)
	}
	if into != nil {
		if err := json.Unmarshal([]byte(text), into); err != nil {
			c.t.Errorf("%s %s: %v in %s", method, path, err, text)
		}
	}
	return text
}

func TestAdminAPI(t *testing.T) {
	c := binaryStart(t, binaryOptions{global: `servers {
	trusted_proxies static 127.0.0.1/32
}`, site: "clients all\nburst 3\nrefill 0.00001\nallow 127.0.0.0/8"})
	origin := listen(t, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 1000))
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\nConnection: close\r\n\r\n"+strings.Repeat("x", 100))
	})
	get := func(client string, want int) {
		t.Helper()
		if res, body := policyRequest(t, c.proxy, http.MethodGet, origin, "X-Forwarded-For: "+client+"\n"); res.StatusCode != want {
			t.Errorf("%s: %s %q, want %d", client, res.Status, body, want)
		}
	}
	var empty status.ClientList
	c.api("GET", "clients", 200, &empty)
	if empty.Clients == nil || empty.Total != 0 {
		t.Errorf("at first: %+v", empty)
	}
	start := time.Now()
	get("192.0.2.1", 200)
	for range 3 {
		get("192.0.2.2", 200)
	}
	for range 2 {
		get("192.0.2.2", 429)
	}
	get("2001:db8::1", 200)
	get("2001:db8::2", 200)

	var list status.ClientList
	c.api("GET", "clients?sort=requests", 200, &list)
	if want := "192.0.2.2 2001:db8::/64 192.0.2.1"; namesOf(list) != want || list.Total != 3 {
		t.Fatalf("clients %+v, want %s", list, want)
	}
	if got := list.Clients[0]; got.Requests != 5 || got.Rejections != 2 || got.BytesDown != 300 || got.Tokens >= 1 || got.Burst != 3 || got.Refill != 0.00001 || got.Zone != "default" ||
		got.LastSeen.Before(start.Add(-time.Second)) || got.LastSeen.After(time.Now().Add(time.Second)) || got.BlockedUntil != nil {
		t.Errorf("client %+v", got)
	}
	for query, want := range map[string]string{
		"sort=requests&order=asc": "192.0.2.1 2001:db8::/64 192.0.2.2", "sort=last_seen": "2001:db8::/64 192.0.2.2 192.0.2.1",
		"sort=rejections&limit=1": "192.0.2.2", "sort=tokens": "192.0.2.1 2001:db8::/64 192.0.2.2", "sort=bytes&limit=1&offset=1": "2001:db8::/64",
		"limited": "192.0.2.2", "q=2001": "2001:db8::/64", "offset=10": "", "sort=requests&offset=2&limit=5": "192.0.2.1",
	} {
		var list status.ClientList
		c.api("GET", "clients?"+query, 200, &list)
		if namesOf(list) != want {
			t.Errorf("%s: %s, want %s", query, namesOf(list), want)
		}
	}

	// Two tunnels, one of which is closed through the API.
	echo := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	conns := make([]*rawConn, 2)
	for i := range conns {
		conns[i] = dialRaw(t, c.proxy)
		conns[i].send(fmt.Sprintf("CONNECT %s HTTP/1.1\nHost: x\nX-Forwarded-For: 192.0.2.%d\n\n", echo, 10+i))
		if res, body := conns[i].response(http.MethodConnect); res.StatusCode != 200 {
			t.Fatalf("%s %s", res.Status, body)
		}
	}
	conns[1].send("12345678\n")
	if _, err := io.ReadFull(conns[1].r, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	var tunnels status.TunnelList
	eventually(t, "the tunnel's bytes to be counted", func() bool {
		c.api("GET", "tunnels?sort=bytes", 200, &tunnels)
		return tunnels.Total == 2 && len(tunnels.Tunnels) == 2 && tunnels.Tunnels[0].BytesUp > 0 && tunnels.Tunnels[0].BytesDown > 0
	})
	if got := tunnels.Tunnels[0]; got.Client != "192.0.2.11" || got.Target != echo || got.Address != echo || got.Proto != "HTTP/1.1" || got.BytesUp != 10 || got.BytesDown != 10 {
		t.Errorf("tunnel %+v", got)
	}
	c.api("GET", "clients?sort=tunnels&limit=2", 200, &list)
	if list.Clients[0].Tunnels != 1 || list.Clients[1].Tunnels != 1 {
		t.Errorf("clients with tunnels %+v", list)
	}
	var one status.TunnelList
	c.api("GET", "tunnels?q=192.0.2.11", 200, &one)
	if len(one.Tunnels) != 1 {
		t.Fatalf("tunnels %+v", one)
	}
	c.api("DELETE", fmt.Sprintf("tunnels/%d", one.Tunnels[0].ID), 204, nil)
	conns[1].expectReset()
	if line := c.waitLog("CONNECT tunnel closed", 1)[0]; line["reason"] != tunnel.ReasonOperator {
		t.Errorf("line %v", line)
	}
	c.api("DELETE", fmt.Sprintf("tunnels/%d", one.Tunnels[0].ID), 404, nil)

	// Refill a bucket, block a client; both survive a reload.
	c.api("DELETE", "clients/192.0.2.2", 204, nil)
	get("192.0.2.2", 200)
	c.api("PUT", "clients/2001:db8::99/block?for=1h", 204, nil)
	c.reload(c.options.site)
	get("2001:db8::1", 429)
	get("2001:db8::2", 429)
	get("192.0.2.2", 200)
	c.api("GET", "clients?limited", 200, &list)
	if namesOf(list) != "2001:db8::/64" || list.Clients[0].BlockedUntil == nil || time.Until(*list.Clients[0].BlockedUntil) < 59*time.Minute {
		t.Errorf("blocked: %+v", list)
	}
	c.api("DELETE", "clients/2001:db8::/64", 204, nil)
	get("2001:db8::1", 200)
	c.api("PUT", "clients/192.0.2.1/block?for=1ms", 204, nil)
	time.Sleep(2 * time.Millisecond)
	get("192.0.2.1", 200)
	c.api("DELETE", "clients/192.0.2.2?zone=another", 404, nil)
	c.api("DELETE", "clients/192.0.2.2?zone=default", 204, nil)

	// Names may contain slashes, and a client can be blocked before its first request.
	for _, name := range []string{"user sales/alice", "user a//b/block", "2001:db8:1::/64"} {
		path := "clients/" + url.PathEscape(name)
		c.api("PUT", path+"/block?for=1h", 204, nil)
		c.api("GET", "clients?limited&q="+url.QueryEscape(strings.ToUpper(name)), 200, &list)
		if namesOf(list) != name || list.Clients[0].BlockedUntil == nil {
			t.Errorf("blocked: %+v, want %s", list, name)
		}
		c.api("DELETE", path, 204, nil)
		c.api("DELETE", path, 404, nil)
	}

	var s status.Stats
	c.api("GET", "stats", 200, &s)
	if s.Requests.Forwarded != 10 || s.Requests.Tunnels != 2 || s.Requests.RateLimited != 2 || s.Requests.Refused != 2 || s.Refusals[deniedRequest] != 4 ||
		s.Tunnels.Open != 1 || s.Tunnels.BytesUp != 10 || s.BytesDown != 1010 || s.Clients.Tracked != 5 || s.Clients.Limit != 1_000_000 || s.Dials.OK != 12 ||
		len(s.DialSeconds.Counts) != len(s.DialSeconds.Buckets)+1 || s.Caddy == "" || !s.Loaded.After(s.Started) {
		t.Errorf("stats %+v", s)
	}
	var dialled int64
	for _, n := range s.DialSeconds.Counts {
		dialled += n
	}
	if dialled != s.Dials.OK {
		t.Errorf("the histogram counts %d dials, want %d", dialled, s.Dials.OK)
	}

	for path, want := range map[string]string{
		"GET clients?sort=name": "expected last_seen", "GET clients?limit=0": "expected a number from 1 to 1000", "GET clients?order=up": "expected asc or desc",
		"GET tunnels?sort=name": "expected started", "DELETE clients/nobody": "is not a client", "DELETE tunnels/x": "is not a tunnel id", "PUT clients/192.0.2.1/block": "expected a positive duration",
		"PUT clients/192.0.2.1/block?for=-1m":     "expected a positive duration",
		"PUT clients/192.0.2.0%2F24/block?for=1m": "no site has clients of 24 bits", "DELETE clients/2001:db8::/48": "no site has clients of 48 bits",
		"DELETE clients/user ": "a user as the list of clients shows it",
	} {
		method, path, _ := strings.Cut(path, " ")
		if text := c.api(method, path, 400, nil); !strings.Contains(text, want) {
			t.Errorf("%s %s: %s, want %q", method, path, text, want)
		}
	}
	for path, want := range map[string]int{
		"GET nothing": 404, "GET ": 404, "GET stats/x": 404, "POST stats": 405, "POST clients": 405, "GET clients/192.0.2.1": 405, "PUT tunnels/1": 405,
		"DELETE clients/198.51.100.1": 404, "GET clients/192.0.2.1/block?for=1m": 405, "GET clients/192.0.2.1/x": 404,
	} {
		method, path, _ := strings.Cut(path, " ")
		if text := c.api(method, path, want, nil); !strings.Contains(text, `"error"`) {
			t.Errorf("%s %s: %s", method, path, text)
		}
	}
}

// A tunnel counts for its client in the zone that opened it, whichever other zones know the
// client, and stays with that zone when its limits change.
func TestAdminTunnelsOfZones(t *testing.T) {
	w := newWorld(t, "zone one", nil)
	other := *w
	other.proxy = freeAddress(t)
	load := func(burst int) {
		options := fmt.Sprintf("burst %d\nrefill 1000\nzone ", burst)
		w.load(w.site(options+"one") + other.site(options+"two"))
	}
	load(1000)
	echo := listen(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	conns := []*rawConn{w.dial(), other.dial(), other.dial()}
	for _, c := range conns {
		c.connect(echo)
	}
	check := func(what string, want ...string) {
		t.Helper()
		var got []string
		eventually(t, what+": "+strings.Join(want, ", "), func() bool {
			got = nil
			for _, c := range lookupClients(t, "limit=10").Clients {
				got = append(got, fmt.Sprintf("%s of %s and %d has %d", c.Client, c.Zone, c.Burst, c.Tunnels))
			}
			slices.Sort(got)
			return slices.Equal(got, want)
		})
	}
	check("both zones", "127.0.0.1 of one and 1000 has 1", "127.0.0.1 of two and 1000 has 2")
	load(2000)
	check("after a reload", "127.0.0.1 of one and 2000 has 1", "127.0.0.1 of two and 2000 has 2")
	for _, proxy := range []*world{w, &other} {
		proxy.dial().connect(echo)
	}
	check("with tunnels of both configs", "127.0.0.1 of one and 2000 has 2", "127.0.0.1 of two and 2000 has 3")
	for _, c := range conns {
		c.Close()
	}
	check("when the first have ended", "127.0.0.1 of one and 2000 has 1", "127.0.0.1 of two and 2000 has 1")

	// Limiters of one zone do not replace each other, nor one that masks clients
	// differently.
	same := func(burst int, prefix string) {
		w.load(w.site("burst 1000\nrefill 1000\nzone same") + other.site(fmt.Sprintf("burst %d\nrefill 1000\nzone same\n%s", burst, prefix)))
	}
	same(2000, "")
	for _, proxy := range []*world{w, &other} {
		proxy.dial().connect(echo)
	}
	same(3000, "")
	check("two limits in a zone", "127.0.0.1 of one and 2000 has 1", "127.0.0.1 of same and 1000 has 1", "127.0.0.1 of same and 2000 has 1", "127.0.0.1 of two and 2000 has 1")
	w.load(w.site("burst 1000\nrefill 1000\nzone same\nipv4_prefix 24"))
	w.dial().connect(echo)
	check("other prefixes", "127.0.0.0/24 of same and 1000 has 1", "127.0.0.1 of one and 2000 has 1", "127.0.0.1 of same and 1000 has 1", "127.0.0.1 of same and 2000 has 1", "127.0.0.1 of two and 2000 has 1")
}

// TestActionsInSeveralZones checks that an action applies to a client in every limiter that
// knows it, with each limiter's own prefix lengths.
func TestActionsInSeveralZones(t *testing.T) {
	w := newWorld(t, "", nil)
	other := freeAddress(t)
	sites := func(options string) string {
		first := w.site("clients all\nzone one\nburst 1\nrefill 0.001\nallow 127.0.0.0/8\n" + options)
		second := strings.NewReplacer(w.proxy[len("127.0.0.1"):], other[len("127.0.0.1"):], "zone one", "zone two\nipv4_prefix 24").Replace(first)
		return first + second
	}
	load := func(options string) {
		t.Helper()
		loadCaddyfile(t, strings.Replace(w.globals(), "{\n", "{\n\tservers {\n\t\ttrusted_proxies static 127.0.0.0/8\n\t}\n", 1)+sites(options))
	}
	get := func(proxy, client string, want int) {
		t.Helper()
		if res, body := policyRequest(t, proxy, http.MethodGet, w.origin.Listener.Addr().String(), "X-Forwarded-For: "+client+"\n"); res.StatusCode != want {
			t.Errorf("%s by %s: %s %q, want %d", client, proxy, res.Status, body, want)
		}
	}
	key := keyOf("192.0.2.7")

	load("")
	for _, proxy := range []string{w.proxy, other} {
		get(proxy, "192.0.2.7", 200)
		get(proxy, "192.0.2.7", 429)
	}
	if !currentProcess().refillClient(key, "one", "") || currentProcess().refillClient(key, "three", "") {
		t.Error("the client is unknown in zone one, or known in zone three")
	}
	get(w.proxy, "192.0.2.7", 200)
	get(other, "192.0.2.7", 429)
	if !currentProcess().refillClient(key, "", "") {
		t.Error("the client is unknown")
	}
	get(w.proxy, "192.0.2.7", 200)
	get(other, "192.0.2.8", 200) // the same client in the other zone
	get(other, "192.0.2.7", 429)

	if !currentProcess().blockClient(key, time.Hour) || !currentProcess().refillClient(keyOf("192.0.2.8"), "", "") {
		t.Error("the client is unknown")
	}
	get(w.proxy, "192.0.2.7", 429)
	get(w.proxy, "192.0.2.8", 200)
	load("dial_timeout 9s") // keeps blocks
	get(w.proxy, "192.0.2.7", 429)
	load("max_clients 5000") // resets every bucket to full, and keeps blocks too
	get(w.proxy, "192.0.2.7", 429)
	if !currentProcess().blockClient(key, 0) {
		t.Error("the client was not blocked")
	}
	get(w.proxy, "192.0.2.7", 200)
	get(other, "192.0.2.7", 200)
	if currentProcess().blockClient(key, 0) {
		t.Error("the client is still blocked")
	}
}
