// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/dnstest"
)

func TestParentIsLocal(t *testing.T) {
	for address, want := range map[string]bool{
		"127.0.0.1:80": true, "[::1]:80": true, "[::ffff:127.0.0.1]:80": true, "localhost:80": true, "0.0.0.0:80": true, "192.0.2.1:80": false,
	} {
		p := &Parent{Address: address, connector: newConnector(NewResolver(nil))}
		if got := p.isLocal(t.Context()); got != want {
			t.Errorf("%s is on this machine: %v, want %v", address, got, want)
		}
	}
}

// The parent's name is not looked up for each request to a port that is closed on this
// machine.
func TestParentNameAskedOnce(t *testing.T) {
	var asked atomic.Int32
	resolver := resolverAt(t, time.Second, dnstest.Serve(t, func(dnstest.Query) dnstest.Reply {
		asked.Add(1)
		return dnstest.Reply{Addrs: []string{"192.0.2.1"}}
	}))
	p := &Parent{Address: "parent.test:80", connector: newConnector(resolver)}
	if p.isLocal(t.Context()) {
		t.Error("192.0.2.1 counts as this machine")
	}
	before := asked.Load()
	d := NewDialer(new(access.Control), time.Second, resolver)
	d.Parent, d.OwnPort = p, func(port uint16) bool { return port == 443 }
	for range 10 {
		if err := d.CheckForParent(t.Context(), access.PublicScope, "origin.test:443"); err != nil {
			t.Error(err)
		}
	}
	if n := asked.Load(); n != before {
		t.Errorf("the name server got %d more questions", n-before)
	}
}

// No tunnel fails because the parent speaks HTTP/2 on some connections only, as several
// machines behind one name may.
func TestParentStreamsMixed(t *testing.T) {
	var p *Parent
	over := make(chan struct{})
	address, _, _ := conntest.HTTP2Server(t, func(w http.ResponseWriter, r *http.Request) {
		p.http1.Store(true) // as if another tunnel had just found out
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		select {
		case <-over:
		case <-r.Context().Done():
		}
	})
	defer close(over)
	p, err := NewParent(ParentConfig{Scheme: "https", Address: address, Timeout: 20 * time.Second}, newConnector(NewResolver(nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	conn, err := p.Connect(t.Context(), "target.example:443")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, ok := conn.(*streamConn); !ok {
		t.Errorf("the tunnel is a %T", conn)
	}
}
