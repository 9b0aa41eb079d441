// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	asyncproxy "github.com/asyncproxy/caddy-async-proxy"
)

// counts makes a request, which Redis must count, and checks that no log line reports Redis
// as gone.
func (w *world) counts(e *engine) {
	w.t.Helper()
	w.gets(200)
	if e.bucket() == "" {
		w.t.Error("Redis did not count the request")
	}
	if failed, _ := w.states(); failed != 0 {
		w.t.Errorf("log lines: %v", logLines(w.t, w.logs, failedLine))
	}
}

// The user, the password and the address may come from the environment or a file. No secret
// appears in a log, the config, or the response to a rejected config.
func TestSecrets(t *testing.T) {
	e := startEngine(t, "redis-server")
	const acl = "resetkeys ~async_proxy:* nocommands +evalsha +eval +get +set +time +hello +ping"
	if text, err := os.ReadFile(page); err != nil || !strings.Contains(string(text), "ACL SETUSER proxy on >PASSWORD "+acl+"\n") {
		t.Errorf("%s does not list the permissions needed: %v", page, err)
	}
	e.do(append([]string{"ACL", "SETUSER", "proxy", "on", ">open-sesame"}, strings.Fields(acl)...)...)
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte("open-sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("REDIS_TEST_ADDRESS", e.address)
	t.Setenv("REDIS_TEST_PASSWORD", "open-sesame")
	t.Setenv("REDIS_TEST_WRONG", "open-barley")
	for _, password := range []string{"{env.REDIS_TEST_PASSWORD}", "{file." + file + "}"} {
		w := newWorld(t, "limiter redis {env.REDIS_TEST_ADDRESS} {\ntimeout 5s\nusername proxy\npassword "+password+"\n}")
		w.counts(e)
		e.do("FLUSHALL")
		w.load("limiter redis {env.REDIS_TEST_ADDRESS} {\nusername proxy\npassword {env.REDIS_TEST_WRONG}\n}")
		w.gets(200)
		eventually(t, "a line about the wrong password", func() bool { failed, _ := w.states(); return failed == 1 })
		text, err := os.ReadFile(w.logs)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), "WRONGPASS") {
			t.Errorf("the log does not name the error: %s", text)
		}
		for _, secret := range []string{"open-sesame", "open-barley"} {
			if strings.Contains(string(text), secret) {
				t.Errorf("the log contains the password: %s", text)
			}
		}
	}

	m := startMachine(t, "limiter redis {env.REDIS_TEST_ADDRESS} {\nusername proxy\npassword {env.REDIS_TEST_PASSWORD}\n}")
	config := m.ask(http.MethodGet, "/config/", "", http.StatusOK)
	if !strings.Contains(config, "{env.REDIS_TEST_PASSWORD}") || strings.Contains(config, "open-sesame") {
		t.Errorf("the config is %s", config)
	}
	answer := m.ask(http.MethodPost, "/load", siteConfig(m.proxy, m.logs, m.admin, "limiter redis proxy:{env.REDIS_TEST_PASSWORD}"), http.StatusBadRequest)
	if !strings.Contains(answer, "{env.REDIS_TEST_PASSWORD}") || strings.Contains(answer, "open-sesame") {
		t.Errorf("/load responds %s", answer)
	}
	if text, err := os.ReadFile(m.logs); err != nil || strings.Contains(string(text), "open-sesame") {
		t.Errorf("the log contains the password: %s, %v", text, err)
	}
}

// certificate creates a self-signed certificate for 127.0.0.1 and returns its files.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	certDER, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: certDER}, key: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// startSecure runs a server that speaks TLS at its own address, with a self-signed
// certificate.
func startSecure(t *testing.T) (e *engine, address, cert string) {
	t.Helper()
	cert, key := certificate(t)
	e = startEngine(t, "redis-server")
	address = freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	e.kill()
	e.args = []string{"--tls-port", port, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert, "--tls-auth-clients", "no"}
	e.run()
	return e, address, cert
}

