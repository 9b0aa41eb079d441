// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

const browserAccept = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"

// A request for the proxy itself that nothing answers gets 421, which no health check takes for the
// response of an application, and no cache stores. A person learns how to use the proxy: from a page in a browser,
// from text in a terminal. Programs get problem details.
func TestSetupPage(t *testing.T) {
	w := newWorld(t, "", nil)
	options := "via tester\nserve_pac\n" + bcryptUsers
	for way, site := range map[string]string{"fast path": w.site(options), "net/http": byCaddy(w.site(options))} {
		w.load(site)
		for _, tc := range []struct{ method, accept, contentType string }{
			{"GET", browserAccept, "text/html; charset=utf-8"},
			{"HEAD", browserAccept, "text/html; charset=utf-8"},
			{"POST", browserAccept, "text/html; charset=utf-8"},
			{"GET", "*/*", "text/plain; charset=utf-8"},
			{"GET", "", "text/plain; charset=utf-8"},
			{"GET", "text/html;q=0", "text/plain; charset=utf-8"},
			{"GET", "text/html;q=0.5, text/plain", "text/plain; charset=utf-8"},
			{"GET", "application/json, text/html;q=0.1", problemType},
		} {
			c := w.dial()
			c.send(tc.method + " / HTTP/1.1\nHost: " + w.proxy + "\nAccept: " + tc.accept + "\nContent-Length: 0\n\n")
			res, body := c.response(tc.method)
			isPage := strings.HasPrefix(tc.contentType, "text/html")
			if res.StatusCode != http.StatusMisdirectedRequest || res.Header.Get("Content-Type") != tc.contentType ||
				res.Header.Get("Cache-Control") != "no-store" || res.Header.Get("X-Content-Type-Options") != "nosniff" ||
				(res.Header.Get("Content-Security-Policy") != "") != isPage || ownStatus(t, res.Header)["error"] != "http_request_error" {
				t.Errorf("%s: %s %q: %s %v", way, tc.method, tc.accept, res.Status, res.Header)
			}
			if tc.method == "HEAD" {
				continue
			}
			for _, want := range []string{
				"This is a proxy", "curl -x http://" + w.proxy + " https://example.com/",
				fmt.Sprintf("export http_proxy=http://%s https_proxy=http://%[1]s", w.proxy), "http://" + w.proxy + "/proxy.pac",
			} {
				if tc.contentType == problemType && strings.Contains(want, "//") {
					continue
				}
				if !strings.Contains(body, want) {
					t.Errorf("%s: %s %q: there is no %q in %s", way, tc.method, tc.accept, want, body)
				}
			}
			for _, secret := range []string{"alice", "tester", "burst", "<script", "Caddy", "1000000"} {
				if strings.Contains(body, secret) {
					t.Errorf("%s: %s %q: there is %q in %s", way, tc.method, tc.accept, secret, body)
				}
			}
			if tc.contentType == problemType {
				var d problem
				if err := json.Unmarshal([]byte(body), &d); err != nil || d.Status != 421 || strings.Contains(d.Detail, "\n") {
					t.Errorf("%v, %s", err, body)
				}
			}
		}
	}
	// The page's only style is the one that its policy allows.
	w.load(w.site(""))
	c := w.dial()
	c.send("GET /some/path HTTP/1.1\nHost: " + w.proxy + "\nAccept: text/html\n\n")
	res, body := c.response(http.MethodGet)
	_, style, _ := strings.Cut(body, "<style>")
	style, _, _ = strings.Cut(style, "</style>")
	sum := sha256.Sum256([]byte(style))
	if want := "style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"; style == "" || !strings.Contains(res.Header.Get("Content-Security-Policy"), want) {
		t.Errorf("the policy is %q, want %s", res.Header.Get("Content-Security-Policy"), want)
	}
	host, port, _ := strings.Cut(w.proxy, ":")
	if want := "host " + host + "   port " + port; !strings.Contains(body, want) || strings.Contains(body, "proxy.pac") {
		t.Errorf("there is no %q, or a PAC script, in %s", want, body)
	}
}

