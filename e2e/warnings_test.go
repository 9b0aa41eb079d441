// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"strings"
	"testing"
	"time"
)

// TestWarnings checks that the strip says what is wrong, does not change while that stays the same,
// and is absent when nothing is wrong.
func TestWarnings(t *testing.T) {
	const options = proxyOptions + "\nmax_tunnels 1"
	w := newWorld(t, options, "")
	p := w.open(400, "dark")
	strip := "document.getElementById('warnings')"
	codes := "[...document.querySelectorAll('#warnings [data-code]')].map((e) => e.dataset.code).join()"
	p.until("the warnings", codes+" === 'forgeable_clients,open_proxy'", patience)
	if text := run[string](p, strip+".innerText"); !strings.Contains(text, w.proxy+" Open proxy: anyone who can reach this address can use it; restrict it with the option clients") {
		t.Errorf("the strip says %q", text)
	}
	if role := run[string](p, strip+".getAttribute('role') + "+strip+".getAttribute('aria-atomic')"); role != "statusfalse" {
		t.Errorf("role and aria-atomic: %s", role)
	}
	p.fits()
	p.accessible()

	// Screen readers announce every change.
	run[bool](p, "!!(window.changes = 0, new MutationObserver(() => window.changes++).observe("+strip+", { childList: true, subtree: true, characterData: true, attributes: true }), true)")
	run[bool](p, "!!(window.titles = 0, new MutationObserver(() => window.titles++).observe(document.querySelector('#about'), { childList: true }), true)")
	p.until("three snapshots more", "window.titles > 2", patience)
	if n := run[int](p, "window.changes"); n != 0 {
		t.Errorf("the strip has changed %d times", n)
	}

	w.tunnel("203.0.113.1")
	p.until("one warning more, at the end", codes+" === 'forgeable_clients,open_proxy,tunnels_near_limit' && window.changes === 1", patience)
	p.until("the tile", "!!document.querySelector('#tiles > .tile.bad:nth-child(3)')", patience)

	w.configure("burst 5", "")
	w.config = strings.NewReplacer("clients all", "", "trusted_proxies static 127.0.0.1/32", "trusted_proxies static 127.0.0.1/32\n\t\ttrusted_proxies_strict").Replace(w.config)
	w.load()
	p.until("no strip", strip+".childElementCount === 0 && "+strip+".getBoundingClientRect().height === 0", patience+5*time.Second)
	p.clean()
}
