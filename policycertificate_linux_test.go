// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// A client certificate makes a user, on the fast path and through Caddy's server.
func TestPolicyTLSCertificateUser(t *testing.T) {
	certificate, _ := conntest.CertificateFiles(t)
	text, err := os.ReadFile(certificate)
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "root.pem")
	if err := os.WriteFile(root, text, 0o600); err != nil {
		t.Fatal(err)
	}
	f := form{overTLS: true, directives: "client_auth {\nmode verify_if_given\ntrust_pool file " + root + "\n}"}
	const name = "localhost" // the only one that the certificate has
	options := authUsers + namesPolicy + `user_from {http.request.tls.client.subject} {http.request.tls.client.san.dns_names.0}
		limit_by user
		policy machines {
			users ` + name + `
			anonymous
		}`
	w := newWorld(t, "", nil)
	for _, fast := range []bool{true, false} {
		loadCaddyfile(t, withServers(w.globals()+f.site(t, w.site(options)), f.servers(fast)+"strict_sni_host insecure_off"))
		for _, known := range []bool{true, false} {
			config := clientTLS("http/1.1")
			if known {
				config.Certificates = []tls.Certificate{tlsCertificate}
			}
			c := dialRaw(t, w.proxy)
			c.startTLS(config)
			for lines, want := range map[string]string{"": map[bool]string{true: "200 machines-", false: "407 "}[known], as("bob", "builder"): "200 -"} {
				c.get(w.origin.URL+"/", lines)
				res, _ := c.response(http.MethodGet)
				if got := fmt.Sprint(res.StatusCode, " ", res.Header.Get("X-Policy")); got != want {
					t.Errorf("fast %v, certificate %v, %q: %s, want %s", fast, known, lines, got, want)
				}
			}
		}
	}
	for _, line := range w.waitLog("request", 2) {
		if line["policy"] == "machines" && line["user"] != name {
			t.Errorf("line %v", line)
		}
	}
}
