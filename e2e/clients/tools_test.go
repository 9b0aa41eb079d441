// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package clients

import (
	"path/filepath"
	"strings"
	"testing"
)

// tunnel, plain and their like with a user are what the proxy has seen of a request.
const (
	tunnel      = "CONNECT example.com:443"
	tunnelAlice = tunnel + " alice"
	plain       = "GET example.com"
	plainAlice  = plain + " alice"
)

// TestLogin checks that the variables may have a user and a password, in every program that reads
// them.
func TestLogin(t *testing.T) {
	m := readersMachine(t)
	variables := m.login("variables-login")
	outputs := m.runReaders([]string{variables + "export URL=http://example.com/", variables + "export URL=https://example.com/"})
	for i, outputs := range outputs {
		for _, out := range outputs {
			if !strings.Contains(out, "through the proxy") && !strings.Contains(out, "over TLS") {
				t.Errorf("%s: %s", readers[i].name, out)
			}
		}
	}
	m.expect(plainAlice, tunnelAlice)
	if out := m.run("echo 's3cr@t/2' | " + m.snippet("encode")); !strings.HasSuffix(out, "s3cr%40t%2F2\n") {
		t.Errorf("the encoded password: %s", out)
	}
}

// TestShellVariables checks the first block of the page: the programs use the proxy for all but the
// machine's own domain.
func TestShellVariables(t *testing.T) {
	m := newMachine(t, "curl")
	m.run(m.snippet("variables") + "curl -sS http://example.com/ https://example.com/")
	m.expect(plain, tunnel)
	if out := m.run(m.snippet("variables") + "curl -sS http://intern.example.com/ http://www.intern.example.com/"); out != "directly\ndirectly\n" {
		t.Errorf("the machine's own domain: %q", out)
	}
	m.expectNone()
}

func TestCurl(t *testing.T) {
	m := newMachine(t, "curl")
	m.run(m.snippet("curl"))
	m.expect(tunnel)
	m.run(m.login("curl-login"))
	m.expect(tunnelAlice)
	m.run(m.snippet("curl-tls"))
	m.expect(tunnelAlice)
	if out, err := m.try(strings.ReplaceAll(m.snippet("curl-tls"), "--proxy-cacert proxy-ca.pem", "")); err == nil {
		t.Errorf("curl trusts the proxy's own authority: %s", out)
	}
	if out, _ := m.try(m.snippet("curl-check")); out != "000\n" {
		t.Errorf("the check says %q without a proxy", out)
	}
	m.write(".curlrc", m.login("curlrc"))
	if out := m.run(m.snippet("curl-check")); out != "200\n" {
		t.Errorf("the check says %q", out)
	}
	m.run("curl -sS http://example.com/")
	m.expect(tunnelAlice, plainAlice)
	m.run("curl -sS http://www.intern.example.com/")
	m.expectNone()
}

func TestWget(t *testing.T) {
	m := newMachine(t, "wget")
	m.write(".wgetrc", m.login("wgetrc"))
	m.run(m.snippet("wget-check"))
	m.run("wget -qO- http://example.com/")
	m.expect(tunnelAlice, plainAlice)
	m.run("wget -qO- http://www.intern.example.com/")
	m.expectNone()
	if out, err := m.try("https_proxy=https://proxy.example.com:8443 wget -O- --no-config https://example.com/"); err == nil {
		t.Errorf("wget speaks TLS to the proxy: %s", out)
	}
}

const gitTunnel = "CONNECT git.example.com:443"

func TestGit(t *testing.T) {
	m := newMachine(t, "git")
	m.run(m.login("git") + m.snippet("git-check"))
	m.run("git clone -q https://git.example.com/project.git && cat project/hello.txt")
	m.run("git ls-remote http://git.example.com/project.git")
	m.expect(gitTunnel+" alice", "GET git.example.com alice", "POST git.example.com alice")

	m.run("rm .gitconfig\n" + m.snippet("git-tls") + "git ls-remote https://git.example.com/project.git")
	m.expect(gitTunnel + " alice")
	m.run("git config --global --unset http.proxySSLCAInfo")
	if out, err := m.try("git ls-remote https://git.example.com/project.git"); err == nil {
		t.Errorf("Git trusts the proxy's own authority: %s", out)
	}

	// One remote with the proxy, one without.
	m.run("rm .gitconfig\n" + m.snippet("git-some") + "git ls-remote https://git.example.com/project.git")
	m.expect(gitTunnel)
	out, err := m.try("git config --global http.proxy http://proxy.example.com:8080; git ls-remote http://intern.example.com/project.git")
	if err == nil || !strings.Contains(out, "not valid") {
		t.Errorf("a remote without a repository: %s", out)
	}
	m.expectNone()

	// Git asks for a password that the URL does not have.
	m.write("ask", "#!/bin/sh\necho 's3cr@t/2'\n")
	m.run("chmod +x ask\nexport GIT_ASKPASS=$PWD/ask https_proxy=http://alice@proxy.example.com:8081\nrm .gitconfig\n" +
		"git ls-remote https://git.example.com/project.git")
	m.expect(gitTunnel + " alice")
}

