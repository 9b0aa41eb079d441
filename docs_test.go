// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// documents returns the texts of the documentation by file.
func documents(t *testing.T) map[string]string {
	t.Helper()
	return readFiles(t, "*.md", "docs/*.md")
}

// readFiles returns the files that match the patterns. Each pattern must match at least
// one.
func readFiles(t *testing.T, patterns ...string) map[string]string {
	t.Helper()
	texts := make(map[string]string)
	for _, pattern := range patterns {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			texts[file] = string(data)
		}
	}
	return texts
}

// What happens to a documented command that does not just print something.
const (
	inBackground = "in the background"
	byCI         = ".ci/run does this, or is it"
	asShown      = "what the page shows"
)

// documented lists the commands of the documentation in order, with patterns for their
// output on a machine without a network.
var documented = []struct{ file, command, says string }{
	{"README.md", "go run ./cmd/caddy async-proxy --status localhost:9090", inBackground},
	{"README.md", "go test ./...", byCI},
	{"README.md", "xcaddy build --with github.com/asyncproxy/caddy-async-proxy", byCI},
	{"README.md", "git clone https://github.com/asyncproxy/caddy-async-proxy", byCI},
	{"README.md", "cd caddy-async-proxy", byCI},
	{"README.md", "go build ./cmd/caddy", byCI},
	{"README.md", "go run ./examples/httpbin", inBackground},
	{"README.md", "curl -x http://127.0.0.1:8080 http://127.0.0.1:8000/get", asShown},
	{"README.md", "curl -k -x http://127.0.0.1:8080 https://127.0.0.1:8443/get", asShown},
	{"README.md", "chromium --proxy-server=http://127.0.0.1:8080 https://example.com/", `ERR_TUNNEL_CONNECTION_FAILED`}, // no DNS here
	{"README.md", "go run ./cmd/caddy run --config Caddyfile.example", inBackground},
	{"README.md", "for i in $(seq 15); do curl -s -o /dev/null -w '%{http_code} ' -x http://127.0.0.1:8080 http://127.0.0.1:8000/get; done", asShown},
	{"README.md", "curl -i -x http://127.0.0.1:8080 http://127.0.0.1:8000/get", asShown},
	{"docs/admin-api.md", "curl localhost:2019/async_proxy/stats", `"requests":\{"forwarded":10,"tunnels":0,`},
	{"docs/admin-api.md", "curl localhost:2019/async_proxy/history", `"step_seconds":5,"requests":\{.*"forwarded":\[`},
	{"docs/admin-api.md", "curl 'localhost:2019/async_proxy/clients?limited&sort=rejections'", `"client":"127.0.0.1".*"total":1`},
	{"docs/admin-api.md", "curl 'localhost:2019/async_proxy/tunnels?q=example.com'", `\{"tunnels":\[\],"total":0\}`},
	{"docs/admin-api.md", "curl 'localhost:2019/async_proxy/refusals?cause=rule&sort=count'", `\{"refusals":\[\],"total":0,"causes":\[\{"cause":"rate_limited","count":6,"groups":1,"dropped":0\}`},
	{"docs/admin-api.md", "curl 'localhost:2019/async_proxy/targets?sort=bytes&limit=10'", `\{"targets":\[\{"target":"127.0.0.1:8000","requests":10,"bytes":\d+\}`},
	{"docs/admin-api.md", "curl 'localhost:2019/async_proxy/explain?client=192.0.2.1&target=127.0.0.1:8000'", `"decision":"denied".*"check":"client","outcome":"denied"`},
	{"docs/admin-api.md", "curl -X DELETE localhost:2019/async_proxy/tunnels/42", `\{"error":"not found"\}`},
	{"docs/admin-api.md", "curl -X DELETE localhost:2019/async_proxy/clients/192.0.2.1", `\{"error":"not found"\}`},
	{"docs/admin-api.md", "curl -X PUT 'localhost:2019/async_proxy/clients/192.0.2.1/block?for=10m'", `\n$`}, // 204
	{"docs/admin-api.md", "curl -X DELETE 'localhost:2019/async_proxy/clients/user%20sales%2Falice?zone=default'", `\{"error":"not found"\}`},
	{"CONTRIBUTING.md", "go test ./...", byCI},
	{"CONTRIBUTING.md", ".ci/run", byCI},
	{"docs/benchmarks.md", "cd bench && go run .", byCI}, // briefly
	{"docs/redis.md", "xcaddy build --with github.com/asyncproxy/caddy-async-proxy --with github.com/asyncproxy/caddy-async-proxy/redis", byCI},
}

