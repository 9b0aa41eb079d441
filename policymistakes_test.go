// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"strings"
	"testing"
)

// TestPolicyMistakes checks that an error says where the mistake is, what it is, and what was
// expected. The options begin on line 3.
func TestPolicyMistakes(t *testing.T) {
	const (
		expected = "expected names of users, in which * at the beginning or the end stands for any characters"
		ranges   = "expected addresses, CIDR ranges such as 10.0.0.0/8, or private_ranges"
		matchers = "expected request matchers, as in a named matcher"
		block    = "expected a name and a block of conditions and options"
		login    = "user_from {http.request.header.X-User}\n"
	)
	name := strings.Repeat("n", 64)
	for _, tc := range []struct{ text, want string }{
		{"policy", "policy: missing value; " + block + ", at Caddyfile:3"},
		{"policy ci", "policy ci: there is nothing in it; expected a block of conditions and options, at Caddyfile:3"},
		{"policy ci {\n}", "policy ci: there is nothing in it; expected a block of conditions and options, at Caddyfile:3"},
		{"policy ci office {\nburst 5\n}", "policy: unexpected value 'office'; " + block + ", at Caddyfile:3"},
		{"policy ci {\nbrust 5\n}", "unrecognized option 'brust'; did you mean burst?, at Caddyfile:4"},
		{"policy ci {\nuser alice\n}", "unrecognized option 'user'; did you mean users?, at Caddyfile:4"},
		{"policy ci {\nnonsense 5\n}", "unrecognized option 'nonsense'; expected one of " + strings.Join(policyOptionNames(), ", ") + ", at Caddyfile:4"},
		{"policy ci {\nzone a\n}", "policy: the option 'zone' is the directive's only; expected one of " + strings.Join(policyOptionNames(), ", ") + ", at Caddyfile:4"},
		{"policy ci {\nbasic_auth {\n}\n}", "policy: the option 'basic_auth' is the directive's only; expected one of " + strings.Join(policyOptionNames(), ", ") + ", at Caddyfile:4"},
		{"policy ci {\npolicy inner {\nburst 5\n}\n}", "policy: the option 'policy' is the directive's only; expected one of " + strings.Join(policyOptionNames(), ", ") + ", at Caddyfile:4"},
		{"policy ci {\nburst 5\nburst 6\n}", "burst: the option is already set at Caddyfile:4; expected it once, at Caddyfile:5"},
		{"policy ci {\nburst 0\n}", "burst: the value '0' is not valid; expected a whole number of tokens from 1 to 1000000000, at Caddyfile:4"},
		{"policy ci {\nmethods get\n}", "methods: the value 'get' is not valid; expected names of methods in capitals, such as GET HEAD CONNECT, or all, at Caddyfile:4"},
		{"methods GET,HEAD", "methods: the value 'GET,HEAD' is not valid; expected names of methods in capitals, such as GET HEAD CONNECT, or all, at Caddyfile:3"},
		{"methods", "methods: missing value; expected names of methods in capitals, such as GET HEAD CONNECT, or all, at Caddyfile:3"},
		{"user_from X-User", "user_from: the value 'X-User' is not valid; expected placeholders such as {http.request.tls.client.subject}, at Caddyfile:3"},
		{"policy ci {\nclients 10.0.0.0/8\nclients 192.0.2.1\n}", "clients: the condition is already set at Caddyfile:4; expected it once, with all its values, at Caddyfile:5"},
		{"policy ci {\nmatch {\nmethod GET\n}\nmatch {\nheader A b\n}\n}", "match: the condition is already set at Caddyfile:4; expected it once, with all its values, at Caddyfile:7"},
		{login + "policy ci {\nusers a\nusers b\n}", "users: the condition is already set at Caddyfile:5; expected it once, with all its values, at Caddyfile:6"},
		{"policy ci {\nclients\n}", "clients: missing value; " + ranges + ", at Caddyfile:4"},
		{"policy ci {\nburst 5\nclients 10.0.0.0/33\n}", "policy ci: clients: the value '10.0.0.0/33' is not valid; " + ranges + ", at Caddyfile:5"},
		{"policy ci {\nclients all\n}", "policy ci: clients: the value 'all' is not valid; " + ranges + ", at Caddyfile:4"},
		{"policy ci {\nclients 10.0.0.1/8\n}", "policy ci: clients: 10.0.0.1/8 has bits set beyond its length; write 10.0.0.0/8 for the range, or 10.0.0.1 for the address, at Caddyfile:4"},
		{login + "policy ci {\nusers\n}", "users: missing value; " + expected + ", at Caddyfile:5"},
		{login + "policy ci {\nusers a*b\n}", "policy ci: users: the value 'a*b' is not valid; " + expected + ", at Caddyfile:5"},
		{login + "policy ci {\nburst 5\nusers a \"\"\n}", "policy ci: users: the value '' is not valid; " + expected + ", at Caddyfile:6"},
		{login + "policy ci {\nusers alice {\nx\n}\n}", "users: unexpected block; " + expected + ", at Caddyfile:5"},
		{"policy ci {\nusers alice\n}", "policy ci: users: clients have no user; expected the option basic_auth, users_file or user_from as well, in the directive, at Caddyfile:4"},
		{"policy ci {\nanonymous\n}", "policy ci: anonymous: no client needs credentials; expected the option basic_auth or users_file as well, in the directive, at Caddyfile:4"},
		{"policy ci {\nanonymous yes\n}", "anonymous: unexpected value 'yes'; expected no value, at Caddyfile:4"},
		{"policy ci {\nlimit_by user\n}", "policy ci: limit_by: clients have no user; expected the option basic_auth, users_file or user_from as well, at Caddyfile:4"},
		{"policy ci {\nburst 5\nno_upstream a.example\n}", "policy ci: no_upstream: no upstream is configured; expected the option upstream as well, at Caddyfile:5"},
		{"policy ci {\nrefill 0.00001\nburst 1000000000\n}", "policy ci: burst 1000000000 with refill 1e-05: an empty bucket would take more than 4000000000 seconds to fill; expected a smaller burst or a larger refill, at Caddyfile:4"},
		{"policy ci {\nmatch {\n}\n}", "match: there are no matchers; " + matchers + ", at Caddyfile:4"},
		{"policy ci {\nmatch\n}", "match: there are no matchers; " + matchers + ", at Caddyfile:4"},
		{"policy ci {\nmatch {\nnonsense a\n}\n}", "getting matcher module 'nonsense': module not registered: http.matchers.nonsense, at Caddyfile:6"},
		{"policy ci {\nburst 5\n}\npolicy ci {\nburst 6\n}", "policy ci: it has no conditions, so policy ci after it never applies; expected users, clients or match, or the policy to be the last, at Caddyfile:3"},
		{"policy ci {\nclients 10.0.0.1\n}\npolicy ci {\nburst 6\n}", "policy ci: there is another policy of this name; expected each name once, at Caddyfile:6"},
		{"policy all {\nburst 5\n}", "policy all: the name 'all' is reserved; expected another name, at Caddyfile:3"},
		{"policy default {\nburst 5\n}", "policy default: the name 'default' is reserved; expected another name, at Caddyfile:3"},
		{"policy burst {\nburst 5\n}", "policy burst: the name 'burst' is reserved; expected another name, at Caddyfile:3"},
		{"policy users {\nburst 5\n}", "policy users: the name 'users' is reserved; expected another name, at Caddyfile:3"},
		{"policy \"\" {\nburst 5\n}", "policy : the name '' is not valid; expected up to 64 letters, digits, dots, hyphens and underscores, at Caddyfile:3"},
		{"policy a/b {\nburst 5\n}", "policy a/b: the name 'a/b' is not valid; expected up to 64 letters, digits, dots, hyphens and underscores, at Caddyfile:3"},
		{"policy ümlaut {\nburst 5\n}", "policy ümlaut: the name 'ümlaut' is not valid; expected up to 64 letters, digits, dots, hyphens and underscores, at Caddyfile:3"},
		{"policy n" + name + " {\nburst 5\n}", "policy n" + name + ": the name 'n" + name + "' is not valid; expected up to 64 letters, digits, dots, hyphens and underscores, at Caddyfile:3"},
		{"policy ci {\nallow a.example\n}", "allow: a.example has no effect, because no later rule denies what it allows; for an allow-list, add `deny all` after it; otherwise remove it, at Caddyfile:4"},
		{"deny all\npolicy ci {\nallow a.example\ndeny b.example\nallow all\n}", ""},
		{"deny b.example\npolicy ci {\nallow a.example\n}", "allow: a.example has no effect, because no later rule denies what it allows; for an allow-list, add `deny all` after it; otherwise remove it, at Caddyfile:5"},
		{"policy " + name + " {\nburst 5\n}", ""},
		{"policy ci {\nclients private_ranges\nanonymous\nmatch {\nmethod GET\nexpression true\n}\n}\nbasic_auth {\na $2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi\n}", ""},
		{"policy ci {\nmatch method GET\n}", ""},
	} {
		text := ":8080 {\n\tasync_proxy {\n" + tc.text + "\n}\n}"
		_, _, err := adapt(text, "Caddyfile")
		got := ""
		if err != nil {
			got = err.Error()
		}
		if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("%s\ngives %s\nwant  %s", tc.text, got, tc.want)
		}
	}
}