func TestSSH(t *testing.T) {
	m := newMachine(t, "ssh", "sshd", "nc", "socat")
	m.needRoot()
	m.startSSHD()
	remote := "git ls-remote ssh://git@git.example.com" + m.dir + "/repositories/project.git\n"
	const passed = "CONNECT git.example.com:22"
	m.write(".ssh/config", m.snippet("ssh-nc"))
	m.run("chmod 600 .ssh/config\n" + m.snippet("ssh-check"))
	m.run(remote)
	m.expect(passed)
	m.write(".ssh/config", m.login("ssh-socat"))
	m.run("chmod 600 .ssh/config\n" + remote)
	m.expect(passed + " alice")
}

// startSSHD starts an SSH server where git.example.com is, and lets the machine's user log in as
// git.
func (m *machine) startSSHD() {
	m.t.Helper()
	m.run(`mkdir -m 700 .ssh
ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519
ssh-keygen -q -t ed25519 -N '' -f host-key
cp .ssh/id_ed25519.pub .ssh/authorized_keys
grep -q ^git: /etc/passwd || echo "git:*:0:0::$HOME:/bin/bash" >>/etc/passwd
echo StrictHostKeyChecking accept-new >/etc/ssh/ssh_config.d/tests.conf
/usr/sbin/sshd -f /dev/null -p 22 -h $PWD/host-key -o ListenAddress=127.0.0.80 -o StrictModes=no -o PidFile=$PWD/sshd.pid`)
	m.t.Cleanup(func() { _, _ = m.try("kill $(cat sshd.pid)") })
}

func TestApt(t *testing.T) {
	m := newMachine(t, "apt-get")
	m.needRoot()
	t.Cleanup(func() { _, _ = m.try("rm -rf /etc/apt/apt.conf.d/* /etc/apt/sources.list.d /var/lib/apt/lists") })
	const config = "/etc/apt/apt.conf.d/80proxy"
	update := func(scheme, proxy string) {
		t.Helper()
		m.write("/etc/apt/sources.list.d/tests.list", "deb [trusted=yes] "+scheme+"://debian.example.com/debian stable main\n")
		m.write(config, proxy)
		m.run("chmod 600 " + config)
		if out := m.run(m.snippet("apt-check")); !strings.Contains(out, "proxy.example.com") || !strings.Contains(out, "Get:") {
			t.Errorf("apt says %s", out)
		}
	}
	update("http", m.login("apt"))
	m.expect("GET debian.example.com alice")
	update("https", m.login("apt"))
	m.expect("CONNECT debian.example.com:443 alice")
	m.run("/usr/lib/apt/apt-helper download-file http://intern.example.com/ got")
	m.expectNone()

	m.copyFile("/etc/ssl/proxy-ca.pem", filepath.Join(m.dir, "proxy-ca.pem"))
	update("http", m.snippet("apt-tls"))
	m.expect("GET debian.example.com alice")
	update("https", m.snippet("apt-tls"))
	m.expect("CONNECT debian.example.com:443 alice")
}

func TestPip(t *testing.T) {
	m := newMachine(t, "/usr/bin/pip3")
	m.write("bin/pip", "#!/bin/sh\nexec /usr/bin/pip3 \"$@\"\n") // others may come first in PATH
	m.run("chmod +x bin/pip")
	m.env = append(m.env, "PATH="+m.home+"/bin:/usr/bin:/bin")
	const passed = "CONNECT pypi.org:443 alice"
	m.run(m.login("pip") + m.snippet("pip-check"))
	m.expect(passed)
	m.run("rm *.whl; export no_proxy=pypi.org\n" + m.snippet("pip-check"))
	m.expect(passed) // no_proxy does not apply to the configuration
	m.run("pip config unset global.proxy; rm *.whl\n" + m.snippet("pip-tls"))
	m.expect(passed)
}

func TestNPM(t *testing.T) {
	m := newMachine(t, "npm", "pnpm", "yarn")
	m.needNode24()
	m.env = append(m.env, "npm_config_registry=https://npm.example.com/", "pnpm_config_registry=https://npm.example.com/") // Yarn reads npm's
	const passed = "CONNECT npm.example.com:443"
	m.run(m.login("npm") + m.snippet("npm-check") + "npm install is-number && test -d node_modules/is-number")
	m.expect(passed + " alice")
	m.run("npm view is-number description --fetch-retries=0 --registry=http://www.intern.example.com")
	m.expectNone()

	m.run(m.snippet("pnpm-check"))
	m.expect(passed + " alice")
	m.run("rm .npmrc\n" + m.snippet("npm-tls"))
	m.expect(passed + " alice")

	m.run(m.login("variables-login") + m.snippet("yarn-check"))
	m.expect(passed + " alice")
}
