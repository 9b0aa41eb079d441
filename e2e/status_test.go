// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// vendored returns a third-party file, after comparing its checksum.
func vendored(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile("testdata/axe.sha256")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(sums), fmt.Sprintf("%x  %s\n", sha256.Sum256(content), name)) {
		t.Fatalf("%s has changed", name)
	}
	return string(content)
}

// accessible fails the test for every violation that axe-core finds, of any impact.
func (p *page) accessible() {
	p.t.Helper()
	axe := vendored(p.t, "axe.min.js")
	run[bool](p, axe+"; true")
	type violation struct {
		ID, Impact, Help string
		Targets          []string
	}
	for _, v := range run[[]violation](p, `axe.run().then((r) => r.violations.map((v) => ({
		ID: v.id, Impact: v.impact, Help: v.help, Targets: v.nodes.map((n) => n.target.join(" ") + " " + n.failureSummary),
	})))`) {
		p.t.Errorf("axe: %s (%s): %s\n%s", v.ID, v.Impact, v.Help, strings.Join(v.Targets[:min(3, len(v.Targets))], "\n"))
	}
}

// fits fails the test if the page is wider than the viewport.
func (p *page) fits() {
	p.t.Helper()
	if n := run[int](p, "document.documentElement.scrollWidth - innerWidth"); n > 0 {
		p.t.Errorf("the page is %d px too wide", n)
	}
}

// TestLoads checks that the page loads without errors and is accessible, in each color
// scheme and width, with and without clients.
func TestLoads(t *testing.T) {
	for _, tc := range []struct {
		name   string
		width  int64
		scheme string
	}{
		{"light", 1440, "light"},
		{"dark", 1440, "dark"},
		{"narrow", 400, "light"},
		{"narrow and dark", 400, "dark"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, proxyOptions, "actions")
			p := w.open(tc.width, tc.scheme)
			p.until("the empty table of clients", "!!"+row("clients", "No clients yet"), patience)
			p.until("the empty table of tunnels", "!!"+row("tunnels", "No open tunnels"), patience)
			if run[bool](p, "document.body.innerText.toLowerCase().includes('polic')") {
				t.Error("without policies, the page mentions them")
			}
			p.fits()
			p.accessible()

			w.tunnel("203.0.113.1")
			w.limit("2001:db8:1234:5678::1")
			w.client()("203.0.113.3")
			p.until("a client", "!!"+row("clients", "203.0.113.3"), patience)
			p.until("a limited client", "!!"+row("clients", "2001:db8:1234:5678::/64", "limited"), patience)
			p.until("a tunnel", "!!"+row("tunnels", strings.TrimPrefix(w.origin.URL, "http://")), patience)
			p.fits()
			p.accessible()
			if got := run[string](p, "getComputedStyle(document.body).colorScheme + matchMedia('(prefers-color-scheme: dark)').matches"); got != fmt.Sprint("light dark", tc.scheme == "dark") {
				t.Errorf("the page's color scheme is %s", got)
			}
			if dark := run[bool](p, "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 100"); dark != (tc.scheme == "dark") {
				t.Errorf("the page is dark: %t", dark)
			}
			p.clean()
		})
	}
}

// TestLimitedLive checks that the page shows a limited client within two seconds.
func TestLimitedLive(t *testing.T) {
	w := newWorld(t, proxyOptions, "")
	p := w.open(1440, "light")
	w.client()("203.0.113.8")
	p.until("a client with tokens", "!!"+row("clients", "203.0.113.8", "/ 5")+" && !"+row("clients", "limited"), patience)
	w.limit("203.0.113.9")
	p.until("the limited client", "!!"+row("clients", "203.0.113.9", "limited"), 2*time.Second)
	if run[bool](p, "!!"+row("clients", "203.0.113.8", "limited")) {
		t.Error("another client is shown as limited")
	}
	if tokens := run[float64](p, row("clients", "203.0.113.9")+".querySelector('meter').value"); tokens >= 1 {
		t.Errorf("its meter is at %v", tokens)
	}
	p.until("the share of limited requests", "/Rate limited\\s*[1-9]/.test(document.querySelector('dl').innerText)", patience)
	p.clean()
}

