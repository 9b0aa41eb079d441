// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// TestClientsPage checks the variables that docs/clients.md gives to containers.
func TestClientsPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/clients.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?ms)^```yaml kubernetes\n(.*?)^```").FindSubmatch(page)
	if block == nil {
		t.Fatal("docs/clients.md has no block for Kubernetes")
	}
	var container corev1.Container
	if err := yaml.UnmarshalStrict(block[1], &container); err != nil {
		t.Fatal(err)
	}
	// $(NAME) stands for an earlier variable; the kubelet leaves others as they are.
	env := make(map[string]string)
	reference := regexp.MustCompile(`\$\((\w+)\)`)
	for _, v := range container.Env {
		env[v.Name] = reference.ReplaceAllStringFunc(v.Value, func(text string) string {
			if value, known := env[reference.FindStringSubmatch(text)[1]]; known {
				return value
			}
			return text
		})
		if v.ValueFrom != nil && v.ValueFrom.SecretKeyRef != nil && v.ValueFrom.SecretKeyRef.Name != "" && v.ValueFrom.SecretKeyRef.Key == "password" {
			env[v.Name] = "s3cr%40t%2F2"
		}
	}
	proxy, err := url.Parse(env["https_proxy"])
	if err != nil || proxy.String() != env["HTTPS_PROXY"] || proxy.Host != "proxy.example.com:8080" {
		t.Fatalf("https_proxy is %q, HTTPS_PROXY %q: %v", env["https_proxy"], env["HTTPS_PROXY"], err)
	}
	if password, _ := proxy.User.Password(); proxy.User.Username() != "alice" || password != "s3cr@t/2" {
		t.Errorf("the user is %q, the password %q", proxy.User.Username(), password)
	}
	if env["no_proxy"] == "" || env["no_proxy"] != env["NO_PROXY"] || strings.Contains(env["no_proxy"], " ") {
		t.Errorf("no_proxy is %q, NO_PROXY %q", env["no_proxy"], env["NO_PROXY"])
	}
}
