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
		{"empty block", `async_proxy {
}`, `{}`},
		{"one line", `async_proxy burst 200 refill 20`, `{"burst": 200, "refill": 20}`},
		{"one line, the other way round", `async_proxy refill 20 burst 200`, `{"burst": 200, "refill": 20}`},
		{"one line, one option", `async_proxy refill 0.1`, `{"refill": 0.1}`},
		{"block", `async_proxy {
	burst 200
	refill 20
}`, `{"burst": 200, "refill": 20}`},
		{"one line and block", `async_proxy burst 200 {
	refill 20
}`, `{"burst": 200, "refill": 20}`},
		{"quoted", "async_proxy {\n \"burst\" `200`\n}", `{"burst": 200}`},
		{"least", `async_proxy {
	burst 1
	refill 0.00001
	ipv4_prefix 1
	ipv6_prefix 1
	max_clients 2
	dial_timeout 1ms
	max_tunnels 1
}`,
			`{"burst": 1, "refill": 0.00001, "ipv4_prefix": 1, "ipv6_prefix": 1, "max_clients": 2, "dial_timeout": 1000000, "max_tunnels": 1}`},
		{"greatest", `async_proxy {
	burst 1000000000
	refill 1e6
	ipv4_prefix 32
	ipv6_prefix 128
}`,
			`{"burst": 1000000000, "refill": 1000000, "ipv4_prefix": 32, "ipv6_prefix": 128}`},
		{"lists", `async_proxy {
	exempt 10.0.0.0/8 192.0.2.1
	exempt private_ranges
	allow 2001:db8::/32
	allow ::1 10.0.0.1
	hosts a.example
	hosts b.example 192.0.2.1
}`,
			`{"exempt": ["10.0.0.0/8", "192.0.2.1", "private_ranges"],
				"rules": [{"action": "allow", "destinations": ["2001:db8::/32"]}, {"action": "allow", "destinations": ["::1", "10.0.0.1"]}], "hosts": ["a.example", "b.example", "192.0.2.1"]}`},
		{"off", `async_proxy {
	via off
	forwarded_for off
	tunnel_idle_timeout off
	response_header_timeout off
}`,
			`{"via": "off", "forwarded_for": "off", "tunnel_idle_timeout": -1, "response_header_timeout": -1}`},
		{"stream_close_delay at once", `async_proxy {
	stream_close_delay 0
}`, `{"stream_close_delay": 0}`},
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
		{"header operations", `async_proxy {
	header_up X-A one
	header_up -X-B
	header_up X-C a b
	header_up -X-*
	header_up {http.request.method} c
	header_down +X-D two
	header_down X-E three
}`,
			`{"headers": {
				"request": {"set": {"X-A": ["one"], "{http.request.method}": ["c"]}, "delete": ["X-B", "X-*"], "replace": {"X-C": [{"search_regexp": "a", "replace": "b"}]}},
				"response": {"add": {"X-D": ["two"]}, "set": {"X-E": ["three"]}}
			}}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := handlers(t, `:8080 {
	`+tc.directive+`
}`)
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
	config, _, err := adapt(`:8080 {
	@lan remote_ip 10.0.0.0/8
	async_proxy @lan burst 5 {
		refill 2
	}
}`, "Caddyfile")
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
		parents      = "expected http|https|socks5://[<user>[:<password>]@]<host>[:<port>], or off"
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
	for _, tc := range []struct {
		text string // the directive, or the options in its block
		want string
	}{
		{"async_proxy nonsense", "unexpected argument 'nonsense'; " + arguments + ", at Caddyfile:2"},
		{"async_proxy 10", "unexpected argument '10'; " + arguments + ", at Caddyfile:2"},
		{"async_proxy zone a", "unexpected argument 'zone'; " + arguments + ", at Caddyfile:2"},
		{"async_proxy burst 5 nonsense", "unexpected argument 'nonsense'; " + arguments + ", at Caddyfile:2"},
		{"async_proxy burst", "burst: missing value; " + tokens + ", at Caddyfile:2"},
		{"async_proxy refill", "refill: missing value; " + perSecond + ", at Caddyfile:2"},
		{"async_proxy burst refill 5", "burst: the value 'refill' is not valid; " + tokens + ", at Caddyfile:2"},
		{"async_proxy burst ten", "burst: the value 'ten' is not valid; " + tokens + ", at Caddyfile:2"},
		{"async_proxy burst 5 burst 6", "burst: the option is already set at Caddyfile:2; expected it once, at Caddyfile:2"},
		{`async_proxy burst 5 {
	burst 6
}`, "burst: the option is already set at Caddyfile:2; expected it once, at Caddyfile:3"},

		// In JSON, 0 stands for the default; what a Caddyfile says must not.
		{"failed_logins 10 per 0s", "failed_logins: the value '10 per 0s' is not valid; expected <n> per <duration>, such as 10 per 1m, with 1 to 1000000 logins per 1s to 8760h, or off, at Caddyfile:3"},
		{"nonsense 5", "unrecognized option 'nonsense'; expected one of " + strings.Join(optionNames(), ", ") + ", at Caddyfile:3"},
		{`burst 5

Burst 5`, "unrecognized option 'Burst'; did you mean burst?, at Caddyfile:5"},
		{`burst 5 {
	x
}`, "burst: unexpected block; " + tokens + ", at Caddyfile:3"},
		{`burst 5 {
}`, "burst: unexpected block; " + tokens + ", at Caddyfile:3"},
		{`exempt 10.0.0.0/8 {
	x
}`, "exempt: unexpected block; " + ranges + ", at Caddyfile:3"},

		{"burst", "burst: missing value; " + tokens + ", at Caddyfile:3"},
		{"burst 5 6", "burst: unexpected value '6'; " + tokens + ", at Caddyfile:3"},
		{`burst 5
burst 5`, "burst: the option is already set at Caddyfile:3; expected it once, at Caddyfile:4"},
		{"burst 0", "burst: the value '0' is not valid; " + tokens + ", at Caddyfile:3"},
		{"burst -1", "burst: the value '-1' is not valid; " + tokens + ", at Caddyfile:3"},
		{"burst 1.5", "burst: the value '1.5' is not valid; " + tokens + ", at Caddyfile:3"},
		{"burst 1e3", "burst: the value '1e3' is not valid; " + tokens + ", at Caddyfile:3"},
		{"burst 1000000001", "burst: the value '1000000001' is not valid; " + tokens + ", at Caddyfile:3"},
		{"burst 99999999999999999999", "burst: the value '99999999999999999999' is not valid; " + tokens + ", at Caddyfile:3"},
		{"burst NaN", "burst: the value 'NaN' is not valid; " + tokens + ", at Caddyfile:3"},
		{`burst ""`, "burst: the value '' is not valid; " + tokens + ", at Caddyfile:3"},

		{"refill", "refill: missing value; " + perSecond + ", at Caddyfile:3"},
		{"refill 1 2", "refill: unexpected value '2'; " + perSecond + ", at Caddyfile:3"},
		{"refill 1/2", "refill: the value '1/2' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill 0", "refill: the value '0' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill -0.5", "refill: the value '-0.5' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill 0.000009", "refill: the value '0.000009' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill 1000001", "refill: the value '1000001' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill NaN", "refill: the value 'NaN' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill Inf", "refill: the value 'Inf' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill -Inf", "refill: the value '-Inf' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill 1e400", "refill: the value '1e400' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill 1e-400", "refill: the value '1e-400' is not valid; " + perSecond + ", at Caddyfile:3"},
		{"refill 0,5", "refill: the value '0,5' is not valid; " + perSecond + ", at Caddyfile:3"},

		{"ipv4_prefix 0", "ipv4_prefix: the value '0' is not valid; expected a number of bits from 1 to 32, at Caddyfile:3"},
		{"ipv4_prefix 33", "ipv4_prefix: the value '33' is not valid; expected a number of bits from 1 to 32, at Caddyfile:3"},
		{"ipv4_prefix /24", "ipv4_prefix: the value '/24' is not valid; expected a number of bits from 1 to 32, at Caddyfile:3"},
		{"ipv6_prefix 129", "ipv6_prefix: the value '129' is not valid; expected a number of bits from 1 to 128, at Caddyfile:3"},
		{"ipv6_prefix -1", "ipv6_prefix: the value '-1' is not valid; expected a number of bits from 1 to 128, at Caddyfile:3"},
		{"max_clients 1", "max_clients: the value '1' is not valid; " + clients + ", at Caddyfile:3"},
		{"max_clients 99999999999999999999", "max_clients: the value '99999999999999999999' is not valid; " + clients + ", at Caddyfile:3"},
		{`zone "a b"`, "zone: the value 'a b' is not valid; " + zones + ", at Caddyfile:3"},
		{`zone ""`, "zone: the value '' is not valid; " + zones + ", at Caddyfile:3"},
		{"zone a b", "zone: unexpected value 'b'; " + zones + ", at Caddyfile:3"},

		{"exempt", "exempt: missing value; " + ranges + ", at Caddyfile:3"},
		{"exempt 10.0.0.0/8 10.0.0.0/33", "exempt: the value '10.0.0.0/33' is not valid; " + ranges + ", at Caddyfile:3"},
		{"clients 10.1.2.3/8", "clients: 10.1.2.3/8 has bits set beyond its length; write 10.0.0.0/8 for the range, or 10.1.2.3 for the address, at Caddyfile:3"},
		{"exempt 10.0.0.0/8 fd00::1/8", "exempt: fd00::1/8 has bits set beyond its length; write fd00::/8 for the range, or fd00::1 for the address, at Caddyfile:3"},
		{"allow 192.0.2.1/24:443", "allow: 192.0.2.1/24 has bits set beyond its length; write 192.0.2.0/24 for the range, or 192.0.2.1 for the address, at Caddyfile:3"},
		{"deny a.example .example.com", `deny: ".example.com" is not a name; for the name and everything below it, write example.com *.example.com, at Caddyfile:3`},
		{"deny .example.com:443", `deny: ".example.com:443" is not a name; for the name and everything below it, write example.com:443 *.example.com:443, at Caddyfile:3`},
		{`upstream http://127.0.0.1:3128
no_upstream .example.com`, `no_upstream: ".example.com" is not a name; for the name and everything below it, write example.com *.example.com, at Caddyfile:4`},
		{`serve_pac {
	direct .example.com
}`, `serve_pac: direct: ".example.com" is not a name; for the name and everything below it, write example.com *.example.com, at Caddyfile:4`},
		{`serve_pac {
	direct all
}`, "serve_pac: direct: the value 'all' is not valid; expected addresses, CIDR ranges, names or *.names, without ports, at Caddyfile:4"},
		{`serve_pac {
	proxy a.example
}`, "serve_pac: unrecognized option 'proxy'; expected direct, at Caddyfile:4"},
		{`serve_pac {
	direct
}`, "serve_pac: direct: missing value; expected addresses, CIDR ranges, names or *.names, without ports, at Caddyfile:4"},
		{"connect_ports 0", "connect_ports: the value '0' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999, at Caddyfile:3"},
		{"clients 10.0.0.0/8 office", "clients: the value 'office' is not valid; " + strings.Replace(ranges, "expected ", "expected all, or ", 1) + ", at Caddyfile:3"},
		{"allow", "allow: missing value; " + destinations + ", at Caddyfile:3"},
		{"allow exa/mple.com", "allow: the value 'exa/mple.com' is not valid; " + destinations + ", at Caddyfile:3"},
		{`allow 10.0.0.0/8
allow 1.2.3`, "allow: the value '1.2.3' is not valid; " + destinations + ", at Caddyfile:4"},
		{`allow a.example
deny a.example *.b.example:0`, "deny: the value '*.b.example:0' is not valid; " + destinations + ", at Caddyfile:4"},
		{"deny a.*.example", "deny: the value 'a.*.example' is not valid; " + destinations + ", at Caddyfile:3"},
		{"deny [2001:db8::1", "deny: the value '[2001:db8::1' is not valid; " + destinations + ", at Caddyfile:3"},
		{"deny fe80::1%eth0", "deny: the value 'fe80::1%eth0' is not valid; " + destinations + ", at Caddyfile:3"},
		{"allow_file", "allow_file: missing value; " + files + ", at Caddyfile:3"},
		{"deny_from", "deny_from: missing value; " + sources + ", at Caddyfile:3"},
		{"deny_from nowhere", "deny_from: this build has no module http.ip_sources.nowhere; " + sources + ", at Caddyfile:3"},
		{"ports 80 443-80", "ports: the value '443-80' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999, at Caddyfile:3"},
		{"ports 65536", "ports: the value '65536' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999, at Caddyfile:3"},
		{"limit_by token", "limit_by: the value 'token' is not valid; expected client_ip or user, at Caddyfile:3"},
		{"report_only rules clients", "report_only: the value 'clients' is not valid; expected rules, limits or both, or off, at Caddyfile:3"},
		{"resolvers 192.0.2.53 :53", "resolvers: the value ':53' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"serve_pac proxy.pac", "serve_pac: the value 'proxy.pac' is not valid; expected a path that begins with /, or no value, at Caddyfile:3"},
		{"no_upstream a.example:80", "no_upstream: the value 'a.example:80' is not valid; expected destinations without ports: addresses, CIDR ranges, names, *.names, public or private, at Caddyfile:3"},
		{"basic_auth", "basic_auth: there are no users; " + users + ", at Caddyfile:3"},
		{`basic_auth md5 {
	alice x
}`, "basic_auth: unknown algorithm 'md5'; " + users + ", at Caddyfile:3"},
		{`basic_auth bcrypt a b {
	alice x
}`, "basic_auth: unexpected value 'b'; " + users + ", at Caddyfile:3"},
		{`basic_auth {
	alice
}`, "basic_auth: the user 'alice' must be followed by exactly one hash, as `caddy hash-password` prints it, at Caddyfile:4"},
		{`basic_auth {
	alice ` + hash + `
}
basic_auth {
	bob x
}`, "basic_auth: the option is already set at Caddyfile:3; expected it once, at Caddyfile:6"},
		{"upstream", "upstream: missing value; " + parents + ", at Caddyfile:3"},
		{"upstream http://a http://b", "upstream: more than one value; " + parents + ", at Caddyfile:3"},
		{"upstream ftp://user:secret@proxy.example", "upstream: the value is not valid: the scheme is not supported; expected http://, https:// or socks5://, and the host of a proxy, at Caddyfile:3"},
		{"upstream http://user:secret@proxy.example:0", "upstream: the value is not valid: the host or the port is not valid; expected the host of a proxy, and optionally its port, after http:// and any credentials, at Caddyfile:3"},
		{`upstream http://a.example {
	tls_server_name b
}`, "upstream: tls_server_name is for https:// only, at Caddyfile:4"},
		{`upstream socks5://a.example {
	header X-A b
}`, "upstream: header: the values are not valid; expected a field and a value, in quotes if it has spaces, for http:// and https:// only, at Caddyfile:4"},
		{`upstream http://a.example {
	weight 5
}`, "upstream: unrecognized option 'weight'; expected header, tls_server_name, tls_trust_pool or tls_insecure_skip_verify, at Caddyfile:4"},

		{"dial_timeout", "dial_timeout: missing value; expected a duration of at least 1ms, such as 10s, at Caddyfile:3"},
		{"dial_timeout 0", "dial_timeout: the value '0' is not valid; expected a duration of at least 1ms, such as 10s, at Caddyfile:3"},
		{"dial_timeout -1s", "dial_timeout: the value '-1s' is not valid; expected a duration of at least 1ms, such as 10s, at Caddyfile:3"},
		{"dial_timeout 10", "dial_timeout: the value '10' is not valid; expected a duration of at least 1ms, such as 10s, at Caddyfile:3"},
		{"dial_timeout 5ns", "dial_timeout: the value '5ns' is not valid; expected a duration of at least 1ms, such as 10s, at Caddyfile:3"},
		{"tunnel_idle_timeout 5us", "tunnel_idle_timeout: the value '5us' is not valid; expected a duration of at least 1ms, such as 1h, or off, at Caddyfile:3"},
		{"max_tunnels 1 per_client 200", "max_tunnels: one client may open 200 tunnels, and all clients together only 1; expected <n> [per_client <n>], each from 1 to 1000000000, at Caddyfile:3"},
		{"burst=10", "unrecognized option 'burst=10'; expected a space in place of =, as in burst 10, at Caddyfile:3"},
		{"dial_timeout off", "dial_timeout: the value 'off' is not valid; expected a duration of at least 1ms, such as 10s, at Caddyfile:3"},
		{"dial_timeout 99999999999999h", "dial_timeout: the value '99999999999999h' is not valid; expected a duration of at least 1ms, such as 10s, at Caddyfile:3"},
		{"response_header_timeout 0", "response_header_timeout: the value '0' is not valid; expected a duration of at least 1ms, such as 5m, or off, at Caddyfile:3"},

		{"via", "via: missing value; " + pseudonym + ", at Caddyfile:3"},
		{"via 1fred", "via: the value '1fred' is not valid; " + pseudonym + ", at Caddyfile:3"},
		{`via "fred joe"`, "via: the value 'fred joe' is not valid; " + pseudonym + ", at Caddyfile:3"},
		{"forwarded_for on", "forwarded_for: the value 'on' is not valid; expected auto or off, at Caddyfile:3"},
		{`forwarded_for ""`, "forwarded_for: the value '' is not valid; expected auto or off, at Caddyfile:3"},
		{"hosts", "hosts: missing value; " + names + ", at Caddyfile:3"},
		{"hosts a.example b.example:443", "hosts: the value 'b.example:443' is not valid; " + names + ", at Caddyfile:3"},

		{"max_tunnels", "max_tunnels: missing value; " + tunnels + ", at Caddyfile:3"},
		{"max_tunnels 0", "max_tunnels: the value '0' is not valid; " + tunnels + ", at Caddyfile:3"},
		{"max_tunnels 5 per_client", "max_tunnels: missing value after per_client; " + tunnels + ", at Caddyfile:3"},
		{"max_tunnels 5 per_client 0", "max_tunnels: the value '0' is not valid; " + tunnels + ", at Caddyfile:3"},
		{"max_tunnels 5 per_client 1 2", "max_tunnels: unexpected value '2'; " + tunnels + ", at Caddyfile:3"},
		{`max_tunnels 5
