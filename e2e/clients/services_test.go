// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package clients

import (
	"encoding/json"
	"testing"
)

// TestSystemd checks the files for a service with systemd's own parser. No systemd runs on the machine,
// so a program gets the lines of the environment file as systemd would give them: as they are.
func TestSystemd(t *testing.T) {
	m := newMachine(t, "systemd-analyze", "curl")
	m.write("units/proxied.service", "[Service]\nExecStart=/usr/bin/curl -sS http://example.com/\n")
	m.write("units/proxied.service.d/override.conf", m.snippet("systemd"))
	m.write("/etc/proxy.env", m.login("systemd-env"))
	if out := m.run("systemd-analyze verify ./units/proxied.service"); out != "" {
		t.Errorf("systemd says %s", out)
	}
	const curl = "env -i $(cat /etc/proxy.env) /usr/bin/curl -sS "
	m.run(curl + "http://example.com/ https://example.com/")
	m.expect(plainAlice, tunnelAlice)
	m.run(curl + "http://www.intern.example.com/")
	m.expectNone()
}

// TestDocker runs a container with the configuration of Docker's client. The one of its daemon needs
// Docker 23, which Debian 12 does not have; it is only checked to be JSON.
func TestDocker(t *testing.T) {
	m := newMachine(t, "dockerd", "docker", "go")
	m.needRoot()
	if !json.Valid([]byte(m.snippet("docker-daemon"))) {
		t.Error("docker-daemon is not JSON")
	}
	m.env = append(m.env, "CGO_ENABLED=0", "DOCKER_HOST=unix://"+m.home+"/docker.sock")
	m.buildGo()
	m.write("daemon.json", "{}")
	m.run(`dockerd --config-file $PWD/daemon.json --host $DOCKER_HOST --bridge none --iptables=false --storage-driver vfs \
	--data-root $PWD/docker --exec-root $PWD/exec --pidfile $PWD/docker.pid >docker.log 2>&1 &
for i in $(seq 100); do docker info >/dev/null 2>&1 && break; sleep 0.2; done
docker info >/dev/null || { cat docker.log; exit 1; }
tar -c get | docker import - get`)
	t.Cleanup(func() { _, _ = m.try("kill $(cat docker.pid); while test -e docker.pid; do sleep 0.1; done") })
	const get = "docker run --rm --network host get /get "
	m.write(".docker/config.json", m.snippet("docker-client"))
	m.run(get + "http://example.com/")
	m.expect(plain)
	m.run(get + "http://www.intern.example.com/")
	m.expectNone()
}