func TestFilterAndSort(t *testing.T) {
	w := newWorld(t, proxyOptions, "")
	get := w.client()
	for i := range 20 {
		for range 1 + i%3 {
			get(fmt.Sprintf("203.0.113.%d", 100+i))
		}
	}
	w.limit("198.51.100.7")
	w.tunnel("198.51.100.8")
	p := w.open(1440, "light")
	p.until("all clients", rows("clients")+" === 22", patience)

	p.fill("Filter clients by address", "113.11")
	p.until("the matching clients", rows("clients")+" === 10", patience)
	p.until("the number of matches and the total", "document.getElementById('clients').innerText.includes('10 of 22')", patience)
	p.fill("Filter clients by address", "nobody")
	p.until("no matching client", "!!"+row("clients", "No matching clients"), patience)
	p.fill("Filter clients by address", "")
	p.do(chromedp.Click(chromedp.CSS("#clients label.switch")))
	p.until("the limited client alone", rows("clients")+" === 1 && !!"+row("clients", "198.51.100.7"), patience)
	p.do(chromedp.Click(chromedp.CSS("#clients label.switch")))

	first := "document.querySelector('#clients tbody tr').innerText"
	p.press("Bucket")
	p.until("the emptiest bucket first", first+".includes('198.51.100.7')", patience)
	p.press("Bucket")
	p.until("the emptiest bucket last", "!"+first+".includes('198.51.100.7') && document.querySelector('#clients th[aria-sort]').getAttribute('aria-sort') === 'descending'", patience)

	p.fill("Filter tunnels by client or target", "198.51.100.9")
	p.until("no tunnel", "!!"+row("tunnels", "No matching tunnels"), patience)
	p.fill("Filter tunnels by client or target", "198.51.100.8")
	p.until("the tunnel", rows("tunnels")+" === 1", patience)
	p.clean()
}

func TestClosesATunnel(t *testing.T) {
	w := newWorld(t, proxyOptions, "actions")
	p := w.open(1440, "light")
	one, two := w.tunnel("203.0.113.1"), w.tunnel("203.0.113.2")
	p.until("two tunnels", rows("tunnels")+" === 2", patience)
	run[bool](p, row("tunnels", "203.0.113.1")+".querySelector('button').click() ?? true")
	if _, err := io.Copy(io.Discard, one); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the tunnel ends with %v, want a reset", err)
	}
	p.until("one tunnel", rows("tunnels")+" === 1 && !!"+row("tunnels", "203.0.113.2"), patience)
	fmt.Fprint(two, "GET / HTTP/1.0\r\n\r\n")
	if text, err := io.ReadAll(two); err != nil || !strings.Contains(string(text), "hello from the origin") {
		t.Errorf("the other tunnel: %q, %v", text, err)
	}
	p.clean()
}

// TestKeyboard checks that the keyboard focus survives updates of a table.
func TestKeyboard(t *testing.T) {
	w := newWorld(t, proxyOptions, "actions")
	p := w.open(1440, "light")
	conn := w.tunnel("203.0.113.1")
	p.until("the tunnel", rows("tunnels")+" === 1", patience)
	p.do(chromedp.Focus(chromedp.CSS("[aria-label='Filter tunnels by client or target']")))
	focused := "document.activeElement.closest('tr')?.innerText.includes('203.0.113.1') && document.activeElement.textContent === 'Close'"
	for !run[bool](p, "!!("+focused+")") {
		p.do(chromedp.KeyEvent(kb.Tab))
		if run[bool](p, "document.activeElement === document.body") {
			t.Fatal("the button cannot be reached by the keyboard")
		}
	}
	w.tunnel("203.0.113.2")
	p.until("another tunnel", rows("tunnels")+" === 2", patience)
	if !run[bool](p, "!!("+focused+")") {
		t.Error("the focus was lost")
	}
	p.do(chromedp.KeyEvent(kb.Enter))
	if _, err := io.Copy(io.Discard, conn); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the tunnel ends with %v, want a reset", err)
	}
	p.until("the other tunnel alone", rows("tunnels")+" === 1 && !!"+row("tunnels", "203.0.113.2"), patience)
	p.clean()
}

