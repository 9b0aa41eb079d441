// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
	"github.com/asyncproxy/caddy-async-proxy/internal/policy"
)

func TestRulesOfDestinations(t *testing.T) {
	const opens, byDefault = "opens", "default"
	for _, tc := range []struct {
		rules string
		reach policy.Scope
		name  string // "": the address itself
		to    string
		want  string // opens, or the rule that denies
	}{
		// The first matching rule decides.
		{"deny 192.0.2.0/24\nallow 192.0.2.1", policy.LocalScope, "", "192.0.2.1:80", "deny 192.0.2.0/24"},
		{"allow 192.0.2.1\ndeny 192.0.2.0/24", policy.PublicScope, "", "192.0.2.1:80", opens},
		{"allow 192.0.2.1\ndeny 192.0.2.0/24", policy.PublicScope, "", "192.0.2.2:80", "deny 192.0.2.0/24"},
		{"deny 8.8.8.8 1.1.1.1", policy.PublicScope, "", "1.1.1.1:80", "deny 1.1.1.1/32"},
		{"deny 8.8.8.8", policy.PublicScope, "", "1.1.1.1:80", opens},
		{"", policy.PublicScope, "", "1.1.1.1:80", opens},
		{"", policy.PublicScope, "", "10.0.0.1:80", byDefault},
		{"", policy.LocalScope, "", "10.0.0.1:80", opens},

		// Names.
		{"deny ads.example", policy.PublicScope, "ads.example", "1.1.1.1:80", "deny ads.example"},
		{"deny ads.example", policy.PublicScope, "www.ads.example", "1.1.1.1:80", opens},
		{"deny ads.example", policy.PublicScope, "", "1.1.1.1:80", opens},
		{"deny ADS.Example.", policy.PublicScope, "ads.example", "1.1.1.1:80", "deny ads.example"},
		{"deny *.ads.example", policy.PublicScope, "ads.example", "1.1.1.1:80", opens},
		{"deny *.ads.example", policy.PublicScope, "a.ads.example", "1.1.1.1:80", "deny *.ads.example"},
		{"deny *.ads.example", policy.PublicScope, "a.b.ads.example", "1.1.1.1:80", "deny *.ads.example"},
		{"deny *.ads.example", policy.PublicScope, "bads.example", "1.1.1.1:80", opens},
		{"deny *.example", policy.PublicScope, "a.b.ads.example", "1.1.1.1:80", "deny *.example"},
		{"deny münchen.example", policy.PublicScope, "xn--mnchen-3ya.example", "1.1.1.1:80", "deny xn--mnchen-3ya.example"},
		{"allow www.ads.example\ndeny *.ads.example", policy.PublicScope, "www.ads.example", "1.1.1.1:80", opens},
		{"allow www.ads.example\ndeny *.ads.example", policy.PublicScope, "ftp.ads.example", "1.1.1.1:80", "deny *.ads.example"},

		// Allowing a name opens no address that is otherwise closed.
		{"allow wiki.example", policy.PublicScope, "wiki.example", "10.0.0.1:80", byDefault},
		{"allow wiki.example", policy.LocalScope, "wiki.example", "10.0.0.1:80", opens},
		{"allow wiki.example", policy.LocalScope, "wiki.example", "169.254.169.254:80", byDefault},
		{"allow wiki.example 10.0.0.0/8", policy.PublicScope, "wiki.example", "10.0.0.1:80", opens},
		{"allow wiki.example\nallow 10.0.0.0/8", policy.PublicScope, "wiki.example", "10.0.0.1:80", opens},
		{"allow wiki.example\ndeny 1.1.1.0/24", policy.PublicScope, "wiki.example", "1.1.1.1:80", "deny 1.1.1.0/24"},
		{"allow wiki.example\ndeny all", policy.PublicScope, "wiki.example", "1.1.1.1:80", opens},
		{"allow wiki.example\ndeny all", policy.PublicScope, "wiki.example", "10.0.0.1:80", byDefault},
		{"allow wiki.example 10.0.0.0/8\ndeny all", policy.PublicScope, "wiki.example", "10.0.0.1:80", opens},
		{"allow wiki.example 10.0.0.0/8\ndeny all", policy.PublicScope, "other.example", "10.0.0.1:80", opens},
		{"allow wiki.example\ndeny all", policy.PublicScope, "other.example", "1.1.1.1:80", "deny all"},
		{"allow wiki.example\ndeny all", policy.PublicScope, "", "1.1.1.1:80", "deny all"},
		{"allow 1.1.1.1\ndeny all", policy.PublicScope, "other.example", "1.1.1.1:80", opens},
		{"allow 1.1.1.1\ndeny all", policy.PublicScope, "", "8.8.8.8:80", "deny all"},

		// Classes.
		{"allow all", policy.PublicScope, "", "10.0.0.1:80", byDefault},
		{"allow all", policy.PublicScope, "x.example", "10.0.0.1:80", byDefault},
		{"allow all", policy.PublicScope, "x.example", "1.1.1.1:80", opens},
		{"allow private", policy.PublicScope, "", "10.0.0.1:80", opens},
		{"allow private", policy.PublicScope, "", "127.0.0.1:80", opens},
		{"allow private", policy.PublicScope, "", "[fd00::1]:80", opens},
		{"allow private", policy.PublicScope, "", "169.254.169.254:80", byDefault},
		{"allow private", policy.LocalScope, "", "0.0.0.0:80", byDefault},
		{"allow private\ndeny all", policy.PublicScope, "", "1.1.1.1:80", "deny all"},
		{"allow public\ndeny all", policy.LocalScope, "", "1.1.1.1:80", opens},
		{"allow public\ndeny all", policy.LocalScope, "", "127.0.0.1:80", "deny all"},
		{"deny private", policy.LocalScope, "", "127.0.0.1:80", "deny private"},
		{"deny private", policy.LocalScope, "x.example", "[64:ff9b::a00:1]:80", "deny private"},
		{"deny private", policy.LocalScope, "", "1.1.1.1:80", opens},
		{"deny public", policy.LocalScope, "", "1.1.1.1:80", "deny public"},
		{"deny public", policy.LocalScope, "", "127.0.0.1:80", opens},
		{"allow private_ranges", policy.PublicScope, "", "192.168.1.1:80", opens},

		// Metadata services.
		{"allow private", policy.PublicScope, "", "[fd00:ec2::254]:80", byDefault},
		{"allow private_ranges", policy.PublicScope, "", "[fd00:ec2::254]:80", byDefault},
		{"allow private", policy.PublicScope, "", "100.100.100.200:80", byDefault},
		{"allow 100.64.0.0/10", policy.PublicScope, "", "100.100.100.200:80", byDefault},
		{"allow 100.64.0.0/10", policy.PublicScope, "", "100.100.100.201:80", opens},
		{"allow 0.0.0.0/0 ::/0", policy.PublicScope, "", "168.63.129.16:80", byDefault},
		{"allow 0.0.0.0/0 ::/0", policy.PublicScope, "", "169.254.169.254:80", byDefault},
		{"allow 0.0.0.0/0 ::/0", policy.PublicScope, "", "[64:ff9b::a9fe:a9fe]:80", byDefault},
		{"allow 168.63.129.16", policy.PublicScope, "", "168.63.129.16:80", opens},
		{"allow 169.254.0.0/16 169.254.169.254", policy.PublicScope, "", "169.254.169.254:80", opens},
		{"allow 169.254.169.254", policy.PublicScope, "metadata.example", "169.254.169.254:80", opens},
		{"allow 169.254.169.254", policy.PublicScope, "", "[64:ff9b::a9fe:a9fe]:80", opens},
		{"allow all", policy.LocalScope, "metadata.example", "192.0.0.192:80", byDefault},
		{"", policy.LocalScope, "", "192.0.0.192:80", byDefault},
		{"", policy.LocalScope, "", "[fd20:ce::254]:80", byDefault},
		{"deny 100.64.0.0/10", policy.LocalScope, "", "100.100.100.200:80", "deny 100.64.0.0/10"},
		{"deny private", policy.LocalScope, "", "100.100.100.200:80", "deny private"},

		// Addresses embedded in others.
		{"deny 1.1.1.0/24", policy.PublicScope, "", "[64:ff9b::101:101]:80", "deny 1.1.1.0/24"},
		{"deny 1.1.1.0/24", policy.PublicScope, "", "[2002:101:101::]:80", "deny 1.1.1.0/24"},
		{"deny 1.1.1.0/24", policy.PublicScope, "", "[::ffff:1.1.1.1]:80", "deny 1.1.1.0/24"},
		{"deny ::ffff:1.1.1.1", policy.PublicScope, "", "1.1.1.1:80", "deny 1.1.1.1/32"},
		{"deny ::ffff:1.1.1.0/120", policy.PublicScope, "", "1.1.1.1:80", "deny 1.1.1.0/24"},
		{"deny 64:ff9b::/96", policy.PublicScope, "", "[64:ff9b::101:101]:80", "deny 64:ff9b::/96"},

		// Ports.
		{"deny x.example:80", policy.PublicScope, "x.example", "1.1.1.1:80", "deny x.example:80"},
		{"deny x.example:80", policy.PublicScope, "x.example", "1.1.1.1:443", opens},
		{"deny all:1-1023\nallow all", policy.PublicScope, "", "1.1.1.1:1023", "deny all:1-1023"},
		{"deny all:1-1023\nallow all", policy.PublicScope, "", "1.1.1.1:1024", opens},
		{"allow all:443\ndeny all", policy.PublicScope, "x.example", "1.1.1.1:443", opens},
		{"allow all:443\ndeny all", policy.PublicScope, "x.example", "1.1.1.1:80", "deny all"},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", policy.PublicScope, "", "10.0.0.1:443", opens},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", policy.PublicScope, "", "[fd00::1]:443", opens},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", policy.PublicScope, "", "[fd00::]:85", opens},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", policy.PublicScope, "", "[fd00::]:91", byDefault},
		{"allow 10.0.0.1:443 [fd00::1]:443 [fd00::]:80-90", policy.PublicScope, "", "10.0.0.1:80", byDefault},
		{"", policy.PublicScope, "", "1.1.1.1:25", "ports"},
		{"allow all 1.1.1.1:25", policy.PublicScope, "", "1.1.1.1:25", "ports"},
		{"ports 25", policy.PublicScope, "", "1.1.1.1:25", opens},
		{"ports 80 8000-8999", policy.PublicScope, "", "1.1.1.1:8500", opens},
		{"ports 80 8000-8999", policy.PublicScope, "", "1.1.1.1:443", "ports"},
		{"ports 80 8000-8999\nallow 1.1.1.1:443", policy.PublicScope, "", "1.1.1.1:443", "ports"},
	} {
		p := policyOf(t, tc.rules)
		to := netip.MustParseAddrPort(tc.to)
		asked := hostport.Target{Name: tc.name, Port: to.Port()}
		if tc.name == "" {
			asked.Addr = to.Addr()
		}
		got := opens
		if denied, _ := p.Check(t.Context(), tc.reach, asked, to); denied != nil {
			if got = denied.Rule; got == "" {
				got = byDefault
			}
		}
		if got != tc.want {
			t.Errorf("%q: %q at %s for reach %d: %s, want %s", tc.rules, tc.name, tc.to, tc.reach, got, tc.want)
		}
		// Checking the name alone may save a lookup but must not change the outcome.
		if early, _ := p.CheckName(t.Context(), tc.reach, asked, true); early != nil && got == opens {
			t.Errorf("%q: the name %q is denied by %s, its address is not", tc.rules, tc.name, early.Rule)
		}
	}
}