func TestTLS(t *testing.T) {
	e, secure, cert := startSecure(t)
	w := newWorld(t, fmt.Sprintf("limiter redis %s {\ntimeout 5s\ntls %s\n}", secure, cert))
	w.counts(e)
	e.do("FLUSHALL")
	w.load(fmt.Sprintf("zone a\nlimiter redis %s {\ntls\n}", secure))
	w.gets(200)
	eventually(t, "a line about the certificate", func() bool { failed, _ := w.states(); return failed == 1 })
	if line := logLines(t, w.logs, failedLine)[0]; !strings.Contains(fmt.Sprint(line["error"]), "certificate signed by unknown authority") {
		t.Errorf("log line %v", line)
	}
	// A CA file replaces the system's roots.
	other, _ := certificate(t)
	t.Setenv("SSL_CERT_FILE", cert)
	m := startMachine(t, fmt.Sprintf("limiter redis %s {\ntls %s\n}", secure, other))
	rush(t, 1, w.origin, m.proxy)
	eventually(t, "a line about the certificate", func() bool { return len(logLines(t, m.logs, failedLine)) == 1 })
	if e.bucket() != "" {
		t.Error("a request was counted by an untrusted server")
	}
}

func TestDatabaseAndPrefix(t *testing.T) {
	e := startEngine(t, "redis-server")
	w := newWorld(t, fmt.Sprintf("zone a\nlimiter redis %s {\ntimeout 5s\ndb 3\nprefix proxy:a\n}", e.address))
	w.gets(200)
	e.do("SELECT", "3")
	var got string
	eventually(t, "the probe's key to expire", func() bool { got = e.do("KEYS", "*"); return !strings.Contains(got, "{") })
	if got != "[proxy:a:10:2000000000:127.0.0.1/32:a]" {
		t.Errorf("the keys are %s", got)
	}
}

// A different database counts as a different server.
func TestDatabases(t *testing.T) {
	e := startEngine(t, "redis-server")
	w := newWorld(t, fleetOptions(e, "burst 10"))
	w.gets(200)
	before := e.bucket()
	w.load(fmt.Sprintf("burst 10\nlimiter redis %s {\ntimeout 5s\ndb 3\n}", e.address))
	w.gets(200)
	if after := e.bucket(); after != before {
		t.Error("the request was counted in database 0")
	}
	e.do("SELECT", "3")
	if e.bucket() == "" {
		t.Error("the request was not counted in database 3")
	}
}

// A config that is replaced before it has connected logs nothing about that.
func TestReloadAtOnce(t *testing.T) {
	e := startEngine(t, "redis-server")
	b := startBridge(t, e.address)
	b.setup.Store(int64(faultTimeout))
	w := newWorld(t, fmt.Sprintf("limiter redis %s {\ntimeout 5s\n}", b.address))
	w.load(fleetOptions(e, ""))
	w.counts(e)
	eventually(t, "the first one to be done", func() bool { return stacksWith("redis.(*server)") == 0 })
	eventually(t, "its connection to be closed", func() bool { // this test's and the new config's remain
		return strings.Contains(e.do("INFO", "clients"), "connected_clients:2\r\n")
	})
	w.load("burst 5")
	eventually(t, "the other one's, too", func() bool { return strings.Contains(e.do("INFO", "clients"), "connected_clients:1\r\n") })
	if failed, back := w.states(); failed != 0 || back != 0 {
		t.Errorf("%d lines say that Redis is gone, %d that it is back; want none", failed, back)
	}
}

// startNode runs a server in cluster mode. Its cluster bus port is not the default one,
// which a client may be using.
func startNode(t *testing.T) *engine {
	t.Helper()
	_, port, _ := net.SplitHostPort(freeAddress(t))
	return startEngine(t, "redis-server", "--cluster-enabled", "yes", "--cluster-port", port)
}

// A changed CA file takes effect on a reload.
func TestRenewedCA(t *testing.T) {
	e, secure, cert := startSecure(t)
	ca, _ := certificate(t)
	options := fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntls %s\n}", secure, ca)
	w := newWorld(t, options)
	w.gets(200)
	eventually(t, "a line about the certificate", func() bool { failed, _ := w.states(); return failed == 1 })
	if err := os.Rename(cert, ca); err != nil {
		t.Fatal(err)
	}
	w.load(options + "\nvia fred")
	w.untilCounted(e)
}

