// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestReasonPhrase(t *testing.T) {
	long := strings.Repeat("a", 60) + "." + strings.Repeat("b", 60) + ".example.com:443"
	for sentence, want := range map[string]string{
		"x:1 refused the connection.":                              "x:1 refused the connection",
		"The name of bücher.example:443 does not resolve.":         "The name of b?cher.example:443 does not resolve",
		"a\r\nInjected: yes\x00\x7f\t\xff.":                        "a??Injected: yes????",
		"Denied by proxy: no rule allows " + long + ".":            "Denied by proxy: no rule allows aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...bbbbbbbbbbbbbbbbb.example.com:443",
		long + " refused the connection.":                          strings.Repeat("a", 37) + "..." + strings.Repeat("b", 21) + ".example.com:443 refused the connection",
		"The name of " + long + " is " + strings.Repeat("so ", 40): "The name of aaaaaaaaaa...ple.com:443 is so so so so so so so so so so so so so so so so so so so ...",
		strings.Repeat("short ", 20):                               strings.Repeat("short ", 16) + "s...",
		strings.Repeat("w", 100):                                   strings.Repeat("w", maxPhrase),
		strings.Repeat("w", 100+1):                                 strings.Repeat("w", 48) + "..." + strings.Repeat("w", 49),
		strings.Repeat("x", 25) + strings.Repeat(" yy", 26):        strings.Repeat("x", 10) + "..." + strings.Repeat("x", 11) + strings.Repeat(" yy", 24) + " ...",
	} {
		if got := reasonPhrase(sentence); got != want || len(got) > 100 {
			t.Errorf("%q: %q (%d bytes), want %q (%d)", sentence, got, len(got), want, len(want))
		}
	}
}

// What a client can see of a denial must not look like a destination that cannot be reached.
func TestDenialsDifferFromFailures(t *testing.T) {
	denials, failures := make(map[string]cause), make(map[string]cause)
	for c, row := range causes {
		if denied := strings.HasPrefix(row.text, "Denied by "); denied != (row.status == http.StatusForbidden) {
			t.Errorf("%s: %d %q", c, row.status, row.text)
		}
		switch {
		case row.status == http.StatusForbidden:
			denials[row.errorType] = c
		case strings.Contains(strings.ToLower(row.text), "denied") || strings.Contains(row.text, "allow"):
			t.Errorf("%s: %q is no denial, but has the words of one", c, row.text)
		case row.outcome != "" || row.status == http.StatusBadGateway || row.status == http.StatusGatewayTimeout:
			failures[row.errorType] = c
		}
	}
	if len(denials) < 2 || len(failures) < 10 {
		t.Fatalf("found %v and %v", denials, failures)
	}
	for errorType, c := range denials {
		if failure, ok := failures[errorType]; ok {
			t.Errorf("%s and %s both have the error type %s", c, failure, errorType)
		}
	}
}

// Hardly any reason is too long for the status line: a destination with a name of usual length
// is shown as a whole.
func TestPhrasesFit(t *testing.T) {
	onlyForOtherMethods := []cause{causeEchoMethod, causeEchoMaxForwards, causeNoHosts, causeNoHandler}
	for c, row := range causes {
		text := row.text
		switch {
		case slices.Contains(onlyForOtherMethods, c):
			continue
		case strings.Contains(text, "%["):
			text = c.failure(errors.New("SERVFAIL"), "origin.example.com:443").text
		default:
			text = strings.NewReplacer("%s", "origin.example.com:443", "%d", "3600", "%v", "the port is missing").Replace(text)
		}
		if got := reasonPhrase(text); got+"." != text && got != text {
			t.Errorf("%s: %q becomes %q", c, text, got)
		}
	}
}

