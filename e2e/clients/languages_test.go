// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package clients

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const goProgram = `package main

import (
	"io"
	"log"
	"net/http"
	"net/url"
	"os"
)

func run() error {
%s
	for _, url := range os.Args[1:] {
		res, err := client.Get(url)
		if err != nil {
			return err
		}
		_, _ = io.Copy(os.Stdout, res.Body)
	}
	return nil
}

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}
`

func TestGo(t *testing.T) {
	m := newMachine(t, "go")
	m.env = append(m.env, "GOCACHE="+os.Getenv("GOCACHE"), "GOFLAGS=-modcacherw", "GOSUMDB=off", "GOTOOLCHAIN=local", "GOPROXY=https://goproxy.example.com")
	m.write("go.mod", "module get\n\ngo 1.26.0\n\nrequire example.com/hello v1.0.0\n")
	const passed = "CONNECT goproxy.example.com:443"
	m.run(m.snippet("variables") + m.snippet("go-check"))
	m.expect(passed)
	m.run("rm -rf go\n" + m.login("variables-login") + m.snippet("go-check"))
	m.expect(passed + " alice")

	// Over TLS to the proxy, Go needs a port that does not accept HTTP/2.
	const overTLS = "rm -rf go\ncat /etc/ssl/certs/ca-certificates.crt proxy-ca.pem >all.pem\n" +
		"export SSL_CERT_FILE=$PWD/all.pem https_proxy=https://alice:s3cr%40t%2F2@proxy.example.com:"
	m.run(overTLS + "8443\ngo mod download -x")
	m.expect(passed + " alice")
	if out, err := m.try(overTLS + "8444\ngo mod download -x"); err == nil ||
		!strings.Contains(out, "malformed HTTP response") && !strings.Contains(out, "unexpected EOF") {
		t.Errorf("at a proxy with HTTP/2, go prints %s", out)
	}

	m.write("go.mod", "module get\n\ngo 1.26.0\n")
	m.write("get.go", strings.Replace(goProgram, "%s", m.login("go"), 1))
	m.run("go build -o get get.go\n./get http://example.com/ https://example.com/")
	m.expect(plainAlice, tunnelAlice)
}

const javaProgram = `import java.net.*;
import java.net.http.*;

public class App {
	static HttpClient newClient() {
%s
		return client;
	}

	public static void main(String[] args) throws Exception {
		HttpClient client = newClient();
		for (String url : args[0].split(" ")) {
			System.out.print(new String(new URL(url).openStream().readAllBytes()));
			HttpRequest request = HttpRequest.newBuilder(URI.create(url)).build();
			System.out.print(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
		}
	}
}
`

func TestJava(t *testing.T) {
	m := newMachine(t, "java", "javac", "jar")
	m.run("keytool -importcert -noprompt -storepass changeit -alias x -file /etc/ssl/certs/ca-certificates.crt -keystore trusted")
	m.env = append(m.env, "JAVA_TOOL_OPTIONS=-XX:TieredStopAtLevel=1 -Djavax.net.ssl.trustStore=trusted -Djavax.net.ssl.trustStorePassword=changeit")
	const both = " 'http://example.com/ https://example.com/'"
	build := func(client string) {
		m.write("App.java", strings.Replace(javaProgram, "%s", client, 1))
		m.run("javac App.java && jar cfe app.jar App *.class")
	}
	build("HttpClient client = HttpClient.newHttpClient();")
	command := strings.TrimSpace(m.snippet("java"))
	m.run(command + both)
	m.expect(plain, tunnel)
	m.run(command + " 'http://www.intern.example.com/ https://www.intern.example.com/'")
	m.expectNone()
	if out, err := m.try(m.snippet("variables") + "java -jar app.jar" + both); err == nil {
		t.Errorf("Java reads the variables: %s", out)
	}

	build(m.snippet("java-login"))
	command = strings.TrimSpace(m.login("java-tunnel"))
	m.run(command + both)
	m.expect(plainAlice, tunnelAlice)
	if out := m.run(command + " https://example.com/"); strings.Count(out, "over TLS") != 2 {
		t.Errorf("the first request is for https://: %s", out)
	}
	m.expect(tunnelAlice)
	m.run(command + " http://localhost/")
	m.expectNone()
	if out, err := m.try(strings.Replace(command, "-Djdk.http.auth.tunneling.disabledSchemes=", "", 1) + " https://example.com/"); err == nil || !strings.Contains(out, "407") {
		t.Errorf("without the property: %s", out)
	}
}

const nodeProgram = `import http from "node:http"
import https from "node:https"

for (const url of ["http://example.com/", "https://example.com/"]) {
	console.log("fetch", await (await fetch(url)).text())
	const { get } = url.startsWith("https:") ? https : http
	await new Promise((resolve, reject) => get(url, response => response.on("data", text => console.log(String(text))).on("end", resolve)).on("error", reject))
}
`