max_tunnels 6 per_client 2`, "max_tunnels: the option is already set at Caddyfile:3; expected it once, at Caddyfile:4"},
		{"tunnel_idle_timeout never", "tunnel_idle_timeout: the value 'never' is not valid; expected a duration of at least 1ms, such as 1h, or off, at Caddyfile:3"},
		{"tunnel_stall_timeout 0", "tunnel_stall_timeout: the value '0' is not valid; expected a duration of at least 1ms, such as 1m, or off, at Caddyfile:3"},
		{"tunnel_idle_timeout 0", "tunnel_idle_timeout: the value '0' is not valid; expected a duration of at least 1ms, such as 1h, or off, at Caddyfile:3"},
		{"tunnel_max_duration never", "tunnel_max_duration: the value 'never' is not valid; expected a duration of at least 1ms, such as 24h, or off, at Caddyfile:3"},
		{"upstream off {\nheader X-A b\n}", "upstream: unexpected block; expected no block after off, at Caddyfile:3"},
		{"report_only rules off", "report_only: off is given together with other values; expected off alone, at Caddyfile:3"},
		{"upstream off\nno_upstream a.example", "no_upstream: no upstream is configured; expected the option upstream as well, at Caddyfile:4"},
		{"stream_close_delay -1s", "stream_close_delay: the value '-1s' is not valid; expected a duration such as 5m, or 0 for immediately, at Caddyfile:3"},
		{"recheck_tunnels yes", "recheck_tunnels: unexpected value 'yes'; expected no value, at Caddyfile:3"},
		{`recheck_tunnels
