// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
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

// adapted is the part of an adapted config that the tests check.
type adapted struct {
	Apps struct {
		HTTP struct {
			Servers map[string]struct {
				Routes []struct {
					Handle []map[string]any `json:"handle"`
				} `json:"routes"`
			} `json:"servers"`
		} `json:"http"`
	} `json:"apps"`
}

// handlers returns the handlers of a Caddyfile's first site, in order.
func handlers(t *testing.T, input string) []map[string]any {
	t.Helper()
	config, _, err := adapt(input, "Caddyfile")
	if err != nil {
		t.Fatalf("adapting %s: %v", input, err)
	}
	var c adapted
	if err := json.Unmarshal(config, &c); err != nil {
		t.Fatal(err)
	}
	var list []map[string]any
	for _, route := range c.Apps.HTTP.Servers["srv0"].Routes {
		list = append(list, route.Handle...)
	}
	return list
}

func TestCaddyfile(t *testing.T) {
	for _, tc := range []struct{ name, directive, want string }{
		{"bare", `async_proxy`, `{}`},
		{"empty block", "async_proxy {\n}", `{}`},
		{"one line", `async_proxy burst 200 refill 20`, `{"burst": 200, "refill": 20}`},
		{"one line, the other way round", `async_proxy refill 20 burst 200`, `{"burst": 200, "refill": 20}`},
		{"one line, one option", `async_proxy refill 0.1`, `{"refill": 0.1}`},
		{"block", "async_proxy {\n burst 200\n refill 20\n}", `{"burst": 200, "refill": 20}`},
		{"one line and block", "async_proxy burst 200 {\n refill 20\n}", `{"burst": 200, "refill": 20}`},
		{"quoted", "async_proxy {\n \"burst\" `200`\n}", `{"burst": 200}`},
		{"least", "async_proxy {\n burst 1\n refill 0.00001\n ipv4_prefix 1\n ipv6_prefix 1\n max_clients 2\n dial_timeout 1ns\n max_tunnels 1\n}",
			`{"burst": 1, "refill": 0.00001, "ipv4_prefix": 1, "ipv6_prefix": 1, "max_clients": 2, "dial_timeout": 1, "max_tunnels": 1}`},
		{"greatest", "async_proxy {\n burst 1000000000\n refill 1e6\n ipv4_prefix 32\n ipv6_prefix 128\n}",
			`{"burst": 1000000000, "refill": 1000000, "ipv4_prefix": 32, "ipv6_prefix": 128}`},
		{"lists", "async_proxy {\n exempt 10.0.0.0/8 192.0.2.1\n exempt private_ranges\n allow 2001:db8::/32\n allow ::1 10.0.0.1\n hosts a.example\n hosts b.example 192.0.2.1\n}",
			`{"exempt": ["10.0.0.0/8", "192.0.2.1", "private_ranges"],
				"rules": [{"action": "allow", "destinations": ["2001:db8::/32"]}, {"action": "allow", "destinations": ["::1", "10.0.0.1"]}], "hosts": ["a.example", "b.example", "192.0.2.1"]}`},
		{"off", "async_proxy {\n via off\n forwarded_for off\n tunnel_idle_timeout off\n response_header_timeout off\n}",
			`{"via": "off", "forwarded_for": "off", "tunnel_idle_timeout": -1, "response_header_timeout": -1}`},
		{"stream_close_delay at once", "async_proxy {\n stream_close_delay 0\n}", `{"stream_close_delay": 0}`},
		{"everything", `async_proxy {
			burst         20
			refill        2.5
			ipv4_prefix   24
			ipv6_prefix   56
			max_clients   1000
			zone          office
			exempt        10.0.0.0/8
			allow         192.168.0.0/16
			dial_timeout  5s
			response_header_timeout 1m
			via           fred
			forwarded_for auto
			hosts         proxy.example.com
			max_tunnels         100 per_client 10
			tunnel_idle_timeout 1d
			tunnel_stall_timeout 2m
			tunnel_max_duration 24h
			stream_close_delay  5m
			recheck_tunnels
			deny          *.example.com:80-81 ads.example
			allow_file    testdata/destinations.txt
			deny_from     static 192.0.2.0/24 private_ranges
			ports         80 443 8000-8999
			connect_ports 443
			clients       10.0.0.0/8
			clients       private_ranges
			basic_auth bcrypt Office {
				alice $2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi
				bob   $2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi
			}
			limit_by      user
			report_only   rules limits
			resolvers     192.0.2.53 tcp/[2001:db8::53]:5353
			serve_pac {
				direct *.corp.example
			}
			no_upstream   *.corp.example 10.0.0.0/8
			upstream https://user:{env.PASSWORD}@proxy.example:3128 {
				header X-Team crawler
				tls_server_name other.example
				tls_trust_pool file /etc/ca.pem
				tls_insecure_skip_verify
			}
		}`, `{
			"burst": 20, "refill": 2.5, "ipv4_prefix": 24, "ipv6_prefix": 56, "max_clients": 1000, "zone": "office",
			"exempt": ["10.0.0.0/8"], "dial_timeout": 5000000000, "response_header_timeout": 60000000000,
			"via": "fred", "forwarded_for": "auto", "hosts": ["proxy.example.com"],
			"max_tunnels": 100, "max_tunnels_per_client": 10, "tunnel_idle_timeout": 86400000000000, "tunnel_stall_timeout": 120000000000, "tunnel_max_duration": 86400000000000,
			"stream_close_delay": 300000000000, "recheck_tunnels": true,
			"rules": [
				{"action": "allow", "destinations": ["192.168.0.0/16"]},
				{"action": "deny", "destinations": ["*.example.com:80-81", "ads.example"]},
				{"action": "allow", "files": ["testdata/destinations.txt"], "files_hash": "` + hashFiles([]string{"testdata/destinations.txt"}) + `"},
				{"action": "deny", "source": {"source": "static", "ranges": ["192.0.2.0/24", "192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8", "127.0.0.1/8", "fd00::/8", "::1"]}}
			],
			"ports": ["80", "443", "8000-8999"], "connect_ports": ["443"], "clients": ["10.0.0.0/8", "private_ranges"],
			"authentication": {"http_basic": {"hash": {"algorithm": "bcrypt"}, "realm": "Office", "hash_cache": {}, "accounts": [
				{"username": "alice", "password": "$2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi"},
				{"username": "bob", "password": "$2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi"}
			]}},
			"limit_by": "user", "report_only": ["rules", "limits"], "resolvers": ["192.0.2.53", "tcp/[2001:db8::53]:5353"],
			"serve_pac": "/proxy.pac", "pac_direct": ["*.corp.example"], "no_upstream": ["*.corp.example", "10.0.0.0/8"],
			"upstream": {
				"url": "https://user:{env.PASSWORD}@proxy.example:3128", "headers": {"X-Team": "crawler"},
				"tls": {"server_name": "other.example", "insecure_skip_verify": true, "ca": {"provider": "file", "pem_files": ["/etc/ca.pem"]}}
			}
		}`},
		{"header operations", "async_proxy {\n header_up X-A one\n header_up -X-B\n header_up X-C a b\n header_up -X-*\n header_up {http.request.method} c\n header_down +X-D two\n header_down X-E three\n}",
			`{"headers": {
				"request": {"set": {"X-A": ["one"], "{http.request.method}": ["c"]}, "delete": ["X-B", "X-*"], "replace": {"X-C": [{"search_regexp": "a", "replace": "b"}]}},
				"response": {"add": {"X-D": ["two"]}, "set": {"X-E": ["three"]}}
			}}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := handlers(t, ":8080 {\n"+tc.directive+"\n}")
			want := map[string]any{"handler": "async_proxy"}
			if err := json.Unmarshal([]byte(tc.want), &want); err != nil {
				t.Fatal(err)
			}
			if len(got) != 1 || !reflect.DeepEqual(got[0], want) {
				t.Errorf("%s\ngives %v\nwant  %v", tc.directive, got, want)
			}
		})
	}
}

func TestCaddyfileMatcher(t *testing.T) {
	config, _, err := adapt(":8080 {\n\t@lan remote_ip 10.0.0.0/8\n\tasync_proxy @lan burst 5 {\n\t\trefill 2\n\t}\n}", "Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"match":[{"remote_ip":{"ranges":["10.0.0.0/8"]}}]`, `{"burst":5,"handler":"async_proxy","refill":2}`} {
		if !strings.Contains(string(config), want) {
			t.Errorf("%s\nlacks %s", config, want)
		}
	}
}

// A site with authentication is no open proxy, and other handlers of the site serve the
// requests that the proxy passes on.
func TestDirectiveOrder(t *testing.T) {
	got := handlers(t, `:8080 {
		respond hello
		reverse_proxy 127.0.0.1:1
		encode gzip
		async_proxy
		request_header X-A b
		basic_auth {
			bob $2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi
		}
		rewrite /a
	}`)
	var names []string
	for _, handler := range got {
		names = append(names, handler["handler"].(string))
	}
	want := []string{"rewrite", "authentication", "headers", "async_proxy", "encode", "static_response", "reverse_proxy"}
	if !slices.Equal(names, want) {
		t.Errorf("the order of handlers is %v, want %v", names, want)
	}
}

func TestCaddyfileMistakes(t *testing.T) {
	const (
		tokens       = "expected a whole number of tokens from 1 to 1000000000"
		perSecond    = "expected tokens per second from 0.00001 to 1000000"
		clients      = "expected a whole number of clients from 2 to 1000000000"
		destinations = "expected addresses, CIDR ranges, names, *.names, public, private or all, each optionally followed by :<ports>"
		users        = "expected [bcrypt|argon2id [<realm>]] and a block of `<user> <hash>` lines"
		parents      = "expected http|https|socks5://[<user>[:<password>]@]<host>[:<port>]"
		ranges       = "expected addresses, CIDR ranges such as 10.0.0.0/8, or private_ranges"
		tunnels      = "expected <n> [per_client <n>], each from 1 to 1000000000"
		pseudonym    = "expected a pseudonym of letters, digits, dots and hyphens that starts with a letter, or off"
		names        = "expected names of this server, without ports"
		zones        = "expected a name in printable ASCII without spaces, quotes and backslashes"
		header       = "expected [+|-]<field> [<value|regexp> [<replacement>]]"
		files        = "expected readable files with one destination per line"
		sources      = "expected a source of CIDR ranges, as for trusted_proxies"
		hash         = "$2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi"
		arguments    = "expected burst <tokens>, refill <tokens_per_second>, or a block of options"
	)
	list := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(list, []byte("# destinations\n\na.example:443\na b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ directive, want string }{
		{"async_proxy nonsense", "unexpected argument 'nonsense'; " + arguments + ", at Caddyfile:2"},
		{"async_proxy 10", "unexpected argument '10'; " + arguments + ", at Caddyfile:2"},
		{"async_proxy zone a", "unexpected argument 'zone'; " + arguments + ", at Caddyfile:2"},
		{"async_proxy burst 5 nonsense", "unexpected argument 'nonsense'; " + arguments + ", at Caddyfile:2"},
		{"async_proxy burst", "burst: missing value; " + tokens + ", at Caddyfile:2"},
		{"async_proxy refill", "refill: missing value; " + perSecond + ", at Caddyfile:2"},
		{"async_proxy burst refill 5", "burst: the value 'refill' is not valid; " + tokens + ", at Caddyfile:2"},
		{"async_proxy burst ten", "burst: the value 'ten' is not valid; " + tokens + ", at Caddyfile:2"},
		{"async_proxy burst 5 burst 6", "burst: the option is already set at Caddyfile:2; expected it once, at Caddyfile:2"},
		{"async_proxy burst 5 {\nburst 6\n}", "burst: the option is already set at Caddyfile:2; expected it once, at Caddyfile:3"},

		{"async_proxy {\nnonsense 5\n}", "unrecognized option 'nonsense'; expected one of " + strings.Join(optionNames(), ", ") + ", at Caddyfile:3"},
		{"async_proxy {\nburst 5\n\nBurst 5\n}", "unrecognized option 'Burst'; did you mean burst?, at Caddyfile:5"},
		{"async_proxy {\nburst 5 {\nx\n}\n}", "burst: unexpected block; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst 5 {\n}\n}", "burst: unexpected block; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nexempt 10.0.0.0/8 {\nx\n}\n}", "exempt: unexpected block; " + ranges + ", at Caddyfile:3"},

		{"async_proxy {\nburst\n}", "burst: missing value; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst 5 6\n}", "burst: unexpected value '6'; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst 5\nburst 5\n}", "burst: the option is already set at Caddyfile:3; expected it once, at Caddyfile:4"},
		{"async_proxy {\nburst 0\n}", "burst: the value '0' is not valid; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst -1\n}", "burst: the value '-1' is not valid; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst 1.5\n}", "burst: the value '1.5' is not valid; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst 1e3\n}", "burst: the value '1e3' is not valid; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst 1000000001\n}", "burst: the value '1000000001' is not valid; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst 99999999999999999999\n}", "burst: the value '99999999999999999999' is not valid; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst NaN\n}", "burst: the value 'NaN' is not valid; " + tokens + ", at Caddyfile:3"},
		{"async_proxy {\nburst \"\"\n}", "burst: the value '' is not valid; " + tokens + ", at Caddyfile:3"},

		{"async_proxy {\nrefill\n}", "refill: missing value; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill 1 2\n}", "refill: unexpected value '2'; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill 1/2\n}", "refill: the value '1/2' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill 0\n}", "refill: the value '0' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill -0.5\n}", "refill: the value '-0.5' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill 0.000009\n}", "refill: the value '0.000009' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill 1000001\n}", "refill: the value '1000001' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill NaN\n}", "refill: the value 'NaN' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill Inf\n}", "refill: the value 'Inf' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill -Inf\n}", "refill: the value '-Inf' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill 1e400\n}", "refill: the value '1e400' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill 1e-400\n}", "refill: the value '1e-400' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"async_proxy {\nrefill 0,5\n}", "refill: the value '0,5' is not valid; " + perSecond + ", at Caddyfile:3"},

		{"async_proxy {\nipv4_prefix 0\n}", "ipv4_prefix: the value '0' is not valid; expected a number of bits from 1 to 32, at Caddyfile:3"},
		{"async_proxy {\nipv4_prefix 33\n}", "ipv4_prefix: the value '33' is not valid; expected a number of bits from 1 to 32, at Caddyfile:3"},
		{"async_proxy {\nipv4_prefix /24\n}", "ipv4_prefix: the value '/24' is not valid; expected a number of bits from 1 to 32, at Caddyfile:3"},
		{"async_proxy {\nipv6_prefix 129\n}", "ipv6_prefix: the value '129' is not valid; expected a number of bits from 1 to 128, at Caddyfile:3"},
		{"async_proxy {\nipv6_prefix -1\n}", "ipv6_prefix: the value '-1' is not valid; expected a number of bits from 1 to 128, at Caddyfile:3"},
		{"async_proxy {\nmax_clients 1\n}", "max_clients: the value '1' is not valid; " + clients + ", at Caddyfile:3"},
		{"async_proxy {\nmax_clients 99999999999999999999\n}", "max_clients: the value '99999999999999999999' is not valid; " + clients + ", at Caddyfile:3"},
		{"async_proxy {\nzone \"a b\"\n}", "zone: the value 'a b' is not valid; " + zones + ", at Caddyfile:3"},
		{"async_proxy {\nzone \"\"\n}", "zone: the value '' is not valid; " + zones + ", at Caddyfile:3"},
		{"async_proxy {\nzone a b\n}", "zone: unexpected value 'b'; " + zones + ", at Caddyfile:3"},

		{"async_proxy {\nexempt\n}", "exempt: missing value; " + ranges + ", at Caddyfile:3"},
		{"async_proxy {\nexempt 10.0.0.0/8 10.0.0.0/33\n}", "exempt: the value '10.0.0.0/33' is not valid; " + ranges + ", at Caddyfile:3"},
		{"async_proxy {\nclients 10.1.2.3/8\n}", "clients: 10.1.2.3/8 has bits set beyond its length; write 10.0.0.0/8 for the range, or 10.1.2.3 for the address, at Caddyfile:3"},
		{"async_proxy {\nexempt 10.0.0.0/8 fd00::1/8\n}", "exempt: fd00::1/8 has bits set beyond its length; write fd00::/8 for the range, or fd00::1 for the address, at Caddyfile:3"},
		{"async_proxy {\nallow 192.0.2.1/24:443\n}", "allow: 192.0.2.1/24 has bits set beyond its length; write 192.0.2.0/24 for the range, or 192.0.2.1 for the address, at Caddyfile:3"},
		{"async_proxy {\ndeny a.example .example.com\n}", `deny: ".example.com" is not a name; for the name and everything below it, write example.com *.example.com, at Caddyfile:3`},
		{"async_proxy {\ndeny .example.com:443\n}", `deny: ".example.com:443" is not a name; for the name and everything below it, write example.com:443 *.example.com:443, at Caddyfile:3`},
		{"async_proxy {\nupstream http://127.0.0.1:3128\nno_upstream .example.com\n}", `no_upstream: ".example.com" is not a name; for the name and everything below it, write example.com *.example.com, at Caddyfile:4`},
		{"async_proxy {\nserve_pac {\ndirect .example.com\n}\n}", `serve_pac: direct: ".example.com" is not a name; for the name and everything below it, write example.com *.example.com, at Caddyfile:4`},
		{"async_proxy {\nserve_pac {\ndirect all\n}\n}", "serve_pac: direct: the value 'all' is not valid; expected addresses, CIDR ranges, names or *.names, without ports, at Caddyfile:4"},
		{"async_proxy {\nserve_pac {\nproxy a.example\n}\n}", "serve_pac: unrecognized option 'proxy'; expected direct, at Caddyfile:4"},
		{"async_proxy {\nserve_pac {\ndirect\n}\n}", "serve_pac: direct: missing value; expected addresses, CIDR ranges, names or *.names, without ports, at Caddyfile:4"},
		{"async_proxy {\nconnect_ports 0\n}", "connect_ports: the value '0' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999, at Caddyfile:3"},
		{"async_proxy {\nclients 10.0.0.0/8 office\n}", "clients: the value 'office' is not valid; " + strings.Replace(ranges, "expected ", "expected all, or ", 1) + ", at Caddyfile:3"},
		{"async_proxy {\nallow\n}", "allow: missing value; " + destinations + ", at Caddyfile:3"},
		{"async_proxy {\nallow exa/mple.com\n}", "allow: the value 'exa/mple.com' is not valid; " + destinations + ", at Caddyfile:3"},
		{"async_proxy {\nallow 10.0.0.0/8\nallow 1.2.3\n}", "allow: the value '1.2.3' is not valid; " + destinations + ", at Caddyfile:4"},
		{"async_proxy {\nallow a.example\ndeny a.example *.b.example:0\n}", "deny: the value '*.b.example:0' is not valid; " + destinations + ", at Caddyfile:4"},
		{"async_proxy {\ndeny a.*.example\n}", "deny: the value 'a.*.example' is not valid; " + destinations + ", at Caddyfile:3"},
		{"async_proxy {\ndeny [2001:db8::1\n}", "deny: the value '[2001:db8::1' is not valid; " + destinations + ", at Caddyfile:3"},
		{"async_proxy {\ndeny fe80::1%eth0\n}", "deny: the value 'fe80::1%eth0' is not valid; " + destinations + ", at Caddyfile:3"},
		{"async_proxy {\nallow_file\n}", "allow_file: missing value; " + files + ", at Caddyfile:3"},
		{"async_proxy {\ndeny_from\n}", "deny_from: missing value; " + sources + ", at Caddyfile:3"},
		{"async_proxy {\ndeny_from nowhere\n}", "deny_from: this build has no module http.ip_sources.nowhere; " + sources + ", at Caddyfile:3"},
		{"async_proxy {\nports 80 443-80\n}", "ports: the value '443-80' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999, at Caddyfile:3"},
		{"async_proxy {\nports 65536\n}", "ports: the value '65536' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999, at Caddyfile:3"},
		{"async_proxy {\nlimit_by token\n}", "limit_by: the value 'token' is not valid; expected client_ip or user, at Caddyfile:3"},
		{"async_proxy {\nreport_only rules clients\n}", "report_only: the value 'clients' is not valid; expected rules, limits or both, at Caddyfile:3"},
		{"async_proxy {\nresolvers 192.0.2.53 :53\n}", "resolvers: the value ':53' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"async_proxy {\nserve_pac proxy.pac\n}", "serve_pac: the value 'proxy.pac' is not valid; expected a path that begins with /, or no value, at Caddyfile:3"},
		{"async_proxy {\nno_upstream a.example:80\n}", "no_upstream: the value 'a.example:80' is not valid; expected destinations without ports: addresses, CIDR ranges, names, *.names, public or private, at Caddyfile:3"},
		{"async_proxy {\nbasic_auth\n}", "basic_auth: there are no users; " + users + ", at Caddyfile:3"},
		{"async_proxy {\nbasic_auth md5 {\nalice x\n}\n}", "basic_auth: unknown algorithm 'md5'; " + users + ", at Caddyfile:3"},
		{"async_proxy {\nbasic_auth bcrypt a b {\nalice x\n}\n}", "basic_auth: unexpected value 'b'; " + users + ", at Caddyfile:3"},
		{"async_proxy {\nbasic_auth {\nalice\n}\n}", "basic_auth: the user 'alice' must be followed by exactly one hash, as `caddy hash-password` prints it, at Caddyfile:4"},
		{"async_proxy {\nbasic_auth {\nalice " + hash + "\n}\nbasic_auth {\nbob x\n}\n}", "basic_auth: the option is already set at Caddyfile:3; expected it once, at Caddyfile:6"},
		{"async_proxy {\nupstream\n}", "upstream: missing value; " + parents + ", at Caddyfile:3"},
		{"async_proxy {\nupstream http://a http://b\n}", "upstream: more than one value; " + parents + ", at Caddyfile:3"},
		{"async_proxy {\nupstream ftp://user:secret@proxy.example\n}", "upstream: the value is not valid: the scheme is not supported; expected http://, https:// or socks5://, and the host of a proxy, at Caddyfile:3"},
		{"async_proxy {\nupstream http://user:secret@proxy.example:0\n}", "upstream: the value is not valid: the host or the port is not valid; expected the host of a proxy, and optionally its port, after http:// and any credentials, at Caddyfile:3"},
		{"async_proxy {\nupstream http://a.example {\ntls_server_name b\n}\n}", "upstream: tls_server_name is for https:// only, at Caddyfile:4"},
		{"async_proxy {\nupstream socks5://a.example {\nheader X-A b\n}\n}", "upstream: header: the values are not valid; expected a field and a value, in quotes if it has spaces, for http:// and https:// only, at Caddyfile:4"},
		{"async_proxy {\nupstream http://a.example {\nweight 5\n}\n}", "upstream: unrecognized option 'weight'; expected header, tls_server_name, tls_trust_pool or tls_insecure_skip_verify, at Caddyfile:4"},

		{"async_proxy {\ndial_timeout\n}", "dial_timeout: missing value; expected a positive duration such as 10s, at Caddyfile:3"},
		{"async_proxy {\ndial_timeout 0\n}", "dial_timeout: the value '0' is not valid; expected a positive duration such as 10s, at Caddyfile:3"},
		{"async_proxy {\ndial_timeout -1s\n}", "dial_timeout: the value '-1s' is not valid; expected a positive duration such as 10s, at Caddyfile:3"},
		{"async_proxy {\ndial_timeout 10\n}", "dial_timeout: the value '10' is not valid; expected a positive duration such as 10s, at Caddyfile:3"},
		{"async_proxy {\ndial_timeout off\n}", "dial_timeout: the value 'off' is not valid; expected a positive duration such as 10s, at Caddyfile:3"},
		{"async_proxy {\ndial_timeout 99999999999999h\n}", "dial_timeout: the value '99999999999999h' is not valid; expected a positive duration such as 10s, at Caddyfile:3"},
		{"async_proxy {\nresponse_header_timeout 0\n}", "response_header_timeout: the value '0' is not valid; expected a positive duration such as 5m, or off, at Caddyfile:3"},

		{"async_proxy {\nvia\n}", "via: missing value; " + pseudonym + ", at Caddyfile:3"},
		{"async_proxy {\nvia 1fred\n}", "via: the value '1fred' is not valid; " + pseudonym + ", at Caddyfile:3"},
		{"async_proxy {\nvia \"fred joe\"\n}", "via: the value 'fred joe' is not valid; " + pseudonym + ", at Caddyfile:3"},
		{"async_proxy {\nforwarded_for on\n}", "forwarded_for: the value 'on' is not valid; expected auto or off, at Caddyfile:3"},
		{"async_proxy {\nforwarded_for \"\"\n}", "forwarded_for: the value '' is not valid; expected auto or off, at Caddyfile:3"},
		{"async_proxy {\nhosts\n}", "hosts: missing value; " + names + ", at Caddyfile:3"},
		{"async_proxy {\nhosts a.example b.example:443\n}", "hosts: the value 'b.example:443' is not valid; " + names + ", at Caddyfile:3"},

		{"async_proxy {\nmax_tunnels\n}", "max_tunnels: missing value; " + tunnels + ", at Caddyfile:3"},
		{"async_proxy {\nmax_tunnels 0\n}", "max_tunnels: the value '0' is not valid; " + tunnels + ", at Caddyfile:3"},
		{"async_proxy {\nmax_tunnels 5 per_client\n}", "max_tunnels: missing value after per_client; " + tunnels + ", at Caddyfile:3"},
		{"async_proxy {\nmax_tunnels 5 per_client 0\n}", "max_tunnels: the value '0' is not valid; " + tunnels + ", at Caddyfile:3"},
		{"async_proxy {\nmax_tunnels 5 per_client 1 2\n}", "max_tunnels: unexpected value '2'; " + tunnels + ", at Caddyfile:3"},
		{"async_proxy {\nmax_tunnels 5\nmax_tunnels 6 per_client 2\n}", "max_tunnels: the option is already set at Caddyfile:3; expected it once, at Caddyfile:4"},
		{"async_proxy {\ntunnel_idle_timeout never\n}", "tunnel_idle_timeout: the value 'never' is not valid; expected a positive duration such as 1h, or off, at Caddyfile:3"},
		{"async_proxy {\ntunnel_stall_timeout 0\n}", "tunnel_stall_timeout: the value '0' is not valid; expected a positive duration such as 1m, or off, at Caddyfile:3"},
		{"async_proxy {\ntunnel_idle_timeout 0\n}", "tunnel_idle_timeout: the value '0' is not valid; expected a positive duration such as 1h, or off, at Caddyfile:3"},
		{"async_proxy {\ntunnel_max_duration off\n}", "tunnel_max_duration: the value 'off' is not valid; expected a positive duration such as 24h, at Caddyfile:3"},
		{"async_proxy {\nstream_close_delay -1s\n}", "stream_close_delay: the value '-1s' is not valid; expected a duration such as 5m, or 0 for immediately, at Caddyfile:3"},
		{"async_proxy {\nrecheck_tunnels yes\n}", "recheck_tunnels: unexpected value 'yes'; expected no value, at Caddyfile:3"},
		{"async_proxy {\nrecheck_tunnels\nrecheck_tunnels\n}", "recheck_tunnels: the option is already set at Caddyfile:3; expected it once, at Caddyfile:4"},
		{"async_proxy {\nbrust 5\n}", "unrecognized option 'brust'; did you mean burst?, at Caddyfile:3"},
		{"async_proxy {\nburst 1000000000\n\nrefill 0.1\nzone a\n}", "burst 1000000000 with refill 0.1: an empty bucket would take more than 4000000000 seconds to fill; expected a smaller burst or a larger refill, at Caddyfile:5"},
		{"async_proxy {\nmax_clients 9223372036854775807\n}", "max_clients: the value '9223372036854775807' is not valid; " + clients + ", at Caddyfile:3"},
		{"async_proxy {\nmax_tunnels 9223372036854775807\n}", "max_tunnels: the value '9223372036854775807' is not valid; " + tunnels + ", at Caddyfile:3"},
		{"async_proxy {\ndial_timeout 9223372036854775807ns\n}", "dial_timeout: the value '9223372036854775807ns' is not valid; expected a positive duration such as 10s, at Caddyfile:3"},
		{"async_proxy {\nno_upstream a.example\nburst 5\n}", "no_upstream: no upstream is configured; expected the option upstream as well, at Caddyfile:3"},
		{"async_proxy {\nlimit_by user\nburst 5\n}", "limit_by: user requires authentication; expected the option basic_auth as well, at Caddyfile:3"},
		{"async_proxy {\nheader_up X-A [ b\n}", "header_up: the values 'X-A [ b' are not valid: replacement 0 for header field 'X-A': error parsing regexp: missing closing ]: `[`; " + header + ", at Caddyfile:3"},
		{"async_proxy {\nheader_down ?X-A b\n}", "header_down: the values '?X-A b' are not valid: '?X-A' is not a field name; " + header + ", at Caddyfile:3"},
		{"async_proxy {\nheader_up \"A b\" c\n}", "header_up: the values 'A b c' are not valid: 'A b' is not a field name; " + header + ", at Caddyfile:3"},
		{"async_proxy {\nheader_up X-A: b\n}", "header_up: the values 'X-A: b' are not valid: 'X-A:' is not a field name; " + header + ", at Caddyfile:3"},
		{"async_proxy {\nheader_up -\n}", "header_up: the values '-' are not valid: '' is not a field name; " + header + ", at Caddyfile:3"},
		{"async_proxy {\nheader_up A: b c\n}", "header_up: the values 'A: b c' are not valid: 'A:' is not a field name; " + header + ", at Caddyfile:3"},
		{"async_proxy {\nheader_up\n}", "header_up: missing value; " + header + ", at Caddyfile:3"},
		{"async_proxy {\nbasic_auth {\nalice wonderland\n}\n}", "basic_auth: the hash of the user 'alice' is not valid; expected one for bcrypt, as `caddy hash-password` prints it, at Caddyfile:4"},
		{"async_proxy {\nbasic_auth {\nbob " + hash + "\nalice $2a$14$short\n}\n}", "basic_auth: the hash of the user 'alice' is not valid; expected one for bcrypt, as `caddy hash-password` prints it, at Caddyfile:5"},
		{"async_proxy {\nbasic_auth argon2id {\nalice " + hash + "\n}\n}", "basic_auth: the hash of the user 'alice' is not valid; expected one for argon2id, as `caddy hash-password` prints it, at Caddyfile:4"},
		{"async_proxy {\nbasic_auth {\nalice " + hash + " " + hash + "\n}\n}", "basic_auth: the user 'alice' must be followed by exactly one hash, as `caddy hash-password` prints it, at Caddyfile:4"},
		{"async_proxy {\nbasic_auth {\nalice " + hash + "\nalice " + hash + "\n}\n}", "basic_auth: the user 'alice' is listed twice; expected each user once, at Caddyfile:5"},
		{"async_proxy {\nallow_file " + list + "\n}", "allow_file: " + list + ":4: \"a b\" is not an address, a CIDR range or a name; " + files + ", at Caddyfile:3"},
		{"async_proxy {\nburst 5\ndeny_file /nonexistent/list\n}", "deny_file: open /nonexistent/list: no such file or directory; " + files + ", at Caddyfile:4"},
		{"async_proxy {\ndeny_from static\n}", "deny_from: static has no ranges; " + sources + ", at Caddyfile:3"},
		{"async_proxy {\ndeny_from static 10.0.0.0/8 a\n}", "deny_from: the value 'a' is not valid; " + sources + ", at Caddyfile:3"},
		{"async_proxy {\nresolvers dns.google\n}", "resolvers: the value 'dns.google' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"async_proxy {\nresolvers 192.0.2.53 udp/localhost:53\n}", "resolvers: the value 'udp/localhost:53' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"async_proxy {\nresolvers fd/3\n}", "resolvers: the value 'fd/3' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"async_proxy {\nresolvers 8.8.8.8:0\n}", "resolvers: the value '8.8.8.8:0' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"async_proxy {\nresolvers 8.8.8.8:\n}", "resolvers: the value '8.8.8.8:' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"async_proxy {\nvia on\n}", "via: the value 'on' is not valid; " + pseudonym + ", at Caddyfile:3"},
		{"async_proxy {\nlimiter redis a\n}", "limiter: this build has no module http.async_proxy.limiters.redis; expected a limiter that this Caddy is built with; for redis, build it with --with github.com/asyncproxy/caddy-async-proxy/redis, at Caddyfile:3"},
		{"async_proxy {\nlimiter\n}", "limiter: missing value; expected a limiter that this Caddy is built with; for redis, build it with --with github.com/asyncproxy/caddy-async-proxy/redis, at Caddyfile:3"},
		{"async_proxy {\nupstream http://us%er@a.example\n}", "upstream: the value is not valid: the user or the password is not correctly percent-encoded, at Caddyfile:3"},
		{"async_proxy {\nupstream https://a.example {\nheader \"X A\" b\n}\n}", "upstream: header: the values are not valid; expected a field and a value, in quotes if it has spaces, for http:// and https:// only, at Caddyfile:4"},
		{"async_proxy {\nupstream https://a.example {\ntls_server_name\n}\n}", "upstream: tls_server_name: missing value; expected one name, at Caddyfile:4"},
		{"async_proxy {\nupstream https://a.example {\ntls_trust_pool nowhere\n}\n}", "upstream: tls_trust_pool: this build has no module tls.ca_pool.source.nowhere; expected a source of certificates, such as file, at Caddyfile:4"},
	} {
		_, _, err := adapt(":8080 {\n"+tc.directive+"\n}\n", "Caddyfile")
		if want := "parsing caddyfile tokens for 'async_proxy': " + tc.want; err == nil || err.Error() != want {
			t.Errorf("%s\ngives %v\nwant  %v", tc.directive, err, want)
		}
	}
}

// validate makes Caddy check a config with one async_proxy handler, in JSON, without
// running it.
func validate(t *testing.T, handler string) error {
	t.Helper()
	var config caddy.Config
	text := fmt.Sprintf(`{"admin": {"disabled": true, "config": {"persist": false}}, "logging": {"logs": {"default": {"writer": {"output": "discard"}}}},
		"apps": {"http": {"servers": {"srv0": {"listen": ["127.0.0.1:0"], "routes": [{"handle": [%s]}]}}}}}`, handler)
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		t.Fatalf("%s: %v", handler, err)
	}
	return caddy.Validate(&config)
}

func TestJSON(t *testing.T) {
	for _, options := range []string{
		`"handler": "async_proxy"`,
		`"handler": "async_proxy", "burst": 200, "refill": 20, "exempt": ["10.0.0.0/8"], "dial_timeout": "5s"`,
		`"handler": "async_proxy", "via": "off", "tunnel_idle_timeout": -1, "stream_close_delay": 0, "stream_close_delay": null`,
	} {
		if err := validate(t, "{"+options+"}"); err != nil {
			t.Errorf("{%s}: %v", options, err)
		}
	}
}

// Each mistake is refused, and resources acquired before it are released.
func TestJSONMistakes(t *testing.T) {
	for _, tc := range []struct{ options, want string }{
		{`"burst": -1`, "burst: the value '-1' is not valid; expected a whole number of tokens from 1 to 1000000000"},
		{`"burst": 1000000001`, "burst: the value '1000000001' is not valid; expected a whole number of tokens from 1 to 1000000000"},
		{`"refill": -0.5`, "refill: the value '-0.5' is not valid; expected tokens per second from 0.00001 to 1000000"},
		{`"refill": 1e300`, "refill: the value '1e+300' is not valid; expected tokens per second from 0.00001 to 1000000"},
		{`"burst": 1000000000, "refill": 0.1`, "burst 1000000000 with refill 0.1: an empty bucket would take more than 4000000000 seconds to fill; expected a smaller burst or a larger refill"},
		{`"ipv4_prefix": 33`, "ipv4_prefix: the value '33' is not valid; expected a number of bits from 1 to 32"},
		{`"ipv6_prefix": -1`, "ipv6_prefix: the value '-1' is not valid; expected a number of bits from 1 to 128"},
		{`"max_clients": 1`, "max_clients: the value '1' is not valid; expected a whole number of clients from 2 to 1000000000"},
		{`"zone": "a b"`, "zone: the value 'a b' is not valid; expected a name in printable ASCII without spaces, quotes and backslashes"},
		{`"exempt": ["10.0.0.0/8", "10.0.0.0/33"]`, "exempt: the value '10.0.0.0/33' is not valid; expected addresses, CIDR ranges such as 10.0.0.0/8, or private_ranges"},
		{`"exempt": [""]`, "exempt: the value '' is not valid; expected addresses, CIDR ranges such as 10.0.0.0/8, or private_ranges"},
		{`"clients": ["example.com"]`, "clients: the value 'example.com' is not valid; expected all, or addresses, CIDR ranges such as 10.0.0.0/8, or private_ranges"},
		{`"rules": [{"action": "allow", "destinations": ["a b"]}]`, "rules[0]: allow: the value 'a b' is not valid; expected addresses, CIDR ranges, names, *.names, public, private or all, each optionally followed by :<ports>"},
		{`"rules": [{"action": "permit", "destinations": ["all"]}]`, `rules[0]: action "permit": expected allow or deny`},
		{`"rules": [{"action": "deny"}]`, "rules[0]: deny: missing destination; expected addresses, CIDR ranges, names, *.names, public, private or all, each optionally followed by :<ports>"},
		{`"connect_ports": ["0"]`, "connect_ports: the value '0' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999"},
		{`"clients": ["10.1.2.3/8"]`, "clients: 10.1.2.3/8 has bits set beyond its length; write 10.0.0.0/8 for the range, or 10.1.2.3 for the address"},
		{`"rules": [{"action": "deny", "destinations": [".example.com"]}]`, `rules[0]: deny: ".example.com" is not a name; for the name and everything below it, write example.com *.example.com`},
		{`"pac_direct": ["a.example"]`, "pac_direct: expected serve_pac to be set as well"},
		{`"serve_pac": "/a", "pac_direct": ["all"]`, "pac_direct: all, public and private are not allowed"},
		{`"ports": ["0"]`, "ports: the value '0' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999"},
		{`"report_only": ["all"]`, "report_only: the value 'all' is not valid; expected rules, limits or both"},
		{`"limit_by": "token"`, "limit_by: the value 'token' is not valid; expected client_ip or user"},
		{`"limit_by": "user"`, "limit_by: user requires authentication; expected the option basic_auth as well"},
		{`"serve_pac": "proxy.pac"`, "serve_pac: the value 'proxy.pac' is not valid; expected a path that begins with /, or no value"},
		{`"resolvers": ["192.0.2.53", "dns.google:53"]`, "resolvers: the value 'dns.google:53' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53"},
		{`"resolvers": ["a b"]`, "resolvers: the value 'a b' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53"},
		{`"upstream": {"url": "proxy.example:80"}`, `upstream: missing scheme; expected http://, https:// or socks5://, and the host of a proxy`},
		{`"no_upstream": ["a.example"]`, "no_upstream: no upstream is configured; expected the option upstream as well"},
		{`"dial_timeout": -1`, "dial_timeout: the value '-1ns' is not valid; expected a positive duration such as 10s"},
		{`"authentication": {}`, `authentication: expected a provider, such as http_basic`},
		{`"headers": {"request": {"set": {"A b": ["c"]}}}`, `headers: 'A b' is not a field name`},
		{`"headers": {"response": {"delete": ["A:"]}}`, `headers: 'A:' is not a field name`},
		{`"headers": {"response": {"replace": {"": [{}]}}}`, `headers: '' is not a field name`},
		{`"via": "fred joe"`, "via: the value 'fred joe' is not valid; expected a pseudonym of letters, digits, dots and hyphens that starts with a letter, or off"},
		{`"via": "on"`, "via: the value 'on' is not valid; expected a pseudonym of letters, digits, dots and hyphens that starts with a letter, or off"},
		{`"forwarded_for": "on"`, "forwarded_for: the value 'on' is not valid; expected auto or off"},
		{`"hosts": ["proxy.example.com:443"]`, "hosts: the value 'proxy.example.com:443' is not valid; expected names of this server, without ports"},
		{`"max_tunnels": -1`, "max_tunnels: the value '-1' is not valid; expected <n> [per_client <n>], each from 1 to 1000000000"},
		{`"max_tunnels_per_client": -1`, "max_tunnels: the value '-1' is not valid; expected <n> [per_client <n>], each from 1 to 1000000000"},
		{`"tunnel_max_duration": "-1s"`, "tunnel_max_duration: the value '-1s' is not valid; expected a positive duration such as 24h"},
		{`"stream_close_delay": "-1s"`, "stream_close_delay: the value '-1s' is not valid; expected a duration such as 5m, or 0 for immediately"},
	} {
		err := validate(t, `{"handler": "async_proxy", `+tc.options+`}`)
		if want := "provision http.handlers.async_proxy: " + tc.want; err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v\nwant %s at the end", tc.options, err, want)
		}
		limiters.Range(func(key, _ any) bool {
			t.Errorf("%s: the limiter %+v was not released", tc.options, key)
			return true
		})
		if n, _ := processes.References(processKey); n != 0 {
			t.Errorf("%s: the process value was not released", tc.options)
		}
	}
}

func TestJSONOfAnotherShape(t *testing.T) {
	for options, want := range map[string]string{
		`"nonsense": 5`:          `json: unknown field "nonsense"`,
		`"burst": "5"`:           "json: cannot unmarshal string into Go struct field Handler.burst of type int64",
		`"burst": 1.5`:           "json: cannot unmarshal number 1.5 into Go struct field Handler.burst of type int64",
		`"burst": 1e30`:          "json: cannot unmarshal number 1e+30 into Go struct field Handler.burst of type int64",
		`"refill": 1e999`:        "json: cannot unmarshal number 1e999 into Go value of type float64",
		`"exempt": "10.0.0.0/8"`: "json: cannot unmarshal string into Go struct field Handler.exempt of type []string",
		`"dial_timeout": "soon"`: `time: invalid duration "soon"`,
	} {
		if err := validate(t, `{"handler": "async_proxy", `+options+`}`); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", options, err, want)
		}
	}
}

// FuzzCaddyfile checks that any tokens of a directive give either an error or a config that
// survives JSON and that Caddy accepts.
func FuzzCaddyfile(f *testing.F) {
	f.Add("async_proxy")
	f.Add("async_proxy burst 5 refill 0.5 {\n zone a\n exempt 10.0.0.0/8 private_ranges\n}")
	f.Add("async_proxy {\n max_tunnels 5 per_client 2\n tunnel_idle_timeout off\n stream_close_delay 0\n recheck_tunnels\n}")
	f.Add("async_proxy {\n burst 1000000000\n refill 0.00001\n}")
	f.Add("async_proxy {\n header_up X-A \"a b\"\n header_down -X-B\n header_down X-C ( d\n via fred\n hosts a.example\n}")
	f.Add("async_proxy {\n burst 5 {\n }\n dial_timeout 1d\n}}")
	f.Add("async_proxy { {\n}\n")
	f.Add("async_proxy {\n allow *.a.example:80-81 private\n deny_from static 10.0.0.0/8 private_ranges\n deny all\n ports 80 8000-8999\n report_only rules\n}")
	f.Add("async_proxy {\n resolvers 192.0.2.53 tcp/[2001:db8::53]:53 8.8.8.8:\n serve_pac /a\n no_upstream a.example 10.0.0.0/8\n}")
	f.Add("async_proxy {\n upstream https://user:pass%20word@a.example:3128 {\n header X-A b\n tls_server_name c\n tls_insecure_skip_verify\n }\n no_upstream *.a.example\n}")
	f.Add("async_proxy {\n clients 10.0.0.0/8\n limit_by user\n basic_auth bcrypt a {\n alice $2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi\n }\n}")
	f.Add("async_proxy {\n limiter test a\n max_clients 9007199254740993\n tunnel_max_duration 2562047h\n}")
	f.Fuzz(func(t *testing.T, input string) {
		// Files and placeholders may have other contents when the config is loaded.
		if regexp.MustCompile(`_file|tls_trust_pool|\{[^\s{]`).MatchString(input) {
			return
		}
		tokens, err := caddyfile.Tokenize([]byte(input), "Caddyfile")
		if err != nil || !utf8.ValidString(input) { // JSON is UTF-8
			return
		}
		h := new(Handler)
		if err := h.UnmarshalCaddyfile(caddyfile.NewDispenser(tokens)); err != nil {
			return
		}
		data, err := json.Marshal(h)
		if err != nil {
			t.Fatalf("%q: %v", input, err)
		}
		roundTripped := new(Handler)
		if err := caddy.StrictUnmarshalJSON(data, roundTripped); err != nil {
			t.Fatalf("%q gives %s: %v", input, data, err)
		}
		if !reflect.DeepEqual(h, roundTripped) {
			t.Fatalf("%q gives %s, which gives %+v, want %+v", input, data, roundTripped, h)
		}
		data = caddyconfig.JSONModuleObject(h, "handler", "async_proxy", nil)
		if err := validate(t, string(data)); err != nil {
			t.Errorf("%q gives %s: %v", input, data, err)
		}
	})
}

// fenced matches the Caddyfile code blocks of a Markdown file.
var fenced = regexp.MustCompile("(?ms)^```caddyfile\n(.*?)^```")

func TestCaddyfilesOfTheDocumentation(t *testing.T) {
	pages, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, page := range append(pages, "README.md") {
		if page == "docs/redis.md" {
			continue // checked in the redis module, which has the limiter
		}
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for i, block := range fenced.FindAllSubmatch(text, -1) {
			found++
			t.Run(fmt.Sprintf("%s %d", page, i+1), func(t *testing.T) { checkShipped(t, string(block[1]), page) })
		}
	}
	if found == 0 {
		t.Error("found no Caddyfile in the documentation")
	}
}

func TestCaddyfileExamples(t *testing.T) {
	for _, file := range []string{"Caddyfile.example", "examples/docker/Caddyfile"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		checkShipped(t, string(text), file)
	}
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
