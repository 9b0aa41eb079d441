// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package clients

import (
	"os"
	"strings"
)

const pythonGet = `import os, sys, urllib.request
url = os.environ["URL"]
if sys.argv[1] == "urllib":
    print(urllib.request.urlopen(url).read().decode())
elif sys.argv[1] == "requests":
    import requests
    print(requests.get(url).text)
else:
    import httpx
    print(httpx.get(url).text)
`

const nodeGet = `import http from "node:http"
import https from "node:https"
const url = process.env.URL
const get = url.startsWith("https:") ? https.get : http.get
get(url, response => response.pipe(process.stdout))
`

const goGet = `package main

import (
	"io"
	"log"
	"net/http"
	"os"
)

func main() {
	for _, url := range os.Args[1:] {
		res, err := http.Get(url)
		if err != nil {
			log.Fatal(err)
		}
		_, _ = io.Copy(os.Stdout, res.Body)
	}
}
`

// buildGo builds the program get, which fetches URLs with net/http.
func (m *machine) buildGo() {
	m.t.Helper()
	m.write("go.mod", "module get\n\ngo 1.26.0\n")
	m.write("get.go", goGet)
	m.run("GOCACHE=" + os.Getenv("GOCACHE") + " go build -o get get.go")
}

// needNode24 needs a Node.js that reads the variables by itself.
func (m *machine) needNode24() {
	m.t.Helper()
	if _, err := m.try("node --help | grep -q -e --use-env-proxy"); err != nil {
		m.missing("Node.js 24 (npm install)")
	}
}

// needPython needs Debian's packages of Python modules.
func (m *machine) needPython(modules ...string) {
	m.t.Helper()
	for _, module := range modules {
		if _, err := m.try("/usr/bin/python3 -c 'import " + module + "'"); err != nil {
			m.missing("python3-" + module)
		}
	}
}

// need needs commands.
func (m *machine) need(programs ...string) {
	m.t.Helper()
	for _, program := range programs {
		if _, err := m.try("command -v " + program); err != nil {
			m.missing(program)
		}
	}
}

// needRoot skips the test of a program that acts for several users, which only root may allow.
func (m *machine) needRoot() {
	m.t.Helper()
	if data, err := os.ReadFile("/proc/self/setgroups"); err != nil || strings.TrimSpace(string(data)) != "allow" {
		m.t.Skip("only root may act for several users")
	}
}
