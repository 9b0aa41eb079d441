// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"net/http"
	"testing"
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
