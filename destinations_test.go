// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/tls"
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

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/hostport"
)

// A rule that is only reported denies nothing, and is logged.
func TestRulesReportOnlyAreLogged(t *testing.T) {
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
		if denied := p.Check(t.Context(), access.LocalScope, hostport.Target{Name: tc.name, Port: to.Port()}, to).Denied; (denied == nil) != tc.open {
			t.Errorf("%s %s: %v", tc.name, tc.to, denied)
		}
	}
	if err := os.WriteFile(file, []byte("a.example\nnot/a/name\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{file: "deny: " + file + ":2: ", file + ".missing": "deny: open " + file + ".missing: "} {
		_, err := access.NewRuleSets([]access.Rule{{Action: "deny", Files: []string{path}}}, new(access.RuleCheck))
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, r := range []access.Rule{{Action: "permit", Destinations: []string{"all"}}, {Action: "deny"}, {Action: "deny", Destinations: []string{"a b"}}} {
		if _, err := access.NewRuleSets([]access.Rule{r}, new(access.RuleCheck)); err == nil {
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
			if denied := p.Check(t.Context(), access.LocalScope, hostport.TargetOf(to.String()), to).Denied; denied != nil {
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
