// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package peer

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/proc"
)

func TestMain(m *testing.M) {
	proc.Guard()
	os.Exit(m.Run())
}

// script returns a peer that is a shell script.
func script(t *testing.T, text string) *Peer {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := *List()[3] // with a configuration and arguments
	p.Path, p.program = path, path
	return &p
}

// TestFailure checks that a peer that does not start is an error with what it said, and
// leaves nothing behind.
func TestFailure(t *testing.T) {
	dir := t.TempDir()
	_, err := script(t, "echo the disk is full >&2; exit 1").Start(t.Context(), dir, false)
	if err == nil || !strings.Contains(err.Error(), "squid: it ended") || !strings.Contains(err.Error(), "the disk is full") {
		t.Error(err)
	}
	if files, _ := os.ReadDir(dir); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
}

// TestVersions asks programs for their versions, in the ways that the peers tell them.
func TestVersions(t *testing.T) {
	for says, want := range map[string]string{
		"Squid Cache: Version 5.7": "5.7",
		"tinyproxy 1.11.1":         "1.11.1",
		"HAProxy version 2.6.12-1+deb12u4 2026/10/17 - https:/": "2.6.12-1+deb12u4",
		"Traffic Server 9.2.9 Apr  4 2026 14:52:39 localhost":   "9.2.9",
		"async_proxy v1.0.0 (go1.26.8) in Caddy v2.11.9 h1:=":   "2.11.9",
	} {
		p := script(t, "echo '"+says+"'")
		if err := p.look(); err != nil || p.Version != want {
			t.Errorf("%q is version %q, %v", says, p.Version, err)
		}
	}
}

// TestMissing checks that a program that is not there is named.
func TestMissing(t *testing.T) {
	p := &Peer{program: "no-such-proxy"}
	if err := p.Find(t.TempDir()); err == nil || err.Error() != "no-such-proxy is not installed" {
		t.Error(err)
	}
}

// TestList checks what flags and tables rely on.
func TestList(t *testing.T) {
	ids := make(map[string]bool)
	for _, p := range List() {
		if p.ID == "" || p.Name == "" || p.Abilities == 0 || ids[p.ID] {
			t.Errorf("%+v", p)
		}
		ids[p.ID] = true
	}
}

// TestPeersGetPortsOfTheirOwn checks that a peer's port cannot be given to a connection, or to another
// peer, before the peer listens.
func TestPeersGetPortsOfTheirOwn(t *testing.T) {
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		t.Fatal(err)
	}
	var ephemeral int
	if _, err := fmt.Sscan(string(text), &ephemeral); err != nil {
		t.Fatal(err)
	}
	seen := make(map[int]bool)
	for range 100 {
		port, err := freePort()
		if err != nil {
			t.Fatal(err)
		}
		if port >= ephemeral || seen[port] {
			t.Fatalf("port %d; ephemeral ports begin at %d; before: %v", port, ephemeral, seen)
		}
		seen[port] = true
	}
}