func TestNode(t *testing.T) {
	m := newMachine(t, "node")
	m.needNode24()
	m.write("app.mjs", nodeProgram)
	const fetched = "CONNECT example.com:80"
	m.run(m.snippet("variables") + m.snippet("node"))
	m.expect(fetched, plain, tunnel)
	m.run("unset NODE_USE_SYSTEM_CA; cat /etc/ssl/certs/ca-certificates.crt proxy-ca.pem >all.pem\n" +
		"export NODE_USE_ENV_PROXY=1 NODE_EXTRA_CA_CERTS=all.pem https_proxy=https://alice:s3cr%40t%2F2@proxy.example.com:8443 http_proxy=https://alice:s3cr%40t%2F2@proxy.example.com:8443\nnode app.mjs")
	m.expect(fetched+" alice", plainAlice, tunnelAlice)
	if out, err := m.try(m.snippet("variables") + "node app.mjs"); err == nil {
		t.Errorf("Node reads the variables without being told: %s", out)
	}
}

// TestNodePackages checks the packages that give Node a proxy.
func TestNodePackages(t *testing.T) {
	m := newMachine(t, "node")
	m.needNode24()
	for _, name := range []string{"axios", "axios-1.7", "global-agent", "undici"} {
		if _, err := os.Stat(filepath.Join(modules(), name)); err != nil {
			m.missing("the npm package " + name)
		}
	}
	if err := os.Symlink(modules(), filepath.Join(m.home, "node_modules")); err != nil {
		t.Fatal(err)
	}
	const getBoth = "for (const url of [\"http://example.com/\", \"https://example.com/\"]) "
	m.write("undici.mjs", m.snippet("undici")+getBoth+"console.log(await (await fetch(url)).text())\n")
	m.run(m.login("variables-login") + "node undici.mjs")
	m.expect(plainAlice, tunnelAlice)

	m.write("app.mjs", strings.Replace(nodeProgram, "console.log(\"fetch\"", "0 && (0", 1))
	m.run(m.snippet("global-agent"))
	m.expect(plain, tunnel)
	m.write("app.mjs", nodeProgram)
	if out, err := m.try(m.snippet("global-agent")); err == nil {
		t.Errorf("global-agent changes fetch: %s", out)
	}

	m.write("axios.mjs", "import axios from \"axios-1.7\"\nconsole.log((await axios.get(\"https://example.com/\")).data)\n")
	m.run(m.snippet("variables") + "node axios.mjs")
	m.expect(plain) // the proxy has made the TLS connection
	m.write("axios.mjs", "import axios from \"axios\"\n"+getBoth+"console.log((await axios.get(url)).data)\n")
	m.run(m.snippet("variables") + "node axios.mjs")
	m.expect(plain, tunnel)
	encoded := m.login("variables-login") + "export GLOBAL_AGENT_HTTP_PROXY=$http_proxy\n"
	for _, command := range []string{"node axios.mjs", "node -r global-agent/bootstrap app.mjs"} {
		if out, err := m.try(encoded + command); err == nil {
			t.Errorf("%s decodes the password: %s", command, out)
		}
	}
}

func TestPython(t *testing.T) {
	m := newMachine(t, "/usr/bin/python3")
	m.needPython("requests", "httpx")
	for _, name := range []string{"python-requests", "python-urllib"} {
		for scheme, passed := range map[string]string{"http": plainAlice, "https": tunnelAlice} {
			m.write("get.py", strings.ReplaceAll(m.login(name), "https://example.com/", scheme+"://example.com/"))
			m.run("/usr/bin/python3 get.py")
			m.expect(passed)
		}
	}

	// TLS to the proxy.
	m.write("get.py", pythonGet)
	const overTLS = "cat /etc/ssl/certs/ca-certificates.crt proxy-ca.pem >all.pem\nexport REQUESTS_CA_BUNDLE=all.pem SSL_CERT_FILE=all.pem " +
		"http_proxy=https://alice:s3cr%40t%2F2@proxy.example.com:8443 https_proxy=https://alice:s3cr%40t%2F2@proxy.example.com:8443 URL="
	m.run(overTLS + "https://example.com/ && /usr/bin/python3 get.py requests")
	m.run(overTLS + "http://example.com/ && unset REQUESTS_CA_BUNDLE SSL_CERT_FILE && /usr/bin/python3 get.py requests")
	m.expect(tunnelAlice, plainAlice)
	for command, url := range map[string]string{"get.py urllib": "http://example.com/", "get.py httpx": "https://example.com/"} {
		if out, err := m.try(overTLS + url + "\n/usr/bin/python3 " + command); err == nil {
			t.Errorf("%s speaks TLS to the proxy: %s", command, out)
		}
	}
}