// TestHostileTargets checks that no target can make Proxy-Status invalid or put anything into
// the header.
func TestHostileTargets(t *testing.T) {
	refusalResolver(t)
	w := newWorld(t, "deny *.denied.example all:1-1024", nil)
	label := strings.Repeat("x", 63)
	long := strings.Join([]string{label, label, label, strings.Repeat("x", 45)}, ".")
	for _, target := range []string{
		long + ".denied.example:443", long + ".invalid:8443", `x"y.invalid:8443`, `x\y.invalid:8443`, `x";error=ok;y="z.invalid:8443`, "b\u00fccher.invalid:8443", "x\x80.invalid:8443",
		"x,y.invalid:8443", "x;y=z.invalid:8443", "(x).invalid:8443", "x%22.invalid:8443", "x%0d%0ay.invalid:8443", "[::ffff:127.0.0.1]:8443", "[fe80::1%25eth0]:443", "x..invalid:8443",
		"-.invalid:99999", "x:y:z", "\u202e.invalid:8443",
	} {
		for _, method := range []string{http.MethodConnect, http.MethodGet} {
			res, body := policyRequest(t, w.proxy, method, target, "")
			if res.StatusCode < 400 || len(res.Header["Proxy-Status"]) > 1 {
				t.Errorf("%s %q: %s", method, target, res.Status)
			}
			if len(res.Header["Proxy-Status"]) == 0 && *byNetHTTP {
				continue // net/http has refused it
			}
			if own := ownStatus(t, res.Header); own["error"] == "" || own["details"] != reasonPhrase(strings.TrimSuffix(body, "\n")) {
				t.Errorf("%s %q: Proxy-Status %q for %q", method, target, res.Header["Proxy-Status"], body)
			}
		}
	}
}

// TestHostileParent checks that Proxy-Status stays valid whatever the parent proxy has sent.
func TestHostileParent(t *testing.T) {
	statuses := []string{
		"parent; Error=dns_error", "parent; a=-", "parent; a=1.", `parent; a="\x"`, "parent; a=?2", "parent; a=:x", "parent;", ", parent", "(parent)", "parent; details=\"\xff\"", "parent; a={b}", "parent ; a=b",
		`parent; error=http_request_denied; details="no \"x\" \\ y"`, "parent;a;b=?0, other",
	}
	address := startScriptedParent(t, func(line string) string {
		var n int
		_, _ = fmt.Sscanf(line, "CONNECT a%d.example", &n)
		return "HTTP/1.1 502 x\nProxy-Status: " + statuses[n] + "\nContent-Length: 0\n\n"
	})
	w := newWorld(t, "via tester\nupstream http://"+address, nil)
	for i, status := range statuses {
		res, _ := policyRequest(t, w.proxy, http.MethodConnect, fmt.Sprintf("a%d.example:443", i), "")
		if own := ownStatus(t, res.Header); res.StatusCode != http.StatusBadGateway || own["error"] != "destination_unavailable" {
			t.Errorf("%q: %s, %q", status, res.Status, res.Header["Proxy-Status"])
		}
	}
}

// TestStatusLine checks that the status line of a refused CONNECT has the reason on both serving
// paths, that their responses are the same in everything else, and that so are the access logs.
func TestStatusLine(t *testing.T) {
	const denied = "403 Denied by proxy: no rule allows host.example:443"
	for name, row := range map[string]struct{ routes, status string }{
		"text":         {"", denied},
		"error route":  {"respond \"sorry\" {err.status_code}", denied},
		"long page":    {"respond \"" + strings.Repeat("sorry ", 1000) + "\" {err.status_code}", denied},
		"other status": {"respond \"sorry\" 418", "418 I'm a teapot"},
		"no response":  {"vars x y", denied},
		"other fields": {"header >Proxy-Status error wrong\nheader -Server\nrespond {err.status_code}", denied},
	} {
		for _, overTLS := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s over TLS %v", name, overTLS), func(t *testing.T) {
				w := newWorld(t, "", nil)
				f := form{overTLS: overTLS}
				var fast string
				for _, change := range []func(string) string{func(site string) string { return site }, byCaddy} {
					site := f.site(t, w.site("via tester\nallow other.example\ndeny all"))
					if row.routes != "" {
						site = strings.TrimSuffix(site, "}\n") + "handle_errors {\n" + row.routes + "\n}\n}\n"
					}
					w.load(strings.Replace(change(site), "{\n", "{\nlog\n", 1))
					before := len(w.logLines("handled request"))
					var all string
					for _, version := range []string{"1.1", "1.0"} {
						c := f.dial(t, w.proxy)
						c.send("CONNECT host.example:443 HTTP/" + version + "\nHost: host.example:443\n\nearly")
						answer := regexp.MustCompile(`Date: [^\r]*`).ReplaceAllString(c.readAll(), "Date")
						line, head, _ := strings.Cut(answer, "\r\n")
						if want := "HTTP/" + version + " " + row.status; line != want {
							t.Errorf("%s, want %s", line, want)
						}
						head, content, _ := strings.Cut(head, "\r\n\r\n")
						lines := strings.Split(head, "\r\n")
						slices.Sort(lines)
						all += fmt.Sprintf("%q %q\n", lines, content)
					}
					for _, line := range w.waitLog("handled request", before+2)[before:] {
						all += fmt.Sprint(line["status"], line["size"], line["resp_headers"], "\n")
					}
					if fast == "" {
						fast = all
					} else if all != fast {
						t.Errorf("%s\nbut on the fast path\n%s", all, fast)
					}
				}
			})
		}
	}
}

