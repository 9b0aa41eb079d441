// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"net/url"
	"strings"
	"testing"
)

// Every check must let a request pass, but one address of the destination is enough.
func TestDecide(t *testing.T) {
	for checks, want := range map[string]Outcome{
		"":                               Allowed,
		"client:allowed address:allowed": Allowed,
		"client:denied address:allowed":  Denied,
		"port:reported address:reported": Allowed,
		"name:allowed address:denied address:allowed":      Allowed,
		"name:allowed address:allowed address:denied":      Allowed,
		"name:allowed address:denied address:reported":     Allowed,
		"name:allowed address:denied address:denied":       Denied,
		"name:allowed resolution:unresolved":               Unresolved,
		"tokens:denied name:allowed resolution:unresolved": Denied,
	} {
		var e Explanation
		for text := range strings.FieldsSeq(checks) {
			check, outcome, _ := strings.Cut(text, ":")
			e.Checks = append(e.Checks, Check{Check: check, Outcome: Outcome(outcome)})
		}
		if e.Decide(); e.Decision != want {
			t.Errorf("%s: %s, want %s", checks, e.Decision, want)
		}
	}
}

func TestReadQuestion(t *testing.T) {
	for query, want := range map[string]string{
		"client=10.0.0.1&target=a:80":                  "10.0.0.1  CONNECT a:80",
		"client=::1&target=http://a/&user=alice":       "::1 alice GET http://a/",
		"client=10.0.0.1&target=http://a/&method=POST": "10.0.0.1  POST http://a/",
		"target=a:80":          `client: missing; expected the IP address of the client`,
		"client=a&target=a:80": `client "a": expected an IP address`,
		"client=10.0.0.1":      "target: missing; expected host:port or a URL",
	} {
		values, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		q, err := ReadQuestion(values)
		got := strings.Join([]string{q.Client.String(), q.User, q.Method, q.Target}, " ")
		if err != nil {
			got = err.Error()
		} else if again, err := ReadQuestion(q.Values()); err != nil || again != q {
			t.Errorf("%s: written and read again %+v, %v", query, again, err)
		}
		if got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}
}
