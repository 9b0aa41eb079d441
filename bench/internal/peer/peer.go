// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/load"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/origin"
	"github.com/asyncproxy/caddy-async-proxy/bench/internal/proc"
	"github.com/asyncproxy/caddy-async-proxy/bench/peers"
)

// readiness is how long a peer may take until it serves its first request.
const readiness = 30 * time.Second

// Running is a peer that runs, with an origin of its own. Stop must be called.
type Running struct {
	*Peer
	Log     bool
	Target  load.Target
	Origin  *origin.Origin
	program *proc.Program
	work    string
}

// Start starts the peer, and waits until it serves requests. With log, it logs them. It
// writes below the directory dir only.
func (p *Peer) Start(ctx context.Context, dir string, log bool) (*Running, error) {
	work, err := os.MkdirTemp(dir, p.ID+"-")
	if err != nil {
		return nil, err
	}
	r := &Running{Peer: p, Log: log, work: work}
	if err := r.start(ctx); err != nil {
		output, _ := os.ReadFile(r.output())
		r.Stop()
		return nil, fmt.Errorf("%s: %w\n%s", p.ID, err, output[max(0, len(output)-2000):])
	}
	return r, nil
}

func (r *Running) output() string { return filepath.Join(r.work, "output") }

func (r *Running) start(ctx context.Context) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	if r.Origin, err = origin.Listen("127.0.0.1:0"); err != nil {
		return err
	}
	v := peers.Values{Port: port, Origin: r.Origin.Address(), Work: r.work, Log: r.Log, Buffered: r.Buffered, Root: os.Getuid() == 0}
	for name, from := range r.files {
		text, err := peers.Expand(from, v)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(r.work, name), text, 0o644); err != nil {
			return err
		}
	}
	// Programs that are started by root become another user, and write their logs as that.
	if err := os.Chmod(r.work, 0o777); err != nil {
		return err
	}
	var env []string
	if r.env != nil {
		env = r.env(v)
	}
	if r.program, err = proc.Start(r.output(), env, r.Path, r.args(v)...); err != nil {
		return err
	}
	r.Target = load.Target{
		Server:  fmt.Sprintf("127.0.0.1:%d", port),
		Origin:  r.Origin.Address(),
		Reverse: r.Abilities&Reversing != 0,
	}
	return r.await(ctx)
}

// await waits until the peer gives the answer that it should.
func (r *Running) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readiness)
	defer cancel()
	probe := load.Load{Path: "/128", Status: 200, AnyBytes: true}
	if r.Abilities&Refusing != 0 {
		probe.Status = 429
	}
	return r.program.Await(ctx, func() error { return load.Probe(ctx, r.Target, probe) })
}

// Usage returns what all processes of the peer use together.
func (r *Running) Usage() proc.Usage { return r.program.Usage() }

// Stop ends the peer with all its processes, and removes what it wrote.
func (r *Running) Stop() {
	if r.program != nil {
		r.program.Stop()
	}
	if r.Origin != nil {
		r.Origin.Close()
	}
	os.RemoveAll(r.work)
}

// nextPort starts below the ephemeral port range: between the choice of a port here and its use by the
// peer, no connection of the load gets it.
var nextPort atomic.Int32

func init() { nextPort.Store(12000 + int32(os.Getpid()%4000)) }

// freePort returns a port that nothing listens on, a different one each time.
func freePort() (int, error) {
	for {
		port := int(nextPort.Add(1))
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return 0, err
		}
		return port, listener.Close()
	}
}
