// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package proc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// holds is the environment variable that makes the test program start another program and
// wait.
const holds = "ASYNC_PROXY_BENCH_TEST_HOLDS"

func TestMain(m *testing.M) {
	Guard()
	if output := os.Getenv(holds); output != "" {
		p, err := Start(output, nil, "/bin/sh", "-c", family)
		if err != nil {
			panic(err)
		}
		await(func() bool { return p.Usage().Processes == members })
		for _, process := range descendants(p.guard.Process.Pid) {
			fmt.Println(process.pid)
		}
		fmt.Println(p.guard.Process.Pid)
		fmt.Println("ready")
		time.Sleep(time.Hour)
	}
	os.Exit(m.Run())
}

// family is a program that starts others: one ignores requests to end, one has left for
// another session, and one has lost its parent.
const (
	family  = `(trap '' TERM INT HUP; exec sleep 1000) & setsid sleep 1000 & (sleep 1000 &) ; sleep 1000; :`
	members = 5
)

// await waits until something is true.
func await(ready func() bool) {
	for !ready() {
		time.Sleep(5 * time.Millisecond)
	}
}

func start(t *testing.T, script string) *Program {
	t.Helper()
	p, err := Start(filepath.Join(t.TempDir(), "output"), nil, "/bin/sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p
}

// runs reports whether a process exists and has not ended.
func runs(pid string) bool {
	data, err := os.ReadFile("/proc/" + pid + "/stat")
	process, ok := parseStat(data)
	return err == nil && ok && !process.ended
}

// TestStop checks that everything that a program has started ends with it.
func TestStop(t *testing.T) {
	p := start(t, family)
	await(func() bool { return p.Usage().Processes == members })
	processes := descendants(p.guard.Process.Pid)
	p.Stop()
	for _, process := range processes {
		if runs(fmt.Sprint(process.pid)) {
			t.Errorf("%d still runs", process.pid)
		}
	}
}

// TestKilled checks that everything ends when the benchmark is killed.
func TestKilled(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holds+"="+filepath.Join(t.TempDir(), "output"))
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pids []string
	lines := bufio.NewScanner(output)
	for lines.Scan() && lines.Text() != "ready" {
		pids = append(pids, lines.Text())
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if len(pids) != members+1 {
		t.Fatalf("processes: %v", pids)
	}
	for _, pid := range pids {
		await(func() bool { return !runs(pid) })
	}
}

// TestUsage checks that the CPU time of children counts, also after their end, and that the
// guard's memory does not.
func TestUsage(t *testing.T) {
	p := start(t, `sh -c 'i=0; while [ $i -lt 1000000 ]; do i=$((i+1)); done'; exec sleep 1000`)
	await(func() bool { // the loop has ended
		processes := descendants(p.guard.Process.Pid)
		if len(processes) != 1 {
			return false
		}
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", processes[0].pid))
		return strings.TrimSpace(string(name)) == "sleep"
	})
	usage := p.Usage()
	if usage.CPU < 50*time.Millisecond {
		t.Errorf("a million steps took %v of CPU time", usage.CPU)
	}
	if usage.Processes != 1 || usage.RSS < 100<<10 || usage.RSS > 4<<20 || usage.Anonymous == 0 || usage.Anonymous > usage.RSS {
		t.Errorf("%+v", usage)
	}
	more := start(t, `exec 8</dev/null 9</dev/null; exec sleep 1000`)
	await(func() bool { return more.Usage().Descriptors == usage.Descriptors+2 })
}

// TestAwait checks when waiting for a program ends.
func TestAwait(t *testing.T) {
	never := errors.New("not yet")
	ended := start(t, "exit 1")
	if err := ended.Await(t.Context(), func() error { return never }); !errors.Is(err, never) || !strings.Contains(err.Error(), "it ended") {
		t.Error(err)
	}
	p := start(t, "exec sleep 1000")
	ctx, cancel := context.WithCancel(t.Context())
	asked := 0
	err := p.Await(ctx, func() error {
		if asked++; asked == 3 {
			cancel()
		}
		return never
	})
	if !errors.Is(err, never) || !strings.Contains(err.Error(), "did not get ready") {
		t.Error(err)
	}
	if err := p.Await(t.Context(), func() error { return nil }); err != nil {
		t.Error(err)
	}
}

// TestStat parses a line of /proc with a name that looks like other fields.
func TestStat(t *testing.T) {
	line := "42 (a) S 1 (b) R 7 42 42 0 -1 4194560 1 2 3 4 100 20 3 4 20 0 1 0 9999\n"
	process, ok := parseStat([]byte(line))
	if !ok || process.pid != 42 || process.parent != 7 || process.cpu != 127*tick || process.ended {
		t.Errorf("%+v, %v", process, ok)
	}
	if process, ok = parseStat([]byte(strings.Replace(line, ") R 7", ") Z 7", 1))); !ok || !process.ended {
		t.Errorf("%+v, %v", process, ok)
	}
	for _, line := range []string{"", "42", "42 (a) S 1 2", "x (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"} {
		if process, ok := parseStat([]byte(line)); ok {
			t.Errorf("%q is %+v", line, process)
		}
	}
}

// TestClocks checks that the clocks of the machine and of this process move with work.
func TestClocks(t *testing.T) {
	busy, own := Busy(), Own()
	for Own() < own+5*tick {
	}
	if busy == 0 {
		t.Error("the machine has never worked")
	}
	await(func() bool { return Busy() > busy })
}
