// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// migration is a section of docs/migrating.md, with the requests that both proxies get.
type migration struct {
	section  string
	table    int    // which table of differences
	requests string // one per line: the client's address and perhaps a user, the method, the target
	ours     string // the address of async_proxy; "": port 3128 of this machine
}

// peerAddress is where the other proxy listens.
const peerAddress = "127.0.0.1:3129"

// blockOf returns the n-th code block of a language in a section of docs/migrating.md.
func blockOf(t *testing.T, section, language string, n int) string {
	t.Helper()
	blocks := regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```").FindAllStringSubmatch(sectionOf(t, section), -1)
	if len(blocks) <= n {
		t.Fatalf("%s has %d blocks of %s", section, len(blocks), language)
	}
	return blocks[n][1]
}

func sectionOf(t *testing.T, section string) string {
	t.Helper()
	_, text, found := strings.Cut(documents(t)["docs/migrating.md"], "# "+section+"\n")
	if !found {
		t.Fatalf("docs/migrating.md has no section %q", section)
	}
	return regexp.MustCompile(`(?m)^##`).Split(text, 2)[0]
}

// differencesOf returns the n-th table of differences of a section: for each request, the two
// answers.
func differencesOf(t *testing.T, section string, n int) map[string]string {
	t.Helper()
	tables := strings.Split(sectionOf(t, section), "| request | from |")
	if len(tables) <= n+1 {
		t.Fatalf("%s has %d tables", section, len(tables)-1)
	}
	rows := make(map[string]string)
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]*)` \\| (.*?) \\| (\\d+) \\| (\\d+) \\| ").FindAllStringSubmatch(tables[n+1], -1) {
		rows[row[1]+" from "+row[2]] = row[3] + ", then " + row[4]
	}
	return rows
}

// unreachable is the address of away.example.com.
const unreachable = "8.8.6.6"

// everywhere makes every other address one of this machine, although no interface has it, and answers
// requests and DNS queries at all of them.
func everywhere(t *testing.T) {
	t.Helper()
	for _, route := range []string{"ip route add local 0.0.0.0/0 dev lo", "ip route add unreachable " + unreachable + " table local", "ip -6 route add local ::/0 dev lo", "echo 1 >/proc/sys/net/ipv6/ip_nonlocal_bind"} {
		if out, err := exec.Command("sh", "-c", route).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", route, err, out)
		}
	}
	for _, port := range []string{"22", "80", "81", "443", "1000", "8080", "8443"} {
		ln, err := net.Listen("tcp", ":"+port)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			_ = http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for _, field := range []string{"Server", "X-Powered-By", "X-Kept"} {
					w.Header().Set(field, "origin")
				}
				_, _ = io.Copy(io.Discard, r.Body)
				_ = r.Header.Write(w)
			}))
		}()
	}
	nameServerAt(t, ":53", func(name string, n int) []string {
		switch {
		case name == "4.4.8.8.in-addr.arpa":
			return []string{"PTR www.ads.example.net"}
		case strings.HasSuffix(name, ".arpa"):
			return nil
		case strings.HasPrefix(name, "intranet."):
			return []string{"10.9.9.9"}
		case strings.HasPrefix(name, "local."):
			return []string{"127.0.0.1"}
		case strings.HasPrefix(name, "away."):
			return []string{unreachable}
		}
		return []string{"8.8.8.8"}
	})
}

// startSquid runs Squid with a configuration of docs/migrating.md until the test ends. It
// returns the directory of its logs.
func startSquid(t *testing.T, config string) (logs string) {
	t.Helper()
	path, err := exec.LookPath("squid")
	if err != nil {
		path = "/usr/sbin/squid"
	}
	if _, err := os.Stat(path); err != nil {
		t.Skip("squid is not installed; apt-get install it")
	}
	dir := openDir(t)
	config = strings.Replace(config, "http_port 3128\n", "http_port 3129\n", 1)
	if !strings.Contains(config, "dns_nameservers") {
		config += "\ndns_nameservers 127.0.0.1\n"
	}
	if !strings.Contains(config, "shutdown_lifetime") {
		config += "shutdown_lifetime 0 seconds\n"
	}
	config += fmt.Sprintf("access_log stdio:%[1]s/access.log\ncache_log %[1]s/cache.log\ncoredump_dir %[1]s\npid_filename none\npinger_enable off\n", dir)
	if !strings.Contains(config, "visible_hostname") {
		config += "visible_hostname tester\n"
	}
	if err := os.WriteFile(filepath.Join(dir, "squid.conf"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-N", "-n", "p"+strconv.Itoa(os.Getpid()), "-f", filepath.Join(dir, "squid.conf"))
	cmd.Env = append(os.Environ(), "TZ=Europe/Berlin")
	if rootIsNobodyElse(t) {
		// Squid believes it is root and wants to become another user, of which there is none here.
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 65534, HostID: 0, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 65534, HostID: 0, Size: 1}},
		}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, "cache.log"))
			t.Logf("%s", log)
		}
	})
	eventually(t, "Squid to listen", func() bool { return binaryListens(peerAddress) })
	return dir
}

// rootIsNobodyElse reports whether this process is root in a user namespace that has no other
// user.
func rootIsNobodyElse(t *testing.T) bool {
	t.Helper()
	data, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(data))
	return len(fields) == 3 && fields[2] == "1"
}

// openDir returns a temporary directory that every user may write to.
func openDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for path, mode := range map[string]os.FileMode{dir: 0o777, filepath.Dir(dir): 0o755} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// startMigrated runs a Caddyfile of docs/migrating.md until the test ends.
func startMigrated(t *testing.T, text string) {
	t.Helper()
	text = strings.Replace(text, ":3128, proxy.example.com:3128 {", ":3128 {", 1)
	if !strings.Contains(text, "resolvers ") {
		text = strings.Replace(text, "async_proxy {\n", "async_proxy {\nresolvers 127.0.0.1\n", 1)
	}
	if rest, found := strings.CutPrefix(text, "{\n"); found {
		text = rest
	} else {
		text = "}\n" + text
	}
	loadCaddyfile(t, "{\nadmin off\npersist_config off\n"+text)
}

// compare sends each request of a migration to both proxies.
func (m migration) compare(t *testing.T) {
	t.Helper()
	want := differencesOf(t, m.section, m.table)
	for line := range strings.Lines(m.requests) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		from, user, password := fields[0], "", ""
		if len(fields) == 4 {
			user, password, _ = strings.Cut(fields[1], ":")
		}
		request := strings.Join(fields[len(fields)-2:], " ")
		row := request + " from " + from
		if user != "" {
			row = fmt.Sprintf("%s from %s at %s", request, user, from)
		}
		var answers [2]int
		for i, proxy := range []string{peerAddress, cmp.Or(m.ours, "127.0.0.1:3128")} {
			answers[i] = ask(t, proxy, from, request, user, password)
			if answers[i] >= 500 && want[row] == "" {
				t.Errorf("%s: %s answers %d: the destination should be reachable", row, proxy, answers[i])
			}
		}
		got := fmt.Sprintf("%d, then %d", answers[0], answers[1])
		switch {
		case answers[0] == answers[1] && want[row] != "":
			t.Errorf("%s: both answer %d, the table says %s", row, answers[0], want[row])
		case answers[0] != answers[1] && want[row] != got:
			t.Errorf("%s: %s; the table says %q", row, got, want[row])
		}
		delete(want, row)
	}
	for row := range want {
		t.Errorf("the table of %s has %q, which the test does not ask", m.section, row)
	}
}

// ask sends a request to a proxy from a local address and returns the status.
func ask(t *testing.T, proxy, from, request, user, password string) int {
	t.Helper()
	method, target, _ := strings.Cut(request, " ")
	var fields string
	if user != "" {
		fields = "Proxy-Authorization: " + login(user, password) + "\r\n"
	}
	if method == http.MethodPost || method == http.MethodPut || method == http.MethodPatch {
		fields += "Content-Length: 0\r\n"
	}
	host := strings.SplitN(strings.TrimPrefix(target[strings.Index(target, "://")+1:], "//"), "/", 2)[0]
	res, _ := exchange(t, proxy, from, fmt.Sprintf("%s HTTP/1.1\r\nHost: %s\r\n%s\r\n", request, host, fields))
	return res.StatusCode
}

// exchange sends bytes to a proxy from a local address and returns its response.
func exchange(t *testing.T, proxy, from, request string) (*http.Response, string) {
	t.Helper()
	if net.ParseIP(from).To4() == nil {
		proxy = strings.Replace(proxy, "127.0.0.1", "[::1]", 1)
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
	conn, err := dialer.Dial("tcp", proxy)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	go func() { _, _ = io.WriteString(conn, request) }()
	method, _, _ := strings.Cut(request, " ")
	res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%.100q to %s: %v", request, proxy, err)
	}
	if method == http.MethodConnect && res.StatusCode == http.StatusOK {
		return res, ""
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Errorf("%.100q to %s: %v", request, proxy, err)
	}
	return res, string(body)
}

// Debian's file is the one in the document, and the Caddyfiles beside it give the same answers.
func TestMigratingFromDebian(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	config := blockOf(t, "Debian's default", "squid", 0)
	if installed, err := os.ReadFile("/etc/squid/squid.conf"); err == nil {
		effective := regexp.MustCompile(`(?m)[ \t]*#.*$`).ReplaceAllString(string(installed), "")
		effective = regexp.MustCompile(`\n\n+`).ReplaceAllString("\n"+effective, "\n")
		effective = regexp.MustCompile(`(?m)[ \t]+$`).ReplaceAllString(effective, "")
		if strings.TrimSpace(effective) != strings.TrimSpace(config) {
			t.Errorf("/etc/squid/squid.conf has\n%s", effective)
		}
	}
	requests := `
		FROM GET http://www.example.com/
		FROM GET http://www.example.com:8080/
		FROM GET http://www.example.com:81/
		FROM GET http://www.example.com:1000/
		FROM GET http://www.example.com:25/
		FROM HEAD http://www.example.com/
		FROM POST http://www.example.com/
		FROM DELETE http://www.example.com/
		FROM PATCH http://www.example.com/
		FROM PROPFIND http://www.example.com/
		FROM GET http://8.8.8.8/
		FROM GET http://[2606:4700::1111]/
		FROM CONNECT www.example.com:443
		FROM CONNECT 8.8.8.8:443
		FROM CONNECT [2606:4700::1111]:443
		FROM CONNECT www.example.com:22
		FROM CONNECT www.example.com:80
		FROM CONNECT www.example.com:8443
		FROM GET http://127.0.0.1/
		FROM GET http://localhost/
		FROM GET http://local.example.com/
		FROM GET http://intranet.example.com/
		FROM GET http://10.9.9.9/
		FROM CONNECT 10.9.9.9:443
		FROM GET http://169.254.1.1/
		FROM GET http://169.254.169.254/latest/meta-data/
		FROM GET ftp://www.example.com/
	`
	t.Run("as installed", func(t *testing.T) {
		startSquid(t, config)
		startMigrated(t, blockOf(t, "Debian's default", "caddyfile", 0))
		all := strings.ReplaceAll(requests, "FROM", "127.0.0.1")
		for _, from := range []string{"::1", "127.0.0.2", "10.1.2.3", "192.168.1.5", "8.8.4.4", "fd00::5"} {
			all += from + " GET http://www.example.com/\n" + from + " CONNECT www.example.com:443\n"
		}
		migration{section: "Debian's default", requests: all}.compare(t)
	})
	t.Run("with the local networks", func(t *testing.T) {
		startSquid(t, strings.Replace(config, "http_access allow localhost\n", "http_access allow localnet\nhttp_access allow localhost\n", 1))
		startMigrated(t, blockOf(t, "Debian's default", "caddyfile", 1))
		all := strings.ReplaceAll(requests, "FROM", "10.1.2.3")
		for _, from := range []string{"127.0.0.1", "::1", "127.0.0.2", "192.168.1.5", "172.20.0.1", "100.64.0.1", "8.8.4.4", "fd00::5"} {
			all += from + " GET http://www.example.com/\n" + from + " CONNECT www.example.com:443\n"
		}
		migration{section: "Debian's default", table: 1, requests: all}.compare(t)
	})
}

