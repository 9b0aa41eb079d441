// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bufio"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// TestCommandRefusals checks the flag --refusals together with the others, and the admin API behind it.
func TestCommandRefusals(t *testing.T) {
	w := commandStart(t, "--deny", "*.ads.example", "--burst", "100", "--access-log")
	for range 3 {
		policyRequest(t, w.proxy, http.MethodConnect, "www.ads.example:443", "")
	}
	policyRequest(t, w.proxy, http.MethodGet, "127.0.0.1:25", "")
	origin := w.origin.Listener.Addr().String()
	policyRequest(t, w.proxy, http.MethodGet, origin, "")
	run := func(flags string) (string, error) {
		out, err := commandOf(t, append([]string{"async-proxy", "status", "--refusals", "--address", w.logs}, strings.Fields(flags)...)...).CombinedOutput()
		return strings.Join(strings.Fields(string(out)), " "), err
	}
	for _, tc := range []struct{ flags, want, not string }{
		{"", "COUNT CAUSE CLIENT TARGET RULE FIRST LAST TO ALLOW IT 1 port 127.0.0.1 127.0.0.1:25 ports", "TOKENS"},
		{"", "3 rule 127.0.0.1 www.ads.example:443 deny *.ads.example", "TUNNEL CLIENT"},
		{"", "ago allow www.ads.example", ""},
		{"", "TARGET REQUESTS TRAFFIC " + origin + " 1 21 B", ""},
		{"--sort count --limit 1", "IT 3 rule", " port "},
		{"--sort count --limit 1", "and 1 more groups of refusals, and 0 that were dropped", ""},
		{"--sort first --limit 1", "IT 1 port", ""},
		{"--sort bytes", origin + " 1 21 B", ""},
		{"--client 127.0.0.1", "3 rule", "TRAFFIC"},
		{"--client 192.0.2.1", "TO ALLOW IT", "127.0.0.1:25"},
	} {
		text, err := run(tc.flags)
		if err != nil || !strings.Contains(text, tc.want) || tc.not != "" && strings.Contains(text, tc.not) {
			t.Errorf("%q: %v: %s, want %q and no %q", tc.flags, err, text, tc.want, tc.not)
		}
	}
	if text, err := run("--sort tokens"); err == nil || !strings.Contains(text, `expected last, first or count for refusals, or requests or bytes for targets`) {
		t.Errorf("%v: %s", err, text)
	}
	text, err := run("--json")
	var members map[string]json.RawMessage
	var list status.RefusalList
	if err == nil {
		err = json.Unmarshal([]byte(text), &members)
	}
	if err == nil {
		err = json.Unmarshal(members["refusals"], &list)
	}
	if err != nil || members["clients"] != nil || members["tunnels"] != nil || members["targets"] == nil || list.Total != 2 || len(list.Causes) != 2 || list.Refusals[1].Allow != "allow www.ads.example" {
		t.Errorf("%v: %s", err, text)
	}

	watching := commandOf(t, "async-proxy", "status", "--refusals", "--watch", "--json", "--address", w.logs)
	out, err := watching.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := watching.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watching.Process.Kill(); _ = watching.Wait() }()
	lines := bufio.NewScanner(out)
	for _, want := range []string{`"count":3,`, `"count":4,`} {
		for lines.Scan() && !strings.Contains(lines.Text(), want) {
			continue
		}
		if !strings.Contains(lines.Text(), want) {
			t.Errorf("--watch: no %s in %s, %v", want, lines.Text(), lines.Err())
		}
		policyRequest(t, w.proxy, http.MethodConnect, "www.ads.example:443", "")
	}
}

// TestRefusalsFit checks that both lists fit a screen, and what is printed of odd texts.
func TestRefusalsFit(t *testing.T) {
	for _, tc := range []struct{ height, refusals, targets, wantRefusals, wantTargets int }{
		{24, 100, 100, 5, 5}, {25, 100, 100, 6, 5}, {24, 2, 100, 2, 8}, {24, 100, 1, 9, 1}, {24, 100, -1, 10, -1}, {1, 9, 9, 0, 0},
	} {
		s := statusReport{Refusals: &status.RefusalList{Refusals: make([]status.Refusal, tc.refusals), Total: 200, Causes: []status.RefusalCause{{Dropped: 3}, {Dropped: 4}}}}
		if tc.targets >= 0 {
			s.Targets = &status.TargetList{Targets: make([]status.Target, tc.targets), Total: 200}
		}
		s.fit(tc.height)
		if got := len(s.Refusals.Refusals); got != tc.wantRefusals || tc.targets >= 0 && len(s.Targets.Targets) != tc.wantTargets {
			t.Errorf("%+v: %d refusals", tc, got)
		}
		var out strings.Builder
		s.print(&out)
		if n := strings.Count(out.String(), "\n"); tc.height > 13 && n > tc.height-1 || !strings.Contains(out.String(), "7 that were dropped") {
			t.Errorf("%+v: %d lines: %s", tc, n, out.String())
		}
	}
	var out strings.Builder
	s := statusReport{Refusals: &status.RefusalList{Refusals: []status.Refusal{{
		Cause: "method", Client: "192.0.2.1", User: "\x1b[2Jbob", Policy: "guests", Method: "P\x1bUT", Target: "a\u202e.example:1", Hint: "add PUT to methods", Last: time.Now(),
	}}}}
	s.print(&out)
	if text := strings.Join(strings.Fields(out.String()), " "); strings.ContainsAny(text, "\x1b\u202e") || !strings.Contains(text, "bob@192.0.2.1 guests P\ufffdUT a\ufffd.example:1") || !strings.Contains(text, "add PUT to methods") {
		t.Errorf("%q", text)
	}
}
