// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"runtime"
	"testing"
	"time"
	"weak"
)

// A tunnel may stay open through many reloads. It keeps none of the configs in memory that
// they replace, neither the one that opened it nor the later ones. With TLS it does: the
// client's connection refers to the server's TLS config, and a stream to the whole server.
func TestLongTunnelKeepsNoReplacedConfig(t *testing.T) {
	w := newWorld(t, "", nil)
	reload := func(options string) { w.load(w.site(options)) }
	reload("max_tunnels 100") // the first config of a process is not freed, even without tunnels
	c := w.dial()
	c.connect(echoTarget(t))
	hear(t, c.r, say(t, c, "before the reloads"))
	var replaced []weak.Pointer[proxy]
	for i := range 2 {
		for _, h := range provisioned(t) {
			replaced = append(replaced, weak.Make(h))
		}
		reload(fmt.Sprintf("max_tunnels %d", 101+i))
	}
	eventually(t, "the replaced configs to be freed", func() bool {
		runtime.GC()
		for _, h := range replaced {
			if h.Value() != nil {
				return false
			}
		}
		return true
	})
	hear(t, c.r, say(t, c, "after the reloads"))
}

// The tunnels of a proxy have its timeouts, and the defaults where it sets none.
func TestTunnelOwnerTimeouts(t *testing.T) {
	for options, want := range map[string][3]time.Duration{
		"": {time.Hour, time.Minute, 0},
		"tunnel_idle_timeout 2h\ntunnel_stall_timeout 2m\ntunnel_max_duration 24h": {2 * time.Hour, 2 * time.Minute, 24 * time.Hour},
	} {
		newWorld(t, options, nil)
		o := provisioned(t)[0].directive.tunnelOwner
		if got := [3]time.Duration{o.IdleTimeout, o.StallTimeout, o.MaxDuration}; got != want {
			t.Errorf("%q: timeouts %v, want %v", options, got, want)
		}
	}
}
