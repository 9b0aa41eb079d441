// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"io/fs"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

//go:embed status
var statusFS embed.FS

// statusFile is a file of the page, ready to be served.
type statusFile struct {
	contentType string
	etag        string
	content     []byte
}

// statusFiles returns the files of the page by name; "" is the page itself.
var statusFiles = sync.OnceValue(func() map[string]*statusFile {
	files := make(map[string]*statusFile)
	for _, name := range statusNames() {
		content, _ := statusFS.ReadFile(path.Join("status", name)) // cannot fail: statusNames listed it
		if name == "index.html" {
			// Each version has its own URLs, so that browsers may cache the files
			// indefinitely.
			content = bytes.ReplaceAll(content, []byte("VERSION"), []byte(statusVersion()))
			files[""] = newStatusFile(name, content)
			continue
		}
		files[name] = newStatusFile(name, content)
	}
	return files
})

func newStatusFile(name string, content []byte) *statusFile {
	sum := sha256.Sum256(content)
	return &statusFile{statusTypes[path.Ext(name)], `"` + hex.EncodeToString(sum[:8]) + `"`, content}
}

// statusTypes maps file extensions to media types.
var statusTypes = map[string]string{
	".html": "text/html; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".svg":  "image/svg+xml",
}

// statusNames returns the sorted names of the files to serve. The directory also holds
// files that are not served, such as licenses.
func statusNames() []string {
	names, _ := fs.Glob(statusFS, "status/*")
	var list []string
	for _, name := range names {
		name = path.Base(name)
		if _, ok := statusTypes[path.Ext(name)]; ok {
			list = append(list, name)
		}
	}
	slices.Sort(list)
	return list
}

// statusVersion returns a hash over all files. A page reloads itself when the server reports
// another version.
var statusVersion = sync.OnceValue(func() string {
	hash := sha256.New()
	for _, name := range statusNames() {
		content, _ := statusFS.ReadFile(path.Join("status", name))
		hash.Write(content)
	}
	return hex.EncodeToString(hash.Sum(nil)[:8])
})

func (f *statusFile) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", f.contentType)
	w.Header().Set("Etag", f.etag)
	if !strings.HasPrefix(f.contentType, "text/html") {
		w.Header().Set("Cache-Control", "no-cache")
		if r.URL.RawQuery == "v="+statusVersion() {
			w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
		}
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.content))
}
