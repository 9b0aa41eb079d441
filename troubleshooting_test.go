// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// symptom is a cause in docs/troubleshooting.md of something that a client prints. The options and
// arguments may name the places of TestSymptoms.
type symptom struct {
	options    string
	before     func(t *testing.T, w *world)
	args       string // of curl, after the proxy; "": https://example.com/
	proxy      string // in place of http://PROXY
	without    bool   // no site at all listens
	tls        bool   // the site has TLS
	clientAuth bool   // and asks for client certificates
}

// symptoms are the causes in the order of the page, by its headings.
func symptoms(t *testing.T) map[string][]symptom {
	loggedIn := "-U alice:? https://example.com/"
	open := func(t *testing.T, w *world) { w.dial().connect(w.origin.Listener.Addr().String()) }
	return map[string][]symptom{
		"response 403": {
			{options: "deny example.com"},
			{args: "https://169.254.169.254/"},
			{args: "https://example.com:25/"},
			{options: "clients 192.0.2.0/24"},
			{options: "upstream http://" + startScriptedParent(t, func(string) string { return "HTTP/1.1 403 no\nContent-Length: 0\n\n" })},
		},
		"response 407": {{options: authUsers}, {options: authUsers, args: loggedIn}},
		"response 429": {
			{options: "burst 1\nrefill 0.00001", before: func(_ *testing.T, w *world) { w.gets(w.proxy, http.StatusOK) }},
			{before: func(t *testing.T, _ *world) {
				currentProcess().blockClient(keyOf("127.0.0.1"), time.Hour)
				t.Cleanup(func() { currentProcess().unblock(keyOf("127.0.0.1")) })
			}},
			{options: authUsers + "failed_logins 1 per 24h", args: loggedIn, before: func(t *testing.T, w *world) {
				runCurl(t, w, symptom{args: "-U alice:! https://example.com/"})
			}},
			{options: "max_tunnels 9 per_client 1", before: open},
		},
		"response 502": {
			{args: "https://CLOSED/"},
			{args: "https://name.invalid/"},
			{options: "upstream http://" + startScriptedParent(t, func(string) string { return "HTTP/1.1 407 no\nContent-Length: 0\n\n" })},
		},
		"response 503": {{options: "max_tunnels 1", before: open}, {options: "resolvers CLOSED"}},
		"response 504": {
			{options: "dial_timeout 200ms", args: "https://FULL/"},
			{options: "dial_timeout 200ms", args: "https://silent.invalid/"},
		},
		"response 421": {
			{before: func(_ *testing.T, w *world) {
				w.load(strings.Replace(w.site(""), "http://:", "http://proxy.example.com:", 1))
			}},
			{before: func(_ *testing.T, w *world) {
				w.load(strings.Replace(w.site(""), "async_proxy {", "@office remote_ip 192.0.2.0/24\nasync_proxy @office {", 1))
			}},
			{tls: true, clientAuth: true, proxy: "https://localhost:PORT", args: "--proxy-insecure https://example.com/"},
		},
		"response 400":         {{tls: true}},
		"wrong version number": {{proxy: "https://PROXY"}, {args: "https://ORIGIN/"}},
		"unable to get local issuer certificate": {
			{tls: true, proxy: "https://localhost:PORT"},
			{args: "https://SECURE/"},
		},
		"No authentication method was acceptable": {{proxy: "socks5h://PROXY"}},
		"Couldn't connect to server":              {{without: true}},
	}
}

// symptomPlaces replaces the names of addresses in options and arguments.
var symptomPlaces *strings.Replacer

// runCurl runs curl as a symptom says, and returns what it prints.
func runCurl(t *testing.T, w *world, s symptom) string {
	t.Helper()
	proxy, args := s.proxy, s.args
	if proxy == "" {
		proxy = "http://PROXY"
	}
	if args == "" {
		args = "https://example.com/"
	}
	_, port, _ := strings.Cut(w.proxy, ":")
	args = strings.NewReplacer("PROXY", w.proxy, "PORT", port, "ORIGIN", w.origin.Listener.Addr().String()).Replace("-x " + proxy + " " + args)
	command := exec.Command("curl", append([]string{"-sS", "-o", os.DevNull, "--max-time", "20"}, strings.Fields(symptomPlaces.Replace(args))...)...)
	command.Env = append(os.Environ(), "no_proxy=")
	out, _ := command.CombinedOutput()
	return string(out)
}

