// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// An allow rule without effect is an error that explains what to write instead: its author
// believes that it closes everything else.
func TestAllowWithoutEffect(t *testing.T) {
	for _, tc := range []struct {
		rules   string // one per line
		useless string // the destinations in the error; "": no error
	}{
		{"allow example.com", "example.com"},
		{"allow github.com *.github.com", "github.com *.github.com"},
		{"allow example.com:443", "example.com:443"},
		{"allow all", "all"},
		{"allow public", "public"},
		{"deny ads.example.com\nallow example.com", "example.com"},
		{"allow example.com\ndeny ads.example.com", "example.com"},
		{"allow example.com\nallow *.example.net\ndeny example.org", "example.com"},
		{"allow example.com:443\ndeny all:80", "example.com:443"},
		// Allowing a name does not open its addresses.
		{"allow example.com\ndeny 192.0.2.0/24", "example.com"},
		{"allow example.com\ndeny public", "example.com"},
		{"allow example.com\ndeny private", "example.com"},
		{"allow example.com\nallow 10.0.0.0/8", "example.com"},
		{"allow example.com\ndeny_from static 192.0.2.0/24", "example.com"},
		{"allow public\ndeny private 10.0.0.0/8", "public"},
		{"allow all\ndeny private", "all"},
		{"report_only rules\nallow example.com", "example.com"},

		{"allow example.com\ndeny all", ""},
		{"allow example.com\nallow_from static 192.0.2.0/24\ndeny all", ""},
		{"allow example.com:443\ndeny all:443", ""},
		{"allow example.com:400-500\ndeny all:443", ""},
		{"allow www.example.com\ndeny *.example.com", ""},
		{"allow *.good.example.com\ndeny *.example.com", ""},
		{"allow *.example.com\ndeny www.example.com", ""},
		{"allow *.example.com\ndeny *.ads.example.com", ""},
		{"allow example.com\ndeny example.com:80", ""},
		{"allow all\ndeny example.com", ""},
		// Private addresses are closed by default, and public ones may be in one of this
		// machine's networks.
		{"allow 10.0.0.0/8", ""},
		{"allow 127.0.0.1", ""},
		{"allow fd00::/8", ""},
		{"allow private", ""},
		{"allow private_ranges", ""},
		{"allow 0.0.0.0/0", ""},
		{"allow 8.8.8.8", ""},
		{"allow public\ndeny 8.8.8.0/24", ""},
		{"allow public\ndeny *.example.com", ""},
		{"allow example.com 10.0.0.0/8", ""}, // a warning
		{"allow_from static 8.8.8.0/24", ""},
		// Rules that never match cause a warning.
		{"deny all\nallow example.com", ""},
		{"ports 80\nallow example.com:443", ""},
	} {
		lines := strings.Split(tc.rules, "\n")
		at := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "allow "+tc.useless) }) + 3
		data, _, err := adapt(`:8080 {
	async_proxy {
		`+tc.rules+`
	}
}`, "Caddyfile")
		if tc.useless == "" {
			if err != nil {
				t.Errorf("%q: %v", tc.rules, err)
			} else if err := validateJSON(t, data); err != nil {
				t.Errorf("%q: %v", tc.rules, err)
			}
			continue
		}
		want := "allow: " + tc.useless + " has no effect, because no later rule denies what it allows; for an allow-list, add `deny all` after it; otherwise remove it"
		if strings.Contains(tc.useless, " ") {
			want = "allow: " + tc.useless + " have no effect, because no later rule denies what they allow; for an allow-list, add `deny all` after them; otherwise remove them"
		}
		if tc.useless == "all" || tc.useless == "public" {
			want = "allow: " + tc.useless + " has no effect, because no later rule denies what it allows; remove it; to open private addresses, write `allow private`"
		}
		if at := fmt.Sprintf(", at Caddyfile:%d", at); err == nil || !strings.Contains(err.Error(), want+at) {
			t.Errorf("%q:\n%v\nwant %s%s", tc.rules, err, want, at)
		}
	}
}

func validateJSON(t *testing.T, data []byte) error {
	t.Helper()
	var config map[string]any
	if err := json.Unmarshal(data, &config); err != nil {
		t.Fatal(err)
	}
	config["admin"] = map[string]any{"disabled": true}
	data, _ = json.Marshal(config)
	var c *caddy.Config
	if err := json.Unmarshal(data, &c); err != nil {
		t.Fatal(err)
	}
	return caddy.Validate(c)
}

// JSON rules are checked on load. Rules from files are never an error.
func TestAllowWithoutEffectInJSON(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(file, []byte("example.com\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for rules, want := range map[string]string{
		`[{"action": "allow", "destinations": ["10.0.0.0/8"]}, {"action": "allow", "destinations": ["example.com"]}]`: "rules[1]: allow: example.com has no effect",
		`[{"action": "allow", "destinations": ["example.com"]}, {"action": "deny", "destinations": ["all"]}]`:         "",
		`[{"action": "allow", "files": ["` + file + `"]}]`:                                                            "",
		`[{"action": "allow", "files": ["` + file + `"], "destinations": ["example.net"]}]`:                           "",
		`[{"action": "allow", "destinations": ["example.com"]}, {"action": "deny", "files": ["` + file + `"]}]`:       "",
	} {
		err := validateJSON(t, fmt.Appendf(nil, `{"apps": {"http": {"servers": {"s": {"listen": ["127.0.0.1:0"],
			"routes": [{"handle": [{"handler": "async_proxy", "rules": %s}]}]}}}}}`, rules))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", rules, err, want)
		}
	}
}

