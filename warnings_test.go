// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// Trouble is what the limiter of tests answers.
func (*testLimiter) Trouble() string {
	answers.Lock()
	defer answers.Unlock()
	return answers.trouble
}

// warningsNow returns what the API says is wrong now.
func warningsNow(t *testing.T) []status.Warning {
	t.Helper()
	w := httptest.NewRecorder()
	if err := program.status.ServeAPI(w, httptest.NewRequest("GET", "/async_proxy/stats", nil)); err != nil {
		t.Fatal(err)
	}
	var stats struct{ Warnings *[]status.Warning }
	if err := json.Unmarshal(w.Body.Bytes(), &stats); err != nil || stats.Warnings == nil {
		t.Fatalf("%v, %s", err, w.Body)
	}
	return *stats.Warnings
}

// checkWarnings checks that exactly these things are wrong, each in a sentence that says what to do.
func checkWarnings(t *testing.T, what string, codes ...string) (found []status.Warning) {
	t.Helper()
	found = warningsNow(t)
	var got []string
	for _, w := range found {
		got = append(got, w.Code)
		if first := []rune(w.Text)[0]; unicode.IsLower(first) || !strings.HasSuffix(w.Text, ".") || strings.HasSuffix(w.Text, "..") {
			t.Errorf("%s: %q is no sentence", what, w.Text)
		}
	}
	if !slices.Equal(got, codes) {
		t.Errorf("%s: %+v, want %v", what, found, codes)
	}
	return found
}

// TestWarningsOfAConfig checks what is wrong with running configs, and that each config has its own
// warnings, which are those of the log.
func TestWarningsOfAConfig(t *testing.T) {
	w := newWorld(t, "", nil)
	checkWarnings(t, "defaults")
	for _, row := range []struct {
		options string
		codes   []string
	}{
		{"clients all", []string{"open_proxy"}},
		{"clients 0.0.0.0/0", []string{"open_proxy"}},
		{"report_only rules", []string{"report_only"}},
		{"policy guests {\nclients 192.0.2.0/24\nreport_only limits\n}", []string{"report_only"}},
		{"clients all\nreport_only rules limits", []string{"open_proxy", "report_only"}},
		{"", nil},
	} {
		w.forgetLogs()
		w.load(w.site(row.options))
		for _, found := range checkWarnings(t, row.options, row.codes...) {
			if found.Site != w.proxy {
				t.Errorf("%s: site %q, want %s", row.options, found.Site, w.proxy)
			}
			if logged := len(w.logLines(strings.TrimSuffix("o"+found.Text[1:], "."))); logged != 1 && found.Code == "open_proxy" {
				t.Errorf("%s: %d log lines have the text %q", row.options, logged, found.Text)
			}
		}
	}
	_, port, _ := net.SplitHostPort(freeAddress(t))
	w.load(w.site("") + "http://:" + port + " {\nbind 0.0.0.0\nasync_proxy {\n" + bcryptUsers + "\n}\n}\n")
	checkWarnings(t, "passwords", "clear_passwords")
	w.load("http://" + w.proxy + " {\nrespond hello\n}\n")
	checkWarnings(t, "no proxy")
}

// An async_proxy that gets no request because of another one before it is most likely a mistake.
func TestWarnsAboutUnreachableProxies(t *testing.T) {
	w := newWorld(t, "", nil)
	site := func(directives string) string {
		return strings.SplitN(w.site(""), "\n", 2)[0] + "\n" + directives + "\n}\n"
	}
	const second = "async_proxy {\nzone two\n}"
	for directives, codes := range map[string][]string{
		"async_proxy\n" + second:                                                           {"unreachable"},
		"handle {\nasync_proxy\n}\nhandle {\n" + second + "\n}":                            {"unreachable"},
		"route {\nasync_proxy\n" + second + "\n}":                                          {"unreachable"},
		"@a remote_ip 192.0.2.1\nasync_proxy @a\n" + second:                                nil,
		"@a remote_ip 192.0.2.1\nhandle @a {\nasync_proxy\n}\nhandle {\n" + second + "\n}": nil,
		"@a remote_ip 192.0.2.1\nroute {\nasync_proxy @a\n" + second + "\n}":               nil,
	} {
		w.load(site(directives))
		checkWarnings(t, directives, codes...)
	}
	_, port, _ := net.SplitHostPort(freeAddress(t))
	w.load(site("async_proxy") + "http://:" + port + " {\n" + second + "\n}\n")
	checkWarnings(t, "two sites")
}

