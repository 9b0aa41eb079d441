// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Command httpbin serves go-httpbin on loopback, over HTTP and HTTPS, as an origin for
// trying out the proxy:
//
//	go run ./examples/httpbin
//
// It creates a self-signed certificate at each start: use curl -k.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"log"
	"math/big"
	"net"
	"net/http"
	"os/signal"
	"syscall"
	"time"

	"github.com/mccutchen/go-httpbin/v2/httpbin"
)

func main() {
	plain := flag.String("http", "127.0.0.1:8000", "`address` for HTTP")
	secure := flag.String("https", "127.0.0.1:8443", "`address` for HTTPS")
	flag.Parse()
	if err := serve(*plain, *secure); err != nil {
		log.Fatal(err)
	}
}

// serve serves until the process receives a signal to stop.
func serve(plain, secure string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	certificate, err := selfSigned()
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", plain)
	if err != nil {
		return err
	}
	tlsListener, err := tls.Listen("tcp", secure, &tls.Config{Certificates: []tls.Certificate{certificate}})
	if err != nil {
		return err
	}
	fmt.Printf("httpbin on http://%s and https://%s\n", listener.Addr(), tlsListener.Addr())

	server := &http.Server{Handler: httpbin.New(), ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 2)
	for _, l := range []net.Listener{listener, tlsListener} {
		go func() { failed <- server.Serve(l) }()
	}
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	// Requests in flight have five seconds to finish.
	grace, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if server.Shutdown(grace) != nil {
		_ = server.Close()
	}
	return err
}

// selfSigned creates a self-signed certificate for loopback that is valid for a day.
func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		DNSNames:     []string{"localhost"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
