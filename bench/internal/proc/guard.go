// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package proc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"syscall"
	"time"
)

// Each program is started by a guard: this program, started again. The guard ends the
// program, and everything that the program started, when its standard input ends. That is
// so when Stop is called, and when this process ends in whatever way.

// isGuard is the environment variable that makes a process a guard.
const isGuard = "ASYNC_PROXY_BENCH_GUARD"

// patience is how long a program may take to end by itself.
const patience = 3 * time.Second

// Guard must be the first call of main. In a guard, it does not return.
func Guard() {
	if os.Getenv(isGuard) == "" {
		return
	}
	os.Unsetenv(isGuard)
	if err := guard(os.Args[1], os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func guard(path string, args []string) error {
	// The guard must outlive the program. Signals that it ignored, the program would ignore, too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	// What the program leaves behind becomes a child of the guard.
	const setChildSubreaper = 36
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, setChildSubreaper, 1, 0); errno != 0 {
		return errno
	}
	nothing, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	process, err := os.StartProcess(path, args, &os.ProcAttr{
		Files: []*os.File{nothing, os.Stdout, os.Stderr},
		Env:   os.Environ(),
	})
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	_ = process.Signal(syscall.SIGTERM)
	end(patience)
	return nil
}

// end waits until this process has no children, and kills those that take longer.
func end(patience time.Duration) {
	deadline := time.Now().Add(patience)
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		switch {
		case errors.Is(err, syscall.ECHILD):
			return
		case pid > 0:
			continue
		case time.Now().After(deadline):
			for _, process := range descendants(os.Getpid()) {
				_ = syscall.Kill(process.pid, syscall.SIGKILL)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Program is a program that runs. Stop must be called.
type Program struct {
	guard *exec.Cmd
	input io.Closer
	ended chan struct{}
}

// Start starts a program. Its output goes to a file.
func Start(output string, env []string, path string, args ...string) (*Program, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	file, err := os.Create(output)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	cmd := exec.Command(self, args...)
	cmd.Args = append([]string{self, path}, args...)
	cmd.Env = append(append(os.Environ(), env...), isGuard+"=yes")
	cmd.Stdout, cmd.Stderr = file, file
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	input, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Program{guard: cmd, input: input, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		_ = cmd.Wait()
	}()
	return p, nil
}

// Stop ends the program and everything it started, and returns when all have ended.
func (p *Program) Stop() {
	p.input.Close()
	<-p.ended
}

// Usage returns what the program and everything it started use.
func (p *Program) Usage() Usage { return TreeUsage(p.guard.Process.Pid) }

// Await calls ready until it succeeds, or ctx is cancelled, or the program has ended.
func (p *Program) Await(ctx context.Context, ready func() error) error {
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-p.ended:
			return fmt.Errorf("it ended: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("it did not get ready: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
		if p.hasEnded() {
			return fmt.Errorf("it ended: %w", err)
		}
	}
}

// hasEnded reports whether the guard has started the program and all its processes have
// ended.
func (p *Program) hasEnded() bool {
	processes := descendants(p.guard.Process.Pid)
	running := slices.ContainsFunc(processes, func(process stat) bool { return !process.ended })
	return len(processes) > 0 && !running
}