// TestRulesWithoutResolving covers names that a parent proxy resolves.
func TestRulesWithoutResolving(t *testing.T) {
	for _, tc := range []struct {
		rules, address string
		reach          policy.Scope
		open           bool
	}{
		{"", "x.example:80", policy.PublicScope, true},
		{"", "x.example:25", policy.PublicScope, false},
		{"", "10.0.0.1:80", policy.PublicScope, false},
		{"", "10.0.0.1:80", policy.LocalScope, true},
		{"", "169.254.169.254:80", policy.LocalScope, false},
		{"", "[::ffff:10.0.0.1]:80", policy.PublicScope, false},
		{"", "localhost:80", policy.PublicScope, false},
		{"", "LOCALHOST.:80", policy.PublicScope, false},
		{"", "x.localhost:80", policy.PublicScope, false},
		{"", "localhost:80", policy.LocalScope, true},
		{"deny x.example", "X.example.:80", policy.PublicScope, false},
		{"deny x.example", "y.example:80", policy.PublicScope, true},
		{"deny all", "y.example:80", policy.PublicScope, false},
		{"allow *.example\ndeny all", "y.example:80", policy.PublicScope, true},
		{"allow *.example\ndeny all", "y.test:80", policy.PublicScope, false},
		{"allow 1.1.1.1\ndeny all", "y.test:80", policy.PublicScope, false}, // unknown: the address would decide
		{"allow 1.1.1.1\ndeny all", "1.1.1.1:80", policy.PublicScope, true},
		{"deny 1.1.1.1", "y.test:80", policy.PublicScope, true}, // likewise unknown
		{"deny 1.1.1.1", "1.1.1.1:80", policy.PublicScope, false},
		{"allow private", "10.0.0.1:80", policy.PublicScope, true},
	} {
		p := policyOf(t, tc.rules)
		if denied, _ := p.CheckName(t.Context(), tc.reach, hostport.TargetOf(tc.address), false); (denied == nil) != tc.open {
			t.Errorf("%q: %s for reach %d: %v, want it open: %v", tc.rules, tc.address, tc.reach, denied, tc.open)
		}
	}
}

