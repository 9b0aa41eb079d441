// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// namespaceAddresses are the addresses of the interface in the network namespace of this
// file's tests, so that every destination really exists.
var namespaceAddresses = strings.Fields(`8.8.8.8 1.1.1.1 172.32.0.1 10.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 169.254.169.254
	192.0.0.192 198.18.0.1 203.0.113.1 168.63.129.16 240.0.0.1
	2606:4700::1111 fd00::1 fec0::1 2001:db8::1 2001:0:7f00:1::1 64:ff9b::808:808 64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::7f00:1
	2002:7f00:1::1 2002:a00:1::1 2002:a9fe:a9fe::1 2002:808:808::1 ::127.0.0.1`)

// inNamespace runs the test in a child process with its own network namespace, in which it
// returns true.
func inNamespace(t *testing.T) bool {
	t.Helper()
	const marker = "ASYNC_PROXY_NAMESPACE"
	if os.Getenv(marker) != "" {
		commands := []string{"ip link set lo up"}
		for _, address := range namespaceAddresses { // the machine answers at these although no interface has them
			commands = append(commands, "ip route add local "+address+" dev lo")
		}
		if out, err := exec.Command("sh", "-ec", strings.Join(commands, "\n")).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return true
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("ip is not installed; apt-get install iproute2")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	if deadline, ok := t.Deadline(); ok { // for a test that hangs, the other process shows the stacks
		cmd.Args = append(cmd.Args, "-test.timeout="+max(time.Until(deadline)-10*time.Second, time.Second).String())
	}
	cmd.Env = append(os.Environ(), marker+"=yes")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) {
		t.Skip("this user may not create network namespaces")
	}
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

// listenEverywhere listens on all addresses and counts the connections.
func listenEverywhere(t *testing.T) (port string, accepted *atomic.Int64) {
	t.Helper()
	ln, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	accepted = new(atomic.Int64)
	go func() {
		_ = http.Serve(countingListener{ln, accepted}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "reached")
		}))
	}()
	t.Cleanup(func() { ln.Close() })
	_, port, _ = net.SplitHostPort(ln.Addr().String())
	return port, accepted
}

type countingListener struct {
	net.Listener
	accepted *atomic.Int64
}

func (l countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.accepted.Add(1)
	}
	return conn, err
}

// dnsNames returns the addresses that the tests' name server has for a name.
func dnsNames(name string, n int) []string {
	switch name {
	case "public.test":
		return []string{"8.8.8.8", "2606:4700::1111"}
	case "loopback.test":
		return []string{"127.0.0.1", "::1"}
	case "private.test":
		return []string{"10.0.0.1", "fd00::1"}
	case "metadata.test":
		return []string{"169.254.169.254"}
	case "mapped.test":
		return []string{"::ffff:127.0.0.1"}
	case "nat64.test":
		return []string{"64:ff9b::7f00:1"}
	case "alias.test":
		return []string{"CNAME loopback.test", "127.0.0.1"}
	case "mixed.test": // one open address among closed ones
		return []string{"127.0.0.1", "8.8.8.8", "10.0.0.1", "::1"}
	case "rebinding.test": // public in the first answer, loopback in all later ones
		if n == 0 {
			return []string{"8.8.8.8"}
		}
		return []string{"127.0.0.1"}
	case "xn--lclhst-cua.test":
		return []string{"127.0.0.1"}
	}
	return nil
}

// TestSpellings requests every forbidden destination in every spelling, by CONNECT and as a
// plain request, of the directive and of a policy. What explain says of each must agree with what
// happens.
func TestSpellings(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	port, accepted := listenEverywhere(t)
	resolvers := "resolvers " + nameServer(t, dnsNames)
	w := newWorld(t, resolvers, nil)
	testSpellings(t, w, port, accepted)
	accepted.Store(0)
	w.load(w.site(resolvers + "\nburst 1000000\npolicy everybody {\nclients 0.0.0.0/0 ::/0\nports 1-24 26-65535\n}"))
	testSpellings(t, w, port, accepted)
}

