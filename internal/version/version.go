// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package version says which build of async_proxy runs. It offers Read, which takes the answer
// from what the Go command and the linker have stored in the binary. It never runs anything.
package version

import (
	"runtime/debug"
	"strings"
)

// Module is the path of async_proxy's module.
const Module = "github.com/asyncproxy/caddy-async-proxy"

// release and commit describe the source of a release. The linker sets them: the Go command knows
// both only if it builds in a clone.
var release, commit string

// Build describes a build of async_proxy.
type Build struct {
	Version string // "(devel)" if it is unknown
	Commit  string // of the source; empty if it is unknown, such as in a build as a module of another program
	Go      string // the version of Go
}

// Read returns the build of the running program.
func Read() Build {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = new(debug.BuildInfo)
	}
	return read(info, release, commit)
}

func read(info *debug.BuildInfo, release, commit string) Build {
	b := Build{Version: "(devel)", Commit: commit, Go: info.GoVersion}
	for _, m := range append(info.Deps, &info.Main) {
		if m.Path == Module && m.Version != "" {
			b.Version = m.Version
		}
	}
	if release != "" {
		b.Version = release
	}
	// The settings describe the repository of the main module.
	if info.Main.Path == Module || strings.HasPrefix(info.Main.Path, Module+"/") {
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" && commit == "" {
				b.Commit = setting.Value
			}
		}
	}
	return b
}

// String returns the version with what is known besides, such as v1.2.3 (1f2e3d4c5b6a, go1.26.8).
func (b Build) String() string {
	return b.Version + " (" + strings.TrimPrefix(b.ShortCommit()+", ", ", ") + b.Go + ")"
}

// ShortCommit returns the first twelve digits of the commit, as many as Go's versions have.
func (b Build) ShortCommit() string { return b.Commit[:min(12, len(b.Commit))] }
