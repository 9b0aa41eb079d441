// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package clients

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// block matches the fenced code blocks of the page. Each has a name.
var block = regexp.MustCompile("(?ms)^```(\\w+)[ ]?([\\w-]*)\n(.*?)^```$")

// notRun lists the blocks whose programs are not on the machine of the tests. A test of
// contrib/kubernetes reads that for Kubernetes.
var notRun = []string{"kubernetes", "macos", "powershell", "windows"}

var used = make(map[string]bool)

// page returns the named blocks of the page.
func page() map[string]string {
	text, err := os.ReadFile("../../docs/clients.md")
	if err != nil {
		panic(err) // the tests are nothing without it
	}
	blocks := make(map[string]string)
	for _, m := range block.FindAllSubmatch(text, -1) {
		if string(m[1]) == "caddyfile" {
			continue // the tests of the root load these
		}
		if _, taken := blocks[string(m[2])]; taken || len(m[2]) == 0 {
			panic("a block of docs/clients.md has no name of its own: " + string(m[0]))
		}
		blocks[string(m[2])] = string(m[3])
	}
	return blocks
}

// unusedSnippets returns the names of the blocks that no test has asked for.
func unusedSnippets() []string {
	var names []string
	for name := range page() {
		if !used[name] && !slices.Contains(notRun, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// machine is the user's account on the machine of the tests, and what the proxy has logged.
type machine struct {
	t         *testing.T
	dir, home string
	env       []string
	seen      int64 // size of the log when the last check ended
}

// newMachine returns an account with an empty home, and needs the programs.
func newMachine(t *testing.T, programs ...string) *machine {
	t.Helper()
	m := &machine{t: t, dir: os.Getenv(inside)}
	m.home = filepath.Join(m.dir, "home")
	if err := os.RemoveAll(m.home); err == nil {
		err = os.Mkdir(m.home, 0o755)
		if err != nil {
			t.Fatal(err)
		}
	}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:" + filepath.Dir(goTool())
	if nodes, _ := filepath.Glob(filepath.Join(modules(), "node-linux-*/bin")); len(nodes) != 0 {
		path = nodes[0] + ":" + filepath.Join(modules(), ".bin") + ":" + path
	}
	m.env = []string{"PATH=" + path, "HOME=" + m.home, "LANG=C.UTF-8", "TERM=dumb", "NODE_USE_SYSTEM_CA=1"}
	m.need(programs...)
	m.copyFile("proxy-ca.pem", filepath.Join(m.dir, "proxy-ca.pem"))
	m.seen = m.logSize()
	return m
}

// modules returns the directory of the npm packages that package.json names.
func modules() string {
	dir, _ := filepath.Abs("node_modules")
	return dir
}

// missing skips the test, or fails it where all programs have been installed.
func (m *machine) missing(program string) {
	m.t.Helper()
	if os.Getenv("CI") != "" {
		m.t.Fatalf("%s is missing", program)
	}
	m.t.Skipf("%s is missing", program)
}

func (m *machine) copyFile(to, from string) {
	m.t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		m.t.Fatal(err)
	}
	m.write(to, string(data))
}

// write writes a file whose name is relative to the home directory.
func (m *machine) write(name, text string) {
	m.t.Helper()
	if !filepath.IsAbs(name) {
		name = filepath.Join(m.home, name)
	}
	err := os.MkdirAll(filepath.Dir(name), 0o755)
	if err == nil {
		err = os.WriteFile(name, []byte(text), 0o600)
	}
	if err == nil {
		err = os.Chmod(name, 0o644)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

// snippet returns a block of the page.
func (m *machine) snippet(name string) string {
	m.t.Helper()
	text, ok := page()[name]
	if !ok {
		m.t.Fatalf("docs/clients.md has no block %q", name)
	}
	used[name] = true
	return text
}

// login returns a block for the port of the proxy that asks for a password.
func (m *machine) login(name string) string {
	m.t.Helper()
	return strings.ReplaceAll(m.snippet(name), "8080", "8081")
}

// try runs a script in the home directory.
func (m *machine) try(script string) (output string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-ec", script)
	cmd.Dir, cmd.Env = m.home, m.env
	cmd.WaitDelay = time.Second
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	err = cmd.Run()
	return b.String(), err
}

// run runs a script that must succeed.
func (m *machine) run(script string) (output string) {
	m.t.Helper()
	output, err := m.try(script)
	if err != nil {
		m.t.Errorf("%s\n%v: %s", script, err, output)
	}
	return output
}

func (m *machine) logSize() int64 {
	info, err := os.Stat(filepath.Join(m.dir, "caddy.log"))
	if err != nil {
		m.t.Fatal(err)
	}
	return info.Size()
}

// line is what the tests look at in the proxy's log.
type line struct {
	Msg, Method, Host, Target, User string
	Status                          int
}

// passed returns what has gone through the proxy since the last check: "GET <host>" or "CONNECT
// <host:port>", with the user.
func (m *machine) passed() []string {
	m.t.Helper()
	data, err := os.ReadFile(filepath.Join(m.dir, "caddy.log"))
	if err != nil {
		m.t.Fatal(err)
	}
	var all []string
	for text := range bytes.Lines(data[m.seen:]) {
		var l line
		if err := json.Unmarshal(text, &l); err != nil {
			continue // a line that is being written
		}
		switch {
		case l.Msg == "CONNECT tunnel":
			all = append(all, strings.TrimSpace("CONNECT "+l.Target+" "+l.User))
		case l.Msg == "request" && l.Status < 300:
			all = append(all, strings.TrimSpace(l.Method+" "+l.Host+" "+l.User))
		}
	}
	return all
}

// expect checks that these requests, and maybe others, have gone through the proxy since the last
// check. A tunnel is logged when it opens, another request when its response has been sent.
func (m *machine) expect(want ...string) {
	m.t.Helper()
	var got []string
	for end := time.Now().Add(patience / 4); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		got = m.passed()
		if !slices.ContainsFunc(want, func(each string) bool { return !slices.Contains(got, each) }) {
			m.settled()
			return
		}
	}
	m.t.Errorf("%q went through the proxy, want %q", got, want)
	m.settled()
}

// settled returns all that has gone through the proxy since the last check: a request of its own
// is logged after all that came before.
func (m *machine) settled() []string {
	m.t.Helper()
	m.run("curl -qsS --noproxy '' -x http://proxy.example.com:8080 http://mark.example.com/")
	const mark = "GET mark.example.com"
	for end := time.Now().Add(patience / 4); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if got := m.passed(); slices.Contains(got, mark) {
			m.seen = m.logSize()
			return slices.DeleteFunc(got, func(each string) bool { return each == mark })
		}
	}
	m.t.Error("the proxy has not logged the request that marks the end")
	return nil
}

// expectNone checks that nothing has gone through the proxy since the last check.
func (m *machine) expectNone() {
	m.t.Helper()
	if got := m.settled(); len(got) != 0 {
		m.t.Errorf("%q went through the proxy, want nothing", got)
	}
}

// goesPast checks that a program reaches a destination without the proxy. The program itself may
// make other requests through it.
func (m *machine) goesPast(request, command string) {
	m.t.Helper()
	m.run(command)
	for _, each := range m.settled() {
		if each == request {
			m.t.Errorf("%s went through the proxy", each)
		}
	}
}