// TestWarningsOfTheProcess checks what is wrong at the moment.
func TestWarningsOfTheProcess(t *testing.T) {
	w := newWorld(t, "", nil)

	w.load(w.site("max_tunnels 10"))
	echo := echoTarget(t)
	w.load(w.site("max_tunnels 10\nallow 127.0.0.0/8"))
	for range 8 {
		w.dial().connect(echo)
	}
	checkWarnings(t, "eight tunnels of ten")
	last := w.dial()
	last.connect(echo)
	if found := checkWarnings(t, "nine tunnels of ten", "tunnels_near_limit"); !strings.Contains(found[0].Text, "of the 10 tunnels") {
		t.Errorf("%q", found[0].Text)
	}
	last.Close()
	eventually(t, "the end of a tunnel", func() bool { return len(warningsNow(t)) == 0 })

	w.load(w.site("limiter test"))
	checkWarnings(t, "a limiter that counts")
	answers.Lock()
	answers.trouble = "the limiter is ill; call a doctor"
	answers.Unlock()
	defer func() {
		answers.Lock()
		answers.trouble = ""
		answers.Unlock()
	}()
	if found := checkWarnings(t, "a limiter that does not", "limiter_away"); found[0].Text != "The limiter is ill; call a doctor." || found[0].Site != w.proxy {
		t.Errorf("%+v", found[0])
	}

	w.load(w.site(""))
	pid, stop := startSharer(t, w.proxy)
	defer stop()
	currentProcess().sharers.onTimer()
	if found := checkWarnings(t, "another process", "other_process"); !strings.Contains(found[0].Text, fmt.Sprintf("pid %d) listens at %s", pid, w.proxy)) {
		t.Errorf("%q", found[0].Text)
	}
	stop()
	currentProcess().sharers.onTimer()
	checkWarnings(t, "the end of another process")
}

// TestWarningsAboutEvictions checks with more clients than max_clients.
func TestWarningsAboutEvictions(t *testing.T) {
	w := newWorld(t, "", nil)
	load := func(most int) {
		loadCaddyfile(t, strings.Replace(w.globals(), "{\n", "{\n\tservers {\n\t\ttrusted_proxies static 127.0.0.0/8\n\t\ttrusted_proxies_strict\n\t}\n", 1)+
			w.site(fmt.Sprintf("clients 192.0.2.0/24\nburst 1\nrefill 0.001\nallow 127.0.0.0/8\nmax_clients %d", most)))
	}
	ask := func() {
		for i := range 10 {
			policyRequest(t, w.proxy, http.MethodGet, w.origin.Listener.Addr().String(), fmt.Sprintf("X-Forwarded-For: 192.0.2.%d\n", i))
		}
	}
	load(100)
	ask()
	if slices.ContainsFunc(warningsNow(t), func(w status.Warning) bool { return w.Code == "clients_forgotten" }) {
		t.Error("a warning although there is room for all clients")
	}
	load(4)
	ask()
	checkWarnings(t, "ten clients of four", "clients_forgotten")
}

