// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
)

// newServer serves the page of v.
func newServer(t *testing.T, v *View) *httptest.Server {
	server := httptest.NewServer(&Page{
		View: v, Done: t.Context().Done(),
		OriginalPath:     func(r *http.Request) string { return r.URL.Path },
		CameThroughProxy: func(*http.Request) bool { return false },
	})
	t.Cleanup(server.Close)
	return server
}

// servePage serves the page of v. It returns a function that sends a request to the page;
// fields alternates names and values.
func servePage(t *testing.T, v *View) func(method, path string, fields ...string) (*http.Response, string) {
	server := newServer(t, v)
	return func(method, path string, fields ...string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequest(method, server.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(fields); i += 2 {
			req.Header.Set(fields[i], fields[i+1])
		}
		res, err := server.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res, string(text)
	}
}

func TestPage(t *testing.T) {
	ask := servePage(t, emptyView())
	res, index := ask("GET", "/")
	for field, want := range map[string]string{
		"Content-Type":            "text/html; charset=utf-8",
		"Cache-Control":           "no-store",
		"X-Content-Type-Options":  "nosniff",
		"Referrer-Policy":         "no-referrer",
		"Content-Security-Policy": pageHeader["Content-Security-Policy"],
	} {
		if got := res.Header.Get(field); got != want {
			t.Errorf("%s: %q, want %q", field, got, want)
		}
	}
	for _, want := range []string{"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} {
		if !strings.Contains(pageHeader["Content-Security-Policy"], want) {
			t.Errorf("the policy lacks %s", want)
		}
	}
	for _, bad := range []string{"unsafe-", "*", "http:"} {
		if strings.Contains(pageHeader["Content-Security-Policy"], bad) {
			t.Errorf("the policy has %s", bad)
		}
	}
	if regexp.MustCompile(`(?i)<script>|<style|\bstyle=|\bon[a-z]+=|https?://`).MatchString(index) {
		t.Error("the page has inline code, or loads something from another site")
	}
	parts := regexp.MustCompile(`(?:src|href)="([^"#]+\?v=[^"]*)"`).FindAllStringSubmatch(index, -1)
	if len(parts) != 5 {
		t.Errorf("the page has %d parts, want 5: %v", len(parts), parts)
	}
	for _, part := range parts {
		res, text := ask("GET", "/"+part[1])
		if res.StatusCode != http.StatusOK || len(text) < 100 || res.Header.Get("Cache-Control") != "public, max-age=31536000, immutable" {
			t.Errorf("%s: %s, %d bytes, Cache-Control %q", part[1], res.Status, len(text), res.Header.Get("Cache-Control"))
		}
		name, _, _ := strings.Cut(part[1], "?")
		etag := res.Header.Get("Etag")
		if res, _ := ask("GET", "/"+name, "If-None-Match", etag); res.StatusCode != http.StatusNotModified || res.Header.Get("Cache-Control") != "no-cache" {
			t.Errorf("%s again: %s, Cache-Control %q", name, res.Status, res.Header.Get("Cache-Control"))
		}
		if res, _ := ask("GET", "/"+name+"?v=another"); res.Header.Get("Cache-Control") != "no-cache" {
			t.Errorf("another version of %s: Cache-Control %q", name, res.Header.Get("Cache-Control"))
		}
	}
	if res, text := ask("HEAD", "/"); res.StatusCode != http.StatusOK || text != "" || res.ContentLength != int64(len(index)) {
		t.Errorf("HEAD: %s, %d bytes, Content-Length %d", res.Status, len(text), res.ContentLength)
	}
	for _, path := range []string{"/nothing.js", "/index.html", "/uplot.LICENSE", "/status/../uplot.sha256"} {
		if res, _ := ask("GET", path); res.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", path, res.Status)
		}
	}
	if res, _ := ask("PUT", "/"); res.StatusCode != http.StatusMethodNotAllowed || res.Header.Get("Allow") != "GET, HEAD, POST" {
		t.Errorf("PUT: %s, Allow %q", res.Status, res.Header.Get("Allow"))
	}
}

// get asks a page for a path, and checks the status of the response.
func get(t *testing.T, p *Page, path string, status int) string {
	t.Helper()
	w := httptest.NewRecorder()
	p.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	if w.Code != status {
		t.Errorf("%s: status %d, want %d: %s", path, w.Code, status, w.Body)
	}
	return w.Body.String()
}
