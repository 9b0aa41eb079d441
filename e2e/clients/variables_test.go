// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package clients

import (
	"os"
	"strings"
	"sync"
	"testing"
)

// readers are the programs that read the variables, as the page names them. Each command fetches
// $URL and prints its page.
var readers = []struct{ name, command string }{
	{"curl, git", "curl -sS $URL"},
	{"wget", "wget -qO- $URL"},
	{"apt", "/usr/lib/apt/apt-helper -o Acquire::Retries=0 -o APT::Sandbox::User=root download-file $URL got && cat got"},
	{"Go", "./get $URL"},
	{"Python `urllib`", "/usr/bin/python3 get.py urllib"},
	{"`requests`, pip", "/usr/bin/python3 get.py requests"},
	{"httpx", "/usr/bin/python3 get.py httpx"},
	{"Node", "NODE_USE_ENV_PROXY=1 node get.mjs"},
	{"npm", "npm view is-number description --fetch-retries=0 --registry=$URL"},
}

// readersMachine returns a machine with the programs that read the variables.
func readersMachine(t *testing.T) *machine {
	m := newMachine(t, "curl", "wget", "/usr/lib/apt/apt-helper", "go", "/usr/bin/python3", "node", "npm")
	m.needNode24()
	m.needPython("requests", "httpx")
	m.write("get.py", pythonGet)
	m.write("get.mjs", nodeGet)
	m.buildGo()
	return m
}

// runReaders runs a program of the table in each of the environments, several at a time, and
// returns the outputs by program and environment.
func (m *machine) runReaders(environments []string) [][]string {
	outputs := make([][]string, len(readers))
	var wait sync.WaitGroup
	for i, program := range readers {
		outputs[i] = make([]string, len(environments))
		wait.Go(func() {
			for j, environment := range environments {
				outputs[i][j], _ = m.try(environment + "\n" + program.command + " 2>&1")
			}
		})
	}
	wait.Wait()
	return outputs
}

// compareTable checks that the page has a table.
func (m *machine) compareTable(rows []string) {
	m.t.Helper()
	text, err := os.ReadFile("../../docs/clients.md")
	if err != nil {
		m.t.Fatal(err)
	}
	if want := strings.Join(rows, "\n") + "\n"; !strings.Contains(string(text), want) {
		m.t.Errorf("docs/clients.md does not have this table:\n%s", want)
	}
}

const elsewhere = "http://proxy.example.com:8080"

// TestVariables checks the table of which variables each program reads. Only the proxy can resolve
// the name, so whatever prints the page has used it.
func TestVariables(t *testing.T) {
	m := readersMachine(t)
	columns := []struct{ name, environment string }{
		{"`http_proxy`", "export URL=http://example.com/ http_proxy=" + elsewhere},
		{"`HTTP_PROXY`", "export URL=http://example.com/ HTTP_PROXY=" + elsewhere},
		{"`HTTP_PROXY` in CGI", "export URL=http://example.com/ REQUEST_METHOD=GET HTTP_PROXY=" + elsewhere},
		{"`https_proxy`", "export URL=https://example.com/ https_proxy=" + elsewhere},
		{"`HTTPS_PROXY`", "export URL=https://example.com/ HTTPS_PROXY=" + elsewhere},
		{"`ALL_PROXY`", "export URL=https://example.com/ ALL_PROXY=" + elsewhere},
	}
	head, rule := "| program |", "|---|"
	var environments []string
	for _, column := range columns {
		head, rule = head+" "+column.name+" |", rule+"---|"
		environments = append(environments, column.environment)
	}
	rows := []string{head, rule}
	for i, outputs := range m.runReaders(environments) {
		row := "| " + readers[i].name + " |"
		for _, out := range outputs {
			cell := " no |"
			if strings.Contains(out, "through the proxy") || strings.Contains(out, "over TLS") {
				cell = " yes |"
			}
			row += cell
		}
		rows = append(rows, row)
	}
	m.compareTable(rows)
}

// noProxyCases are the rows, in the words of the table.
var noProxyCases = []struct{ entry, destination, url string }{
	{"`intern.example.com`", "that name", "http://intern.example.com/"},
	{"`intern.example.com`", "names below it", "http://www.intern.example.com/"},
	{"`.intern.example.com`", "that name", "http://intern.example.com/"},
	{"`.intern.example.com`", "names below it", "http://www.intern.example.com/"},
	{"`*.intern.example.com`", "names below it", "http://www.intern.example.com/"},
	{"`intern.example.com:80`", "that port", "http://intern.example.com/"},
	{"`192.0.2.7`", "that address", "http://192.0.2.7/"},
	{"`192.0.2.0/24`", "that network", "http://192.0.2.7/"},
	{"`*`", "everything", "http://192.0.2.7/"},
	{"`x, intern.example.com`", "the second of two", "http://intern.example.com/"},
	{"(empty)", "`localhost`", "http://localhost/"},
}

// TestNoProxy checks the table of what each program understands in NO_PROXY.
func TestNoProxy(t *testing.T) {
	m := readersMachine(t)
	head, rule := "| entry | covers |", "|---|---|"
	for _, program := range readers {
		head, rule = head+" "+program.name+" |", rule+"---|"
	}
	var environments []string
	for _, c := range noProxyCases {
		entry := strings.Trim(strings.TrimPrefix(c.entry, "(empty)"), "`")
		environments = append(environments, "export URL="+c.url+" no_proxy='"+entry+"' NO_PROXY='"+entry+
			"' http_proxy="+elsewhere+" HTTP_PROXY="+elsewhere)
	}
	outputs := m.runReaders(environments)
	rows := []string{head, rule}
	for j, c := range noProxyCases {
		row := "| " + c.entry + " | " + c.destination + " |"
		for i, program := range readers {
			switch out := outputs[i][j]; {
			case strings.Contains(out, "directly"):
				row += " yes |"
			case strings.Contains(out, "through the proxy"):
				row += " no |"
			default:
				t.Errorf("%s, %s: %s", program.name, c.entry, out)
			}
		}
		rows = append(rows, row)
	}
	m.compareTable(rows)
}