func testSpellings(t *testing.T, w *world, port string, accepted *atomic.Int64) {
	t.Helper()
	const (
		loopback  = `127.0.0.1 127.0.0.1. 127.0.0.2 127.1.2.3 127.255.255.254 [::1] [0:0:0:0:0:0:0:1] [::0001] [0000:0000:0000:0000:0000:0000:0000:0001] [::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:ffff:127.0.0.1] [::FFFF:7F00:0001] [::127.0.0.1] [::7f00:1] localhost LOCALHOST LocalHost loopback.test LOOPBACK.test loopback.test. alias.test mapped.test nat64.test xn--lclhst-cua.test`
		private   = `10.0.0.1 10.0.0.1. 172.16.0.1 192.168.1.1 100.64.0.1 192.0.0.192 198.18.0.1 203.0.113.1 240.0.0.1 168.63.129.16 [fd00::1] [FD00::1] [fec0::1] [2001:db8::1] [::ffff:10.0.0.1] [::ffff:a00:1] [::ffff:192.168.1.1] [::ffff:100.64.0.1] private.test`
		embedding = `[64:ff9b::127.0.0.1] [64:ff9b::7f00:1] [64:FF9B::A00:1] [64:ff9b::10.0.0.1] [64:ff9b:1::7f00:1] [2002:7f00:1::1] [2002:7F00:0001::1] [2002:a00:1::1]`
		never     = `0.0.0.0 [::] [::0] [0:0:0:0:0:0:0:0] [::ffff:0.0.0.0] [::ffff:0:0] 169.254.169.254 169.254.0.1 [::ffff:169.254.169.254] [::ffff:a9fe:a9fe] [64:ff9b::a9fe:a9fe] [64:ff9b::169.254.169.254] [2002:a9fe:a9fe::1] metadata.test [fe80::1] [FE80::1] 224.0.0.1 239.255.255.250 [ff02::1] [ff0e::1] 255.255.255.255 [2001:0:7f00:1::1] [2001::1]`
		malformed = `2130706433 017700000001 0x7f000001 0X7F000001 0x7f.0.0.1 0x7f.1 127.1 127.0.1 127.0.0.01 127.0.0.0x1 0177.0.0.1 0177.1 00127.0.0.1 127.0.0.1.. 127.0.0.1.1 1.2.3.256 [::1%25lo] [fe80::1%25eth0] [fe80::1%lo] [::ffff:127.0.0.1.] [::ffff:0x7f.0.0.1] 127.0.0.%31 %6cocalhost loc%61lhost ⓛocalhost 127。0。0。1 １２７.0.0.1 localhost%00 [127.0.0.1] [localhost] 127.0.0.1\ .test .127.0.0.1 localhost.. ..localhost ::1 0 00 0x0 1`
	)
	ask := func(host, lines string, want ...int) {
		t.Helper()
		for _, method := range []string{http.MethodConnect, http.MethodGet} {
			res, body := policyRequest(t, w.proxy, method, host+":"+port, lines)
			ok := false
			for _, each := range want {
				ok = ok || res.StatusCode == each
			}
			if !ok {
				t.Errorf("%s %s for %q: %s %q, want %v", method, host, lines, res.Status, body, want)
			}
			from, target := "127.0.0.1", host+":"+port
			if lines == policyRemote {
				from = "192.168.77.7"
			}
			if method != http.MethodConnect {
				target = "http://" + target + "/"
			}
			explanation := http.StatusBadRequest
			if e, err := explained(t, from, "", method, target); err == nil {
				explanation = map[status.Outcome]int{status.Allowed: 200, status.Denied: 403, status.Unresolved: 502}[e.Decision]
			}
			if explanation != res.StatusCode {
				t.Errorf("%s %s for %q: %s, but it is explained as %d", method, host, lines, res.Status, explanation)
			}
		}
	}
	forbidden := 0
	for _, list := range []string{loopback, private, embedding, never} {
		for host := range strings.FieldsSeq(list) {
			ask(host, policyRemote, http.StatusForbidden)
			forbidden++
		}
	}
	for host := range strings.FieldsSeq(never) {
		ask(host, "", http.StatusForbidden)
		forbidden++
	}
	ask("localhost.", policyRemote, http.StatusForbidden, http.StatusBadGateway) // some resolvers resolve it
	for host := range strings.FieldsSeq(malformed) {
		ask(host, policyRemote, http.StatusBadRequest)
		ask(host, "", http.StatusBadRequest)
		forbidden += 2
	}
	if n := accepted.Load(); n != 0 {
		t.Errorf("%d connections got through", n)
	}
	t.Logf("%d spellings refused, each twice", forbidden)
	for _, row := range []struct{ hosts, lines string }{
		{`8.8.8.8 1.1.1.1 172.32.0.1 [2606:4700::1111] [2606:4700:0::1111] [::ffff:8.8.8.8] [::ffff:808:808] [64:ff9b::8.8.8.8] [2002:808:808::1] public.test PUBLIC.test. mixed.test`, policyRemote},
		{`127.0.0.1 127.0.0.2 [::1] [::ffff:127.0.0.1] 10.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 [fd00::1] localhost loopback.test private.test alias.test 8.8.8.8`, ""},
	} {
		for host := range strings.FieldsSeq(row.hosts) {
			ask(host, row.lines, http.StatusOK)
		}
	}
	if accepted.Load() == 0 {
		t.Error("no connection got through")
	}
}

