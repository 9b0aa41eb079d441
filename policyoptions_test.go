// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// policyOptionValues are two values of each option that a policy may set.
var policyOptionValues = map[string][2]string{
	"burst":                   {"5", "7"},
	"refill":                  {"0.5", "0.25"},
	"limit_by":                {"user", "client_ip"},
	"allow":                   {"10.0.0.1", "10.0.0.2 10.0.0.3"},
	"deny":                    {"a.example", "b.example c.example"},
	"allow_file":              {"testdata/destinations.txt", "testdata/destinations.txt"},
	"deny_file":               {"testdata/destinations.txt", "testdata/destinations.txt"},
	"allow_from":              {"static 10.0.0.0/8", "static 172.16.0.0/12"},
	"deny_from":               {"static 192.0.2.0/24", "static 203.0.113.0/24"},
	"ports":                   {"80 443", "8000-8999"},
	"connect_ports":           {"443", "22 8443"},
	"methods":                 {"GET HEAD", "CONNECT"},
	"report_only":             {"rules", "limits"},
	"upstream":                {"http://a.example", "https://user:{env.HOME}@b.example:444 {\nheader X-Team c\ntls_insecure_skip_verify\n}"},
	"no_upstream":             {"10.0.0.0/8 a.example", "*.b.example"},
	"dial_timeout":            {"1s", "2s"},
	"response_header_timeout": {"3s", "off"},
	"max_tunnels":             {"9 per_client 4", "8 per_client 3"},
	"tunnel_idle_timeout":     {"off", "3m"},
	"tunnel_max_duration":     {"3h", "5m"},
	"forwarded_for":           {"off", "auto"},
	"header_up":               {"X-A one", "-X-B"},
	"header_down":             {"+X-C two", "X-D a b"},
	"deny_hint":               {"\"ask A\"", "\"ask B about {http.async_proxy.rule}\""},
}

// parseOptions parses the options of a directive.
func parseOptions(t *testing.T, text string) *Handler {
	t.Helper()
	h := new(Handler)
	if err := h.UnmarshalCaddyfile(caddyfile.NewTestDispenser("async_proxy {\nuser_from {http.request.header.X-User}\n" + text + "\n}")); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return h
}

// Each option that a policy may set has there what the policy sets, or else what the directive
// sets. A policy has rules and max_tunnels of its own only.
func TestPolicyInheritsEachOption(t *testing.T) {
	for _, o := range options {
		values, known := policyOptionValues[o.name]
		if known != o.inPolicy {
			t.Errorf("%s: this test has values: %v; a policy may set it: %v", o.name, known, o.inPolicy)
		}
		if !known {
			continue
		}
		parent, more := "", ""
		if o.name == "no_upstream" {
			parent = "upstream http://parent.example\n"
		}
		if strings.HasPrefix(o.name, "allow") {
			more = "\ndeny a.example"
		}
		directive, own := o.name+" "+values[0], o.name+" "+values[1]
		isRule, isLimit := o.parse != nil && (strings.HasPrefix(o.name, "allow") || strings.HasPrefix(o.name, "deny")), o.name == "max_tunnels"
		for name, tc := range map[string]struct{ directive, own, want string }{
			"in the directive": {directive, "", directive},
			"in the policy":    {"", own, own},
			"in both":          {directive, own, own},
			"in neither":       {"", "", ""},
		} {
			h := parseOptions(t, parent+tc.directive+more+"\npolicy p {\nusers *\n"+tc.own+"\n}")
			got, err := h.optionsOf(h.Policies[0])
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case isRule && tc.own == "":
				tc.want = ""
			case isLimit && tc.own == "":
				tc.want = "" // but that of a client, below
			}
			want := parseOptions(t, parent+tc.want+strings.Repeat(more, strings.Count(tc.want, "allow")))
			if isRule {
				want.Rules = slices.DeleteFunc(want.Rules, func(r Rule) bool {
					return len(r.Destinations) == 1 && r.Destinations[0] == "a.example" && o.name != "deny"
				})
			}
			if isLimit && name == "in the directive" {
				want.MaxTunnelsPerClient = 4
			}
			if !reflect.DeepEqual(*got, want.Options) {
				t.Errorf("%s, %s: %s, want %s", o.name, name, asJSON(t, got), asJSON(t, &want.Options))
			}
		}
	}
}

func asJSON(t *testing.T, value any) string {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A policy may replace the directive's changes to requests and keep those to responses, and the
// other way round.
func TestPolicyInheritsHeaderChanges(t *testing.T) {
	for own, want := range map[string]string{
		"":                                       `{"request":{"set":{"X-A":["1"]}},"response":{"set":{"X-B":["1"]}}}`,
		"header_up X-C 2":                        `{"request":{"set":{"X-C":["2"]}},"response":{"set":{"X-B":["1"]}}}`,
		"header_down -X-D":                       `{"request":{"set":{"X-A":["1"]}},"response":{"delete":["X-D"]}}`,
		"header_up X-C 2\nheader_down X-D 2":     `{"request":{"set":{"X-C":["2"]}},"response":{"set":{"X-D":["2"]}}}`,
		"header_down X-D 2\nheader_down +X-D 3":  `{"request":{"set":{"X-A":["1"]}},"response":{"add":{"X-D":["3"]},"set":{"X-D":["2"]}}}`,
		"header_up X-A {http.async_proxy.user}-": `{"request":{"set":{"X-A":["{http.async_proxy.user}-"]}},"response":{"set":{"X-B":["1"]}}}`,
	} {
		h := parseOptions(t, "header_up X-A 1\nheader_down X-B 1\npolicy p {\nburst 3\n"+own+"\n}")
		got, err := h.optionsOf(h.Policies[0])
		if err != nil {
			t.Fatal(err)
		}
		var parsed any
		if err := json.Unmarshal([]byte(want), &parsed); err != nil {
			t.Fatal(err)
		}
		var headers any
		if err := json.Unmarshal([]byte(asJSON(t, got.Headers)), &headers); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(headers, parsed) {
			t.Errorf("%q: %s, want %s", own, fmt.Sprint(headers), want)
		}
	}
}
