// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/peer"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/proc"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/report"
)

// isBench is the environment variable that makes the test program the benchmark.
const isBench = "ASYNC_PROXY_BENCH_TEST_MAIN"

func TestMain(m *testing.M) {
	proc.Guard()
	if os.Getenv(isBench) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// command returns the benchmark with arguments, and its directory for temporary files.
func command(t *testing.T, args ...string) (*exec.Cmd, string) {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), isBench+"=yes", "TMPDIR="+dir)
	return cmd, dir
}

// isClean checks that a benchmark has left no files and no processes.
func isClean(t *testing.T, dir string) {
	t.Helper()
	if files, _ := os.ReadDir(dir); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
	if running := programsIn(dir); len(running) > 0 {
		t.Errorf("still running: %v", running)
	}
}

// programsIn returns the running programs whose files are, or were, in a directory.
func programsIn(dir string) []string {
	var found []string
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, link := range links {
		if program, err := os.Readlink(link); err == nil && strings.HasPrefix(program, dir) {
			found = append(found, program)
		}
	}
	return found
}

// TestQuick runs all scenarios with a peer that is built in no time.
func TestQuick(t *testing.T) {
	cmd, dir := command(t, "-quick", "-peers", "goproxy", "-ref", "goproxy")
	out := t.TempDir()
	docs, rounds := filepath.Join(out, "docs.md"), filepath.Join(out, "rounds.json")
	document := "# Text\n\n" + report.BeginMark + "\n" + report.EndMark + "\n"
	if err := os.WriteFile(docs, []byte(document), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd.Args = append(cmd.Args, "-docs", docs, "-json", rounds)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	output, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s%s", err, output, stderr.String())
	}
	isClean(t, dir)
	var results report.Results
	data, _ := os.ReadFile(rounds)
	if err := json.Unmarshal(data, &results); err != nil {
		t.Fatal(err)
	}
	if want := 2 * (len(scenarios()) - 1); len(results.Rows) != want { // all but 429
		t.Errorf("%d rows instead of %d", len(results.Rows), want)
	}
	if failed := results.Failed(); len(failed) > 0 {
		t.Error(failed)
	}
	tables, _ := os.ReadFile(docs)
	for _, want := range []string{"# Text", "### GET of 1 MiB", "| goproxy "} {
		if !bytes.Contains(tables, []byte(want)) || want[0] != '#' && !bytes.Contains(output, []byte(want)) {
			t.Errorf("no %q in\n%s\n%s", want, tables, output)
		}
	}
}

// TestInterrupt checks that a benchmark that is interrupted leaves nothing behind.
func TestInterrupt(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		cmd, dir := command(t, "-scenarios", "get-128", "-peers", "goproxy", "-duration", "1h")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for len(programsIn(dir)) < 2 { // with and without logs
			time.Sleep(5 * time.Millisecond)
		}
		_ = cmd.Process.Signal(signal)
		if err := cmd.Wait(); err == nil || !strings.Contains(stderr.String(), "interrupted") {
			t.Errorf("%v: %s", err, stderr.String())
		}
		isClean(t, dir)
	}
}

// TestMistakes checks what mistakes in the command line lead to.
func TestMistakes(t *testing.T) {
	for _, test := range []struct{ args, says string }{
		{"-scenarios get-129", `-scenarios "get-129": use get-128, get-10k, `},
		{"-peers squid,nobody", `-peers "nobody": use async_proxy, goproxy, `},
		{"-ref nobody", `-ref "nobody": use async_proxy, goproxy, `},
		{"-logs no", "use off, on or both"},
		{"-rounds 0", "-rounds 0: use 1 or more"},
		{"get-128", `unexpected argument "get-128"`},
	} {
		cmd, dir := command(t, strings.Fields(test.args)...)
		if output, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(output), test.says) {
			t.Errorf("%s: %v\n%s", test.args, err, output)
		}
		isClean(t, dir)
	}
}

// TestPlan checks that each peer has work, and each scenario peers and a description.
func TestPlan(t *testing.T) {
	used := make(map[string]bool)
	for _, s := range scenarios() {
		own := false
		for _, p := range peer.List() {
			if p.Abilities&s.needs != 0 {
				used[p.ID] = true
				own = own || p.ID == s.Own
			}
		}
		if !own || s.ID == "" || s.Title == "" || s.Details == "" || s.Unit == "" {
			t.Errorf("%+v", s.Scenario)
		}
	}
	for _, p := range peer.List() {
		if !used[p.ID] {
			t.Errorf("%s has nothing to do", p.ID)
		}
	}
}

// TestModel reads the name of the processor.
func TestModel(t *testing.T) {
	if got := model([]byte("processor\t: 0\nmodel name\t: A CPU @ 3 GHz: fast\n")); got != "A CPU @ 3 GHz: fast" {
		t.Error(got)
	}
	if got := model(nil); got == "" {
		t.Error("a processor without a name")
	}
}
