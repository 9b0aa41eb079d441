// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"bytes"
	"flag"
	"go/ast"
	"go/build"
	"go/parser"
	"go/printer"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// arrows lists the packages below internal/, each with the packages below internal/ that it
// may import. No package may import one that is listed after it.
var arrows = []struct{ name, imports string }{
	{"conntest", ""},
	{"dnstest", ""},
	{"monotime", ""},
	{"printable", ""},
	{"linebuffer", ""},
	{"client", ""},
	{"hostport", ""},
	{"tcpconn", ""},
	{"bucket", "client"},
	{"selection", ""},
	{"h1", ""},
	{"metrics", ""},
	{"access", "hostport"},
	{"tunnel", "monotime client hostport tcpconn"},
	{"egress", "monotime client hostport tcpconn h1 access"},
	{"origin", "monotime client hostport tcpconn h1 access egress"},
	{"downstream", "hostport tcpconn h1"},
	{"version", ""},
	{"status", "monotime printable client bucket metrics tunnel"},
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

// TestAPI compares what the root exports with testdata/api.txt: users' code and JSON configs
// depend on it. To update the file, run `go test -run TestAPI . -update`.
func TestAPI(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var decls []string
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.FileExports(file)
		for _, decl := range file.Decls {
			var text strings.Builder
			switch decl := decl.(type) {
			case *ast.FuncDecl:
				if decl.Body = nil; !ast.IsExported(strings.TrimSuffix(declName(decl), "."+decl.Name.Name)) {
					continue // a method of an unexported type
				}
			case *ast.GenDecl:
				if decl.Tok == token.IMPORT {
					continue
				}
			}
			if err := printer.Fprint(&text, fset, decl); err != nil {
				t.Fatal(err)
			}
			decls = append(decls, text.String())
		}
	}
	slices.Sort(decls)
	got := strings.Join(decls, "\n\n") + "\n"
	const golden = "testdata/api.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the exported names or their types differ from %s:\n%s", golden, got)
	}
}

var update = flag.Bool("update", false, "write testdata/api.txt, and the options in docs/reference.md and caddyfile.go")

// declName returns the name of a function, or that of a method after its type's name.
func declName(decl *ast.FuncDecl) string {
	if decl.Recv == nil {
		return decl.Name.Name
	}
	receiver := decl.Recv.List[0].Type
	if star, ok := receiver.(*ast.StarExpr); ok {
		receiver = star.X
	}
	if id, ok := receiver.(*ast.Ident); ok {
		return id.Name + "." + decl.Name.Name
	}
	return decl.Name.Name // the type has parameters
}

// declared returns the names of the functions, methods, types, variables and constants in
// the root and below internal/. A method's name has the type before it.
func declared(t *testing.T) map[string]bool {
	names := make(map[string]bool)
	files, err := filepath.Glob("*.go")
	inner, err2 := filepath.Glob("internal/*/*.go")
	if err != nil || err2 != nil {
		t.Fatal(err, err2)
	}
	for _, path := range append(files, inner...) {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			switch decl := decl.(type) {
			case *ast.FuncDecl:
				names[declName(decl)] = true
			case *ast.GenDecl:
				for _, spec := range decl.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						names[spec.Name.Name] = true
					case *ast.ValueSpec:
						for _, id := range spec.Names {
							names[id.Name] = true
						}
					}
				}
			}
		}
	}
	return names
}

// TestLifeOfARequest checks that each name in docs/life-of-a-request.md exists.
func TestLifeOfARequest(t *testing.T) {
	text, err := os.ReadFile("docs/life-of-a-request.md")
	if err != nil {
		t.Fatal(err)
	}
	names := declared(t)
	found := regexp.MustCompile("`([A-Za-z]+(?:\\.[A-Za-z]+)?)`|\\b([A-Za-z]+\\.[A-Za-z]+)\\b").FindAllSubmatch(text, -1)
	if len(found) < 50 {
		t.Fatalf("found %d names", len(found))
	}
	for _, match := range found {
		if name := string(match[1]) + string(match[2]); !names[name] {
			t.Errorf("there is no %s", name)
		}
	}
}