// TestWarningsAboutDescriptors checks with a process that may open few, and the command that prints
// warnings.
func TestWarningsAboutDescriptors(t *testing.T) {
	c := binaryStart(t, binaryOptions{shell: "ulimit -n 100", site: "clients all"})
	var stats status.Stats
	codes := func() (codes []string) {
		stats = status.Stats{}
		c.api("GET", "stats", 200, &stats)
		for _, w := range stats.Warnings {
			codes = append(codes, w.Code)
		}
		return codes
	}
	if got := codes(); !slices.Equal(got, []string{"open_proxy"}) {
		t.Errorf("at first: %+v", stats.Warnings)
	}
	var conns []net.Conn
	for range 92 - c.descriptors() {
		conns = append(conns, c.dial())
	}
	eventually(t, "the warning", func() bool { return slices.Equal(codes(), []string{"descriptors_near_limit", "open_proxy"}) })
	if want := "of the 100 file descriptors"; !strings.Contains(stats.Warnings[0].Text, want) {
		t.Errorf("%q does not contain %q", stats.Warnings[0].Text, want)
	}
	out, err := c.command("async-proxy", "status", "--address", c.admin).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range stats.Warnings {
		if line := w.Text; !strings.Contains(string(out), line+"\n") || strings.Index(string(out), line) > strings.Index(string(out), "requests") {
			t.Errorf("%q is not at the top of\n%s", line, out)
		}
	}
	for _, conn := range conns {
		conn.Close()
	}
	eventually(t, "the end of the warning", func() bool { return slices.Equal(codes(), []string{"open_proxy"}) })
}

// TestWarningLines checks that warnings are wrapped between words, and take their lines from the
// lists.
func TestWarningLines(t *testing.T) {
	s := statusReport{Clients: status.ClientList{Clients: make([]status.Client, 100), Total: 100}, width: 30}
	s.Stats.Warnings = []status.Warning{{Code: "a", Site: ":8080", Text: "Something is wrong here; change it."}, {Code: "b", Text: "More."}}
	want := []string{"! :8080: Something is wrong", "  here; change it.", "! More.", ""}
	if got := s.warningLines(s.width); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := s.warningLines(0); len(got) != 3 || got[0] != "! :8080: Something is wrong here; change it." {
		t.Errorf("%q", got)
	}
	if got := wrapWords("! incomprehensibilities", 5); !slices.Equal(got, []string{"!", "  incomprehensibilities"}) {
		t.Errorf("%q", got)
	}
	s.fit(30)
	if n := len(s.Clients.Clients); n != 30-1-maxOtherLines-4 {
		t.Errorf("%d clients", n)
	}
	long := "Begin " + strings.Repeat("0123456789 ", 50) + "\x1b[31m\u202eend."
	s.Stats.Warnings = []status.Warning{{Code: "c", Text: long}}
	if got := s.warningLines(0); got[0] != "! "+strings.ReplaceAll(strings.ReplaceAll(long, "\x1b", "\ufffd"), "\u202e", "\ufffd") {
		t.Errorf("a long warning: %q", got)
	}
	s.Stats.Warnings = nil
	if got := s.warningLines(80); got != nil {
		t.Errorf("%q without warnings", got)
	}
}

// TestWarningsAreDocumented compares the codes in the source with those in the table.
func TestWarningsAreDocumented(t *testing.T) {
	var source string
	for _, file := range []string{"warnings.go", "usersfile.go", "internal/status/warnings.go"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		source += string(text)
	}
	doc, err := os.ReadFile("docs/admin-api.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(doc), "| `code` | what is wrong |")
	table, _, _ = strings.Cut(table, "\n\n")
	find := func(pattern, text string) (codes []string) {
		for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
			codes = append(codes, match[1])
		}
		slices.Sort(codes)
		return codes
	}
	codes, rows := find(`(?:warn\(|Code: )"([a-z_]+)"`, source), find("(?m)^\\| `([a-z_]+)` ", table)
	if len(codes) < 10 || !slices.Equal(codes, rows) {
		t.Errorf("the source has %v, and the table has %v", codes, rows)
	}
}