// TestRulesReportOnly checks that denials by rules and ports are reported, and that
// checking continues as if those rules did not exist.
func TestRulesReportOnly(t *testing.T) {
	for _, tc := range []struct {
		rules, name, to, reported string
		open                      bool
	}{
		{"deny all", "x.example", "1.1.1.1:80", "deny all", true},
		{"deny all", "x.example", "10.0.0.1:80", "", false}, // closed by default
		{"deny 1.1.1.1\ndeny all", "", "1.1.1.1:80", "deny 1.1.1.1/32", true},
		{"ports 443", "", "1.1.1.1:80", "ports", true},
		{"", "", "1.1.1.1:80", "", true},
		{"deny 10.0.0.1\nallow 10.0.0.0/8", "", "10.0.0.1:80", "deny 10.0.0.1/32", true},
	} {
		p := policyOf(t, "report_only rules\n"+tc.rules)
		to := netip.MustParseAddrPort(tc.to)
		denied, reported := p.Check(t.Context(), policy.PublicScope, hostport.Target{Name: tc.name, Port: to.Port()}, to)
		rule := ""
		if reported != nil {
			rule = reported.Rule
		}
		if (denied == nil) != tc.open || rule != tc.reported {
			t.Errorf("%q: %s: %v, reported %q; want open %v, reported %q", tc.rules, tc.to, denied, rule, tc.open, tc.reported)
		}
		if early, _ := p.CheckName(t.Context(), policy.PublicScope, hostport.Target{Name: tc.name, Port: to.Port()}, true); early != nil {
			t.Errorf("%q: the name alone is denied: %v", tc.rules, early)
		}
	}
	w := newWorld(t, "report_only rules limits\nburst 1\nrefill 0.00001\ndeny all", nil)
	for range 3 {
		res, err := w.client().Get(w.origin.URL)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			t.Errorf("status %d, want 200", res.StatusCode)
		}
	}
	line := w.waitLog("would be denied", 3)[0]
	if line["level"] != "warn" || line["rule"] != "deny all" || line["client"] != "127.0.0.1" || line["report_only"] != true ||
		line["target"] != w.origin.Listener.Addr().String() || line["address"] != line["target"] {
		t.Errorf("line %v", line)
	}
	if line := w.waitLog("rate limited", 2)[0]; line["report_only"] != true {
		t.Errorf("line %v", line)
	}
}

func TestRulesFromFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(file, []byte("# a comment\n\n  10.1.2.3  # another\nads.example\n*.ads.example:80\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := policyOf(t, "deny_file "+file)
	for _, tc := range []struct {
		name, to string
		open     bool
	}{{"", "10.1.2.3:80", false}, {"", "10.1.2.4:80", true}, {"ads.example", "1.1.1.1:1", false}, {"x.ads.example", "1.1.1.1:80", false}, {"x.ads.example", "1.1.1.1:81", true}} {
		to := netip.MustParseAddrPort(tc.to)
		if denied, _ := p.Check(t.Context(), policy.LocalScope, hostport.Target{Name: tc.name, Port: to.Port()}, to); (denied == nil) != tc.open {
			t.Errorf("%s %s: %v", tc.name, tc.to, denied)
		}
	}
	if err := os.WriteFile(file, []byte("a.example\nnot/a/name\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{file: "deny: " + file + ":2: ", file + ".missing": "deny: open " + file + ".missing: "} {
		_, err := policy.NewRuleSets([]policy.Rule{{Action: "deny", Files: []string{path}}}, new(policy.RuleCheck))
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, r := range []policy.Rule{{Action: "permit", Destinations: []string{"all"}}, {Action: "deny"}, {Action: "deny", Destinations: []string{"a b"}}} {
		if _, err := policy.NewRuleSets([]policy.Rule{r}, new(policy.RuleCheck)); err == nil {
			t.Errorf("the rule %+v is accepted", r)
		}
	}
}

// changingRanges is a source of ranges that tests can change.
type changingRanges struct{}

var changing atomic.Pointer[[]netip.Prefix]

func init() { caddy.RegisterModule(changingRanges{}) }

func (changingRanges) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.ip_sources.changing", New: func() caddy.Module { return new(changingRanges) }}
}
func (*changingRanges) UnmarshalCaddyfile(d *caddyfile.Dispenser) error { d.Next(); return nil }
func (*changingRanges) GetIPRanges(r *http.Request) []netip.Prefix {
	if r == nil {
		panic("without a request")
	}
	return *changing.Load()
}

func TestRulesFromSources(t *testing.T) {
	p := policyOf(t, "deny_from static 192.0.2.0/24 2001:db8::/32\ndeny_from changing")
	check := func(want string, addresses ...string) {
		t.Helper()
		for _, address := range addresses {
			to := netip.AddrPortFrom(netip.MustParseAddr(address), 80)
			rule := ""
			if denied, _ := p.Check(t.Context(), policy.LocalScope, hostport.TargetOf(to.String()), to); denied != nil {
				rule = denied.Rule
			}
			if rule != want {
				t.Errorf("%s: rule %q, want %q", address, rule, want)
			}
		}
	}
	changing.Store(new([]netip.Prefix))
	check("deny http.ip_sources.static", "192.0.2.1", "2001:db8::1", "64:ff9b::c000:201")
	check("", "198.51.100.1")
	changing.Store(&[]netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")})
	check("deny http.ip_sources.changing", "198.51.100.1")
	changing.Store(&[]netip.Prefix{netip.MustParsePrefix("198.51.101.0/24")})
	check("", "198.51.100.1")
}

// TestRulesLookup checks that thousands of entries cost no memory per check and hardly any
// time.
func TestRulesLookup(t *testing.T) {
	p := manyRules(t)
	to := netip.MustParseAddrPort("1.2.3.4:443")
	asked := hostport.Target{Name: "a.b.c.example.com", Port: 443}
	ctx := context.Background()
	if n := testing.AllocsPerRun(100, func() { _, _ = p.Check(ctx, policy.PublicScope, asked, to) }); n > 0 {
		t.Errorf("%v allocations for a check, want none", n)
	}
}

func manyRules(t testing.TB) *policy.Policy {
	var b strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&b, "deny 20.%d.%d.0/24\n", i/256, i%256)
	}
	for i := range 1000 {
		fmt.Fprintf(&b, "deny *.d%d.example\n", i)
	}
	return policyOf(t, b.String())
}

func BenchmarkRules(b *testing.B) {
	p := manyRules(b)
	ctx := context.Background()
	asked := hostport.Target{Name: "www.d999.example.com", Port: 443}
	for name, address := range map[string]string{"IPv4": "30.2.3.4:443", "IPv6": "[2606:4700::1]:443"} {
		to := netip.MustParseAddrPort(address)
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if denied, _ := p.Check(ctx, policy.PublicScope, asked, to); denied != nil {
					b.Fatal(denied)
				}
			}
		})
	}
}

