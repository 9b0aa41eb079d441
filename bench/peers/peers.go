// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package peers holds the configurations of the proxies that are compared. They are
// templates of package text/template, with the fields of Values.
package peers

import (
	"bytes"
	"embed"
	"text/template"
)

//go:embed *.Caddyfile *.conf *.cfg *.config *.yaml
var files embed.FS

// Values are what a configuration depends on.
type Values struct {
	Port     int    // to listen on, at 127.0.0.1
	Origin   string // the address and port of the origin, for a peer that has one only
	Work     string // an empty directory for what the peer writes
	Log      bool   // whether requests are logged
	Buffered bool   // whether async_proxy buffers the lines
	Root     bool   // whether the benchmark runs as root
}

// Expand returns the configuration with the given file name.
func Expand(name string, values Values) ([]byte, error) {
	parsed, err := template.ParseFS(files, name)
	if err != nil {
		return nil, err
	}
	var text bytes.Buffer
	err = parsed.Execute(&text, values)
	return text.Bytes(), err
}