// A handler of the site answers in place of the page, and error routes see the same sentence as before.
func TestSetupPageGivesWay(t *testing.T) {
	w := newWorld(t, "", nil)
	for site, want := range map[string]string{
		strings.Replace(w.site(""), "\tasync_proxy", "\trespond /health ok\n\tasync_proxy", 1):                                                        "200 ok",
		strings.Replace(w.site(""), "\tasync_proxy", "\thandle_errors {\n\t\trespond \"{err.status_code} {err.message}\" 503\n\t}\n\tasync_proxy", 1): "503 421 This is a proxy, and it has no page of its own here. A proxy request must name a full URL.",
	} {
		w.load(site)
		c := w.dial()
		c.send("GET /health HTTP/1.1\nHost: x\nAccept: text/html\n\n")
		if res, body := c.response(http.MethodGet); fmt.Sprint(res.StatusCode, " ", body) != want {
			t.Errorf("%s %q, want %q", res.Status, body, want)
		}
	}
}

// A client chooses the Host field. What the page shows of it can be pasted into a shell, and it is
// never HTML. In its place, the page does not show the local address, which strangers need not know.
func TestSetupPageDistrustsHost(t *testing.T) {
	w := newWorld(t, "", nil)
	_, port, _ := strings.Cut(w.proxy, ":")
	for _, host := range []string{
		"$(id)", "a;id", "a'b", "a&b", "`id`", "a|id", "-xyz", "x:$(id)", "x:0", "x:99999", "[fe80::1%25eth0]", "a%0Aid", "", strings.Repeat("a", 300),
		`"><script>alert(1)</script>`, "<b>",
	} {
		for _, accept := range []string{"text/html", "*/*"} {
			c := w.dial()
			c.send("GET / HTTP/1.1\nHost: " + host + "\nAccept: " + accept + "\n\n")
			res, body := c.response(http.MethodGet)
			if res.StatusCode == http.StatusBadRequest {
				continue // net/http has refused the field
			}
			if !strings.Contains(body, "curl -x http://proxy.example.com:"+port+" https") || strings.Contains(body, "127.0.0.1") || host != "" && strings.Contains(body, host) {
				t.Errorf("%q: %s %s", host, res.Status, body)
			}
		}
	}
	for host, want := range map[string]string{
		"proxy.example.com:3128": "proxy.example.com:3128", "proxy": "proxy:80", "[2001:db8::1]:8080": "[2001:db8::1]:8080", "192.0.2.1": "192.0.2.1:80",
	} {
		c := w.dial()
		c.send("GET / HTTP/1.1\nHost: " + host + "\n\n")
		if _, body := c.response(http.MethodGet); !strings.Contains(body, "curl -x http://"+want+" https") {
			t.Errorf("%q: %s, want %s", host, body, want)
		}
	}
}

// Over TLS, the URL has https and the name by which the client knows the proxy: over HTTP/2 the Host
// field may be the destination's.
func TestSetupPageOverTLS(t *testing.T) {
	w := newTunnelWorld(t, tunnelSetup{options: "serve_pac"})
	_, port, _ := strings.Cut(w.tls, ":")
	ask := http2LoginClient(t, dialTLS(t, w.tls, "h2"))
	for url, want := range map[string]string{
		"https://localhost:" + port + "/": "https://localhost:" + port, "http://www.example.com/": "https://localhost:" + port,
	} {
		res, body := ask(http.MethodGet, url, "")
		if res.StatusCode != http.StatusMisdirectedRequest || !strings.Contains(body, "curl -x "+want+" https://example.com/") ||
			!strings.Contains(body, want+"/proxy.pac") || res.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %s %s", url, res.Status, body)
		}
	}
}

// FuzzSetup checks that whatever a client sends as its host ends up neither in a shell nor in HTML.
func FuzzSetup(f *testing.F) {
	for _, host := range []string{"proxy.example.com:3128", "[::1]:8080", "$(id)", "<b>", "a:b:c", "", "[", "x:+80"} {
		f.Add(host, "Mozilla/5.0 (X11; Linux x86_64)")
	}
	p := &proxy{config: &Handler{ServePAC: defaultPACPath}}
	f.Fuzz(func(t *testing.T, host, agent string) {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Host = host
		r.Header.Set("User-Agent", agent)
		r.Header.Set("Accept", "text/html")
		s := p.setupOf(r, "This is a proxy.")
		if strings.ContainsAny(s.URL, " \t\r\n'\"`$\\;&|<>(){}*?!#~%") {
			t.Errorf("%q: %q", host, s.URL)
		}
		page := p.describeSetup(http.Header{}, r, causeNoHandler.refusal(nil))
		if n := strings.Count(string(page), "<"); n != strings.Count(string(page), ">") || strings.Contains(string(page), "<script") {
			t.Errorf("%q: %s", host, page)
		}
		_, _ = io.Discard.Write(s.plain())
	})
}
