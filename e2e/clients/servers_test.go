// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package clients

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// caddyfile configures the proxies of the page: one on port 8080, the same with logins on port
// 8081, and with logins over TLS on port 8443. Port 8444 accepts HTTP/2, too.
const caddyfile = `{
	admin off
	auto_https off
	persist_config off
	default_bind 127.0.0.1
	log {
		output file DIR/caddy.log
		format json
	}
}
(options) {
	burst 1000000
	refill 1000000
	resolvers 127.0.0.53
	allow 127.0.0.80 192.0.2.0/24
}
(logins) {
	import options
	basic_auth {
		alice $2b$04$jhO1PbJ1ztv3Xqv0O6KwVuzH0e72NEpzOd2rIKYQ1s8lnRsLK./lS
	}
}
http://:8080 {
	async_proxy {
		import options
		serve_pac
	}
}
http://:8081 {
	async_proxy {
		import logins
	}
}
(tls) {
	async_proxy {
		hosts proxy.example.com
		import logins
	}
}
https://:8443 {
	tls DIR/proxy.pem DIR/proxy.key {
		alpn http/1.1
	}
	import tls
}
https://:8444 {
	tls DIR/proxy.pem DIR/proxy.key
	import tls
}
`

// startServers starts the origins, the DNS server of the proxy, and the proxy.
func startServers(dir string) (stop func(), err error) {
	if err := serveDNS("127.0.0.53:53"); err != nil {
		return nil, err
	}
	if err := serveOrigins(dir); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(config, []byte(replaceDir(caddyfile, dir)), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(filepath.Join(dir, "caddy"), "run", "--config", config)
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	output, err := os.Create(filepath.Join(dir, "caddy.out"))
	if err != nil {
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	for _, address := range []string{"127.0.0.1:8080", "127.0.0.1:8081", "127.0.0.1:8443", "127.0.0.1:8444"} {
		for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
			conn, err := net.Dial("tcp4", address)
			if err == nil {
				conn.Close()
				break
			}
			if time.Now().After(end) {
				stop()
				said, _ := os.ReadFile(output.Name())
				return nil, fmt.Errorf("the proxy does not listen on %s: %s", address, said)
			}
		}
	}
	return stop, nil
}

// serveDNS answers every question for an IPv4 address with that of the origin.
func serveDNS(address string) error {
	conn, err := net.ListenPacket("udp4", address)
	if err != nil {
		return err
	}
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			if answer := answerDNS(b[:n]); answer != nil {
				_, _ = conn.WriteTo(answer, from)
			}
		}
	}()
	return nil
}

// answerDNS returns the answer to a query with one question, or nil for other packets (RFC 1035,
// section 4.1).
func answerDNS(query []byte) []byte {
	const header, typeA = 12, 1
	end := header
	for end < len(query) && query[end] != 0 {
		end += int(query[end]) + 1
	}
	end += 1 + 4 // the root label, the type and the class
	if end > len(query) {
		return nil
	}
	answer := append([]byte(nil), query[:end]...)
	binary.BigEndian.PutUint16(answer[2:], 0x8180)         // a response, recursion available
	copy(answer[4:header], []byte{0, 1, 0, 0, 0, 0, 0, 0}) // one question
	if binary.BigEndian.Uint16(answer[end-4:]) != typeA {
		return answer
	}
	answer[7] = 1 // one answer
	address := netip.MustParseAddr("127.0.0.80").As4()
	return append(append(answer, 0xc0, header, 0, typeA, 0, 1, 0, 0, 0, 1, 0, 4), address[:]...)
}

// serveOrigins serves HTTP and HTTPS for all names, at all addresses of the machine.
func serveOrigins(dir string) error {
	handler, err := newOrigins(dir)
	if err != nil {
		return err
	}
	authority, err := tls.LoadX509KeyPair(filepath.Join(dir, "origins.pem"), filepath.Join(dir, "origins.key"))
	if err != nil {
		return err
	}
	config := &tls.Config{GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		return issue(hello.ServerName, authority)
	}}
	for port, over := range map[string]*tls.Config{"80": nil, "443": config} {
		ln, err := net.Listen("tcp4", ":"+port)
		if err != nil {
			return err
		}
		if over != nil {
			ln = tls.NewListener(ln, over)
		}
		server := &http.Server{Handler: handler, ErrorLog: log.New(io.Discard, "", 0)} // browsers end many handshakes
		go func() { _ = server.Serve(ln) }()
	}
	return nil
}

// makeAuthorities writes the certification authorities of the origins and of the proxy, and the
// proxy's certificate. No program trusts the proxy's authority unless it is told so.
func makeAuthorities(dir string) error {
	for _, name := range []string{"origins", "proxy-ca"} {
		authority, err := newCertificate(&x509.Certificate{
			Subject: pkix.Name{CommonName: "Tests of " + name}, IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		}, nil)
		if err == nil {
			err = writeCertificate(filepath.Join(dir, name), authority)
		}
		if err != nil {
			return err
		}
		if name == "proxy-ca" {
			if authority, err = issue("proxy.example.com", *authority); err != nil {
				return err
			}
			return writeCertificate(filepath.Join(dir, "proxy"), authority)
		}
	}
	return nil
}

// issue returns a certificate for a server.
func issue(name string, authority tls.Certificate) (*tls.Certificate, error) {
	return newCertificate(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, &authority)
}

// newCertificate returns a certificate with a key of its own that the authority has signed, or
// the key itself if there is none.
func newCertificate(template *x509.Certificate, authority *tls.Certificate) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	parent, signer := template, any(key)
	if authority != nil {
		if parent, err = x509.ParseCertificate(authority.Certificate[0]); err != nil {
			return nil, err
		}
		signer = authority.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// writeCertificate writes a certificate and its key to files that end in .pem and .key.
func writeCertificate(file string, certificate *tls.Certificate) error {
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		return err
	}
	err = os.WriteFile(file+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}), 0o644)
	if err != nil {
		return err
	}
	return os.WriteFile(file+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600)
}
