// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bufio"
	"bytes"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/report"
)

// thisMachine describes the machine.
func thisMachine() report.Machine {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	cpuinfo, _ := os.ReadFile("/proc/cpuinfo")
	return report.Machine{
		CPU: model(cpuinfo), Cores: runtime.NumCPU(), Kernel: "Linux " + strings.TrimSpace(string(kernel)),
		Go: runtime.Version(), Date: time.Now(),
	}
}

// model returns the name of the processor. Not all architectures tell it.
func model(cpuinfo []byte) string {
	lines := bufio.NewScanner(bytes.NewReader(cpuinfo))
	for lines.Scan() {
		if name, value, _ := strings.Cut(lines.Text(), ":"); strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// raiseLimit raises the limit of open files, which peers inherit, as far as possible. It
// returns how many of the wanted idle tunnels are possible: goproxy needs six files for each.
func raiseLimit(wanted int) (int, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	return min(wanted, int(limit.Max/8)), nil
}
