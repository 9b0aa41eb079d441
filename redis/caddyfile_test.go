// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// adapt converts a Caddyfile to JSON, as `caddy adapt` does.
func adapt(input, filename string) (config []byte, warnings []caddyconfig.Warning, err error) {
	return caddyconfig.GetAdapter("caddyfile").Adapt([]byte(input), map[string]any{"filename": filename})
}

func TestCaddyfile(t *testing.T) {
	for _, tc := range []struct{ option, want string }{
		{`limiter redis 127.0.0.1`, `{"module": "redis", "addresses": ["127.0.0.1"]}`},
		{`limiter redis {env.REDIS} [::1]:6380 ::1 redis.example:1`, `{"module": "redis", "addresses": ["{env.REDIS}", "[::1]:6380", "::1", "redis.example:1"]}`},
		{"limiter redis localhost {\n}", `{"module": "redis", "addresses": ["localhost"]}`},
		{"limiter redis localhost {\ntls\n}", `{"module": "redis", "addresses": ["localhost"], "tls": {}}`},
		{`limiter redis localhost {
			username alice
			password {env.SECRET}
			tls      /etc/ca.pem
			db       3
			sentinel mymaster
			prefix   proxy:a
			timeout  75ms
			on_error deny
		}`, `{"module": "redis", "addresses": ["localhost"], "username": "alice", "password": "{env.SECRET}", "tls": {"ca": "/etc/ca.pem"},
			"db": 3, "sentinel": "mymaster", "prefix": "proxy:a", "timeout": 75000000, "on_error": "deny"}`},
	} {
		config, _, err := adapt(":8080 {\nasync_proxy {\nburst 5\n"+tc.option+"\nrefill 2\n}\n}", "Caddyfile")
		if err != nil {
			t.Errorf("%s: %v", tc.option, err)
			continue
		}
		var got struct {
			Apps struct {
				HTTP struct {
					Servers map[string]struct {
						Routes []struct{ Handle []map[string]any }
					}
				}
			}
		}
		want := map[string]any{"handler": "async_proxy", "burst": 5.0, "refill": 2.0, "limiter": nil}
		var limiter map[string]any
		if err := json.Unmarshal([]byte(tc.want), &limiter); err != nil {
			t.Fatal(err)
		}
		want["limiter"] = limiter
		if err := json.Unmarshal(config, &got); err != nil {
			t.Fatal(err)
		}
		if handler := got.Apps.HTTP.Servers["srv0"].Routes[0].Handle[0]; !reflect.DeepEqual(handler, want) {
			t.Errorf("%s\ngives %v\nwant  %v", tc.option, handler, want)
		}
	}
}

func TestCaddyfileMistakes(t *testing.T) {
	for option, want := range map[string]string{
		"limiter redis":                                 "redis: missing value; expected addresses of servers as host:port, and username and password as options, at Caddyfile:3",
		"limiter redis {\ndb 1\n}":                      "redis: missing value; expected addresses of servers as host:port, and username and password as options, at Caddyfile:3",
		"limiter redis a:b":                             "redis: the value 'a:b' is not valid; expected addresses of servers as host:port, and username and password as options, at Caddyfile:3",
		"limiter redis a redis://:open-sesame@b":        "redis: a value is a URL or has a user; expected addresses of servers as host:port, and username and password as options, at Caddyfile:3",
		"limiter redis alice:open{sesame}@b":            "redis: a value is a URL or has a user; expected addresses of servers as host:port, and username and password as options, at Caddyfile:3",
		"limiter redis a:0":                             "redis: the value 'a:0' is not valid; expected addresses of servers as host:port, and username and password as options, at Caddyfile:3",
		"limiter redis \"\"":                            "redis: the value '' is not valid; expected addresses of servers as host:port, and username and password as options, at Caddyfile:3",
		"limiter redis a {\nnonsense\n}":                "unrecognized option 'nonsense'; expected one of db, on_error, password, prefix, sentinel, timeout, tls, username, at Caddyfile:4",
		"limiter redis a {\ndb 1\ndb 2\n}":              "db: the option is set twice; expected it once, at Caddyfile:5",
		"limiter redis a {\ndb\n}":                      "db: missing value; expected the number of a database, from 0, at Caddyfile:4",
		"limiter redis a {\ndb 1 2\n}":                  "db: more than one value; expected the number of a database, from 0, at Caddyfile:4",
		"limiter redis a {\ndb -1\n}":                   "db: the value '-1' is not valid; expected the number of a database, from 0, at Caddyfile:4",
		"limiter redis a {\ndb 1 {\nx\n}\n}":            "db: unexpected block; expected the number of a database, from 0, at Caddyfile:5",
		"limiter redis a {\ntls a b\n}":                 "tls: more than one value; expected no value, or a file with certificates, at Caddyfile:4",
		"limiter redis a {\nusername\n}":                "username: missing value; expected a name, at Caddyfile:4",
		"limiter redis a {\npassword secret of mine\n}": "password: more than one value; expected a password, such as {env.REDIS_PASSWORD}, at Caddyfile:4",
		"limiter redis a {\npassword \"\"\n}":           "password: the value '' is not valid; expected a password, such as {env.REDIS_PASSWORD}, at Caddyfile:4",
		"limiter redis a {\nsentinel\n}":                "sentinel: missing value; expected the name of the set of servers that the sentinels watch over, at Caddyfile:4",
		"limiter redis a {\nprefix \"a b\"\n}":          "prefix: the value 'a b' is not valid; expected a name without spaces and braces, at Caddyfile:4",
		"limiter redis a {\nprefix {env.A}\n}":          "prefix: the value '{env.A}' is not valid; expected a name without spaces and braces, at Caddyfile:4",
		"limiter redis a {\ntimeout 0\n}":               "timeout: the value '0' is not valid; expected a positive duration such as 50ms, at Caddyfile:4",
		"limiter redis a {\ntimeout soon\n}":            "timeout: the value 'soon' is not valid; expected a positive duration such as 50ms, at Caddyfile:4",
		"limiter redis a {\non_error panic\n}":          "on_error: the value 'panic' is not valid; expected local, allow or deny, at Caddyfile:4",
	} {
		_, _, err := adapt(":8080 {\nasync_proxy {\n"+option+"\n}\n}\n", "Caddyfile")
		if want := "parsing caddyfile tokens for 'async_proxy': " + want; err == nil || err.Error() != want {
			t.Errorf("%s\ngives %v\nwant  %v", option, err, want)
		}
	}
}

