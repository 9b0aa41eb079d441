// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"maps"
	"net/http"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
)

func init() {
	caddy.RegisterModule(eventRecorder{})
}

// eventRecorder is an event handler that records events.
type eventRecorder struct{}

var notedEvents = make(chan caddy.Event, 100)

func (eventRecorder) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.async_proxy_test", New: func() caddy.Module { return new(eventRecorder) }}
}

func (*eventRecorder) UnmarshalCaddyfile(*caddyfile.Dispenser) error { return nil }

func (*eventRecorder) Handle(_ context.Context, e caddy.Event) error {
	notedEvents <- e
	return nil
}

var _ caddyevents.Handler = (*eventRecorder)(nil)

// Each client without a token causes an event, and again after a minute at the earliest,
// whatever the config does in between.
func TestEventOfALimitedClient(t *testing.T) {
	w := newWorld(t, "", nil)
	load := func(options string) {
		t.Helper()
		globals := strings.Replace(w.globals(), "{\n", "{\n\tevents {\n\t\ton rate_limited async_proxy_test\n\t}\n\tservers {\n\t\ttrusted_proxies static 127.0.0.0/8\n\t}\n", 1)
		loadCaddyfile(t, globals+w.site("clients all\nzone events\nburst 1\nrefill 0.001\nallow 127.0.0.0/8\n"+options))
	}
	ask := func(client string) {
		t.Helper()
		for range 3 {
			res, _ := policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), "X-Forwarded-For: "+client+"\n")
			if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusTooManyRequests {
				t.Errorf("%s: %s", client, res.Status)
			}
		}
	}
	want := func(clients ...string) {
		t.Helper()
		for _, client := range clients {
			select {
			case e := <-notedEvents:
				wait, _ := e.Data["retry_after"].(int64) // minus the time since the token was taken
				data := map[string]any{"client": client, "user": "", "zone": "events", "policy": "", "host": w.origin.Listener.Addr().String(), "retry_after": min(max(wait, 900), 1000), "cause": "rate_limited"}
				if e.Name() != "rate_limited" || e.Origin().CaddyModule().ID != "http.handlers.async_proxy" || !maps.Equal(e.Data, data) {
					t.Errorf("event %s of %v: %v, want %v", e.Name(), e.Origin(), e.Data, data)
				}
			default:
				t.Errorf("got no event for %s", client)
			}
		}
		select {
		case e := <-notedEvents:
			t.Errorf("another event: %v", e.Data)
		default:
		}
	}

	load("")
	ask("192.0.2.1")
	ask("192.0.2.2")
	want("192.0.2.1", "192.0.2.2")
	load("dial_timeout 9s")
	ask("192.0.2.1")
	want()
	load("report_only limits")
	ask("192.0.2.3")
	want()
}