// TestRebinding checks that an earlier DNS answer for a name does not count.
func TestRebinding(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	port, accepted := listenEverywhere(t)
	w := newWorld(t, "resolvers "+nameServer(t, dnsNames), nil)
	for i, want := range []int{http.StatusOK, http.StatusForbidden, http.StatusForbidden} {
		res, body := policyRequest(t, w.proxy, http.MethodConnect, "rebinding.test:"+port, policyRemote)
		if res.StatusCode != want {
			t.Errorf("request %d: %s %q, want %d", i, res.Status, body, want)
		}
		accepted.Store(0)
	}
	if n := accepted.Load(); n != 0 {
		t.Errorf("%d connections got through", n)
	}
	line := w.waitLog("request", 2)[0]
	if line["level"] != "warn" || line["rule"] != "default" || line["address"] != "127.0.0.1:"+port || line["client"] != "127.0.0.1" {
		t.Errorf("line %v", line)
	}
	// One address is closed to the client and nothing listens at the others: the client is
	// told about the former. A name that is denied is not even resolved.
	var questions atomic.Int64
	w.load(w.site("deny denied.test\nresolvers " + nameServer(t, func(name string, n int) []string {
		questions.Add(1)
		return dnsNames(name, n)
	})))
	if res, body := policyRequest(t, w.proxy, http.MethodConnect, "mixed.test:1", policyRemote); res.StatusCode != http.StatusForbidden {
		t.Errorf("%s %q", res.Status, body)
	}
	questions.Store(0)
	if res, body := policyRequest(t, w.proxy, http.MethodConnect, "denied.test:80", policyRemote); res.StatusCode != http.StatusForbidden || questions.Load() != 0 {
		t.Errorf("%s %q, %d questions to the name server", res.Status, body, questions.Load())
	}
	// Allowing a name does not open closed addresses.
	w.load(w.site("allow rebinding.test loopback.test mixed.test\ndeny all\nresolvers " + nameServer(t, func(name string, _ int) []string { return dnsNames(name, 1) })))
	for host, want := range map[string]int{"rebinding.test": 403, "loopback.test": 403, "mixed.test": 200, "public.test": 403, "8.8.8.8": 403} {
		for _, method := range []string{http.MethodConnect, http.MethodGet} {
			if res, body := policyRequest(t, w.proxy, method, host+":"+port, policyRemote); res.StatusCode != want {
				t.Errorf("%s %s: %s %q, want %d", method, host, res.Status, body, want)
			}
		}
	}
}

