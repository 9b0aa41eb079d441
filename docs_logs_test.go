// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// A drawnStep is a step of the drawing in docs/observability.md.
type drawnStep struct {
	name   string
	ends   map[string][]int // the status of each cause, or reason, with which it ends a request
	fields []string
}

// drawnSteps returns the steps of the drawing in docs/observability.md, from the top.
func drawnSteps(t *testing.T) (steps []drawnStep) {
	t.Helper()
	_, drawing, _ := strings.Cut(documents(t)["docs/observability.md"], "\n## The way of a request\n")
	_, drawing, _ = strings.Cut(drawing, "```text\n")
	drawing, _, _ = strings.Cut(drawing, "```")
	ending := regexp.MustCompile(`(\d{3}) ([a-z_]+(?:, [a-z_]+)*)`)
	for block := range strings.SplitSeq(drawing, "┌────────▼────────┐") {
		name := regexp.MustCompile(`│ *([a-zA-Z ]+?) *│`).FindStringSubmatch(block)
		if name == nil {
			continue
		}
		step := drawnStep{name: name[1], ends: make(map[string][]int)}
		if _, fields, ok := strings.Cut(block, "log "); ok {
			fields, _, _ = strings.Cut(fields, "\n")
			step.fields = strings.Split(fields, ", ")
		}
		for _, end := range ending.FindAllStringSubmatch(block, -1) {
			status, _ := strconv.Atoi(end[1])
			for cause := range strings.SplitSeq(end[2], ", ") {
				step.ends[cause] = append(step.ends[cause], status)
			}
		}
		steps = append(steps, step)
	}
	return steps
}

// TestDrawingNamesCauses checks that the drawing has every cause, each with its status, and only
// fields of the log line.
func TestDrawingNamesCauses(t *testing.T) {
	drawn := make(map[string][]int)
	lines := documentedLines(t)
	for _, step := range drawnSteps(t) {
		for cause, statuses := range step.ends {
			drawn[cause] = append(drawn[cause], statuses...)
		}
		for _, field := range step.fields {
			if !slices.Contains(lines["request"], field) {
				t.Errorf("%s: the log line has no field %q", step.name, field)
			}
		}
	}
	known := make(map[string][]int)
	for _, row := range causes {
		known[string(row.label)] = append(known[string(row.label)], row.status)
		known[row.errorType] = append(known[row.errorType], row.status)
		if row.label != "" && drawn[string(row.label)] == nil {
			t.Errorf("the drawing does not have %s", row.label)
		}
	}
	for cause, statuses := range drawn {
		for _, status := range statuses {
			if !slices.Contains(known[cause], status) {
				t.Errorf("the drawing has %d %s, and the proxy has %v", status, cause, known[cause])
			}
		}
	}
}

// TestDrawingHasTheOrder sends a request that every step would end, and then lets it pass one step
// after the other.
func TestDrawingHasTheOrder(t *testing.T) {
	server := nameServer(t, func(string, int) []string { return []string{"127.0.0.1"} })
	w := newWorld(t, "", nil)
	w.dial().connect(w.origin.Listener.Addr().String())
	_, port, _ := net.SplitHostPort(freeAddress(t))
	var want, got []string
	for _, step := range drawnSteps(t) {
		if step.name != "policy" && step.name != "login" && step.name != "DNS" && step.name != "relay" {
			want = append(want, step.name)
		}
	}
	remaining := []struct{ step, option, lines string }{
		{"limit", "burst 1\nrefill 0.00001", ""},
		{"client", "clients 192.0.2.0/24", ""},
		{"method", "methods GET", ""},
		{"tunnels", "max_tunnels 1", ""},
		{"rules by name", "deny name.test", ""},
		{"rules by address", "deny 127.0.0.0/8", ""},
		{"dial", "", ""}, // nothing listens there
	}
	for i := range remaining {
		options := "zone order" + strconv.Itoa(i) + "\nresolvers " + server
		for _, step := range remaining[i:] {
			options += "\n" + step.option
		}
		w.load(w.site(options))
		if i == 0 {
			policyRequest(t, w.proxy, http.MethodGet, "name.test:"+port, "") // uses up the token
		}
		w.forgetLogs()
		policyRequest(t, w.proxy, http.MethodConnect, "name.test:"+port, "")
		var line map[string]any
		eventually(t, "the log line", func() bool {
			lines := append(w.logLines("request"), w.logLines("rate limited")...)
			if len(lines) > 0 {
				line = lines[0]
			}
			return line != nil
		})
		got = append(got, stepOf(t, line))
	}
	if !slices.Equal(got, want) {
		t.Errorf("requests end at the steps %q, and the drawing has %q", got, want)
	}
}

// stepOf returns the step of the drawing that has ended a request with this log line. Rules by
// address name it.
func stepOf(t *testing.T, line map[string]any) string {
	t.Helper()
	for _, step := range drawnSteps(t) {
		cause, _ := line["cause"].(string)
		if cause == "" {
			cause, _ = line["reason"].(string)
		}
		if _, ok := step.ends[cause]; ok && (slices.Contains(step.fields, "address") || line["address"] == nil) {
			return step.name
		}
	}
	return fmt.Sprint(line)
}