// Both hardened proxies deny the same requests, hide the same of the client and the origin, and bound
// what they take.
func TestMigratingHardened(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	startSquid(t, blockOf(t, "Hardened", "squid", 0))
	startMigrated(t, blockOf(t, "Hardened", "caddyfile", 0))
	migration{section: "Hardened", requests: `
		10.0.1.2 GET http://www.example.com/
		10.0.1.2 HEAD http://www.example.com/
		10.0.1.2 POST http://www.example.com/
		10.0.1.2 OPTIONS http://www.example.com/
		10.0.1.2 TRACE http://www.example.com/
		10.0.1.2 PROPFIND http://www.example.com/
		10.0.1.2 CONNECT www.example.com:443
		10.0.1.2 CONNECT www.example.com:80
		10.0.1.2 CONNECT www.example.com:22
		10.0.1.2 GET http://www.example.com:8080/
		10.0.1.2 GET http://8.8.8.8/
		10.0.1.2 GET http://127.0.0.1/
		10.0.1.2 GET http://127.1/
		10.0.1.2 GET http://0.0.0.0/
		10.0.1.2 GET http://localhost/
		10.0.1.2 GET http://local.example.com/
		10.0.1.2 CONNECT local.example.com:443
		10.0.1.2 GET http://10.9.9.9/
		10.0.1.2 GET http://intranet.example.com/
		10.0.1.2 GET http://192.168.1.1/
		10.0.1.2 GET http://169.254.169.254/latest/meta-data/
		10.0.1.2 GET http://100.100.100.200/
		10.0.1.2 GET http://168.63.129.16/
		10.0.1.2 GET http://192.0.0.192/
		10.0.1.2 GET http://198.18.0.1/
		10.0.1.2 GET http://[::1]/
		10.0.1.2 GET http://[::ffff:127.0.0.1]/
		10.0.1.2 GET http://[fd00:ec2::254]/
		10.0.1.2 GET http://[fe80::1]/
		10.0.1.2 GET http://[64:ff9b::7f00:1]/
		10.0.1.2 GET http://[2002:7f00:1::1]/
		10.0.1.2 GET ftp://www.example.com/
		10.1.1.2 GET http://www.example.com/
		127.0.0.1 GET http://www.example.com/
		8.8.4.4 CONNECT www.example.com:443
	`}.compare(t)
	for _, proxy := range []string{"127.0.0.1:3129", "127.0.0.1:3128"} {
		checkHardened(t, proxy)
	}
}