// validate makes Caddy check a config with one limiter, in JSON, without running it.
func validate(t *testing.T, limiter string) error {
	t.Helper()
	var config caddy.Config
	text := fmt.Sprintf(`{"admin": {"disabled": true, "config": {"persist": false}}, "logging": {"logs": {"default": {"writer": {"output": "discard"}}}},
		"apps": {"http": {"servers": {"srv0": {"listen": ["127.0.0.1:0"], "routes": [{"handle": [{"handler": "async_proxy", "limiter": {"module": "redis", %s}}]}]}}}}}`, limiter)
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		t.Fatalf("%s: %v", limiter, err)
	}
	return caddy.Validate(&config)
}

// Each mistake is refused, and no server stays referenced.
func TestJSONMistakes(t *testing.T) {
	t.Setenv("REDIS_TEST_EMPTY", "")
	t.Setenv("REDIS_TEST_URL", "redis://:open-sesame@a")
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	for options, want := range map[string]string{
		`"db": 0`:                                                  "addresses: there are none; expected host:port of at least one server",
		`"addresses": ["a", "b:0"]`:                                `addresses "b:0": expected host:port, and username and password as options`,
		`"addresses": ["{env.REDIS_TEST_URL}"]`:                    `addresses "{env.REDIS_TEST_URL}": expected host:port, and username and password as options`,
		`"addresses": ["redis://:open{sesame}@a"]`:                 "addresses: one of them is a URL or has a user; expected host:port, and username and password as options",
		`"addresses": ["{env.REDIS_TEST_EMPTY}"]`:                  "addresses: evaluated placeholder {env.REDIS_TEST_EMPTY} is empty",
		`"addresses": ["a"], "username": "alice"`:                  "username: there is no password; expected one",
		`"addresses": ["a"], "password": "{env.REDIS_TEST_EMPTY}"`: "password: a placeholder in it is empty or unknown",
		`"addresses": ["a"], "password": "sec{r}et"`:               "password: a placeholder in it is empty or unknown",
		`"addresses": ["a"], "db": -1`:                             "db -1: expected the number of a database, from 0",
		`"addresses": ["a"], "timeout": -1`:                        "timeout -1ns: expected a positive duration",
		`"addresses": ["a"], "prefix": "a b"`:                      `prefix "a b": expected a name without spaces and braces`,
		`"addresses": ["a"], "prefix": "{a}"`:                      `prefix "{a}": expected a name without spaces and braces`,
		`"addresses": ["a"], "on_error": "panic"`:                  `on_error "panic": expected local, allow or deny`,
		`"addresses": ["a"], "tls": {"ca": "/nonexistent"}`:        "tls: open /nonexistent: no such file or directory",
		`"addresses": ["a"], "tls": {"ca": "` + file + `"}`:        "tls: " + file + ": it contains no PEM certificate",
	} {
		if err := validate(t, options); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v\nwant %s at the end", options, err, want)
		}
	}
	if err := validate(t, `"addresses": ["127.0.0.1:1"]`); err != nil {
		t.Error(err)
	}
	servers.Range(func(key, _ any) bool {
		t.Errorf("a server was not released")
		return true
	})
}

