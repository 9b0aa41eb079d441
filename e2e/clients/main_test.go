// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package clients runs what docs/clients.md says about programs that use the proxy, with the
// programs themselves. The tests run in namespaces of their own, where proxy.example.com is
// this machine, all ports are free, and only the proxy can resolve the names of origins. So
// they run the commands and files of the page as they are.
package clients

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait. No wait is expected to take that long.
const patience = time.Minute

// inside is the directory of the run, and is set in the namespaces only.
const inside = "ASYNC_PROXY_CLIENTS"

func TestMain(m *testing.M) {
	flag.Parse()
	if dir := os.Getenv(inside); dir != "" {
		os.Exit(runInside(m, dir))
	}
	code, err := runOutside()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// runOutside builds Caddy and runs the tests in new namespaces.
func runOutside() (code int, err error) {
	dir, err := os.MkdirTemp("", "async-proxy-clients")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // apt reads files as another user
		return 0, err
	}
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "caddy"), "./cmd/caddy")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("building cmd/caddy: %v\n%s", err, out)
	}
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cache, err := exec.Command("go", "env", "GOCACHE").Output()
	if err != nil {
		return 0, err
	}
	cmd.Env = append(os.Environ(), inside+"="+dir, "GOCACHE="+strings.TrimSpace(string(cache)))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// With the process, the kernel ends everything in its process namespace.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// runInside makes the machine of the tests, runs them, and checks that they have used the whole
// page.
func runInside(m *testing.M, dir string) int {
	err := prepareMachine(dir)
	var stop func()
	if err == nil {
		stop, err = startServers(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer stop()
	code := m.Run()
	if only := flag.Lookup("test.run").Value.String(); code == 0 && only == "" {
		for _, name := range unusedSnippets() {
			fmt.Fprintf(os.Stderr, "FAIL: no test runs the block %q of docs/clients.md\n", name)
			code = 1
		}
	}
	return code
}

// internal are the names that the machine itself resolves, as it does those of an intranet. They
// lead to the origin.
const internal = "intern.example.com www.intern.example.com"

// prepareMachine gives the machine of the tests its addresses, its names, the certification
// authority of the origins, and an /etc and a home directory of its own.
func prepareMachine(dir string) error {
	if err := makeAuthorities(dir); err != nil {
		return err
	}
	home := filepath.Join(dir, "home")
	if err := os.Mkdir(home, 0o755); err != nil {
		return err
	}
	commands := []string{
		"mount --make-rprivate /", "mount -t proc proc /proc", "ip link set lo up", "ip route add local 192.0.2.0/24 dev lo",
		"cp -a /etc DIR/etc 2>/dev/null || test -e DIR/etc/passwd", // an ordinary user may not copy all of it
		"mount --bind DIR/etc /etc",
		"printf '127.0.0.1 localhost proxy.example.com\\n127.0.0.80 " + internal + "\\n' >DIR/hosts",
		"mount --bind DIR/hosts /etc/hosts",
		"sed -i \"s|^root:.*|root:x:0:0:root:DIR/home:/bin/bash|\" /etc/passwd", // the home of ssh
		"cp DIR/origins.pem /etc/ssl/certs/ca-certificates.crt",
		"rm -rf /etc/apt/sources.list* /etc/apt/apt.conf.d/*",
		"for dir in /run /var/lib/apt /var/cache/apt; do mount -t tmpfs -o mode=755 tmpfs $dir; done",
		"mkdir /run/sshd",
	}
	script := strings.ReplaceAll(strings.Join(commands, "\n"), "DIR", dir)
	if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
		return fmt.Errorf("making the tests' machine: %v\n%s", err, out)
	}
	return nil
}

// goTool returns the location of the go command.
func goTool() string {
	path, _ := exec.LookPath("go")
	path, _ = filepath.EvalSymlinks(path)
	return path
}