// documentedLines returns the fields of each log line in docs/observability.md.
func documentedLines(t *testing.T) map[string][]string {
	t.Helper()
	_, table, _ := strings.Cut(documents(t)["docs/observability.md"], "| line | level | fields |\n")
	table, _, _ = strings.Cut(table, "\n\n")
	lines := make(map[string][]string)
	quoted := regexp.MustCompile("`([^`]*)`")
	var previous []string
	for row := range strings.Lines(table) {
		cells := strings.Split(row, " | ")
		if len(cells) != 3 {
			continue
		}
		var fields []string
		for _, field := range quoted.FindAllStringSubmatch(cells[2], -1) {
			fields = append(fields, field[1])
		}
		if strings.HasPrefix(cells[2], "the same") {
			fields = previous
		}
		slices.Sort(fields)
		previous = slices.Compact(fields)
		for _, line := range quoted.FindAllStringSubmatch(cells[0], -1) {
			lines[strings.TrimSuffix(line[1], ": ...")] = previous
		}
	}
	return lines
}

// TestLogTable compares the table of log lines in docs/observability.md with the lines that the
// proxy writes.
func TestLogTable(t *testing.T) {
	w := newWorld(t, "", nil)
	origin := w.origin.Listener.Addr().String()
	logIn := "Proxy-Authorization: " + login("alice", "wonderland") + "\n"
	certificate, key := conntest.CertificateFiles(t) // one that Caddy obtains while it starts is a data race in Caddy
	for _, site := range []string{
		w.site(authUsers + "zone logs\npolicy staff {\nusers alice\ndeny 192.0.2.0/24 ads.test\nburst 1000\nrefill 1000\n}"),
		w.site("zone limited\ndial_timeout 100ms\npolicy guests {\nclients 127.0.0.0/8\nburst 1\nrefill 0.00001\ndeny 192.0.2.0/24\nreport_only rules limits\n}"),
		w.site(authUsers + "zone users\nlimit_by user\npolicy staff {\nusers alice\nburst 1\nrefill 0.00001\n}"),
		byCaddy(w.site("zone ordinary")) + "http://" + freeAddress(t) + " {\n\tasync_proxy_status\n}\n",
		strings.Replace(strings.Replace(w.site("zone secure"), "http://:", "https://:", 1), "{", "{\n\ttls "+certificate+" "+key, 1),
	} {
		w.load(site)
		for _, request := range []struct{ method, target string }{
			{http.MethodGet, origin}, {http.MethodGet, origin}, {http.MethodGet, "192.0.2.1:80"}, {http.MethodConnect, "ads.test:443"}, {http.MethodConnect, origin},
		} {
			sendForLog(w.proxy, request.method+" "+map[bool]string{true: "http://"}[request.method == http.MethodGet]+request.target+" HTTP/1.1\r\nHost: "+request.target+"\r\n"+strings.ReplaceAll(logIn, "\n", "\r\n")+"\r\n")
		}
		for _, bytes := range []string{"SSH-2.0-client\r\n", "PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\nGET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "\x05\x01\x00", "GET / HTTP/1.1\r\nHost", "nonsense\r\n\r\n", "GET http://" + origin + "/ HTTP/3.7\r\n\r\n", "GET http://" + origin + "/ HTTP/1.1\r\nA: " + strings.Repeat("a", 300<<10) + "\r\n\r\n"} {
			sendForLog(w.proxy, bytes)
		}
	}
	loadCaddyfile(t, strings.Replace(w.globals(), "{\n", "{\n\tservers {\n\t\tprotocols h1\n\t\tlistener_wrappers {\n\t\t\tasync_proxy\n\t\t}\n\t}\n", 1)+w.site("zone h1"))
	sendForLog(w.proxy, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	currentProcess().blockClient(keyOf("127.0.0.1"), time.Hour)
	defer currentProcess().unblock(keyOf("127.0.0.1"))
	w.load(w.site("zone blocked"))
	sendForLog(w.proxy, "GET http://"+origin+"/ HTTP/1.1\r\nHost: "+origin+"\r\n\r\n")

	documented := documentedLines(t)
	written := func() map[string][]string {
		lines := make(map[string][]string)
		for _, line := range w.logLines("") {
			message, _, _ := strings.Cut(line["msg"].(string), ": ")
			if _, ok := documented[message]; !ok || line["logger"] != "http.handlers.async_proxy" {
				continue
			}
			for field := range maps.Keys(line) {
				if !slices.Contains([]string{"level", "ts", "logger", "msg"}, field) && !slices.Contains(lines[message], field) {
					lines[message] = append(lines[message], field)
				}
			}
			slices.Sort(lines[message])
		}
		return lines
	}
	deadline := time.Now().Add(patience)
	for !maps.EqualFunc(written(), documented, slices.Equal) && time.Now().Before(deadline) {
		time.Sleep(50 * time.Millisecond)
	}
	got := written()
	for line, fields := range documented {
		if !slices.Equal(got[line], fields) {
			t.Errorf("%s has the fields\n%q, and the page has\n%q", line, got[line], fields)
		}
	}
}

// sendForLog sends bytes to a proxy, and waits for what it answers. After a request, it sends FIN only once
// the response has begun: net/http takes an earlier one for a client that has gone away.
func sendForLog(address, text string) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(conn, text)
	if strings.Contains(text, " HTTP/1.1\r\n") && strings.HasSuffix(text, "\r\n\r\n") {
		_, _ = conn.Read(make([]byte, 1))
	}
	_ = conn.(*net.TCPConn).CloseWrite()
	_, _ = io.Copy(io.Discard, conn)
}