// TestDocumentedCommands runs the documentation's commands for newcomers verbatim and in
// order, in a network namespace of its own, where the ports are free.
func TestDocumentedCommands(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	texts := documents(t)
	var commands []struct{ file, command string }
	blocks, comment := regexp.MustCompile("(?ms)^```sh\n(.*?)^```"), regexp.MustCompile(`\s+# .*`)
	for _, file := range []string{"README.md", "docs/admin-api.md", "CONTRIBUTING.md", "docs/benchmarks.md", "docs/redis.md"} {
		for _, block := range blocks.FindAllStringSubmatch(texts[file], -1) {
			for line := range strings.Lines(strings.ReplaceAll(block[1], "\\\n\t", "")) {
				command := comment.ReplaceAllString(strings.TrimSpace(line), "")
				commands = append(commands, struct{ file, command string }{file, command})
			}
		}
		delete(texts, file)
	}
	for file, text := range texts {
		if blocks.MatchString(text) {
			t.Errorf("%s has commands that no test runs", file)
		}
	}
	if len(commands) != len(documented) {
		t.Fatalf("the documentation has %d commands, want %d: %q", len(commands), len(documented), commands)
	}
	dir := t.TempDir()
	cache, err := exec.Command("go", "env", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	shell := func(command string) *exec.Cmd {
		cmd := exec.Command("bash", "-c", command)
		cmd.Env = append(os.Environ(), "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir, "GOCACHE="+strings.TrimSpace(string(cache)))
		return cmd
	}
	var background backgroundCommands
	for i, row := range documented {
		if commands[i].file != row.file || commands[i].command != row.command {
			t.Fatalf("%s has the command %q, want %q from %s", commands[i].file, commands[i].command, row.command, row.file)
		}
		switch row.says {
		case byCI:
			continue
		case inBackground:
			background.start(t, shell(row.command), row.command)
			continue
		}
		cmd := shell(row.command)
		switch {
		case strings.Contains(row.command, ":2019"):
			cmd = shell(row.command + " -s -w '\\n'")
		case strings.HasPrefix(row.command, "chromium "):
			if cmd = inChromium(t, shell, row.command); cmd == nil {
				continue
			}
		}
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, patience // the browser's processes may outlive it
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_ = awaitExit(cmd)
		if row.says == asShown {
			compareShown(t, out.String(), shownAfter(t, row.file, row.command))
		} else if !regexp.MustCompile(row.says).Match(out.Bytes()) {
			t.Errorf("%s prints\n%s\nwant %s", row.command, &out, row.says)
		}
	}
}

// shipped returns the Caddyfiles that users copy, by location, without those of the redis
// module.
func shipped(t *testing.T) map[string]string {
	t.Helper()
	configs := readFiles(t, "Caddyfile.example", "examples/*/Caddyfile", "packaging/Caddyfile", "contrib/kubernetes/Caddyfile")
	for file, text := range documents(t) {
		for i, block := range fenced.FindAllStringSubmatch(text, -1) {
			configs[fmt.Sprintf("%s %d", file, i+1)] = block[1]
		}
	}
	shared := regexp.MustCompile(`(?ms)^\t\tlimiter redis .*?^\t\t\}\n`)
	for name, config := range configs {
		configs[name] = shared.ReplaceAllString(config, "")
	}
	return configs
}

// TestShippedConfigs runs each Caddyfile that users copy, in a network namespace of its
// own: none may be an open proxy, or cause any other warning at start.
func TestShippedConfigs(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	clientCA := filepath.Join(t.TempDir(), "clients.pem")
	if err := os.WriteFile(clientCA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tlsCertificate.Certificate[0]}), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, text := range shipped(t) {
		text = withFiles(t, strings.ReplaceAll(text, "/etc/caddy/clients.pem", clientCA))
		for _, placeholder := range regexp.MustCompile(`\{env\.(\w+)\}`).FindAllStringSubmatch(text, -1) {
			t.Setenv(placeholder[1], "secret")
		}
		data, _, err := adapt(text, "Caddyfile")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var config map[string]any
		if err := json.Unmarshal(data, &config); err != nil {
			t.Fatal(err)
		}
		w := &world{t: t, logs: filepath.Join(t.TempDir(), "caddy.log")}
		config["admin"] = map[string]any{"disabled": true, "config": map[string]any{"persist": false}}
		storage, err := os.MkdirTemp("", "storage")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(storage) }) // Caddy may still write to it after it has stopped
		config["storage"] = map[string]any{"module": "file_system", "root": storage}
		config["logging"] = map[string]any{"logs": map[string]any{"default": map[string]any{
			"writer": map[string]any{"output": "file", "filename": w.logs}, "encoder": map[string]any{"format": "json"},
		}}}
		if data, err = json.Marshal(config); err != nil {
			t.Fatal(err)
		}
		if err := caddy.Load(data, true); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if strings.Contains(text, "async_proxy {") {
			w.waitLog("async-proxy listening", 1)
		}
		logged, err := os.ReadFile(w.logs)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(logged)) {
			if strings.HasPrefix(line, `{"level":"warn"`) && strings.Contains(line, `"logger":"http.handlers.async_proxy`) {
				t.Errorf("%s: %s", name, line)
			}
		}
		if err := caddy.Stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDocumentedFail2ban checks that the recipe's expression matches failed logins and
