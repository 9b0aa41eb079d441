// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package proc starts programs, ends them with everything they started, and tells what they
// used. It needs Linux: it reads /proc.
package proc

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// tick is the unit of times in /proc. It is the same on all architectures of Linux that Go
// supports.
const tick = 10 * time.Millisecond

// Usage is what the processes of a tree use together.
type Usage struct {
	CPU         time.Duration // user and system, including children that have ended
	RSS         int64         // resident memory in bytes; pages shared between processes count in each
	Anonymous   int64         // the part of RSS that is not backed by files
	Descriptors int
	Processes   int
}

// stat is what is needed of /proc/PID/stat.
type stat struct {
	pid, parent int
	cpu         time.Duration
	ended       bool // but not waited for yet
}

// TreeUsage returns the usage of all descendants of a process, without the process itself.
// Of those that have ended, only the CPU time counts.
func TreeUsage(root int) Usage {
	var usage Usage
	for _, process := range descendants(root) {
		usage.CPU += process.cpu
		if process.ended {
			continue
		}
		usage.Processes++
		dir := "/proc/" + strconv.Itoa(process.pid)
		if status, err := os.ReadFile(dir + "/status"); err == nil {
			usage.RSS += kilobytes(status, "VmRSS:")
			usage.Anonymous += kilobytes(status, "RssAnon:")
		}
		if fds, err := os.ReadDir(dir + "/fd"); err == nil {
			usage.Descriptors += len(fds)
		}
	}
	return usage
}

// descendants returns all processes below root.
func descendants(root int) []stat {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	children := make(map[int][]stat)
	for _, file := range files {
		if data, err := os.ReadFile(file); err == nil {
			if process, ok := parseStat(data); ok {
				children[process.parent] = append(children[process.parent], process)
			}
		}
	}
	found := children[root]
	for i := 0; i < len(found); i++ {
		found = append(found, children[found[i].pid]...)
	}
	return found
}

// fields returns the fields of /proc/PID/stat after the name, which may itself contain
// spaces and parentheses.
func fields(data []byte) []string {
	return strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
}

func parseStat(data []byte) (stat, bool) {
	pid, err := strconv.Atoi(string(data[:max(bytes.IndexByte(data, ' '), 0)]))
	f := fields(data)
	if err != nil || len(f) < 15 {
		return stat{}, false
	}
	parent, err := strconv.Atoi(f[1])
	return stat{pid: pid, parent: parent, cpu: ticks(f[11:15]), ended: f[0] == "Z"}, err == nil
}

// ticks adds up times in /proc.
func ticks(times []string) time.Duration {
	var sum time.Duration
	for _, text := range times {
		n, _ := strconv.ParseInt(text, 10, 64)
		sum += time.Duration(n) * tick
	}
	return sum
}

// kilobytes returns the value of a line of /proc/PID/status, in bytes.
func kilobytes(status []byte, name string) int64 {
	for line := range bytes.Lines(status) {
		if rest, found := bytes.CutPrefix(line, []byte(name)); found {
			n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(string(rest)), " kB"), 10, 64)
			return n << 10
		}
	}
	return 0
}

// Busy returns how long the processors of the machine have worked since it started, for
// this machine or, on a virtual machine, been taken by others.
func Busy() time.Duration {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := bytes.Cut(data, []byte("\n"))
	f := strings.Fields(string(line)) // cpu user nice system idle iowait irq softirq steal ...
	if len(f) < 9 {
		return 0
	}
	return ticks(f[1:4]) + ticks(f[6:9])
}

// Own returns the CPU time of this process.
func Own() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