func TestRefillsAndBlocksAClient(t *testing.T) {
	w := newWorld(t, proxyOptions, "actions")
	p := w.open(1440, "light")
	w.limit("203.0.113.9")
	p.until("the limited client", "!!"+row("clients", "203.0.113.9", "limited"), patience)
	p.press("Refill the bucket of 203.0.113.9")
	p.until("a full bucket", "!!"+row("clients", "203.0.113.9", "5 / 5"), patience)
	if status := w.client()("203.0.113.9"); status != http.StatusOK {
		t.Errorf("with a full bucket the client gets %d", status)
	}

	p.press("Block 203.0.113.9")
	p.until("the dialog", "document.querySelector('dialog').open && document.querySelector('dialog').innerText.includes('203.0.113.9')", patience)
	p.accessible()
	p.press("Cancel")
	p.until("no dialog", "!document.querySelector('dialog').open", patience)
	p.press("Block 203.0.113.9")
	p.press("Block") // the dialog's
	p.until("the blocked client", "!!"+row("clients", "203.0.113.9", "blocked"), patience)
	if status := w.client()("203.0.113.9"); status < 400 {
		t.Errorf("a blocked client gets %d", status)
	}
	if status := w.client()("203.0.113.10"); status != http.StatusOK {
		t.Errorf("another client gets %d", status)
	}
	p.press("Unblock 203.0.113.9")
	p.until("no blocked client", "!!"+row("clients", "203.0.113.9")+" && !"+row("clients", "blocked"), patience)
	if status := w.client()("203.0.113.9"); status != http.StatusOK {
		t.Errorf("a client that is no longer blocked gets %d", status)
	}
	p.clean()
}

// TestRefusalsAndSettings checks that refusals are shown with their reason, and settings
// by their Caddyfile names, with defaults apart.
func TestRefusalsAndSettings(t *testing.T) {
	w := newWorld(t, proxyOptions, "")
	p := w.open(1440, "light")
	w.origin.Close()
	w.client()("203.0.113.4")
	p.until("the refusal", "!!"+row("refusals", "203.0.113.4", "502", "refused the connection")+" && !!"+groupOf("connection_refused"), patience)
	p.until("the setting", "/burst\\s+5\\b/.test(document.getElementById('settings').innerText)", patience)
	p.until("a default", "[...document.querySelectorAll('#settings .default')].some((d) => /dial_timeout\\s+10s/.test(d.innerText))", patience)
	if run[bool](p, "[...document.querySelectorAll('#settings .default')].some((d) => d.innerText.includes('burst'))") {
		t.Error("a setting that was given is shown as a default")
	}
	p.clean()
}

// TestReconnects checks that the page recovers by itself after a reload and a restart.
func TestReconnects(t *testing.T) {
	w := newWorld(t, proxyOptions, "actions")
	p := w.open(1440, "light")
	w.tunnel("203.0.113.1")
	p.until("the tunnel, and its button", "!!"+row("tunnels", "Close"), patience)
	w.reload(proxyOptions, "")
	p.until("the tunnel without its button", "!!"+row("tunnels", "203.0.113.1")+" && !"+row("tunnels", "Close"), patience)
	p.state("Live")
	w.client()("203.0.113.2")
	p.until("the client of after the reload", "!!"+row("clients", "203.0.113.2"), patience)

	w.stop()
	p.state("Reconnecting")
	w.start()
	p.state("Live")
	p.until("an empty table", "!!"+row("clients", "No clients yet"), patience)
}

// TestKeepsItsCharts checks that the data of the charts survives a reload of the page.
func TestKeepsItsCharts(t *testing.T) {
	w := newWorld(t, proxyOptions, "")
	p := w.open(1440, "light")
	conn := w.tunnel("203.0.113.1")
	tallest := "Math.max(...document.querySelector('#tiles > :nth-child(3) .spark-line').getAttribute('d').split(/[ML]/).slice(1).map((at) => 28 - at.split(' ')[1]))"
	p.until("the tunnel in its sparkline", tallest+" > 20", patience)
	conn.Close()
	p.until("no tunnel", rows("tunnels")+" === 0", patience)
	p.do(chromedp.Reload())
	p.state("Live")
	p.until("the tunnel in its sparkline after the reload", tallest+" > 20", patience)
	p.clean()
}

