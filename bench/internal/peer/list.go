// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package peer knows the proxies that are compared: how they are built or found, started
// and ended.
package peer

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/asyncproxy/caddy-async-proxy/bench/peers"
)

// Ability is what a peer can do.
type Ability int

// The abilities of peers.
const (
	Forwarding Ability = 1 << iota // plain requests of any origin
	Reversing                      // plain requests of one origin
	Tunnelling                     // CONNECT
	Refusing                       // nothing but 429
)

// Peer is a proxy, or a server that a proxy is compared with.
type Peer struct {
	ID        string // for flags
	Name      string // in tables
	Note      string // what a reader of the tables should know
	Abilities Ability
	Buffered  bool // async_proxy with buffered logs, which runs with logs only

	program string            // the name of the binary
	build   string            // the package that it is built from; if empty, it must be installed
	files   map[string]string // configurations: what they are called for the peer, and here
	args    func(v peers.Values) []string
	env     func(v peers.Values) []string
	version []string // arguments that make the program tell its version

	Path    string // of the binary
	Version string
}

// List returns all peers.
func List() []*Peer {
	return []*Peer{
		caddy("async_proxy", "async_proxy", Forwarding|Tunnelling, "with logs: its own lines, an access log and metrics"),
		{
			ID: "goproxy", Name: "goproxy", Abilities: Forwarding | Tunnelling,
			Note:    "a library for Go; with logs: a line for each request by its hooks",
			program: "goproxy", build: "./peers/goproxy",
			args: func(v peers.Values) []string {
				args := []string{"-listen", fmt.Sprintf("127.0.0.1:%d", v.Port)}
				if v.Log {
					args = append(args, "-log", filepath.Join(v.Work, "access.log"))
				}
				return args
			},
		},
		caddy("reverse_proxy", "Caddy `reverse_proxy`", Reversing, "no forward proxy; has one origin"),
		{
			ID: "squid", Name: "Squid", Abilities: Forwarding | Tunnelling, Note: "one worker, its default",
			program: "squid", version: []string{"-v"}, files: map[string]string{"squid.conf": "squid.conf"},
			args: func(v peers.Values) []string {
				return []string{"--foreground", "-n", fmt.Sprintf("bench%d", v.Port), "-f", filepath.Join(v.Work, "squid.conf")}
			},
		},
		{
			ID: "tinyproxy", Name: "tinyproxy", Abilities: Forwarding | Tunnelling, Note: "closes each connection after one request; with logs: waits for the disk after each line",
			program: "tinyproxy", version: []string{"-v"}, files: map[string]string{"tinyproxy.conf": "tinyproxy.conf"},
			args: func(v peers.Values) []string { return []string{"-d", "-c", filepath.Join(v.Work, "tinyproxy.conf")} },
		},
		{
			ID: "haproxy", Name: "HAProxy", Abilities: Forwarding, Note: "for origins given as addresses only; no CONNECT",
			program: "haproxy", version: []string{"-v"}, files: map[string]string{"haproxy.cfg": "haproxy.cfg"},
			args: func(v peers.Values) []string { return []string{"-db", "-f", filepath.Join(v.Work, "haproxy.cfg")} },
		},
		{
			ID: "trafficserver", Name: "Traffic Server", Abilities: Forwarding | Tunnelling, Note: "1.5 threads for each core, its default",
			program: "traffic_server", version: []string{"-V"},
			files: map[string]string{
				"records.config": "records.config", "logging.yaml": "logging.yaml",
				"ip_allow.yaml": "ip_allow.yaml", "storage.config": "storage.config", "runroot.yaml": "runroot.yaml",
			},
			args: func(peers.Values) []string { return nil },
			env:  func(v peers.Values) []string { return []string{"TS_RUNROOT=" + filepath.Join(v.Work, "runroot.yaml")} },
		},
		buffered(),
		caddy("limited", "async_proxy, limiting", Refusing, "a client over its limit"),
		caddy("respond", "Caddy `respond`", Refusing, "the same answer without a limiter"),
	}
}

// caddy returns a peer that is this repository's build of Caddy.
func caddy(id, name string, abilities Ability, note string) *Peer {
	return &Peer{
		ID: id, Name: name, Note: note, Abilities: abilities,
		program: "caddy", build: "../cmd/caddy", version: []string{"version"},
		files: map[string]string{"Caddyfile": id + ".Caddyfile"},
		args: func(v peers.Values) []string {
			return []string{"run", "--config", filepath.Join(v.Work, "Caddyfile"), "--adapter", "caddyfile"}
		},
		env: func(v peers.Values) []string {
			return []string{"XDG_DATA_HOME=" + v.Work, "XDG_CONFIG_HOME=" + v.Work}
		},
	}
}

// buffered returns async_proxy in another configuration.
func buffered() *Peer {
	p := caddy("async_proxy_buffered", "async_proxy, buffered logs", Forwarding|Tunnelling, "`async_proxy_buffer` around both logs' files")
	p.files["Caddyfile"] = "async_proxy.Caddyfile"
	p.Buffered = true
	return p
}

// Find builds the program of the peer, or looks for it, and asks for its version. Programs
// are built in the directory bin. The error says what is missing.
func (p *Peer) Find(bin string) error {
	if p.build == "" {
		return p.look()
	}
	p.Path = filepath.Join(bin, p.program)
	dir, pkg := ".", p.build
	if rest, outside := strings.CutPrefix(pkg, "../"); outside {
		dir, pkg = "..", "./"+rest
	}
	cmd := exec.Command("go", "build", "-o", p.Path, pkg)
	cmd.Dir = dir
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %s: %w\n%s", p.build, err, output)
	}
	return p.ask()
}

// look looks for an installed program, also where daemons are.
func (p *Peer) look() error {
	for _, name := range []string{p.program, "/usr/sbin/" + p.program, "/usr/local/sbin/" + p.program} {
		if path, err := exec.LookPath(name); err == nil {
			p.Path = path
			return p.ask()
		}
	}
	return fmt.Errorf("%s is not installed", p.program)
}

var number = regexp.MustCompile(`v?\d+(\.\d+)+[^\s,]*`)

// ask asks a program for its version. A program built from a library has the version of
// that.
func (p *Peer) ask() error {
	cmd := exec.Command(p.Path, p.version...)
	if p.version == nil {
		cmd = exec.Command("go", "list", "-m", "-f", "{{.Version}}", "github.com/elazarl/goproxy")
	}
	output, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	text := string(output)
	if _, after, found := strings.Cut(text, " in Caddy "); found {
		text = after // before it is the version of async_proxy
	}
	p.Version = strings.TrimPrefix(number.FindString(text), "v")
	if p.program == "caddy" {
		p.Version = "Caddy " + p.Version
	}
	if p.ID == "async_proxy" {
		if commit, err := exec.Command("git", "rev-parse", "--short", "HEAD").Output(); err == nil {
			p.Version = "commit " + strings.TrimSpace(string(commit)) + " on " + p.Version
		}
	}
	return nil
}
