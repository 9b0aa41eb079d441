// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// sfItem is a member of a structured field that is a list of tokens and strings, as Proxy-Status
// is (RFC 9209 §2).
type sfItem struct {
	name   string
	params map[string]string // strings without quotes and escapes; everything else as it is
}

// The grammar of RFC 9651 §3, apart from inner lists, dates and display strings, which Proxy-Status
// does not use.
var (
	sfKey    = regexp.MustCompile(`^[a-z*][a-z0-9_.*-]*`)
	sfString = regexp.MustCompile(`^"(?:[ !#-\[\]-~]|\\["\\])*"`)
	sfToken  = regexp.MustCompile("^[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*")
	sfOther  = regexp.MustCompile(`^(?:-?[0-9]{1,12}\.[0-9]{1,3}|-?[0-9]{1,15}|\?[01]|:[A-Za-z0-9+/=]*:)`)
)

// parseList parses a structured field that is a list (RFC 9651 §4.2.1). It is stricter than the
// RFC in one thing: a key may occur once.
func parseList(field string) (list []sfItem, err error) {
	rest := strings.Trim(field, " ")
	fail := func(what string) ([]sfItem, error) { return nil, fmt.Errorf("%s before %q", what, rest) }
	cut := func(grammar ...*regexp.Regexp) string {
		for _, each := range grammar {
			if found := each.FindString(rest); found != "" {
				rest = rest[len(found):]
				return found
			}
		}
		return ""
	}
	for {
		item := sfItem{params: make(map[string]string)}
		if item.name = sfUnquote(cut(sfString, sfToken)); item.name == "" {
			return fail("no item")
		}
		for strings.HasPrefix(rest, ";") {
			rest = strings.TrimLeft(rest[1:], " ")
			key, value := cut(sfKey), "?1"
			if _, again := item.params[key]; key == "" || again {
				return fail("no key, or one that occurs twice,")
			}
			if after, ok := strings.CutPrefix(rest, "="); ok {
				if rest = after; strings.HasPrefix(rest, `""`) {
					value, rest = `""`, rest[2:]
				} else if value = cut(sfString, sfOther, sfToken); value == "" {
					return fail("no value")
				}
			}
			item.params[key] = sfUnquote(value)
		}
		list = append(list, item)
		if rest = strings.TrimLeft(rest, " \t"); rest == "" {
			return list, nil
		}
		if rest[0] != ',' {
			return fail("no comma")
		}
		if rest = strings.TrimLeft(rest[1:], " \t"); rest == "" {
			return fail("a comma at the end")
		}
	}
}

// sfUnquote returns the text of a string, and anything else unchanged.
func sfUnquote(s string) string {
	if !strings.HasPrefix(s, `"`) {
		return s
	}
	return strings.NewReplacer(`\\`, `\`, `\"`, `"`).Replace(s[1 : len(s)-1])
}

func TestParseList(t *testing.T) {
	for _, field := range []string{"", ",", "a,", "a b", "a;", "a; B", `a;b="x`, `a;b="\x"`, "a;b=\"\x7f\"", "a;b=\"ä\"", "a;b;b", "1", "a;b=1.", "a;b=,c"} {
		if list, err := parseList(field); err == nil {
			t.Errorf("%q: %v", field, list)
		}
	}
	list, err := parseList(`a; error=dns_error ;no, b`)
	if err == nil {
		t.Errorf("a space before a semicolon: %v", list)
	}
	list, err = parseList(`"p, 1";b="\"\\",c; error=dns_error;  details="";n=-1.5;yes`)
	if err != nil || fmt.Sprint(list) != `[{p, 1 map[b:"\]} {c map[details: error:dns_error n:-1.5 yes:?1]}]` {
		t.Errorf("%v, %v", list, err)
	}
}

// ownStatus returns the last member of the Proxy-Status of a response, which is this proxy's. The
// whole field must be valid, and the details must be what a status line can carry.
func ownStatus(t testing.TB, header http.Header) map[string]string {
	t.Helper()
	values := header.Values("Proxy-Status")
	list, err := parseList(strings.Join(values, ", "))
	if err != nil {
		t.Errorf("Proxy-Status %q: %v", values, err)
		return nil
	}
	params := list[len(list)-1].params
	if details := params["details"]; details == "" || len(details) > 100 || strings.HasSuffix(details, ".") && !strings.HasSuffix(details, omission) {
		t.Errorf("Proxy-Status %q: the details are %q", values, details)
	}
	return params
}