// Cluster mode is detected automatically.
func TestCluster(t *testing.T) {
	e := startNode(t)
	e.do("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
	eventually(t, "the cluster", func() bool { return strings.Contains(e.do("CLUSTER", "INFO"), "cluster_state:ok") })
	w := newWorld(t, fleetOptions(e, "burst 3\nrefill 0.001"))
	w.counts(e)
	w.gets(200, 200, 429)
	for _, b := range []asyncproxy.Bucket{{Zone: "default"}, {Zone: "a{b}c"}, {Zone: "a}b"}, {Zone: "default", User: "x}y"}} {
		key := bucketKey("async_proxy", b)
		if slot, probe := e.do("CLUSTER", "KEYSLOT", key), e.do("CLUSTER", "KEYSLOT", probeKey("async_proxy", key)); slot != probe {
			t.Errorf("the slot of %s is %s, that of its probe %s", key, slot, probe)
		}
	}
	e.kill()
	w.load(fleetOptions(e, "burst 2\nrefill 0.001"))
	w.gets(200, 200, 429)
	e.run()
	eventually(t, "Redis to be back", func() bool { _, back := w.states(); return back > 0 })
}

// joinNodes joins nodes into a cluster that covers all slots.
func joinNodes(t *testing.T, nodes []*engine) {
	t.Helper()
	for _, e := range nodes[1:] {
		host, port, _ := net.SplitHostPort(e.address)
		nodes[0].do("CLUSTER", "MEET", host, port, e.args[len(e.args)-1])
	}
	for _, e := range nodes {
		eventually(t, "the cluster", func() bool { return strings.Contains(e.do("CLUSTER", "INFO"), "cluster_state:ok") })
	}
}

// announce puts a bridge in front of a node and announces its address to clients.
func announce(t *testing.T, e *engine) *bridge {
	t.Helper()
	b := startBridge(t, e.address)
	_, port, _ := net.SplitHostPort(b.address)
	e.do("CONFIG", "SET", "cluster-announce-port", port)
	return b
}

// No request waits for a connection to a cluster node, even one that the addresses do not
// list.
func TestClusterSlowToConnect(t *testing.T) {
	nodes := []*engine{startNode(t), startNode(t), startNode(t)}
	first := announce(t, nodes[0])
	for _, e := range nodes[1:] {
		announce(t, e).setup.Store(int64(700 * time.Millisecond))
	}
	last := []int{5460, 10922, 16383}
	from := 0
	for i, e := range nodes {
		e.do("CLUSTER", "ADDSLOTSRANGE", strconv.Itoa(from), strconv.Itoa(last[i]))
		from = last[i] + 1
	}
	joinNodes(t, nodes)
	w := newWorld(t, fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout 500ms\n}", first.address))
	s := w.server()
	<-s.tried
	var asked [3]int // per node
	for i := range 30 {
		key := fmt.Sprint("async_proxy:", i)
		slot, err := strconv.Atoi(nodes[0].do("CLUSTER", "KEYSLOT", key))
		if err != nil {
			t.Fatal(err)
		}
		if _, err = s.take("async_proxy", key, probeArgs); err != nil {
			t.Fatalf("question %d, of slot %d: %v", i, slot, err)
		}
		node, _ := slices.BinarySearch(last, slot)
		asked[node]++
	}
	if slices.Contains(asked[:], 0) {
		t.Errorf("the nodes were asked %v times", asked)
	}
	if failed, _ := w.states(); failed != 0 {
		t.Errorf("log lines: %v", logLines(t, w.logs, failedLine))
	}
}

// A request does not wait while the library finds out which node serves its key.
func TestClusterThatFallsSilent(t *testing.T) {
	const key = "async_proxy:nobody's"
	e := startNode(t)
	e.do("CONFIG", "SET", "cluster-require-full-coverage", "no")
	b := announce(t, e)
	slot, err := strconv.Atoi(e.do("CLUSTER", "KEYSLOT", key))
	if err != nil {
		t.Fatal(err)
	}
	e.do("CLUSTER", "ADDSLOTSRANGE", "0", strconv.Itoa(slot-1), strconv.Itoa(slot+1), "16383")
	eventually(t, "the cluster", func() bool { return strings.Contains(e.do("CLUSTER", "INFO"), "cluster_state:ok") })
	w := newWorld(t, fmt.Sprintf("burst 100000\nrefill 0.001\nlimiter redis %s {\ntimeout %v\n}", b.address, faultTimeout))
	w.untilCounted(e)
	s := w.server()
	b.silent.Store(true)
	if _, err := s.link.Load().take(s.deadline(time.Now()), key, probeArgs); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if stacksWith("rueidis.(*clusterClient)._refresh") == 0 {
		t.Error("the library had already given up")
	}
}

// In a cluster of two nodes, each key is counted by its own node.
func TestClusterOfTwo(t *testing.T) {
	nodes := []*engine{startNode(t), startNode(t)}
	nodes[0].do("CLUSTER", "ADDSLOTSRANGE", "0", "8191")
	nodes[1].do("CLUSTER", "ADDSLOTSRANGE", "8192", "16383")
	joinNodes(t, nodes)
	w := newWorld(t, fmt.Sprintf("burst 3\nrefill 0.001\nzone z0\nlimiter redis %s {\ntimeout 5s\n}", nodes[0].address))
	for i := range 10 {
		w.load(fmt.Sprintf("burst 3\nrefill 0.001\nzone z%d\nlimiter redis %s %s {\ntimeout 5s\n}", i, nodes[0].address, nodes[1].address))
		w.gets(200)
	}
	for _, e := range nodes {
		if n := len(e.bucketKeys()); n == 0 || n == 10 {
			t.Fatalf("a node counts %d of 10 buckets", n)
		}
	}
	if failed, _ := w.states(); failed != 0 {
		t.Errorf("log lines: %v", logLines(t, w.logs, failedLine))
	}

	// One node is gone. The other's successes do not count as Redis being back.
	key := nodes[1].bucketKeys()[0]
	w.load(fmt.Sprintf("burst 3\nrefill 0.001\nzone %s\nlimiter redis %s %s", key[strings.LastIndexByte(key, ':')+1:], nodes[0].address, nodes[1].address))
	nodes[1].kill()
	w.gets(200)
	time.Sleep(2*probeInterval + probeInterval/2)
	if failed, back := w.states(); failed != 1 || back != 0 {
		t.Errorf("%d lines say that Redis is gone, %d that it is back; want only the first", failed, back)
	}
}

// The sentinels name the current master, also after a failover.
func TestSentinel(t *testing.T) {
	first := startEngine(t, "redis-server")
	second := startEngine(t, "redis-server")
	host, port, _ := net.SplitHostPort(first.address)
	second.do("REPLICAOF", host, port)
	eventually(t, "the replica", func() bool { return strings.Contains(first.do("INFO", "replication"), "state=online") })

	address := freeAddress(t)
	_, sentinelPort, _ := net.SplitHostPort(address)
	dir := t.TempDir()
	config := filepath.Join(dir, "sentinel.conf")
	text := fmt.Sprintf("port %s\nbind 127.0.0.1\ndir %s\nsentinel monitor mymaster %s %s 1\nsentinel down-after-milliseconds mymaster 500\nsentinel failover-timeout mymaster 2000\n",
		sentinelPort, dir, host, port)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, exec.Command("redis-server", config, "--sentinel"))
	eventually(t, "the sentinel", func() bool { return listens(address) })

	w := newWorld(t, fmt.Sprintf("burst 100\nrefill 0.001\nlimiter redis %s {\nsentinel mymaster\ntimeout 300ms\n}", address))
	w.gets(200)
	eventually(t, "the master to count", func() bool { return first.bucket() != "" })
	eventually(t, "the sentinel to know the replica", func() bool {
		out, err := exec.Command("redis-cli", "-p", sentinelPort, "SENTINEL", "replicas", "mymaster").Output()
		return err == nil && strings.Contains(string(out), "127.0.0.1")
	})
	first.kill()
	var before string
	eventually(t, "the replica to be the master", func() bool { return strings.Contains(second.do("ROLE"), "master") })
	eventually(t, "the new master to count", func() bool {
		before = second.bucket()
		w.gets(200)
		time.Sleep(50 * time.Millisecond)
		return second.bucket() != before
	})
}

// Redis metrics are among Caddy's metrics, also after a reload.
func TestMetrics(t *testing.T) {
	e := startEngine(t, "redis-server")
	m := startMachine(t, fleetOptions(e, "burst 100\nrefill 0.001"))
	origin := startOrigin(t)
	rush(t, 3, origin, m.proxy)
	m.reload(fleetOptions(e, "burst 100\nrefill 0.001") + "\nvia fred")
	rush(t, 2, origin, m.proxy)
	e.kill()
	rush(t, 1, origin, m.proxy)
	res, err := http.Get("http://" + m.admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var body strings.Builder
	if err := res.Write(&body); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"caddy_async_proxy_limiter_duration_seconds_count 6",
		`caddy_async_proxy_limiter_errors_total{kind="connection"} 1`,
		`caddy_async_proxy_limiter_fallbacks_total{on_error="local"} 1`,
	} {
		if !strings.Contains(body.String(), "\n"+want+"\n") {
			t.Errorf("the metrics lack %s", want)
		}
	}
}