// FuzzCaddyfile checks that any tokens of a block give either an error or a valid config
// that survives JSON.
func FuzzCaddyfile(f *testing.F) {
	f.Add("redis 127.0.0.1:6379 [::1] {env.A}")
	f.Add("redis a {\n username a\n password b\n tls\n db 1\n sentinel c\n prefix d\n timeout 1s\n on_error allow\n}")
	f.Add("redis a {\n tls /ca.pem\n db 1 {\n }\n}}")
	f.Add("redis { {\n}\n")
	f.Fuzz(func(t *testing.T, input string) {
		tokens, err := caddyfile.Tokenize([]byte(input), "Caddyfile")
		if err != nil || !utf8.ValidString(input) { // JSON is UTF-8
			return
		}
		l := new(Limiter)
		if err := l.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
			return
		}
		data, err := json.Marshal(l)
		if err != nil {
			t.Fatalf("%q: %v", input, err)
		}
		again := new(Limiter)
		if err := caddy.StrictUnmarshalJSON(data, again); err != nil {
			t.Fatalf("%q gives %s: %v", input, data, err)
		}
		if !reflect.DeepEqual(l, again) {
			t.Fatalf("%q gives %s, which gives %+v, want %+v", input, data, again, l)
		}
		l.OnError, l.Prefix = orDefault(l.OnError, "local"), orDefault(l.Prefix, "a")
		if err := l.validate(); err != nil && (l.Username == "" || l.Password != "") {
			t.Errorf("%q gives %s: %v", input, data, err)
		}
		for _, address := range l.Addresses {
			if _, ok := parseAddress(address); !ok && !strings.Contains(address, "{") {
				t.Errorf("%q gives %s: unexpected address %q", input, data, address)
			}
		}
	})
}

func orDefault(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// checkShipped checks a Caddyfile that users copy: it must adapt without warnings and be
// formatted as by `caddy fmt`.
func checkShipped(t *testing.T, text, filename string) {
	t.Helper()
	_, warnings, err := adapt(text, filename)
	if err != nil {
		t.Errorf("adapting: %v\n%s", err, text)
	}
	for _, warning := range warnings {
		t.Errorf("adapting: %v\n%s", warning, text)
	}
	if formatted := string(caddyfile.Format([]byte(text))); formatted != text {
		t.Errorf("formatted:\n%s\nfile:\n%s", formatted, text)
	}
}

const page = "../docs/redis.md"

func TestShippedCaddyfiles(t *testing.T) {
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?ms)^```caddyfile\n(.*?)^```").FindAllSubmatch(text, -1)
	if len(blocks) == 0 {
		t.Error("found no Caddyfile in " + page)
	}
	for _, block := range blocks {
		checkShipped(t, string(block[1]), page)
	}
	const example = "../examples/redis/Caddyfile"
	if text, err = os.ReadFile(example); err != nil {
		t.Fatal(err)
	}
	checkShipped(t, string(text), example)
}

// syntaxOptions returns the options in a description of the syntax, which are indented
// deeper than the line that starts with "redis".
func syntaxOptions(t *testing.T, text, start string) []string {
	t.Helper()
	_, rest, found := strings.Cut(text, start)
	block, _, found2 := strings.Cut(rest, "\n}")
	if !found || !found2 {
		t.Fatalf("found no syntax in %q", text)
	}
	var options []string
	for line := range strings.Lines(block[strings.IndexByte(block, '\n'):]) {
		if words := strings.Fields(line); len(words) > 0 {
			options = append(options, words[0])
		}
	}
	slices.Sort(options)
	return options
}

func TestSyntaxNamesEveryOption(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "caddyfile.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	var doc string
	ast.Inspect(file, func(n ast.Node) bool {
		if f, ok := n.(*ast.FuncDecl); ok && f.Name.Name == "UnmarshalCaddyfile" {
			doc = strings.ReplaceAll(f.Doc.Text(), "\n\t", "\n")
		}
		return true
	})
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	want := slices.Sorted(maps.Keys(expectations))
	if got := syntaxOptions(t, doc, "redis <address...>"); !slices.Equal(got, want) {
		t.Errorf("the comment of UnmarshalCaddyfile names the options %v, want %v", got, want)
	}
	if got := syntaxOptions(t, string(text), "limiter redis <address...>"); !slices.Equal(got, want) {
		t.Errorf("%s names the options %v, want %v", page, got, want)
	}
}
