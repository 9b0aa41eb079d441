// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/bcrypt"
)

// Rules about the request have the same effect in both proxies.
func TestMigratingRulesAboutRequests(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	startSquid(t, blockOf(t, "Rules about the request", "squid", 0))
	startMigrated(t, blockOf(t, "Rules about the request", "caddyfile", 0))
	migration{section: "Rules about the request", requests: `
		10.1.2.3 GET http://www.example.com/
		10.1.2.3 GET http://ad7.example.com/
		10.1.2.3 CONNECT ad12.example.com:443
		10.1.2.3 CONNECT x.ad1.example.com:443
		10.1.2.3 CONNECT head1.example.com:443
		10.1.2.3 GET http://www.example.com/a.exe
		10.1.2.3 GET http://www.example.com/dir/A.MSI
		10.1.2.3 GET http://www.example.com/a.exe.txt
		10.1.2.3 GET http://www.example.com/get?file=a.exe
		10.1.2.3 GET http://www.example.com/admin/users
		10.1.2.3 GET http://www.example.com/a/admin/
		10.1.2.3 POST http://www.example.com/
		10.2.2.3 POST http://www.example.com/
		10.2.2.3 PUT http://www.example.com/
		10.2.2.3 GET http://www.example.com/
		10.1.2.3 GET http://10.9.9.9/
		127.0.0.1 GET http://www.example.com/
	`}.compare(t)
	for fields, status := range map[string]int{
		"User-Agent: Mozilla/4.0 (compatible; MSIE 6.0)": http.StatusForbidden, "User-Agent: curl/8": http.StatusOK,
		"X-Api-Key: 1": http.StatusForbidden, "X-Api: 1": http.StatusOK,
	} {
		for _, proxy := range []string{peerAddress, "127.0.0.1:3128"} {
			if res, _ := exchange(t, proxy, "10.1.2.3", "GET http://www.example.com/ HTTP/1.1\r\nHost: www.example.com\r\n"+fields+"\r\n\r\n"); res.StatusCode != status {
				t.Errorf("%s answers %d to %s", proxy, res.StatusCode, fields)
			}
		}
	}
}

// The directives in the document exist in Squid, whose packaged file documents all of them, and the
// options beside them exist here or in Caddy.
func TestMigratingDirectives(t *testing.T) {
	packaged, err := os.ReadFile("/etc/squid/squid.conf")
	if err != nil {
		t.Skip("squid is not installed; apt-get install it")
	}
	known := map[string]bool{"include": true}
	for _, tag := range regexp.MustCompile(`(?m)^#\s+TAG: (\w+)`).FindAllStringSubmatch(string(packaged), -1) {
		known[tag[1]] = true
	}
	ours := strings.Fields("bind tls log import handle_errors request_body policy match proxy_protocol trusted_proxies trusted_proxies_strict write_idle read_header idle " +
		"max_header_size grace_period roll_size roll_keep level format caddy tls_trust_pool tls_server_name users LimitNOFILE User :3128 async_proxy")
	for _, o := range options {
		ours = append(ours, o.name)
	}
	directives := make(map[string]bool)
	for _, row := range regexp.MustCompile(`(?m)^\| (.*) \| (.*) \|$`).FindAllStringSubmatch(sectionOf(t, "Directives"), -1) {
		for _, code := range regexp.MustCompile("`(\\w+)[^`]*`").FindAllStringSubmatch(row[1], -1) {
			directives[code[1]] = true
			if !known[code[1]] {
				t.Errorf("Squid has no %s", code[1])
			}
		}
		for _, code := range regexp.MustCompile("`([^` ]+)[^`]*`").FindAllStringSubmatch(row[2], -1) {
			if name := code[1]; !slices.Contains(ours, name) && !strings.Contains(name, "example.com") {
				t.Errorf("there is no %s", name)
			}
		}
	}
	if len(directives) < 40 {
		t.Errorf("the table has only %d directives of Squid", len(directives))
	}
}

