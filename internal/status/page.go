// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Page serves a live page at every path that ends in a slash, and its files and data next to
// it. Its fields must not change while it serves.
type Page struct {
	View        *View
	Actions     bool            // whether operators may act; not if MaskClients is set
	MaskClients bool            // whether to show only networks of clients, and no users
	Done        <-chan struct{} // closing it ends the streams

	// OriginalPath returns the path of a request as its client sent it.
	OriginalPath func(*http.Request) string

	// CameThroughProxy reports whether a proxy of this process sent a request. The page
	// refuses such requests.
	CameThroughProxy func(*http.Request) bool

	// Acted logs an action. Its parameters are in the request's form, which has been parsed.
	Acted func(r *http.Request, action string, done bool)
}

// pageHeader restricts the page: it may load only its own files and cannot be framed.
var pageHeader = map[string]string{
	"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
	"X-Content-Type-Options":       "nosniff",
	"Referrer-Policy":              "no-referrer",
	"Cross-Origin-Opener-Policy":   "same-origin",
	"Cross-Origin-Resource-Policy": "same-origin",
	"Cache-Control":                "no-store",
}

// ServeHTTP implements http.Handler. It responds to every request.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	for field, value := range pageHeader {
		w.Header().Set(field, value)
	}
	if p.CameThroughProxy(r) {
		writeError(w, http.StatusForbidden, "The status page is not available through the proxy.")
		return
	}
	name := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		p.get(w, r, name)
	case http.MethodPost:
		p.act(w, r, name)
	default:
		w.Header().Set("Allow", "GET, HEAD, POST")
		writeError(w, http.StatusMethodNotAllowed, "Expected GET, HEAD or POST.")
	}
}

func (p *Page) get(w http.ResponseWriter, r *http.Request, name string) {
	switch name {
	case "events":
		p.stream(w, r)
	case "snapshot.json":
		snap := p.View.Snapshot(time.Now())
		p.data(w, r, &snap, nil)
	case "clients.json":
		list, err := p.View.Clients(r.URL.Query(), time.Now())
		p.data(w, r, list, err)
	case "tunnels.json":
		list, err := p.View.Tunnels(r.URL.Query(), time.Now())
		p.data(w, r, list, err)
	case "refusals.json":
		list, err := p.View.Refusals(r.URL.Query())
		p.data(w, r, list, err)
	case "targets.json":
		list, err := p.View.Targets(r.URL.Query())
		p.data(w, r, list, err)
	default:
		p.file(w, r, name)
	}
}

// data responds with data as JSON. Searching is not allowed when clients are masked, because
// it would reveal their addresses.
func (p *Page) data(w http.ResponseWriter, r *http.Request, data interface{ mask() }, err error) {
	switch {
	case err != nil:
		writeError(w, http.StatusBadRequest, err.Error())
	case p.MaskClients && (r.URL.Query().Get("q") != "" || r.URL.Query().Get("client") != ""):
		writeError(w, http.StatusForbidden, "Searching by q or client is not allowed while mask_clients is on.")
	default:
		if p.MaskClients {
			data.mask()
		}
		writeJSON(w, http.StatusOK, data)
	}
}

// file serves the page and its files. Their links are relative, so the path of the page
// must end in a slash; other paths are redirected.
func (p *Page) file(w http.ResponseWriter, r *http.Request, name string) {
	if file, ok := files()[name]; ok && name != "" {
		file.serve(w, r)
		return
	}
	path := p.OriginalPath(r)
	last := path[strings.LastIndexByte(path, '/')+1:]
	switch {
	case strings.Contains(name, "."):
		writeError(w, http.StatusNotFound, "The status page has no such file.")
	case last != "":
		w.Header().Set("Location", (&url.URL{Path: last + "/"}).String())
		w.WriteHeader(http.StatusPermanentRedirect)
	default:
		files()[""].serve(w, r)
	}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // fails only if the client has disconnected
}

func writeError(w http.ResponseWriter, status int, text string) {
	writeJSON(w, status, map[string]string{"error": text})
}