// nothing that only looks like one.
func TestDocumentedFail2ban(t *testing.T) {
	_, text, found := strings.Cut(documents(t)["docs/recipes.md"], "\nfailregex = ")
	text, _, _ = strings.Cut(text, "\n")
	if !found {
		t.Fatal("found no failregex")
	}
	failed := regexp.MustCompile(strings.Replace(text, "<HOST>", "([0-9a-f.:]+)", 1))

	w := newWorld(t, bcryptUsers, nil)
	origin := w.origin.Listener.Addr().String()
	get := func(path, lines string) {
		c := w.dial()
		c.send("GET http://" + origin + path + " HTTP/1.1\nHost: " + origin + "\n" + lines + "\n")
		c.response(http.MethodGet)
	}
	get("/", "")
	get("/ok", "Proxy-Authorization: "+login("alice", "wonderland")+"\n")
	get(`/","status":407,"client":"192.0.2.1","error":"the`+"%20credentials%20are%20wrong", "")
	get("/failed", "Proxy-Authorization: "+login("alice", "?")+"\n")
	w.waitLog("request", 4)
	data, err := os.ReadFile(w.logs)
	if err != nil {
		t.Fatal(err)
	}
	matches := 0
	for line := range strings.Lines(string(data)) {
		if m := failed.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
			if matches++; m[1] != "127.0.0.1" || !strings.Contains(line, `"/failed"`) {
				t.Errorf("%s matches %s", m[1], line)
			}
		}
	}
	if matches != 1 {
		t.Errorf("%d failed logins matched in\n%s", matches, data)
	}
}

// TestDocumentedLinks checks that the documentation's links into this repository exist, and
// that all others use https.
func TestDocumentedLinks(t *testing.T) {
	texts := documents(t)
	anchors := make(map[string]bool)
	for file, text := range texts {
		anchors[file+"#"] = true
		for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
			name := regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(strings.ToLower(heading[1]), "")
			anchors[file+"#"+strings.ReplaceAll(name, " ", "-")] = true
		}
	}
	for file, text := range texts {
		for _, link := range regexp.MustCompile(`\]\(([^)]*)\)`).FindAllStringSubmatch(text, -1) {
			u, err := url.Parse(link[1])
			switch {
			case err != nil || u.Scheme != "" && (u.Scheme != "https" || u.Host == ""):
				t.Errorf("%s: %s: %v", file, link[1], err)
			case u.Scheme != "":
			default:
				to := file
				if u.Path != "" {
					to = filepath.Join(filepath.Dir(file), u.Path)
				}
				if _, err := os.Stat(to); err != nil {
					t.Errorf("%s: %s: %v", file, link[1], err)
				} else if u.Fragment != "" && strings.HasSuffix(to, ".md") && !anchors[to+"#"+u.Fragment] {
					t.Errorf("%s: %s: no such heading", file, link[1])
				}
			}
		}
	}
}