func TestPauses(t *testing.T) {
	w := newWorld(t, proxyOptions, "")
	p := w.open(1440, "light")
	p.press("Pause")
	p.state("Paused")
	w.client()("203.0.113.2")
	at := run[float64](p, "performance.now()")
	p.until("two snapshots more", fmt.Sprintf("performance.now() > %f", at+2500), patience)
	if run[bool](p, "!!"+row("clients", "203.0.113.2")) {
		t.Error("a paused page shows a new client")
	}
	p.press("Pause")
	p.state("Live")
	p.until("the new client", "!!"+row("clients", "203.0.113.2"), patience)
	p.clean()
}

// TestZones checks that a client in several zones has a row for each, in each width, and
// that its buckets are refilled separately.
func TestZones(t *testing.T) {
	zoneTwo := freeAddress(t)
	w := newWorld(t, fmt.Sprintf("zone one\n%s\n\t}\n}\nhttp://:%s {\n\tasync_proxy {\n\t\tzone two\n\t\tclients all\n\t\tburst 1000\n\t\trefill 0.01\n\t\tallow 127.0.0.0/8", proxyOptions, port(zoneTwo)), "actions")
	for _, width := range []int64{400, 1440} {
		p := w.open(width, "light")
		w.limit("203.0.113.9")
		p.until("the client", "!!"+row("clients", "203.0.113.9", "limited"), patience)
		proxy := w.proxy
		w.proxy = zoneTwo
		if status := w.client()("203.0.113.9"); status != http.StatusOK {
			t.Errorf("in the other zone the client gets %d", status)
		}
		w.proxy = proxy
		p.until("the client in both zones", "!!"+row("clients", "203.0.113.9 one", "limited")+" && !!"+row("clients", "203.0.113.9 two", " / 1,000"), patience)
		p.fits()
		p.accessible()
		p.press("Refill the bucket of 203.0.113.9 in zone two")
		p.until("one full bucket", "!!"+row("clients", "203.0.113.9 two", "1,000 / 1,000")+" && !!"+row("clients", "203.0.113.9 one", "limited"), patience)
		p.clean()
	}
}

// TestPolicies checks that a client in several policies has a row for each, in each width, that one
// policy can be shown alone, and that its settings are shown apart.
func TestPolicies(t *testing.T) {
	w := newWorld(t, proxyOptions+`
		policy guests {
			clients 203.0.113.0/24
			match {
				method GET
			}
			burst 2
		}
		policy staff {
			clients 198.51.100.0/24
			deny ads.example.com
		}`, "actions")
	for _, width := range []int64{400, 1440} {
		p := w.open(width, "light")
		w.limit("203.0.113.9")
		w.tunnel("203.0.113.9") // is not a GET
		w.tunnel("198.51.100.7")
		p.until("the client in and outside of a policy", "!!"+row("clients", "203.0.113.9", "guests", "limited")+" && !!"+row("clients", "203.0.113.9", " / 5"), patience)
		p.until("the tunnel of a policy", "!!"+row("tunnels", "198.51.100.7", "staff"), patience)
		p.until("the refusal of a policy", "!!"+row("refusals", "203.0.113.9", "guests"), patience)
		p.until("the settings of a policy", `/policy guests\s+clients\s+203\.0\.113\.0\/24\s+match\s+method\s+burst\s+2\s+policy staff/.test(document.getElementById('settings').innerText)`, patience)
		p.fits()
		p.accessible()

		p.choose("Show only this policy", "guests")
		p.until("the policy's clients and refusals alone", rows("clients")+" === 1 && "+rows("refusals")+" > 0 && !!"+row("clients", "203.0.113.9", "guests"), patience)
		p.until("no tunnel of the policy", "!!"+row("tunnels", "No matching tunnels"), patience)
		p.choose("Show only this policy", "staff")
		p.until("no refusal of the policy", "!!"+row("refusals", "No matching refusals"), patience)
		p.choose("Show only this policy", "default")
		p.until("what no policy is for", rows("clients")+" === 1 && !!"+row("clients", "203.0.113.9", " / 5")+" && "+rows("tunnels")+" > 0 && !"+row("tunnels", "staff"), patience)
		p.choose("Show only this policy", "")
		p.press("Refill the bucket of 203.0.113.9 in policy guests")
		p.until("a full bucket of the policy", "!!"+row("clients", "203.0.113.9", "guests", "2 / 2"), patience)
		p.clean()
	}
}