recheck_tunnels`, "recheck_tunnels: the option is already set at Caddyfile:3; expected it once, at Caddyfile:4"},
		{"brust 5", "unrecognized option 'brust'; did you mean burst?, at Caddyfile:3"},
		{`burst 1000000000

refill 0.1
zone a`, "burst 1000000000 with refill 0.1: an empty bucket would take more than 4000000000 seconds to fill; expected a smaller burst or a larger refill, at Caddyfile:5"},
		{"max_clients 9223372036854775807", "max_clients: the value '9223372036854775807' is not valid; " + clients + ", at Caddyfile:3"},
		{"max_tunnels 9223372036854775807", "max_tunnels: the value '9223372036854775807' is not valid; " + tunnels + ", at Caddyfile:3"},
		{"dial_timeout 9223372036854775807ns", "dial_timeout: the value '9223372036854775807ns' is not valid; expected a duration of at least 1ms, such as 10s, at Caddyfile:3"},
		{`no_upstream a.example
burst 5`, "no_upstream: no upstream is configured; expected the option upstream as well, at Caddyfile:3"},
		{`limit_by user
burst 5`, "limit_by: clients have no user; expected the option basic_auth, users_file or user_from as well, at Caddyfile:3"},
		{"header_up X-A [ b", "header_up: the values 'X-A [ b' are not valid: replacement 0 for header field 'X-A': error parsing regexp: missing closing ]: `[`; " + header + ", at Caddyfile:3"},
		{"header_down ?X-A b", "header_down: the values '?X-A b' are not valid: '?X-A' is not a field name; " + header + ", at Caddyfile:3"},
		{`header_up "A b" c`, "header_up: the values 'A b c' are not valid: 'A b' is not a field name; " + header + ", at Caddyfile:3"},
		{"header_up X-A: b", "header_up: the values 'X-A: b' are not valid: 'X-A:' is not a field name; " + header + ", at Caddyfile:3"},
		{"header_up -", "header_up: the values '-' are not valid: '' is not a field name; " + header + ", at Caddyfile:3"},
		{"header_up A: b c", "header_up: the values 'A: b c' are not valid: 'A:' is not a field name; " + header + ", at Caddyfile:3"},
		{"header_up", "header_up: missing value; " + header + ", at Caddyfile:3"},
		{`basic_auth {
	alice wonderland
}`, "basic_auth: the hash of the user 'alice' is not valid; expected one for bcrypt, as `caddy hash-password` prints it, at Caddyfile:4"},
		{`basic_auth {
	bob ` + hash + `
	alice $2a$14$short
}`, "basic_auth: the hash of the user 'alice' is not valid; expected one for bcrypt, as `caddy hash-password` prints it, at Caddyfile:5"},
		{`basic_auth argon2id {
	alice ` + hash + `
}`, "basic_auth: the hash of the user 'alice' is not valid; expected one for argon2id, as `caddy hash-password` prints it, at Caddyfile:4"},
		{`basic_auth {
	alice ` + hash + " " + hash + `
}`, "basic_auth: the user 'alice' must be followed by exactly one hash, as `caddy hash-password` prints it, at Caddyfile:4"},
		{`basic_auth {
	alice ` + hash + `
	alice ` + hash + `
}`, "basic_auth: the user 'alice' is listed twice; expected each user once, at Caddyfile:5"},
		{"allow_file " + list, "allow_file: " + list + ":4: \"a b\" is not an address, a CIDR range or a name; " + files + ", at Caddyfile:3"},
		{`burst 5
deny_file /nonexistent/list`, "deny_file: open /nonexistent/list: no such file or directory; " + files + ", at Caddyfile:4"},
		{"deny_from static", "deny_from: static has no ranges; " + sources + ", at Caddyfile:3"},
		{"deny_from static 10.0.0.0/8 a", "deny_from: the value 'a' is not valid; " + sources + ", at Caddyfile:3"},
		{"resolvers dns.google", "resolvers: the value 'dns.google' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"resolvers 192.0.2.53 udp/localhost:53", "resolvers: the value 'udp/localhost:53' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"resolvers fd/3", "resolvers: the value 'fd/3' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"resolvers 8.8.8.8:0", "resolvers: the value '8.8.8.8:0' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"resolvers 8.8.8.8:", "resolvers: the value '8.8.8.8:' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53, at Caddyfile:3"},
		{"via on", "via: the value 'on' is not valid; " + pseudonym + ", at Caddyfile:3"},
		{"limiter redis a", "limiter: this build has no module http.async_proxy.limiters.redis; expected a limiter that this Caddy is built with; for redis, build it with --with github.com/asyncproxy/caddy-async-proxy/redis, at Caddyfile:3"},
		{"limiter", "limiter: missing value; expected a limiter that this Caddy is built with; for redis, build it with --with github.com/asyncproxy/caddy-async-proxy/redis, at Caddyfile:3"},
		{"upstream http://us%er@a.example", "upstream: the value is not valid: the user or the password is not correctly percent-encoded, at Caddyfile:3"},
		{`upstream https://a.example {
	header "X A" b
}`, "upstream: header: the values are not valid; expected a field and a value, in quotes if it has spaces, for http:// and https:// only, at Caddyfile:4"},
		{`upstream https://a.example {
	tls_server_name
}`, "upstream: tls_server_name: missing value; expected one name, at Caddyfile:4"},
		{`upstream https://a.example {
	tls_trust_pool nowhere
}`, "upstream: tls_trust_pool: this build has no module tls.ca_pool.source.nowhere; expected a source of certificates, such as file, at Caddyfile:4"},
	} {
		directive := tc.text
		if !strings.HasPrefix(directive, "async_proxy") {
			directive = `async_proxy {
	` + directive + `
}`
		}
		_, _, err := adapt(`:8080 {
	`+directive+`
}
`, "Caddyfile")
		if want := "parsing caddyfile tokens for 'async_proxy': " + tc.want; err == nil || err.Error() != want {
			t.Errorf("%s\ngives %v\nwant  %v", directive, err, want)
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
	shared, err := acquireProcess()
	if err != nil {
		t.Fatal(err)
	}
	defer releaseProcess()
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
		{`"rules": [{"action": "permit", "destinations": ["all"]}]`, `rules[0]: action: the value 'permit' is not valid; expected allow or deny`},
		{`"rules": [{"action": "deny"}]`, "rules[0]: deny: missing destination; expected addresses, CIDR ranges, names, *.names, public, private or all, each optionally followed by :<ports>"},
		{`"connect_ports": ["0"]`, "connect_ports: the value '0' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999"},
		{`"clients": ["10.1.2.3/8"]`, "clients: 10.1.2.3/8 has bits set beyond its length; write 10.0.0.0/8 for the range, or 10.1.2.3 for the address"},
		{`"rules": [{"action": "deny", "destinations": [".example.com"]}]`, `rules[0]: deny: ".example.com" is not a name; for the name and everything below it, write example.com *.example.com`},
		{`"pac_direct": ["a.example"]`, "pac_direct: expected serve_pac to be set as well"},
		{`"serve_pac": "/a", "pac_direct": ["all"]`, "pac_direct: all, public and private are not allowed"},
		{`"ports": ["0"]`, "ports: the value '0' is not valid; expected ports from 1 to 65535, or ranges such as 8000-8999"},
		{`"report_only": ["all"]`, "report_only: the value 'all' is not valid; expected rules, limits or both, or off"},
		{`"limit_by": "token"`, "limit_by: the value 'token' is not valid; expected client_ip or user"},
		{`"limit_by": "user"`, "limit_by: clients have no user; expected the option basic_auth, users_file or user_from as well"},
		{`"serve_pac": "proxy.pac"`, "serve_pac: the value 'proxy.pac' is not valid; expected a path that begins with /, or no value"},
		{`"resolvers": ["192.0.2.53", "dns.google:53"]`, "resolvers: the value 'dns.google:53' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53"},
		{`"resolvers": ["a b"]`, "resolvers: the value 'a b' is not valid; expected IP addresses of DNS servers, such as 192.0.2.53 or tcp/[2001:db8::53]:53"},
		{`"upstream": {"url": "proxy.example:80"}`, `upstream: missing scheme; expected http://, https:// or socks5://, and the host of a proxy`},
		{`"no_upstream": ["a.example"]`, "no_upstream: no upstream is configured; expected the option upstream as well"},
		{`"dial_timeout": 5`, "dial_timeout: the value '5ns' is not valid; expected a duration of at least 1ms, such as 10s"},
		{`"tunnel_idle_timeout": 5`, "tunnel_idle_timeout: the value '5ns' is not valid; expected a duration of at least 1ms, such as 1h, or off"},
		{`"rules": [{"action": "block", "destinations": ["all"]}]`, "rules[0]: action: the value 'block' is not valid; expected allow or deny"},
		{`"dial_timeout": -1`, "dial_timeout: the value '-1ns' is not valid; expected a duration of at least 1ms, such as 10s"},
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
		{`"tunnel_max_duration": "2562047h"`, "tunnel_max_duration: the value '2562047h0m0s' is not valid; expected a duration of at least 1ms, such as 24h, or off"},
		{`"stream_close_delay": "-1s"`, "stream_close_delay: the value '-1s' is not valid; expected a duration such as 5m, or 0 for immediately"},
	} {
		err := validate(t, `{"handler": "async_proxy", `+tc.options+`}`)
		if want := "provision http.handlers.async_proxy: " + tc.want; err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v\nwant %s at the end", tc.options, err, want)
		}
		for _, tables := range []*caddy.UsagePool{shared.limiters, shared.failedLogins} {
			tables.Range(func(limits, _ any) bool {
				t.Errorf("%s: the table %+v was not released", tc.options, limits)
				return true
			})
		}
		if n, _ := program.processes.References(processKey); n != 1 {
			t.Errorf("%s: the process value was not released", tc.options)
		}
	}
}

