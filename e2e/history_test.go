// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// tells returns what the admin API says about something.
func tells[T any](w *world, what string) (answer T) {
	w.t.Helper()
	res, err := http.Get("http://" + w.admin + "/async_proxy/" + what)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil || res.StatusCode != http.StatusOK {
		w.t.Fatalf("%s: %s, %v", what, res.Status, err)
	}
	return answer
}

// colored returns an expression for the number of pixels that the first chart has in the color of
// a series.
func colored(series string) string {
	return fmt.Sprintf(`(() => {
	const canvas = document.querySelector(".chart canvas")
	const color = getComputedStyle(document.documentElement).getPropertyValue("--%s").trim().match(/[0-9a-f]{2}/g).map((part) => parseInt(part, 16))
	const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true }) // else Chromium warns
	copy.drawImage(canvas, 0, 0)
	const { data } = copy.getImageData(0, 0, canvas.width, canvas.height)
	let n = 0
	for (let i = 0; i < data.length; i += 4) if (data[i + 3] && color.every((part, k) => Math.abs(part - data[i + k]) < 8)) n++
	return n
})()`, series)
}

// TestHistoryFromBefore checks that the charts show what happened before anybody opened the page.
func TestHistoryFromBefore(t *testing.T) {
	w := newWorld(t, proxyOptions, "mask_clients")
	get := w.client()
	get("203.0.113.1")
	w.tunnel("203.0.113.1")
	w.eventually("a few steps", func() bool {
		h := tells[struct{ Tunnels []int }](w, "history")
		return len(h.Tunnels) > 2 && h.Tunnels[len(h.Tunnels)-3] == 1
	})
	p := w.open(1440, "light")
	path := "document.querySelector('#tiles > :nth-child(3) .spark-line').getAttribute('d').split(/[ML]/).slice(1).map((at) => +at.split(' ')[0])"
	p.until("the tunnel in its sparkline, from before the page was opened",
		fmt.Sprintf("((x) => Math.max(...x) - Math.min(...x) > performance.now() / 1000 + 3)(%s)", path), patience)
	p.until("the request of five minutes", colored("forwarded")+" > 10", patience)
	p.until("latencies of before", "/Connecting: p50/.test([...document.querySelectorAll('.chart [role=img]')].at(-1).getAttribute('aria-label'))", patience)
	p.clean()
}

// TestHistorySpan checks that the operator can switch between five minutes and an hour, with the
// keyboard too, and that the URL remembers it.
func TestHistorySpan(t *testing.T) {
	w := newWorld(t, proxyOptions, "")
	get := w.client()
	w.eventually("steps with requests", func() bool {
		get("203.0.113.1")
		h := tells[struct{ Requests map[string][]int }](w, "history")
		n := 0
		for _, limited := range h.Requests["rate_limited"] {
			n += min(limited, 1)
		}
		return n > 1
	})
	p := w.open(1440, "dark")
	labels := "[...document.querySelectorAll('.chart [role=img]')].map((e) => e.getAttribute('aria-label')).join()"
	expect := func(name, query string) {
		t.Helper()
		p.until("the charts of the "+name, fmt.Sprintf("%s.split('%s').length === 5 && location.search === %q && document.querySelector('input[name=span]:checked').parentElement.innerText.trim() === %q",
			labels, name, query, map[string]string{"last five minutes": "Five minutes", "last hour": "One hour"}[name]), patience)
	}
	expect("last five minutes", "")
	p.do(chromedp.Focus(chromedp.CSS("input[name=span]:checked")), chromedp.KeyEvent(kb.ArrowRight))
	expect("last hour", "?span=hour")
	p.until("the request in the hour", colored("limited")+" > 0", patience)
	p.until("the latencies of the hour", "/Connecting: p50/.test("+labels+")", patience)
	p.do(chromedp.EmulateViewport(400, 900))
	p.fits()
	p.accessible()
	p.do(chromedp.EmulateViewport(1440, 900))
	steps := len(tells[struct{ Tunnels []int }](w, "history").Tunnels)
	p.do(chromedp.Reload())
	p.state("Live")
	expect("last hour", "?span=hour")
	p.until("the request in the hour", colored("limited")+" > 0", patience)
	w.eventually("another step", func() bool { return len(tells[struct{ Tunnels []int }](w, "history").Tunnels) > steps })
	p.do(chromedp.Focus(chromedp.CSS("input[name=span]:checked")), chromedp.KeyEvent(kb.ArrowLeft))
	expect("last five minutes", "")
	p.clean()
}