// Squid's native log and what native.jq makes of ours agree about the same requests.
func TestMigratingLogs(t *testing.T) {
	if _, err := exec.LookPath("jq"); err != nil {
		t.Skip("jq is not installed; apt-get install it")
	}
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	logs := startSquid(t, "http_port 3128\nacl lan src 10.0.0.0/8\nacl bad dstdomain .bad.example.com\nhttp_access deny bad\nhttp_access allow lan\n"+
		"auth_param basic program /usr/lib/squid/basic_ncsa_auth /dev/null\nvia off\n")
	ours := filepath.Join(t.TempDir(), "proxy.log")
	block := strings.Replace(blockOf(t, "Logs", "caddyfile", 0), "/var/log/caddy/proxy.log", ours, 1)
	startMigrated(t, strings.Replace(block, "clients 10.0.0.0/8", "clients 10.0.0.0/8\ndeny bad.example.com *.bad.example.com", 1))
	requests := []string{"GET http://www.example.com/a?b=c", "POST http://www.example.com/", "HEAD http://8.8.8.8/", "GET http://x.bad.example.com/", "CONNECT www.example.com:443", "CONNECT bad.example.com:443"}
	for _, request := range requests {
		for _, proxy := range []string{peerAddress, "127.0.0.1:3128"} {
			ask(t, proxy, "10.1.2.3", request, "", "")
		}
	}
	script, list := blockOf(t, "Logs", "console", 0), blockOf(t, "Logs", "console", 1)
	run := func(command string) string {
		out, err := exec.Command("sh", "-c", strings.Replace(strings.TrimPrefix(command, "$ "), "/var/log/caddy/proxy.log", ours, 1)).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	var theirs, converted []string
	eventually(t, "all lines", func() bool {
		data, _ := os.ReadFile(filepath.Join(logs, "access.log"))
		theirs = nativeLines(string(data), "10.1.2.3")
		converted = nativeLines(run(script), "10.1.2.3")
		return len(theirs) == len(requests) && len(converted) == len(requests)
	})
	if !slices.Equal(theirs, converted) {
		t.Errorf("Squid logs\n%s\nand native.jq prints\n%s", strings.Join(theirs, "\n"), strings.Join(converted, "\n"))
	}
	if got, want := strings.Join(strings.Fields(run(list)), " "), "1 10.1.2.3 x.bad.example.com deny *.bad.example.com 1 10.1.2.3 bad.example.com:443 deny bad.example.com"; got != want {
		t.Errorf("the list of refusals is %s, want %s", got, want)
	}
}

// nativeLines returns what lines in Squid's native format say of a client's requests, sorted: the
// client, the code and status, the method, the URL, the user, and whether the request went further.
func nativeLines(text, client string) (lines []string) {
	native := regexp.MustCompile(`(?m)^\d{10}\.\d{3} +\d+ (\S+) (\w+/\d{3}) \d+ (\S+) (\S+) (\S+) (HIER_\w+)/\S+ \S+$`)
	for _, fields := range native.FindAllStringSubmatch(text, -1) {
		if fields[1] == client {
			lines = append(lines, strings.Join(fields[1:], " "))
		}
	}
	slices.Sort(lines)
	return lines
}

// namedRequests are for proxies with a list of names.
const namedRequests = `
	10.1.2.3 GET http://example.com/
	10.1.2.3 GET http://www.example.com/
	10.1.2.3 POST http://www.example.com/
	10.1.2.3 GET http://www.example.com.example.org/
	10.1.2.3 GET http://notexample.com/
	10.1.2.3 GET http://8.8.8.8/
	10.1.2.3 GET http://intranet.example.com/
	10.1.2.3 GET http://local.example.com/
	10.1.2.3 CONNECT www.example.com:443
	10.1.2.3 CONNECT www.example.org:443
	10.1.2.3 CONNECT 127.0.0.1:443
	192.168.1.5 GET http://www.example.com/
`

// The two configurations of tinyproxy's section give the same answers.
func TestMigratingFromTinyproxy(t *testing.T) {
	path, err := exec.LookPath("tinyproxy")
	if err != nil {
		t.Skip("tinyproxy is not installed; apt-get install tinyproxy-bin")
	}
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	dir := t.TempDir()
	pattern := regexp.MustCompile("(?m)^with `(.*)` in `/etc/tinyproxy/filter`").FindStringSubmatch(sectionOf(t, "From tinyproxy"))
	if pattern == nil {
		t.Fatal("found no filter")
	}
	filter, config := filepath.Join(dir, "filter"), filepath.Join(dir, "config")
	text := strings.NewReplacer("/etc/tinyproxy/filter", filter, "Port 8888", "Port 3129").Replace(blockOf(t, "From tinyproxy", "tinyproxy", 0))
	for file, content := range map[string]string{filter: pattern[1] + "\n", config: text} {
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	startOther(t, exec.Command(path, "-d", "-c", config))
	startMigrated(t, blockOf(t, "From tinyproxy", "caddyfile", 0))
	migration{section: "From tinyproxy", ours: "127.0.0.1:8888", requests: namedRequests + `
		127.0.0.1 GET http://www.example.com/
		10.1.2.3 CONNECT www.example.com:80
		10.1.2.3 CONNECT www.example.com:22
	`}.compare(t)
}

// The two configurations of forwardproxy's section give the same answers, both without TLS.
func TestMigratingFromForwardproxy(t *testing.T) {
	const built = "ASYNC_PROXY_FORWARDPROXY"
	if os.Getenv(built) == "" { // outside the namespace, where Go can fetch modules
		t.Setenv(built, filepath.Join(t.TempDir(), "caddy"))
		build := exec.Command("go", "build", "-o", os.Getenv(built), ".")
		build.Dir = "e2e/forwardproxy"
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	const section = "From forwardproxy"
	config := filepath.Join(t.TempDir(), "Caddyfile")
	text := strings.NewReplacer("{\n\torder", "{\nadmin off\npersist_config off\norder", ":443, proxy.example.com {", "http://:3129 {").
		Replace(blockOf(t, section, "text", 0))
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Getenv(built), "run", "--adapter", "caddyfile", "--config", config)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	startOther(t, cmd)
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	ours := regexp.MustCompile(`alice \S+`).ReplaceAllLiteralString(blockOf(t, section, "caddyfile", 0), "alice "+string(hash))
	startMigrated(t, strings.Replace(ours, ":443, proxy.example.com {", "http://:3128 {", 1))
	var requests strings.Builder
	for line := range strings.Lines(namedRequests + `
		10.1.2.3 CONNECT www.example.com:80
		10.1.2.3 CONNECT www.example.com:22
		10.1.2.3 GET http://www.example.com:8080/
		10.1.2.3 GET http://WWW.EXAMPLE.COM/
		10.1.2.3 GET http://10.9.9.9/
		10.1.2.3 CONNECT intranet.example.com:443
		10.1.2.3 CONNECT away.example.com:443
		127.0.0.1 GET http://www.example.com/
	`) {
		if fields := strings.Fields(line); len(fields) != 0 {
			fmt.Fprintln(&requests, fields[0], "alice:secret", fields[1], fields[2])
		}
	}
	migration{section: section, requests: requests.String() + `
		10.1.2.3 GET http://www.example.com/
		10.1.2.3 CONNECT www.example.com:443
		10.1.2.3 alice:wrong GET http://www.example.com/
		10.1.2.3 bob:secret GET http://www.example.com/
	`}.compare(t)

	// Neither tells origins of the client or of itself.
	for _, proxy := range []string{peerAddress, "127.0.0.1:3128"} {
		_, sent := exchange(t, proxy, "10.1.2.3", "GET http://www.example.com/ HTTP/1.1\r\nHost: www.example.com\r\nProxy-Authorization: "+login("alice", "secret")+"\r\n\r\n")
		for _, field := range []string{"Forwarded", "Via:", "10.1.2.3", "Proxy-"} {
			if strings.Contains(sent, field) {
				t.Errorf("through %s, the origin got\n%s", proxy, sent)
			}
		}
	}
}

// The program in the document compiles, and gives the same answers as the Caddyfile.
func TestMigratingFromProgram(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	dir := t.TempDir()
	source, program := filepath.Join(dir, "main.go"), filepath.Join(dir, "program")
	if err := os.WriteFile(source, []byte(blockOf(t, "From a program of your own", "go", 0)), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", program, source)
	build.Dir = dir
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	startOther(t, exec.Command(program))
	startMigrated(t, blockOf(t, "From a program of your own", "caddyfile", 0))
	migration{section: "From a program of your own", requests: namedRequests + `
		10.1.2.3 CONNECT www.example.com:22
		10.1.2.3 GET http://WWW.EXAMPLE.COM/
	`}.compare(t)
}

// startOther runs a proxy at peerAddress until the test ends.
func startOther(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	eventually(t, cmd.Path+" to listen", func() bool { return binaryListens(peerAddress) })
}