// TestDenyHint checks that the hint ends the text of a denial, on both serving paths, and is nowhere
// else.
func TestDenyHint(t *testing.T) {
	const hint = "Ask in #egress about {http.async_proxy.rule}, {http.async_proxy.client}."
	for way, change := range map[string]func(string) string{"fast": func(site string) string { return site }, "ordinary": byCaddy} {
		t.Run(way, func(t *testing.T) {
			w := newWorld(t, "", nil)
			w.load(change(w.site("deny ads.example\ndeny_hint \"" + hint + "\"")))
			for _, method := range []string{http.MethodConnect, http.MethodGet} {
				res, body := policyRequest(t, w.proxy, method, "ads.example:443", "")
				if body != "Denied by proxy: a rule denies ads.example:443. Ask in #egress about deny ads.example, 127.0.0.1.\n" {
					t.Errorf("%s: %q", method, body)
				}
				if own := ownStatus(t, res.Header); own["details"] != "Denied by proxy: a rule denies ads.example:443" || strings.Contains(res.Status, "Ask") {
					t.Errorf("%s: %s, %q", method, res.Status, own)
				}
				if _, body := policyRequest(t, w.proxy, method, freeAddress(t), ""); strings.Contains(body, "Ask") {
					t.Errorf("%s of a destination that refuses connections: %q", method, body)
				}
			}
			w.load(change(w.site("deny ads.example\ndeny_hint \"Ask me.\"\nzone other")))
			if _, body := policyRequest(t, w.proxy, http.MethodConnect, "ads.example:443", ""); body != "Denied by proxy: a rule denies ads.example:443. Ask me.\n" {
				t.Errorf("%q", body)
			}
			if detail := lastRefusals(t, "")[0].Detail; strings.Contains(detail, "Ask") {
				t.Errorf("the status page has %q", detail)
			}
		})
	}
}

func TestPrefersProblem(t *testing.T) {
	for accept, want := range map[string]bool{
		"": false, "*/*": false, "text/html, */*;q=0.8": false, "application/*": false, "text/plain": false, "application/xml": false,
		"application/json": true, "application/problem+json": true, "Application/JSON": true, "text/html, application/json": true,
		"application/json, text/plain, */*": true, "application/json;q=0.5, */*;q=0.4": true, "application/json; q=0.5, text/html": true,
		"application/json;q=0.5, */*": false, "application/json;q=0.5, text/plain": false, "application/json;q=0.5, text/plain;q=0.1, */*": true,
		"application/json;q=0": false, "application/json;q=x": false, "application/json;q=2": false, "application/json;q=NaN": false,
		"application/json, application/problem+json;q=0": false, "application/json;q=0, application/problem+json": true,
		"application/json;q=0.5, text/*;q=0.6": false, "application/json;charset=utf-8;q=1.000": true, "application/ld+json": false, ";;,=,json": false,
	} {
		if got := prefersProblem([]string{accept}); got != want {
			t.Errorf("%q: %v", accept, got)
		}
	}
	if prefersProblem(nil) || !prefersProblem([]string{"text/html", "application/json"}) || prefersProblem([]string{"text/plain", "application/json;q=0.9"}) {
		t.Error("wrong for several fields")
	}
}