// TestPolicyMistakesInJSON checks the same mistakes, and those that only JSON allows.
func TestPolicyMistakesInJSON(t *testing.T) {
	const last = `{"name": "last", "burst": 5}`
	for _, tc := range []struct{ policies, want string }{
		{`[null]`, "policies[0]: there is nothing in it"},
		{`[{}]`, "policies[0]: the name '' is not valid"},
		{`[{"name": "ci", "burst": -5}]`, "policies[0]: burst: the value '-5' is not valid"},
		{`[{"name": "ci", "zone": "a"}]`, `unknown field "zone"`},
		{`[{"name": "ci"}, ` + last + `]`, "policies[0]: it has no conditions, so policy last after it never applies"},
		{`[{"name": "last", "clients": ["10.0.0.1"]}, ` + last + `]`, "policies[1]: there is another policy of this name"},
		{`[{"name": "ci", "clients": ["10.0.0.0/33"]}, ` + last + `]`, "policies[0]: clients: the value '10.0.0.0/33' is not valid"},
		{`[{"name": "ci", "clients": ["10.0.0.1"]}, {"name": "b", "users": ["a"]}]`, "policies[1]: users: clients have no user"},
		{`[{"name": "ci", "users": ["a*b"]}]`, "policies[0]: users: the value 'a*b' is not valid"},
		{`[{"name": "ci", "anonymous": true}]`, "policies[0]: anonymous: no client needs credentials"},
		{`[{"name": "ci", "match": {"nonsense": {}}}]`, "policy ci: match: module name 'nonsense': unknown module: http.matchers.nonsense"},
		{`[{"name": "ci", "match": {"expression": "1 +"}}]`, "policy ci: match: "},
		{`[{"name": "ci", "no_upstream": ["a.example"]}]`, "policies[0]: no_upstream: no upstream is configured"},
		{`[{"name": "ci", "limit_by": "user"}]`, "policies[0]: limit_by: clients have no user"},
		{`[{"name": "ci", "rules": [{"action": "allow", "destinations": ["a.example"]}]}]`, "policy ci: rules[0]: allow: a.example has no effect"},
		{`[{"name": "ci", "rules": [{"action": "drop", "destinations": ["a.example"]}]}]`, `policies[0]: rules[0]: action: the value 'drop' is not valid; expected allow or deny`},
		{`[{"name": "ci", "methods": ["GET"], "match": {"method": ["GET"]}}, ` + last + `]`, ""},
	} {
		err := validate(t, `{"handler": "async_proxy", "policies": `+tc.policies+`}`)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("%s\ngives %s\nwant  %s", tc.policies, got, tc.want)
		}
	}
	if err := validate(t, `{"handler": "async_proxy", "rules": [{"action": "deny", "destinations": ["all"]}],
		"policies": [{"name": "ci", "rules": [{"action": "allow", "destinations": ["a.example"]}]}]}`); err != nil {
		t.Errorf("a policy that opens what the directive denies: %v", err)
	}
}