// TestRulesOfPooledConnections checks that a pooled connection is not used for an http or
// https request, or an upgrade that the origin declines, if the source of ranges has
// changed since and now denies it.
func TestRulesOfPooledConnections(t *testing.T) {
	secure := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	secure.EnableHTTP2 = true
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{tlsCertificate}}
	secure.StartTLS()
	defer secure.Close()
	for _, options := range []string{"deny_from changing", "deny_from changing\nupstream http://127.0.0.1:1\nno_upstream 127.0.0.1"} {
		changing.Store(new([]netip.Prefix))
		w := newWorld(t, options, nil)
		for _, request := range []string{
			"GET " + w.origin.URL + "/ HTTP/1.1\nHost: x\n\n",
			"GET " + secure.URL + "/ HTTP/1.1\nHost: x\n\n",
			"GET " + secure.URL + "/ HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: x\n\n",
		} {
			conn := w.dial()
			for _, tc := range []struct {
				ranges []netip.Prefix
				status int
			}{{nil, http.StatusOK}, {[]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, http.StatusForbidden}, {nil, http.StatusOK}} {
				changing.Store(&tc.ranges)
				conn.send(request)
				if res, _ := conn.response(http.MethodGet); res.StatusCode != tc.status {
					t.Errorf("%s, %.40q with %v: status %d, want %d", options, request, tc.ranges, res.StatusCode, tc.status)
				}
			}
		}
	}
}