// checkHardened checks what the two hardened proxies have in common, apart from their rules.
func checkHardened(t *testing.T, proxy string) {
	t.Helper()
	head := "GET http://www.example.com/ HTTP/1.1\r\nHost: www.example.com\r\nFrom: a@example.com\r\nReferer: http://intranet/\r\nX-Forwarded-For: 10.0.1.9\r\nX-Kept: yes\r\n"
	res, sent := exchange(t, proxy, "10.0.1.2", head+"\r\n")
	for _, field := range []string{"From:", "Referer:", "X-Forwarded-For:", "Via:", "10.0.1."} {
		if strings.Contains(sent, field) {
			t.Errorf("through %s, the origin got\n%s", proxy, sent)
		}
	}
	if !strings.Contains(sent, "X-Kept: yes") || res.Header.Get("X-Kept") != "origin" {
		t.Errorf("through %s, the origin got\n%s\nand the client %v", proxy, sent, res.Header)
	}
	for _, field := range []string{"Server", "X-Powered-By", "X-Cache", "Via"} {
		if res.Header.Get(field) != "" {
			t.Errorf("%s passes on %s: %s", proxy, field, res.Header.Get(field))
		}
	}
	if res, body := exchange(t, proxy, "10.0.1.2", "GET http://127.0.0.1/ HTTP/1.1\r\nHost: x\r\n\r\n"); regexp.MustCompile(`\d\.\d`).MatchString(res.Header.Get("Server")) || strings.Contains(body, "5.7") {
		t.Errorf("%s names its version: %v %s", proxy, res.Header, body)
	}
	upload := func(size int) int {
		res, _ := exchange(t, proxy, "10.0.1.2", fmt.Sprintf("POST http://www.example.com/ HTTP/1.1\r\nHost: www.example.com\r\nContent-Length: %d\r\n\r\n%s", size, strings.Repeat("x", size)))
		return res.StatusCode
	}
	if small, large := upload(9<<20), upload(11<<20); small != http.StatusOK || large != http.StatusRequestEntityTooLarge {
		t.Errorf("%s answers %d to 9 MiB and %d to 11 MiB", proxy, small, large)
	}
	if res, _ := exchange(t, proxy, "10.0.1.2", head+"X-Long: "+strings.Repeat("x", 80<<10)+"\r\n\r\n"); res.StatusCode < 400 || res.StatusCode >= 500 {
		t.Errorf("%s answers %d to a head of 80 KiB", proxy, res.StatusCode)
	}
	if res, _ := exchange(t, proxy, "10.0.1.2", "GET http://www.example.com/a b HTTP/1.1\r\nHost: www.example.com\r\n\r\n"); res.StatusCode != http.StatusBadRequest {
		t.Errorf("%s answers %d to a space in the target", proxy, res.StatusCode)
	}
}
