// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package clients

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// newOrigins returns the servers that the programs of the page fetch from, by name: package
// registries with one package each, a Git server, and a page for all other names. The page says
// whether the request came through the proxy.
func newOrigins(dir string) (http.Handler, error) {
	repositories, err := makeRepository(dir)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, wayOf(r)) })
	mux.HandleFunc("/is-number", func(w http.ResponseWriter, r *http.Request) { // a registry for npm, too
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"name":"is-number","dist-tags":{"latest":"1.0.0"},"versions":{"1.0.0":{"name":"is-number","version":"1.0.0","description":%q}}}`, wayOf(r))
	})
	mux.Handle("git.example.com/", &cgi.Handler{
		Path: "/usr/bin/git", Args: []string{"http-backend"},
		Env: []string{"GIT_PROJECT_ROOT=" + repositories, "GIT_HTTP_EXPORT_ALL=1"},
	})
	serveDebian(mux)
	servePython(mux)
	serveNPM(mux)
	serveGo(mux)
	return mux, nil
}

// wayOf says how a request came. Nothing can be told of those through a tunnel.
func wayOf(r *http.Request) string {
	switch {
	case r.TLS != nil:
		return "over TLS"
	case r.Header.Get("Via") != "":
		return "through the proxy"
	default:
		return "directly"
	}
}

// file serves content at a pattern.
func file(mux *http.ServeMux, pattern, contentType string, content []byte) {
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = w.Write(content)
	})
}

// makeRepository makes the repository project.git with one commit.
func makeRepository(dir string) (repositories string, err error) {
	repositories = filepath.Join(dir, "repositories")
	script := `git init -q --bare project.git
blob=$(echo hello | git -C project.git hash-object -w --stdin)
tree=$(printf "100644 blob $blob\thello.txt\n" | git -C project.git mktree)
commit=$(git -C project.git -c user.name=x -c user.email=x@example.com commit-tree -m first $tree)
git -C project.git update-ref "$(git -C project.git symbolic-ref HEAD)" $commit
git -C project.git update-server-info`
	if err := os.Mkdir(repositories, 0o755); err != nil {
		return "", err
	}
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = repositories
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("making a repository: %v\n%s", err, out)
	}
	return repositories, nil
}

// serveDebian serves a distribution without packages.
func serveDebian(mux *http.ServeMux) {
	file(mux, "debian.example.com/debian/dists/stable/main/binary-all/Packages", "text/plain", nil)
	release := fmt.Sprintf("Suite: stable\nComponents: main\nArchitectures: all\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n %x 0 main/binary-all/Packages\n", sha256.Sum256(nil))
	file(mux, "debian.example.com/debian/dists/stable/Release", "text/plain", []byte(release))
	mux.HandleFunc("debian.example.com/", http.NotFound)
}

// zipped returns a ZIP archive of files.
func zipped(files ...[2]string) []byte {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, f := range files {
		to, err := w.Create(f[0])
		if err != nil {
			panic(err) // a buffer takes everything
		}
		_, _ = to.Write([]byte(f[1]))
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// servePython serves the package index with the package idna.
func servePython(mux *http.ServeMux) {
	const name = "idna-3.0-py3-none-any.whl"
	file(mux, "pypi.org/simple/idna/", "text/html", []byte(`<a href="/packages/`+name+`">`+name+`</a>`))
	file(mux, "pypi.org/packages/"+name, "application/zip", zipped(
		[2]string{"idna/__init__.py", ""},
		[2]string{"idna-3.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: idna\nVersion: 3.0\n"},
		[2]string{"idna-3.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"},
		[2]string{"idna-3.0.dist-info/RECORD", ""},
	))
}

// serveNPM serves the registry with the package is-number.
func serveNPM(mux *http.ServeMux) {
	var b bytes.Buffer
	compressed := gzip.NewWriter(&b)
	archive := tar.NewWriter(compressed)
	const manifest = `{"name":"is-number","version":"7.0.0"}`
	err := archive.WriteHeader(&tar.Header{Name: "package/package.json", Mode: 0o644, Size: int64(len(manifest))})
	if err == nil {
		_, _ = archive.Write([]byte(manifest))
		if err = archive.Close(); err == nil {
			err = compressed.Close()
		}
	}
	if err != nil {
		panic(err) // a buffer takes everything
	}
	sum, short := sha512.Sum512(b.Bytes()), sha1.Sum(b.Bytes())
	document := fmt.Sprintf(`{"name":"is-number","dist-tags":{"latest":"7.0.0"},"versions":{"7.0.0":{"name":"is-number","version":"7.0.0",
		"dist":{"tarball":"https://npm.example.com/is-number/-/is-number-7.0.0.tgz","integrity":"sha512-%s","shasum":"%x"}}}}`,
		base64.StdEncoding.EncodeToString(sum[:]), short)
	file(mux, "npm.example.com/is-number", "application/json", []byte(document))
	file(mux, "npm.example.com/is-number/-/is-number-7.0.0.tgz", "application/octet-stream", b.Bytes())
	file(mux, "npm.example.com/-/ping", "application/json", []byte("{}"))
}

// serveGo serves the Go module proxy with the module example.com/hello.
func serveGo(mux *http.ServeMux) {
	const base, module = "goproxy.example.com/example.com/hello/@v/", "module example.com/hello\n"
	file(mux, base+"list", "text/plain", []byte("v1.0.0\n"))
	file(mux, base+"v1.0.0.info", "application/json", []byte(`{"Version":"v1.0.0","Time":"2026-01-01T00:00:00Z"}`))
	file(mux, base+"v1.0.0.mod", "text/plain", []byte(module))
	file(mux, base+"v1.0.0.zip", "application/zip", zipped(
		[2]string{"example.com/hello@v1.0.0/go.mod", module},
		[2]string{"example.com/hello@v1.0.0/hello.go", "package hello\n"},
	))
}

// replaceDir puts the directory of the run into a text.
func replaceDir(text, dir string) string { return strings.ReplaceAll(text, "DIR", dir) }
