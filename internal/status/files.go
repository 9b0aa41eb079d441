// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

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

//go:embed page
var pageFS embed.FS

// file is a file of the page, ready to be served.
type file struct {
	contentType string
	etag        string
	content     []byte
}

// files returns the files of the page by name; "" is the page itself.
var files = sync.OnceValue(func() map[string]*file {
	files := make(map[string]*file)
	for _, name := range fileNames() {
		content, _ := pageFS.ReadFile(path.Join("page", name)) // cannot fail: fileNames listed it
		if name == "index.html" {
			// Each version has its own URLs, so that browsers may cache the files
			// indefinitely.
			content = bytes.ReplaceAll(content, []byte("VERSION"), []byte(version()))
			files[""] = newFile(name, content)
			continue
		}
		files[name] = newFile(name, content)
	}
	return files
})

func newFile(name string, content []byte) *file {
	sum := sha256.Sum256(content)
	return &file{mediaTypes[path.Ext(name)], `"` + hex.EncodeToString(sum[:8]) + `"`, content}
}

// mediaTypes maps file extensions to media types.
var mediaTypes = map[string]string{
	".html": "text/html; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".svg":  "image/svg+xml",
}

// fileNames returns the sorted names of the files to serve. The directory also holds
// files that are not served, such as licenses.
func fileNames() []string {
	names, _ := fs.Glob(pageFS, "page/*")
	var list []string
	for _, name := range names {
		name = path.Base(name)
		if _, ok := mediaTypes[path.Ext(name)]; ok {
			list = append(list, name)
		}
	}
	slices.Sort(list)
	return list
}

// version returns a hash over all files. A page reloads itself when the server reports
// another version.
var version = sync.OnceValue(func() string {
	hash := sha256.New()
	for _, name := range fileNames() {
		content, _ := pageFS.ReadFile(path.Join("page", name))
		hash.Write(content)
	}
	return hex.EncodeToString(hash.Sum(nil)[:8])
})

func (f *file) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", f.contentType)
	w.Header().Set("Etag", f.etag)
	if !strings.HasPrefix(f.contentType, "text/html") {
		w.Header().Set("Cache-Control", "no-cache")
		if r.URL.RawQuery == "v="+version() {
			w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
		}
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.content))
}
