// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"strings"
	"testing"
)

// A policy can undo each option of the directive that has no limit, no parent or no text by default.
func TestPolicyUndoesOptions(t *testing.T) {
	h := parseOptions(t, `upstream http://parent.example
		no_upstream a.example
		methods GET
		report_only rules
		deny_hint "ask A"
		tunnel_max_duration 1h
		policy p {
			upstream off
			methods all
			report_only off
			deny_hint off
			tunnel_max_duration off
		}`)
	got, err := h.optionsOf(h.Policies[0])
	if err != nil {
		t.Fatal(err)
	}
	if text := asJSON(t, got); text != "{}" {
		t.Errorf("left of the directive's options: %s", text)
	}
	if err := h.Validate(); err != nil {
		t.Error(err)
	}
}

// Clients of a policy that undoes options of the directive are served without them.
func TestPolicyWithoutTheDirectivesOptions(t *testing.T) {
	const undoing = `
		policy free {
			match {
				header X-Free 1
			}
			upstream off
			methods all
			report_only off
			deny_hint off
		}`
	w := newWorld(t, "", nil)
	options := "upstream http://" + freeAddress(t) + "\nmethods GET\nreport_only rules\ndeny denied.example\ndeny_hint Ask." + undoing
	for way, site := range map[string]string{"fast": w.site(options), "ordinary": byCaddy(w.site(options))} {
		w.load(site)
		for _, tc := range []struct {
			method, url, lines string
			status             int
			text, without      string
		}{
			{"GET", w.origin.URL + "/", "", http.StatusBadGateway, "parent", ""},
			{"GET", w.origin.URL + "/", "X-Free: 1\r\n", http.StatusOK, "", ""},
			{"POST", w.origin.URL + "/", "Content-Length: 0\r\n", http.StatusBadGateway, "parent", ""},
			{"POST", w.origin.URL + "/", "Content-Length: 0\r\nX-Free: 1\r\n", http.StatusOK, "", ""},
			{"GET", "http://denied.example/", "", http.StatusBadGateway, "parent", ""},
			{"GET", "http://denied.example/", "X-Free: 1\r\n", http.StatusForbidden, "denies", "Ask."},
		} {
			c := w.dial()
			c.send(tc.method + " " + tc.url + " HTTP/1.1\r\nHost: x\r\n" + tc.lines + "\r\n")
			res, body := c.response(tc.method)
			if res.StatusCode != tc.status || !strings.Contains(body, tc.text) || tc.without != "" && strings.Contains(body, tc.without) {
				t.Errorf("%s: %s %s with %q: %s %q, want %d and %q", way, tc.method, tc.url, tc.lines, res.Status, body, tc.status, tc.text)
			}
		}
	}
}
