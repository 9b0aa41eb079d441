// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// ask sends a GET for a URL from the client with the given address.
func (w *world) ask(address, target string) (status int) {
	w.t.Helper()
	transport := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: w.proxy}), DisableKeepAlives: true}
	req, err := http.NewRequest(http.MethodGet, target, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("X-Forwarded-For", address)
	res, err := (&http.Client{Transport: transport, Timeout: patience}).Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, res.Body)
	return res.StatusCode
}

// pasted returns what the clipboard has, by pasting it.
func (p *page) pasted() string {
	p.t.Helper()
	p.fill("Filter refusals by client, target or cause", "")
	p.do(chromedp.KeyEvent("v", chromedp.KeyModifiers(chromedp.ModifierCtrl), func(e *input.DispatchKeyEventParams) { e.Commands = []string{"paste"} }))
	text := run[string](p, "document.activeElement.value")
	p.fill("Filter refusals by client, target or cause", "")
	p.do(chromedp.KeyEvent(kb.Tab))
	return text
}

// copyLine clicks the button that copies a line. Only a real click lets a page use the clipboard.
func (p *page) copyLine(line string) {
	p.t.Helper()
	button := fmt.Sprintf("button[aria-label=%q]", "Copy allow line: "+line)
	p.until("a button for "+line, fmt.Sprintf("!!document.querySelector(%q)", button), patience)
	p.do(chromedp.Click(chromedp.CSS(button)))
	p.until("the note", fmt.Sprintf("document.getElementById('note').innerText.startsWith(%q)", "Copied: "+line+"."), patience)
}

// groupOf returns an expression for the row above the refusals of a cause, or undefined.
func groupOf(cause string) string {
	return fmt.Sprintf("[...document.querySelectorAll('#refusals tr.group')].find((r) => r.querySelector('span').innerText === %q)", cause)
}

// TestRefusals checks that refusals are grouped by cause, with their counts, and that a button copies
// the line that would allow what was refused, where there is one, in each width and color scheme.
func TestRefusals(t *testing.T) {
	w := newWorld(t, "deny ads.example.com\n"+proxyOptions+"\nports 80 443 1024-65535\npolicy guests {\nclients 198.51.100.0/24\ndeny *.games.example\n}", "")
	for range 3 {
		w.ask("203.0.113.4", "http://ads.example.com/")
	}
	w.ask("203.0.113.5", "http://ads.example.com/")
	w.ask("203.0.113.4", "http://10.0.0.7/")
	w.ask("203.0.113.4", "http://10.0.0.7:81/")
	w.ask("198.51.100.3", "http://chess.games.example/")
	w.limit("203.0.113.9")
	gone := freeAddress(t)
	w.ask("203.0.113.6", "http://"+gone+"/")
	for _, view := range []struct {
		width  int64
		scheme string
	}{{1440, "light"}, {1440, "dark"}, {400, "light"}, {400, "dark"}} {
		p := w.open(view.width, view.scheme)
		p.until("the denials by rules", "/^rule\\s*5 refusals$/.test("+groupOf("rule")+"?.innerText)", patience)
		p.until("the failure", "!!"+groupOf("connection_refused")+" && !!"+row("refusals", gone), patience)
		if order := run[string](p, "[...document.querySelectorAll('#refusals tr.group span:first-child')].map((s) => s.innerText).join()"); order != "default,port,rate_limited,rule,connection_refused" {
			t.Errorf("the causes are %s", order)
		}
		if following := run[string](p, groupOf("rate_limited")+".nextElementSibling.innerText"); !strings.Contains(following, strings.TrimPrefix(w.origin.URL, "http://")) || strings.Contains(following, "Copy") {
			t.Errorf("below rate_limited is %q", following)
		}
		p.fits()
		p.accessible()
		p.copyLine("allow ads.example.com")
		if got := p.pasted(); got != "allow ads.example.com" {
			t.Errorf("the clipboard has %q", got)
		}
		if view.width > 1000 {
			p.until("a count", "!!"+row("refusals", "203.0.113.4", "ads.example.com", "deny ads.example.com", "\t403\t3\t"), patience)
			p.until("a policy", "!!"+row("refusals", "198.51.100.3", "chess.games.example", "guests", "deny *.games.example"), patience)
		}
		p.clean()
	}

	p := w.open(1440, "light")
	p.copyLine("ports 80 443 1024-65535 81")
	p.until("where it belongs", "document.getElementById('note').innerText.includes('It replaces the option ports.')", patience)
	p.copyLine("allow chess.games.example")
	p.until("where it belongs", "document.getElementById('note').innerText.includes('Put it before deny *.games.example, in the policy guests.')", patience)
	// Pages that are neither from localhost nor over TLS have no navigator.clipboard.
	run[bool](p, "Object.defineProperty(navigator, 'clipboard', { value: undefined }) && true")
	p.copyLine("allow 10.0.0.7")
	if got := p.pasted(); got != "allow 10.0.0.7" {
		t.Errorf("without navigator.clipboard, the clipboard has %q", got)
	}
	p.fill("Filter refusals by client, target or cause", "connection_ref")
	p.until("the failure alone", rows("refusals")+" === 2 && !!"+row("refusals", gone), patience)
	p.fill("Filter refusals by client, target or cause", "203.0.113.4")
	p.until("those of the client alone", "!"+groupOf("rate_limited")+" && !!"+groupOf("port"), patience)
	p.clean()

	w.reload(proxyOptions, "mask_clients")
	p.state("Live")
	p.fill("Filter refusals by client, target or cause", "")
	p.until("masked clients, of before the reload", "!!"+row("refusals", "203.0.113.0/24", "ads.example.com", "\t403\t3\t")+" && !"+row("refusals", "203.0.113.4"), patience)
}