func TestJSONOfAnotherShape(t *testing.T) {
	for options, want := range map[string]string{
		`"nonsense": 5`:          `json: unknown field "nonsense"`,
		`"burst": "5"`:           "json: cannot unmarshal string into Go struct field Handler.Options.burst of type int64",
		`"burst": 1.5`:           "json: cannot unmarshal number 1.5 into Go struct field Handler.Options.burst of type int64",
		`"burst": 1e30`:          "json: cannot unmarshal number 1e+30 into Go struct field Handler.Options.burst of type int64",
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
	f.Add(`async_proxy {
	user_from {a.b}
	policy ci {
		users ci-* *-bot
		limit_by user
		allow a.example
		deny all
	}
	policy guests {
		clients 10.0.0.0/8
		match {
			method GET
		}
		max_tunnels 5 per_client 2
	}
	policy others {
		methods GET
	}
}`)
	f.Add(`async_proxy burst 5 refill 0.5 {
	zone a
	exempt 10.0.0.0/8 private_ranges
}`)
	f.Add(`async_proxy {
	max_tunnels 5 per_client 2
	tunnel_idle_timeout off
	stream_close_delay 0
	recheck_tunnels
}`)
	f.Add(`async_proxy {
	burst 1000000000
	refill 0.00001
}`)
	f.Add(`async_proxy {
	header_up X-A "a b"
	header_down -X-B
	header_down X-C ( d
	via fred
	hosts a.example
}`)
	f.Add(`async_proxy {
	burst 5 {
	}
	dial_timeout 1d
}}`)
	f.Add(`async_proxy { {
}
`)
	f.Add(`async_proxy {
	allow *.a.example:80-81 private
	deny_from static 10.0.0.0/8 private_ranges
	deny all
	ports 80 8000-8999
	report_only rules
}`)
	f.Add(`async_proxy {
	resolvers 192.0.2.53 tcp/[2001:db8::53]:53 8.8.8.8:
	serve_pac /a
	no_upstream a.example 10.0.0.0/8
}`)
	f.Add(`async_proxy {
	upstream https://user:pass%20word@a.example:3128 {
		header X-A b
		tls_server_name c
		tls_insecure_skip_verify
	}
	no_upstream *.a.example
}`)
	f.Add(`async_proxy {
	clients 10.0.0.0/8
	limit_by user
	basic_auth bcrypt a {
		alice $2a$04$L3tYy4Xp5LAaG0jL6YbCaeF2TPXqQVbEs6EY68eOAKjBjzLWbN.oi
	}
}`)
	f.Add(`async_proxy {
	limiter test a
	max_clients 9007199254740993
	tunnel_max_duration 2562047h
}`)
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
	for _, file := range []string{"Caddyfile.example", "examples/docker/Caddyfile", "contrib/kubernetes/Caddyfile"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		checkShipped(t, string(text), file)
	}
}

// TestPackagedCaddyfile checks that the configuration of the service is valid, and still is with all
// that is commented out.
func TestPackagedCaddyfile(t *testing.T) {
	data, err := os.ReadFile("packaging/Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(data), "/etc/async-proxy/users", "/etc/caddy/proxy-users", 1)
	checkShipped(t, text, "packaging/Caddyfile")
	comment := regexp.MustCompile(`(?m)^(\t*)# (clients |users_file |deny |allow |http://|\tbind|\tasync_proxy_status|})`)
	if n := len(comment.FindAllString(text, -1)); n != 8 {
		t.Errorf("%d lines are commented out, want 8", n)
	}
	checkShipped(t, comment.ReplaceAllString(text, "$1$2"), "packaging/Caddyfile")
}

// checkShipped checks a Caddyfile that users copy: it must adapt without warnings and be
// formatted as by `caddy fmt`.
func checkShipped(t *testing.T, text, filename string) {
	t.Helper()
	_, warnings, err := adapt(withFiles(t, text), filename)
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

// withFiles replaces the lists, secrets and users that a documented Caddyfile names with files that
// exist.
func withFiles(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	return regexp.MustCompile(`(/etc/caddy/lists|/run/secrets)/\w+|/etc/caddy/proxy-users`).ReplaceAllStringFunc(text, func(path string) string {
		name := filepath.Base(path)
		content := name + ".example\n"
		switch {
		case strings.HasPrefix(path, "/run/"):
			content = "secret"
		case name == "proxy-users":
			content = "alice:$2a$14$TYr0d8dN27p8HCUCzfbnxOZLvYEpmds.0N9q2duGeJkfDBawuI9RK\n"
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return filepath.Join(dir, name)
	})
}
