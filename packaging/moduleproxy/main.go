// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Command moduleproxy writes what a module proxy would serve of a commit of this repository, so that
// `go install` can be tried before a tag exists:
//
//	moduleproxy <repository> <module> <version> <directory>
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/mod/module"
	"golang.org/x/mod/zip"
)

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: moduleproxy <repository> <module> <version> <directory>")
		os.Exit(2)
	}
	if err := write(os.Args[1], module.Version{Path: os.Args[2], Version: os.Args[3]}, os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// write writes the files of one version. The zip has what is committed.
func write(repository string, m module.Version, proxy string) error {
	escaped, err := module.EscapePath(m.Path)
	if err != nil {
		return err
	}
	dir := filepath.Join(proxy, filepath.FromSlash(escaped), "@v")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	archive, err := os.Create(filepath.Join(dir, m.Version+".zip"))
	if err != nil {
		return err
	}
	defer archive.Close()
	if err := zip.CreateFromVCS(archive, m, repository, "HEAD", ""); err != nil {
		return err
	}
	mod, err := exec.Command("git", "-C", repository, "show", "HEAD:go.mod").Output()
	if err != nil {
		return err
	}
	for name, text := range map[string]string{
		m.Version + ".mod":  string(mod),
		m.Version + ".info": fmt.Sprintf("{\"Version\":%q}\n", m.Version),
		"list":              m.Version + "\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return archive.Close()
}