// TestProblemDetails checks the problem details of refusals of all kinds, over HTTP/1 on both
// serving paths.
func TestProblemDetails(t *testing.T) {
	closed := freeAddress(t)
	for way, change := range map[string]func(string) string{"fast": func(site string) string { return site }, "ordinary": byCaddy} {
		for _, row := range []struct{ options, method, target, want string }{
			{"deny ads.example\ndeny_hint \"See <https://wiki.example/?a&b>.\"", "CONNECT", "ads.example:443",
				`{"status":403,"title":"Forbidden","detail":"Denied by proxy: a rule denies ads.example:443.","error":"http_request_denied","target":"ads.example:443","rule":"deny ads.example","hint":"See <https://wiki.example/?a&b>."}`},
			{"policy guests {\nclients 127.0.0.0/8\ndeny ads.example\n}", "GET", "ads.example:80",
				`{"status":403,"title":"Forbidden","detail":"Denied by proxy: a rule denies ads.example:80.","error":"http_request_denied","target":"ads.example:80","policy":"guests","rule":"deny ads.example"}`},
			{"", "GET", "169.254.169.254:80",
				`{"status":403,"title":"Forbidden","detail":"Denied by proxy: no rule allows 169.254.169.254:80 (its address has a special purpose).","error":"destination_ip_prohibited","target":"169.254.169.254:80","rule":"default"}`},
			{authUsers, "CONNECT", "ads.example:443",
				`{"status":407,"title":"Proxy Authentication Required","detail":"This proxy requires a user name and password.","error":"http_request_denied","target":"ads.example:443"}`},
			{"burst 1\nrefill 0.01", "GET", closed,
				`{"status":429,"title":"Too Many Requests","detail":"Too many requests from your address; try again in 100 s.","error":"http_request_denied","target":"` + closed + `","retry_after":100}`},
			{"", "CONNECT", closed,
				`{"status":502,"title":"Bad Gateway","detail":"` + closed + ` refused the connection.","error":"connection_refused","target":"` + closed + `"}`},
		} {
			t.Run(way+" "+row.target, func(t *testing.T) {
				w := newWorld(t, "", nil)
				w.load(change(w.site(row.options + "\nzone problem")))
				if strings.Contains(row.options, "burst") {
					policyRequest(t, w.proxy, row.method, row.target, "")
				}
				for _, accept := range []string{"application/json", "application/problem+json, */*"} {
					res, body := policyRequest(t, w.proxy, row.method, row.target, "Accept: "+accept+"\n")
					if got := strings.NewReplacer("in 99 s", "in 100 s", `:99}`, `:100}`).Replace(body); got != row.want+"\n" || res.Header.Get("Content-Type") != problemType || ownStatus(t, res.Header) == nil {
						t.Errorf("%s, %q, %s, want %s", res.Status, res.Header, body, row.want)
					}
				}
				if _, body := policyRequest(t, w.proxy, row.method, row.target, "Accept: */*\n"); strings.HasPrefix(body, "{") {
					t.Errorf("%s for */*", body)
				}
			})
		}
	}
}

