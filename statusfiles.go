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

// statusFile is a part of the page, made ready to be served.
type statusFile struct {
	contentType string
	etag        string
	content     []byte
}

// statusFiles are the parts of the page by name; "" is the page itself.
var statusFiles = sync.OnceValue(func() map[string]*statusFile {
	files := make(map[string]*statusFile)
	for _, name := range statusNames() {
		content, _ := statusFS.ReadFile(path.Join("status", name)) // is there, as it was listed
		if name == "index.html" {
			// A part of another version has another address, so that each may
			// be kept for ever.
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

// statusTypes are the media types of the parts.
var statusTypes = map[string]string{
	".html": "text/html; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".svg":  "image/svg+xml",
}

// statusNames are those of the parts that are served, in order: not those that
// are there for whoever reads the source.
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

// statusVersion is that of all parts together. A page that was loaded from
// another version of this program loads itself again.
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