// TestFindsABlockedUser checks that the filter ignores case, both in the page and on the
// server, and that it finds clients that are blocked but not tracked.
func TestFindsABlockedUser(t *testing.T) {
	w := newWorld(t, proxyOptions, "actions")
	p := w.open(1440, "light")
	req, err := http.NewRequest(http.MethodPut, "http://"+w.admin+"/async_proxy/clients/user%20Sales%2FAlice/block?for=1h", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil || res.StatusCode != http.StatusNoContent {
		t.Fatal(res, err)
	}
	res.Body.Close()
	p.until("the user", "!!"+row("clients", "user Sales/Alice", "blocked", "never"), patience)
	p.fill("Filter clients by address", "sales/aLiCe")
	p.until("the number of matches", "document.getElementById('clients-count').innerText === '1'", patience)
	p.until("the user", "!!"+row("clients", "user Sales/Alice", "blocked"), patience)
	p.press("Unblock user Sales/Alice")
	p.until("no matching client", "!!"+row("clients", "No matching clients"), patience)
	p.clean()
}

// TestManyClients checks that the page finds clients that are not in the snapshot.
func TestManyClients(t *testing.T) {
	const n = 50_000
	w := newWorld(t, proxyOptions, "")
	get := w.client()
	get("192.0.2.1") // the first of them
	w.limit("192.0.2.2")
	var wg sync.WaitGroup
	for part := range 32 {
		wg.Go(func() {
			for i := part; i < n-2; i += 32 {
				get(fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255))
			}
		})
	}
	wg.Wait()
	p := w.open(1440, "light")
	p.until("the number of clients", "document.getElementById('clients').innerText.includes('100 of 50,000')", patience)
	p.fill("Filter clients by address", "192.0.2.1")
	p.until("the client that came first", "!!"+row("clients", "192.0.2.1"), patience)
	p.fill("Filter clients by address", "")
	p.press("Rejected")
	p.until("the one with refusals", "document.querySelector('#clients tbody tr').innerText.includes('192.0.2.2')", patience)
	p.clean()
	p.accessible()
}

// TestScreenshots takes the screenshots for the documentation, if SCREENSHOTS names the
// directory for them. It generates traffic for some minutes, which the charts show.
func TestScreenshots(t *testing.T) {
	dir := os.Getenv("SCREENSHOTS")
	if dir == "" {
		t.Skip("SCREENSHOTS is not set")
	}
	w := newWorld(t, "burst 60\nrefill 4\nallow 127.0.0.0/8\nmax_tunnels 500 per_client 50", "actions")
	// A proxy as it should be, which the page has no warnings about.
	w.config = strings.NewReplacer("clients all", "clients 203.0.113.0/24", "trusted_proxies static 127.0.0.1/32", "trusted_proxies static 127.0.0.1/32\n\t\ttrusted_proxies_strict").Replace(w.config)
	w.load()
	p := w.open(1440, "light")
	const shown = 5 * time.Minute
	done := make(chan struct{})
	go func() {
		w.traffic(shown + 30*time.Second) // and while the pictures are taken
		close(done)
	}()
	time.Sleep(shown)
	for _, picture := range []struct {
		name, scheme  string
		width, height int64
	}{
		{"status", "light", 1440, 1180},
		{"status-dark", "dark", 1440, 1180},
		{"status-narrow", "light", 400, 1180},
	} {
		p.do(chromedp.EmulateViewport(picture.width, picture.height), colorScheme(picture.scheme), chromedp.Sleep(2*time.Second))
		data, err := chromedp.Run(p.ctx, chromedp.CaptureScreenshot())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(fmt.Sprintf("%s/%s.png", dir, picture.name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	<-done
	p.clean()
}
