// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// peerProxies are other forward proxies, as packaged by Debian, with settings that make
// them comparable. PORT and DIR are filled in.
var peerProxies = []struct {
	name, command string
	args          []string
	config        string
}{
	{"squid", "squid", []string{"--foreground", "-n", "pPORT", "-f", "DIR/config"}, `http_port 127.0.0.1:PORT
acl loop src 127.0.0.0/8
http_access allow loop
cache deny all
access_log none
cache_log DIR/cache.log
cache_store_log none
pid_filename none
coredump_dir DIR
shutdown_lifetime 0 seconds
visible_hostname tester
pinger_enable off
`},
	{"apache2", "apache2", []string{"-f", "DIR/config", "-D", "FOREGROUND"}, `ServerName tester
ServerRoot "DIR"
PidFile "DIR/pid"
DefaultRuntimeDir "DIR"
Mutex file:DIR
Listen 127.0.0.1:PORT
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule authz_host_module /usr/lib/apache2/modules/mod_authz_host.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
User nobody
Group nogroup
ErrorLog "DIR/error.log"
ProxyRequests On
ProxyVia On
<Proxy "*">
  Require ip 127.0.0.0/8
</Proxy>
`},
	{"tinyproxy", "tinyproxy", []string{"-d", "-c", "DIR/config"}, `Port PORT
Listen 127.0.0.1
Timeout 600
Allow 127.0.0.0/8
LogLevel Critical
LogFile "DIR/log"
PidFile "DIR/pid"
ViaProxyName "tester"
`},
}

// peerAgreed are rules that every listed proxy keeps. If one of these fails, the table, or
// the way it is run, is wrong.
var peerAgreed = []string{"origin form", "no content", "content of known length", "304", "a part", "HEAD"}

// TestRulesOfPeers runs the table of rules against other proxies. Differences are logged,
// not judged; the test shows that the table can be kept at all.
func TestRulesOfPeers(t *testing.T) {
	for _, peer := range peerProxies {
		t.Run(peer.name, func(t *testing.T) {
			t.Parallel()
			address := startPeer(t, peer.command, peer.args, peer.config)
			// A rule that is not kept is often one that the test waits for in vain.
			found := make([]differences, len(rules))
			var wg sync.WaitGroup
			for i, rule := range rules {
				rule = rule.forPeer()
				c, origin := dialRaw(t, address), newRuleOrigin(t, rule.answer)
				wg.Go(func() { found[i] = rule.run(c, origin, 2*time.Second) })
			}
			wg.Wait()
			kept := 0
			for i, rule := range rules {
				if len(found[i]) == 0 {
					kept++
					continue
				}
				t.Logf("RFC %s, %s: %.300s", rule.rfc, rule.name, strings.Join(found[i], "; "))
				if slices.Contains(peerAgreed, rule.name) {
					t.Errorf("%s does not keep %q", peer.name, rule.name)
				}
			}
			t.Logf("%s keeps %d of %d", peer.name, kept, len(rules))
			if kept < len(rules)/3 {
				t.Errorf("%s keeps only %d of %d rules", peer.name, kept, len(rules))
			}
		})
	}
}

// forPeer removes from a rule what is specific to this proxy: how it names itself and the
// client, and Go's spelling of fields.
func (rule rule) forPeer() rule {
	withoutOwn := func(lines []string) (kept []string) {
		for _, line := range lines {
			if !strings.Contains(line, "tester") && !strings.HasPrefix(line, "X-Forwarded-For") && !strings.HasPrefix(line, "X-Real-Ip") && !strings.HasPrefix(line, "Allow") {
				kept = append(kept, line)
			}
		}
		return kept
	}
	rule.has, rule.clientHas = withoutOwn(rule.has), withoutOwn(rule.clientHas)
	return rule
}

// startPeer runs one of the Debian proxies until the test ends.
func startPeer(t *testing.T, command string, args []string, config string) string {
	t.Helper()
	path, err := exec.LookPath(command)
	for _, dir := range []string{"/usr/sbin/", "/usr/bin/"} {
		if err != nil {
			path, err = exec.LookPath(dir + command)
		}
	}
	if err != nil {
		t.Skipf("%s is not installed; apt-get install it", command)
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil { // the proxies change to another user
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	fill := strings.NewReplacer("PORT", port, "DIR", dir).Replace
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(fill(config)), 0o644); err != nil {
		t.Fatal(err)
	}
	filled := make([]string, len(args))
	for i := range args {
		filled[i] = fill(args[i])
	}
	cmd := exec.Command(path, filled...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		done := time.AfterFunc(5*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		done.Stop()
	})
	eventually(t, command+" to listen", func() bool {
		conn, err := net.Dial("tcp4", address)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return address
}