// TestOwnAddresses checks that a port that is open on all addresses is closed at each
// address of this machine.
func TestOwnAddresses(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	addAddresses(t, "8.8.8.8/32", "1.1.1.1/32", "2606:4700::1111/128", "2002:808:808::1/128")
	admin, proxy := freeAddress(t), freeAddress(t)
	port := func(address string) string { return address[strings.LastIndexByte(address, ':'):] }
	loadCaddyfile(t, fmt.Sprintf(`{
	admin %s
	persist_config off
	log {
		output discard
	}
}
http://%s {
	async_proxy {
		burst 1000000
		refill 1000000
	}
}
`, port(admin), port(proxy)))
	for _, host := range []string{"8.8.8.8", "1.1.1.1", "[2606:4700::1111]", "[2002:808:808::1]", "[64:ff9b::808:808]"} {
		for _, lines := range []string{"", policyRemote} {
			accessDenied(t, proxy, http.MethodConnect, host+port(admin), lines)
			accessDenied(t, proxy, http.MethodConnect, host+port(proxy), lines)
		}
	}
}

// addAddresses adds addresses to a namespace's loopback interface.
func addAddresses(t *testing.T, cidrs ...string) {
	t.Helper()
	for _, cidr := range cidrs {
		if out, err := exec.Command("ip", "addr", "add", cidr, "dev", "lo").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
}

// TestNearbyAddresses checks that a remote client reaches neither this machine at its
// public addresses nor the networks around them. An allow rule for such an address opens
// it, and clients on this machine reach it anyway.
func TestNearbyAddresses(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	addAddresses(t, "8.8.8.1/24", "2606:4700::1/64")
	port, _ := listenEverywhere(t)
	const ownAddrs, network, elsewhere = "8.8.8.1 [2606:4700::1] [::ffff:8.8.8.1]",
		"8.8.8.8 [2606:4700::1111] [2002:808:808::1] [64:ff9b::808:808] public.test", "1.1.1.1"
	for _, tc := range []struct{ rules, lines, open, denied string }{
		{"", policyRemote, elsewhere, ownAddrs + " " + network},
		{"allow public\ndeny all:1", policyRemote, elsewhere, ownAddrs + " " + network},
		{"allow private", policyRemote, ownAddrs + " " + network + " " + elsewhere, ""},
		{"allow 8.8.8.0/24", policyRemote, "8.8.8.1 8.8.8.8 1.1.1.1", "[2606:4700::1] [2606:4700::1111]"},
		{"allow 2000::/3", policyRemote, "[2606:4700::1]", "[2002:808:808::1] 8.8.8.8"},
		{"deny private", policyRemote, elsewhere, ownAddrs + " " + network},
		{"", "", ownAddrs + " " + network + " " + elsewhere, ""},
		{"deny private", "", elsewhere, ownAddrs + " " + network},
	} {
		w := newWorld(t, "resolvers "+nameServer(t, dnsNames)+"\n"+tc.rules, nil)
		for _, method := range []string{http.MethodConnect, http.MethodGet} {
			for want, hosts := range map[int]string{http.StatusOK: tc.open, http.StatusForbidden: tc.denied} {
				for host := range strings.FieldsSeq(hosts) {
					if res, body := policyRequest(t, w.proxy, method, host+":"+port, tc.lines); res.StatusCode != want {
						t.Errorf("%q, %s %s for %q: %s %q, want %d", tc.rules, method, host, tc.lines, res.Status, body, want)
					}
				}
			}
		}
	}
}

// TestSearchList checks that names are complete: a search list would turn one into a name
// that no rule has checked. The hosts file may contain short names.
func TestSearchList(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	port, accepted := listenEverywhere(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"resolv.conf": "search corp.example eu.corp.example\n", "hosts": "127.0.0.1 localhost short long.test\n"} {
		if err := os.WriteFile(dir+"/"+name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("sh", "-ec", "mount --make-rprivate /\nmount --bind "+dir+"/resolv.conf /etc/resolv.conf\nmount --bind "+dir+"/hosts /etc/hosts").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	w := newWorld(t, "deny *.corp.example\nallow private\nresolvers "+nameServer(t, func(name string, n int) []string {
		if strings.HasSuffix(name, ".corp.example") || name == "whole" {
			return []string{"127.0.0.1"}
		}
		return nil
	}), nil)
	for host, want := range map[string]int{
		"db.corp.example": 403, "db": 502, "db.": 502, "db.eu": 502, "db.eu.": 502,
		"localhost": 200, "short": 200, "SHORT.": 200, "long.test": 200, "whole": 200, "whole.": 200,
	} {
		accepted.Store(0)
		res, body := policyRequest(t, w.proxy, http.MethodConnect, host+":"+port, policyRemote)
		if res.StatusCode != want {
			t.Errorf("%s: %s %q, want %d", host, res.Status, body, want)
		}
	}
}

// TestUnroutable checks the cause reported for EADDRNOTAVAIL. For an IPv6 destination on a
// machine without IPv6 addresses there is no route. Otherwise all local ports are in use.
func TestUnroutable(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	system := func(commands string) {
		t.Helper()
		if out, err := exec.Command("sh", "-ec", commands).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	port, _ := listenEverywhere(t)
	server := nameServer(t, func(string, int) []string { return []string{"2606:4700::1111"} })
	w := newWorld(t, "resolvers "+server, nil)
	ask := func(host string, status int, kind string) {
		t.Helper()
		for _, method := range []string{http.MethodConnect, http.MethodGet} {
			res, body := policyRequest(t, w.proxy, method, host+":"+port, "")
			if res.StatusCode != status || status != 200 && ownStatus(t, res.Header)["error"] != kind {
				t.Errorf("%s %s: %s, %s, %q; want %d, %s", method, host, res.Status, res.Header.Get("Proxy-Status"), body, status, kind)
			}
		}
	}
	system("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
	for _, host := range []string{"[2606:4700::1111]", "ipv6.test", "[::1]", "[2606:4700::2222]"} {
		ask(host, 502, "destination_ip_unroutable")
	}
	ask("127.0.0.1", 200, "")
	system("echo 0 > /proc/sys/net/ipv6/conf/all/disable_ipv6; ip addr add 2606:4700::1111/128 dev lo nodad")
	eventually(t, "a route to the address", func() bool {
		conn, err := net.Dial("tcp", "[2606:4700::1111]:"+port)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	// Two ports for all connections, and connections of either family use both.
	system("echo 61000 61001 > /proc/sys/net/ipv4/ip_local_port_range")
	for _, host := range []string{"127.0.0.1", "[2606:4700::1111]"} {
		for range 2 {
			conn, err := net.Dial("tcp", host+":"+port)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
		}
	}
	// The client's connection to the proxy chooses its own local port.
	for i, host := range []string{"127.0.0.1", "[2606:4700::1111]"} {
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 50000 + i}}
		conn, err := dialer.Dial("tcp", w.proxy)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "CONNECT %s:%s HTTP/1.1\r\nHost: x\r\n\r\n", host, port)
		b := make([]byte, 4<<10)
		n, _ := conn.Read(b)
		if answer := string(b[:n]); !strings.Contains(answer, " 503 ") || !strings.Contains(answer, "error=proxy_internal_error") {
			t.Errorf("%s: %q", host, answer)
		}
	}
}
