// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// backgroundCommands are documented commands that run until the test ends, or until another one needs
// their address.
type backgroundCommands struct {
	proxy  *exec.Cmd    // on 127.0.0.1:8080; nil: none yet
	output bytes.Buffer // of the first proxy
}

// start starts a documented command and waits until it listens. A proxy replaces the one before, as
// the reader does with Ctrl+C.
func (b *backgroundCommands) start(t *testing.T, cmd *exec.Cmd, command string) {
	t.Helper()
	address, output := "127.0.0.1:8080", new(bytes.Buffer)
	switch {
	case strings.Contains(command, "httpbin"):
		address = "127.0.0.1:8443"
	case b.proxy == nil:
		output, b.proxy = &b.output, cmd
	default:
		if err := syscall.Kill(-b.proxy.Process.Pid, syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		_ = awaitExit(b.proxy)
		compareShown(t, b.output.String(), shownLine(t, "A forward proxy listens on "))
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // to stop what `go run` starts, too
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(output.String())
		}
	})
	for deadline := time.Now().Add(2 * time.Minute); !binaryListens(address); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen on %s", command, address)
		}
	}
}

// inChromium returns a documented command that starts Chromium, with what it needs to print the page
// instead of showing it; nil if there is no Chromium.
func inChromium(t *testing.T, shell func(string) *exec.Cmd, command string) *exec.Cmd {
	t.Helper()
	if _, err := exec.LookPath("chromium"); err != nil {
		t.Log("there is no chromium; apt-get install chromium")
		return nil
	}
	profile, err := os.MkdirTemp("", "async-proxy-test-chromium")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		eventually(t, "the browser's profile to be removed", func() bool { return os.RemoveAll(profile) == nil })
	})
	return shell("timeout 90 " + command + " --headless --dump-dom --no-sandbox --disable-gpu --no-first-run --disable-background-networking" +
		" --disable-component-update --disable-sync --disable-dev-shm-usage --user-data-dir=" + profile)
}

// shownAfter returns the output that a page shows after a command.
func shownAfter(t *testing.T, file, command string) string {
	t.Helper()
	_, rest, _ := strings.Cut(documents(t)[file], "```sh\n"+command+"\n```\n\n```text\n")
	shown, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatalf("%s shows no output of %s", file, command)
	}
	return shown
}

// shownLine returns the line of a code block in the README that begins so.
func shownLine(t *testing.T, begins string) string {
	t.Helper()
	_, rest, found := strings.Cut(documents(t)["README.md"], "```text\n"+begins)
	line, _, _ := strings.Cut(rest, "```")
	if !found {
		t.Fatalf("the README does not show %s", begins)
	}
	return begins + line
}

// compareShown compares output with that on a page, which may lack lines and may be a second off.
func compareShown(t *testing.T, got, want string) {
	t.Helper()
	same := func(text string) string {
		text = regexp.MustCompile(`proxy-[0-9a-f]{8}\b`).ReplaceAllString(text, "proxy-N")
		return regexp.MustCompile(`t=[12]\b|: [12]\b|in [12] s`).ReplaceAllString(text, "WAIT")
	}
	got = same(strings.ReplaceAll(got, "\r", "")) + "\n"
	for line := range strings.Lines(same(want)) {
		if line = strings.TrimSpace(line); !strings.Contains(got, line) {
			t.Errorf("the output lacks %q:\n%s", line, got)
		}
	}
}

// TestDocumentedExplain runs the explanation in docs/observability.md with the policies of
// docs/reference.md.
func TestDocumentedExplain(t *testing.T) {
	texts := documents(t)
	_, policies, _ := strings.Cut(texts["docs/reference.md"], "\n## Policies\n")
	config := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(config, []byte(fenced.FindStringSubmatch(policies)[1]), 0o600); err != nil {
		t.Fatal(err)
	}
	shown := regexp.MustCompile("(?ms)^```text\n\\$ caddy (async-proxy explain [^\n]*)\n(.*?)^```").FindStringSubmatch(texts["docs/observability.md"])
	if shown == nil {
		t.Fatal("found no explanation")
	}
	out, err := commandOf(t, strings.Fields(strings.Replace(shown[1], " Caddyfile", " "+config, 1))...).Output()
	if code := (*exec.ExitError)(nil); !errors.As(err, &code) || code.ExitCode() != 1 {
		t.Errorf("explain: %v", err)
	}
	compareShown(t, string(out), shown[2])
}

// TestDocumentedRefusal compares the refusal in docs/denials.md with the proxy's.
func TestDocumentedRefusal(t *testing.T) {
	w := newWorld(t, "via office\nallow other.example.com\ndeny all", nil)
	_, want, _ := strings.Cut(documents(t)["docs/denials.md"], "```text\n")
	want, _, _ = strings.Cut(want, "```")
	conn := w.dial()
	conn.send("CONNECT example.com:443 HTTP/1.1\nHost: example.com:443\n\n")
	compareShown(t, conn.readAll(), want)
}