// TestManyRefusals checks that the page says how many groups are not kept, and finds those that are
// not in its snapshot.
func TestManyRefusals(t *testing.T) {
	w := newWorld(t, "burst 1000\nrefill 1000\ndeny *.example", "")
	for i := range 210 {
		w.ask("203.0.113.4", fmt.Sprintf("http://h%d.example/", i))
	}
	conn, err := net.Dial("tcp4", w.proxy)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "CONNECT hostile.example:443 HTTP/1.1\r\nHost: x\r\n\r\n")
	p := w.open(1440, "light")
	p.until("the dropped groups", "/211 refusals · 11 older groups dropped/.test("+groupOf("rule")+"?.innerText)", patience)
	p.until("the latest", "!!"+row("refusals", "hostile.example:443"), patience)
	if run[bool](p, "!!"+row("refusals", "h20.example")) {
		t.Error("the snapshot has all refusals")
	}
	p.fill("Filter refusals by client, target or cause", "h20.")
	p.until("an older one", "!!"+row("refusals", "h20.example"), patience)
	p.clean()
}

// TestTargets checks that the page shows the targets with the most requests and the most bytes.
func TestTargets(t *testing.T) {
	w := newWorld(t, "burst 1000\nrefill 1000\nallow 127.0.0.0/8", "")
	p := w.open(400, "light")
	p.until("no targets", "!!"+row("targets", "No targets yet"), patience)
	target := strings.TrimPrefix(w.origin.URL, "http://")
	for range 3 {
		w.client()("203.0.113.4")
	}
	gone := freeAddress(t)
	w.ask("203.0.113.4", "http://"+gone+"/")
	p.until("three responses of 21 bytes", "!!"+row("targets", target, "\t3\t63 B"), patience)
	conn := w.tunnel("203.0.113.5")
	fmt.Fprint(conn, "GET / HTTP/1.0\r\n\r\n")
	p.until("the tunnel", "!!"+row("targets", target, "\t4\t"), patience)
	if _, err := io.ReadAll(conn); err != nil {
		t.Fatal(err)
	}
	p.until("the bytes of the tunnel", "!"+row("targets", target, "\t63 B"), patience)
	if run[bool](p, "!!"+row("targets", gone)) {
		t.Error("a target that refuses connections is listed")
	}
	p.fits()
	p.accessible()
	p.clean()
}