// TestSymptoms brings about each cause on docs/troubleshooting.md that a client sees. curl must
// print the page's message, and the log must have the page's line.
func TestSymptoms(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("there is no curl; apt-get install curl")
	}
	_, page, _ := strings.Cut(documents(t)["docs/troubleshooting.md"], "\n## Messages of clients\n")
	page, _, _ = strings.Cut(page, "\n## ")
	rows := symptoms(t)
	refusalResolver(t)
	symptomPlaces = strings.NewReplacer("CLOSED", freeAddress(t), "FULL", deafTarget(t, "127.0.0.1", 0), "SECURE", unknownIssuer(t))
	for section := range strings.SplitSeq(page, "\n### ") {
		heading, text, _ := strings.Cut(section, "\n")
		message := regexp.MustCompile("(?ms)^```text\n(curl: .*?)\n```").FindStringSubmatch(text)
		if message == nil {
			if strings.Contains(text, "| cause |") {
				t.Errorf("%s: no message", heading)
			}
			continue
		}
		name := strings.TrimPrefix(strings.Trim(heading, "`"), "CONNECT tunnel failed, ")
		causes := regexp.MustCompile(`(?m)^\| ([A-Z][^|]*) \| ([^|]*) \| [^|]* \|$`).FindAllStringSubmatch(text, -1)
		if len(causes) == 0 || len(causes) != len(rows[name]) {
			t.Errorf("%s: the page has %d causes, and the test has %d", name, len(causes), len(rows[name]))
			continue
		}
		for i, s := range rows[name] {
			t.Run(fmt.Sprint(name, " ", i+1), func(t *testing.T) { checkSymptom(t, s, message[1], causes[i][2]) })
		}
		delete(rows, name)
	}
	for name := range rows {
		t.Errorf("the page does not have %s", name)
	}
}

// checkSymptom checks what curl prints and what the log has. line is the page's: a message in
// backquotes, and perhaps a field and its value.
func checkSymptom(t *testing.T, s symptom, message, line string) {
	w := newWorld(t, symptomPlaces.Replace(s.options+"\nzone symptom"+strings.ReplaceAll(t.Name(), "/", "-")), nil)
	if s.tls {
		clientAuth := ""
		if s.clientAuth {
			clientAuth = "client_auth {\nmode request\n}\n"
		}
		w.load(strings.Replace(strings.Replace(w.site(""), "http://", "https://", 1), "{\n", "{\ntls internal {\non_demand\n"+clientAuth+"}\n", 1))
	}
	if s.before != nil {
		s.before(t, w)
	}
	if s.without {
		w.proxy = freeAddress(t)
	}
	out, _, _ := strings.Cut(runCurl(t, w, s), "\n")
	same := func(text string) string {
		return regexp.MustCompile(`port \d+ after \d+ ms|OpenSSL/[\d.]+`).ReplaceAllString(text, "N")
	}
	if same(out) != same(message) {
		t.Errorf("curl prints %q, and the page has %q", out, message)
	}
	words := regexp.MustCompile("`([^`]*)`").FindAllStringSubmatch(line, -1)
	if len(words) == 0 {
		return
	}
	eventually(t, line, func() bool {
		return slices.ContainsFunc(w.logLines(""), func(logged map[string]any) bool {
			text, _ := logged["msg"].(string)
			return strings.HasPrefix(text, words[0][1]) && (len(words) < 3 || logged[words[1][1]] == words[2][1])
		})
	})
}

// unknownIssuer starts a TLS server whose certificate has been issued by an unknown
// authority, and returns its address.
func unknownIssuer(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "origin"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	issuer := &x509.Certificate{Subject: pkix.Name{CommonName: "issuer"}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, issuer, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	return listen(t, func(conn *net.TCPConn) { _ = tls.Server(conn, config).Handshake() })
}