// Rules that never match, or have a part without effect, are warned about when the config
// is loaded.
func TestWarnsAboutRulesThatNeverMatch(t *testing.T) {
	w := newWorld(t, "", nil)
	file := filepath.Join(t.TempDir(), "list")
	var list strings.Builder
	for i := range 20 {
		fmt.Fprintf(&list, "h%02d.example.com\n", i)
	}
	if err := os.WriteFile(file, []byte(list.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		rules string
		want  []string // rule and reason of each warning
	}{
		{"deny all\nallow example.com 10.0.0.0/8", []string{"allow example.com 10.0.0.0/8: deny all before it decides first"}},
		{"deny all\ndeny example.com", []string{"deny example.com: deny all before it decides first"}},
		{"deny all:443\nallow example.com:443 example.com:80\ndeny all", []string{"allow example.com:443: deny all:443 before it decides first"}},
		{"allow 192.0.2.0/24\ndeny 192.0.2.7", []string{"deny 192.0.2.7: allow 192.0.2.0/24 before it decides first"}},
		{"allow 2001:db8::/32\ndeny 2001:db8:1::/48", []string{"deny 2001:db8:1::/48: allow 2001:db8::/32 before it decides first"}},
		{"deny 10.0.0.0/8\ndeny 10.1.0.0/16", []string{"deny 10.1.0.0/16: deny 10.0.0.0/8 before it decides first"}},
		{"deny *.example.com\nallow www.example.com *.a.example.com example.com\ndeny all",
			[]string{"allow www.example.com *.a.example.com: deny *.example.com before it decides first"}},
		{"allow all\ndeny ads.example.com", []string{"deny ads.example.com: allow all before it decides first"}},
		{"allow all\ndeny all", []string{"deny all: allow all before it decides first"}},
		{"deny private\nallow 10.0.0.0/8 private_ranges", []string{"allow 10.0.0.0/8 private_ranges: deny private before it decides first"}},
		{"deny public\nallow 8.8.8.8", []string{"allow 8.8.8.8: deny public before it decides first"}},
		{"ports 80\nallow example.com:443\ndeny all", []string{"allow example.com:443: port 443 is closed"}},
		{"ports 443\ndeny all:443\nallow example.com", []string{"allow example.com: deny all:443 before it decides first"}},
		{"deny all:25", []string{"deny all:25: port 25 is closed"}},
		{"deny *.example.com\nallow_file " + file, []string{"allow h00.example.com h01.example.com h02.example.com h03.example.com h04.example.com and 15 more: deny *.example.com before it decides first"}},
		{"allow_file " + file, []string{"allow h00.example.com h01.example.com h02.example.com h03.example.com h04.example.com: effect"}},
		{"allow example.com 10.0.0.0/8", []string{"allow example.com: effect"}},
		{"allow 8.8.8.8", []string{"allow 8.8.8.8: effect"}},

		{"allow example.com:443\ndeny all\nallow 10.0.0.0/8", nil}, // the name's addresses
		{"allow example.com\ndeny public\nallow *.example.com\ndeny all", nil},
		{"allow private\ndeny private", nil}, // link-local addresses
		{"allow 10.0.0.0/8\ndeny private", nil},
		{"deny 10.0.0.0/8\nallow private", nil},
		{"allow example.com *.example.com\ndeny all", nil},
		{"allow *.example.com www.example.com\ndeny all", nil}, // a single rule
		{"deny *.example.com\ndeny_file " + file, nil},         // a third-party list
		{"ports 80 443 8000-8999\nallow example.com:8080 example.net:400-500\ndeny all", nil},
		{"deny all:1-24\ndeny all:25-80", nil},
		{"allow_from static 192.0.2.0/24\ndeny 192.0.2.7", nil},
	} {
		w.forgetLogs()
		w.load(w.site(tc.rules))
		var got []string
		for _, line := range w.logLines("a rule can never match") {
			got = append(got, fmt.Sprintf("%s: %s", line["rule"], line["why"]))
		}
		for _, line := range w.logLines("a rule has no effect") {
			got = append(got, fmt.Sprintf("%s: effect", line["rule"]))
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%q: warnings %q, want %q", tc.rules, got, tc.want)
		}
	}
}

// A changed rule file gives the same Caddyfile another config, because Caddy does not
// reload a config that it already runs.
func TestChangedRuleFileIsRead(t *testing.T) {
	w := newWorld(t, "", nil)
	file := filepath.Join(t.TempDir(), "list")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, option := range []string{"deny_file", "allow_file"} {
		load := func() string {
			t.Helper()
			config, _, err := adapt(w.globals()+w.site(option+" "+file+"\ndeny ads.example 127.0.0.1"), "Caddyfile")
			if err != nil {
				t.Fatal(err)
			}
			if err := caddy.Load(config, false); err != nil {
				t.Fatal(err)
			}
			return string(config)
		}
		t.Cleanup(func() { _ = caddy.Stop() })
		write("192.0.2.1\n")
		first := load()
		if load() != first {
			t.Errorf("%s: an unchanged file gives another config", option)
		}
		write("192.0.2.2\n")
		if load() == first {
			t.Errorf("%s: a changed file gives the same config", option)
		}
		if got := w.waitLog("async-proxy listening", 2); len(got) < 2 {
			t.Errorf("%s: the config was not loaded", option)
		}
	}
}

// Third-party lists may contain ranges with host bits set.
func TestWarnsAboutInexactRanges(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(file, []byte("192.0.2.1/24\n127.0.0.1/8\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, "deny_file "+file, nil)
	if line := w.waitLog("ranges in a file have bits set beyond their length, which are ignored", 1)[0]; fmt.Sprint(line["ranges"]) != "[192.0.2.1/24 127.0.0.1/8]" || line["count"] != 2.0 {
		t.Errorf("line %v", line)
	}
	if got := w.get(w.proxy); got != 403 {
		t.Errorf("status %d", got)
	}
}