// fencedJSON matches the JSON code blocks of a Markdown file.
var fencedJSON = regexp.MustCompile("(?ms)^```json\n(.*?)^```")

// TestDocumentedJSON checks that the configs and handlers in the documentation are valid.
func TestDocumentedJSON(t *testing.T) {
	t.Setenv("PARENT_PASSWORD", "secret")
	found := 0
	for file, text := range documents(t) {
		for _, block := range fencedJSON.FindAllStringSubmatch(text, -1) {
			found++
			var config map[string]any
			if err := json.Unmarshal([]byte(block[1]), &config); err != nil {
				t.Errorf("%s: %v: %s", file, err, block[1])
				continue
			}
			if config["apps"] == nil { // a handler
				config = map[string]any{"apps": map[string]any{"http": map[string]any{"servers": map[string]any{"proxy": map[string]any{
					"listen": []string{"127.0.0.1:0"}, "routes": []any{map[string]any{"handle": []any{config}}},
				}}}}}
			}
			config["admin"] = map[string]any{"disabled": true}
			data, err := json.Marshal(config)
			if err != nil {
				t.Fatal(err)
			}
			var c *caddy.Config
			if err = caddy.StrictUnmarshalJSON(data, &c); err == nil {
				err = caddy.Validate(c)
			}
			if err != nil {
				t.Errorf("%s: %v: %s", file, err, block[1])
			}
		}
	}
	if found == 0 {
		t.Error("found no JSON in the documentation")
	}
}

// TestJSONBesideItsCaddyfile checks that the JSON in docs/reference.md is what its Caddyfile adapts to.
func TestJSONBesideItsCaddyfile(t *testing.T) {
	_, section, _ := strings.Cut(documents(t)["docs/reference.md"], "\n## JSON\n")
	site, shown := fenced.FindStringSubmatch(section), fencedJSON.FindStringSubmatch(section)
	if site == nil || shown == nil {
		t.Fatal("found no Caddyfile, or no JSON")
	}
	adapted, _, err := adapt(site[1], "Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	var want, got any
	if err := errors.Join(json.Unmarshal(adapted, &want), json.Unmarshal([]byte(shown[1]), &got)); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the page shows\n%s\nand the Caddyfile adapts to\n%s", shown[1], adapted)
	}
}

// The filter in docs/security.md keeps passwords in URLs out of Caddy's access log.
func TestAccessLogFilter(t *testing.T) {
	var site string
	for _, block := range fenced.FindAllStringSubmatch(documents(t)["docs/security.md"], -1) {
		if strings.Contains(block[1], "request>uri") {
			site = block[1]
		}
	}
	w := newWorld(t, "", nil)
	access := filepath.Join(t.TempDir(), "access.log")
	site = strings.Replace(site, ":8080", "http://"+strings.TrimPrefix(w.proxy, "127.0.0.1"), 1)
	w.load(strings.Replace(site, "log {", "log {\noutput file "+access, 1))
	for _, line := range []string{
		"GET http://bob:pa55w0rd@127.0.0.1:9/a@b HTTP/1.1", "CONNECT bob:pa55w0rd@127.0.0.1:9 HTTP/1.1", "GET http://127.0.0.1:9/@c//d@e HTTP/1.1",
	} {
		c := w.dial()
		c.send(line + "\nHost: x\n\n")
		c.response(http.MethodGet)
	}
	var log string
	eventually(t, "three lines", func() bool {
		data, _ := os.ReadFile(access)
		log = string(data)
		return strings.Count(log, "\n") == 3
	})
	for _, uri := range []string{"http://127.0.0.1:9/a@b", "127.0.0.1:9", "http://127.0.0.1:9/@c//d@e"} {
		if !strings.Contains(log, `"uri":"`+uri+`"`) {
			t.Errorf("the log lacks %s: %s", uri, log)
		}
	}
	if strings.Contains(log, "pa55w0rd") {
		t.Error("the log contains the password")
	}
}

// TestDocumentsHaveNoPublishedHash checks that no example in the documentation uses a
// publicly known password.
func TestDocumentsHaveNoPublishedHash(t *testing.T) {
	for file, text := range documents(t) {
		for _, hash := range publishedHashes {
			if strings.Contains(text, hash) {
				t.Errorf("%s contains %s", file, hash)
			}
		}
	}
}