// TestDenialsBeforeLogin checks that a client that has not logged in cannot tell destinations that
// the rules deny from others, nor learn of rules and policies in any other way.
func TestDenialsBeforeLogin(t *testing.T) {
	w := newWorld(t, authUsers+"\nfailed_logins off\ndeny ads.example\nports 80-100\ndeny_hint \"Ask about {http.async_proxy.rule}.\"\npolicy guests {\nclients 127.0.0.0/8\ndeny other.example\nmethods GET CONNECT\n}", nil)
	for _, credentials := range []string{"", "Proxy-Authorization: " + login("alice", "?") + "\n"} {
		for _, accept := range []string{"", "Accept: application/json\n"} {
			for _, method := range []string{http.MethodConnect, http.MethodGet, http.MethodDelete} {
				var shape string
				for _, target := range []string{"site.example:80", "ads.example:80", "other.example:80", "169.254.169.254:80", "site.example:25", w.proxy} {
					res, body := policyRequest(t, w.proxy, method, target, accept+credentials)
					for _, name := range []string{"Date", "Content-Length"} {
						res.Header.Del(name)
					}
					got := res.Status + fmt.Sprint(res.Header) + strings.ReplaceAll(body, target, "TARGET")
					if shape == "" {
						shape = got
					}
					if res.StatusCode != http.StatusProxyAuthRequired || got != shape || strings.Contains(got, "Ask") || strings.Contains(got, "guests") || strings.Contains(got, "rule") {
						t.Errorf("%s %s: %s, want %s", method, target, got, shape)
					}
				}
			}
		}
	}
	// A client that may not use the proxy at all learns that and nothing else.
	w.load(w.site(authUsers + "\nclients 192.0.2.0/24\nzone clients\ndeny_hint \"Ask about {http.async_proxy.rule}.\"\npolicy guests {\nclients 127.0.0.0/8\nburst 5\n}"))
	_, body := policyRequest(t, w.proxy, http.MethodConnect, "ads.example:80", "Accept: application/json\n")
	if want := `{"status":403,"title":"Forbidden","detail":"Denied by proxy: your address, 127.0.0.1, may not use it.","error":"http_request_denied","target":"ads.example:80"}` + "\n"; body != want {
		t.Errorf("%s, want %s", body, want)
	}
}

// TestClientsShowTheReason checks what curl and Go show of a refused CONNECT, and that the page
// about clients says the same.
func TestClientsShowTheReason(t *testing.T) {
	page, err := os.ReadFile("docs/denials.md")
	if err != nil {
		t.Fatal(err)
	}
	closed := freeAddress(t)
	for _, row := range []struct {
		options, target string
		status          int
		phrase          string
	}{
		{"allow other.example.com\ndeny all", "example.com", 403, "Denied by proxy: no rule allows example.com:443"},
		{authUsers, "example.com", 407, "This proxy requires a user name and password"},
		{"burst 1\nrefill 0.05", "example.com", 429, "Too many requests from your address; try again in 20 s"},
		{"", closed, 502, closed + " refused the connection"},
	} {
		t.Run(fmt.Sprint(row.status), func(t *testing.T) {
			w := newWorld(t, row.options+"\nzone shown", nil)
			if row.status == http.StatusTooManyRequests {
				w.gets(w.proxy, 200)
			}
			seconds := regexp.MustCompile(`in (1\d|20) s`)
			_, err := w.client().Get("https://" + row.target + "/")
			var failed *url.Error
			if !errors.As(err, &failed) || seconds.ReplaceAllString(failed.Err.Error(), "in 20 s") != row.phrase {
				t.Errorf("Go: %v, want %s", err, row.phrase)
			}
			out, _ := exec.Command("curl", "-sv", "--max-time", "20", "-x", "http://"+w.proxy, "https://"+row.target+"/").CombinedOutput()
			shown := seconds.ReplaceAllString(string(out), "in 20 s")
			for _, want := range []string{fmt.Sprintf("< HTTP/1.1 %d %s\r\n", row.status, row.phrase), fmt.Sprintf("CONNECT tunnel failed, response %d", row.status)} {
				if !strings.Contains(shown, want) {
					t.Errorf("curl: %s, want %q", out, want)
				}
			}
			if phrase := strings.Replace(row.phrase, closed, "127.0.0.1:18099", 1); !strings.Contains(string(page), fmt.Sprintf("< HTTP/1.1 %d %s`", row.status, phrase)) {
				t.Errorf("the page does not have %d %q", row.status, phrase)
			}
		})
	}
}
