// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"go/build"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// arrows lists the packages below internal/, each with the packages below internal/ that it
// may import. No package may import one that is listed after it.
var arrows = []struct{ name, imports string }{
	{"dnstest", ""},
	{"monotime", ""},
	{"client", ""},
	{"hostport", ""},
	{"tcpconn", ""},
	{"bucket", "client"},
	{"h1", ""},
	{"policy", "hostport"},
	{"tunnel", "monotime client hostport tcpconn"},
	{"egress", "monotime client hostport tcpconn h1 policy"},
}

// TestArrows checks the imports of the packages below internal/. They know neither Caddy nor
// zap. Prometheus is known to the metrics package alone, and http.ResponseWriter to the
// packages that serve clients and the status page.
func TestArrows(t *testing.T) {
	const module = "github.com/asyncproxy/caddy-async-proxy/internal/"
	var known []string
	for _, p := range arrows {
		pkg, err := build.ImportDir(filepath.Join("internal", p.name), 0)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(pkg.Doc, "Package "+p.name+" ") {
			t.Errorf("internal/%s has no package comment", p.name)
		}
		for _, path := range pkg.Imports {
			own, isOwn := strings.CutPrefix(path, module)
			switch {
			case isOwn && (!slices.Contains(strings.Fields(p.imports), own) || !slices.Contains(known, own)):
				t.Errorf("internal/%s must not import internal/%s", p.name, own)
			case strings.HasPrefix(path, "github.com/caddyserver/"), strings.HasPrefix(path, "go.uber.org/zap"):
				t.Errorf("internal/%s imports %s, which only the root may", p.name, path)
			case strings.HasPrefix(path, "github.com/prometheus/") && p.name != "metrics":
				t.Errorf("internal/%s imports %s, which only internal/metrics may", p.name, path)
			}
		}
		for _, file := range pkg.GoFiles {
			source, err := os.ReadFile(filepath.Join(pkg.Dir, file))
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(source, []byte("http.ResponseWriter")) && p.name != "downstream" && p.name != "status" {
				t.Errorf("internal/%s/%s names http.ResponseWriter", p.name, file)
			}
		}
		known = append(known, p.name)
	}
	entries, err := os.ReadDir("internal")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if !slices.Contains(known, entry.Name()) {
			t.Errorf("internal/%s is not in the list of packages", entry.Name())
		}
	}
}
