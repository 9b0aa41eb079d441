// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package clients

import "testing"

// chromium is a command that adds to those of the page what a run without a screen needs.
const chromium = `#!/bin/sh
exec /usr/bin/chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
	--disable-component-update --disable-sync --disable-dev-shm-usage --user-data-dir="$(mktemp -d -p "$HOME")" --dump-dom "$@"
`

func TestChromium(t *testing.T) {
	m := newMachine(t, "/usr/bin/chromium")
	m.write("bin/chromium", chromium)
	m.run("chmod +x bin/chromium")
	m.env = append(m.env, "PATH="+m.home+"/bin:/usr/bin:/bin")
	m.run(m.snippet("chromium"))
	m.expect(plain, tunnel) // Chromium tries https:// first
	m.run(m.snippet("chromium-pac"))
	m.expect("GET proxy.example.com:8080", plain)
	m.run(m.snippet("variables") + "chromium http://example.com/")
	m.expect(plain)

	const policy = "/etc/chromium/policies/managed/proxy.json"
	m.write(policy, m.snippet("chromium-policy"))
	t.Cleanup(func() { _, _ = m.try("rm " + policy) })
	m.run("chromium http://example.com/")
	m.expect(plain)
	m.goesPast("GET www.intern.example.com", "chromium http://www.intern.example.com/")
}

func TestFirefox(t *testing.T) {
	m := newMachine(t, "firefox-esr")
	const policies = "/etc/firefox/policies/policies.json"
	t.Cleanup(func() { _, _ = m.try("rm " + policies) })
	for name, passed := range map[string][]string{"firefox-policy": {plain}, "firefox-pac": {"GET proxy.example.com:8080", plain}} {
		m.write(policies, m.snippet(name))
		m.run("firefox-esr --headless --screenshot $PWD/shot.png http://example.com/ && test -s shot.png")
		m.expect(passed...)
	}
	m.write(policies, m.snippet("firefox-policy"))
	m.goesPast("GET intern.example.com", "firefox-esr --headless --screenshot $PWD/shot.png http://intern.example.com/")
}

// TestGNOME checks that a browser without a setting of its own follows that of GNOME.
func TestGNOME(t *testing.T) {
	m := newMachine(t, "/usr/bin/chromium", "gsettings", "dbus-run-session", "/usr/libexec/dconf-service")
	m.write("bin/chromium", chromium)
	m.write("session", m.snippet("gnome")+"chromium http://example.com/\n")
	m.run("chmod +x bin/chromium; mkdir -m 700 runtime\n" +
		"export XDG_RUNTIME_DIR=$PWD/runtime XDG_CURRENT_DESKTOP=GNOME PATH=$PWD/bin:/usr/bin:/bin\ndbus-run-session -- sh -e session")
	m.expect("GET proxy.example.com:8080", plain)
}
