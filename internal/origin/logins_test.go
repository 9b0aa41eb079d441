// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"bufio"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

func TestConnectionLogin(t *testing.T) {
	for value, want := range map[string][2]bool{
		"":                                   {},
		"Basic realm=\"NTLM\"":               {},
		"Basic TlRMTQ==":                     {},
		"Bearer Negotiate":                   {},
		"NTLMv2 abc":                         {},
		"NTLM":                               {true, false},
		"ntlm TlRMTVNTUAAB":                  {true, true},
		"NTLM\tTlRMTVNTUAAB":                 {true, true},
		"Negotiate":                          {true, false},
		"nEGOTIATE YII=":                     {true, true},
		"Kerberos YII=":                      {true, true},
		"Basic realm=\"a\", NTLM":            {true, false},
		"Basic realm=\"a, b\" , Negotiate x": {true, true},
		" \tNTLM ":                           {true, false},
	} {
		if found, token := connectionLogin([]string{"Basic realm=x", value}); found != want[0] || token != want[1] {
			t.Errorf("%q: %v, %v; want %v", value, found, token, want)
		}
	}
	if found, _ := connectionLogin(nil); found {
		t.Error("a missing field counts as a login")
	}
	fields := http.Header{"Authorization": {"Bearer abc"}}
	if n := testing.AllocsPerRun(100, func() { _, _ = connectionLogin(fields["Authorization"]) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

// A client may disconnect while its first bound connection is being registered.
func TestBoundClientDisconnectsAtOnce(t *testing.T) {
	client, c := new(int), &boundClient{id: "leaves at once"}
	boundClientMap.Store(client, c)
	boundClientCount.Add(1)
	ReleaseClient(client)
	c.uses(new(connPool), client)
	if c.timer != nil || !c.isGone() {
		t.Error("a disconnected client is still registered")
	}
}

// A client whose disconnect is not reported is released when it has not used its connections
// for long.
func TestBoundClientIsReleasedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, _ := net.Pipe()
		client, pool := new(int), newPool(nil)
		conn := newPooledConn(near, "origin.test:80")
		conn.r = bufio.NewReader(near)
		b := binding{client: client, target: conn.authority, login: true}
		b.keep(t.Context(), pool, conn)
		if _, bound := boundClientMap.Load(client); !bound || !b.has(pool) {
			t.Error("the connection is not kept for the client")
		}
		time.Sleep(maxIdleTime)
		synctest.Wait()
		if _, bound := boundClientMap.Load(client); bound {
			t.Error("the client is still registered")
		}
	})
}
