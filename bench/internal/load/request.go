// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/wire"
)

// loopback returns the server of a target. Both addresses of the target must be on the
// loopback interface.
func loopback(target Target) (netip.AddrPort, error) {
	server, err := wire.Loopback(target.Server)
	if err != nil {
		return server, err
	}
	_, err = wire.Loopback(target.Origin)
	return server, err
}

// requestFor returns the bytes of each request of a load.
func requestFor(target Target, load *Load) []byte {
	if load.Kind == Connects || load.Kind == Download || load.Kind == Upload {
		return connectTo(target.Origin)
	}
	uri := "http://" + target.Origin + load.Path
	if target.Reverse {
		uri = load.Path
	}
	method, fields := "GET", ""
	if load.Content > 0 {
		method = "POST"
		fields = fmt.Sprintf("Content-Type: application/octet-stream\r\nContent-Length: %d\r\n", load.Content)
	}
	if load.Kind == Connections {
		fields += "Connection: close\r\n"
	}
	head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: async_proxy-bench\r\nAccept: */*\r\n%s\r\n",
		method, uri, target.Origin, fields)
	return append([]byte(head), wire.Content(load.Content)...)
}

func connectTo(origin string) []byte {
	return fmt.Appendf(nil, "CONNECT %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: async_proxy-bench\r\n\r\n", origin, origin)
}

// sourceOf returns the address that the client with number i connects from. Several
// addresses have more ports than one, and the kernel keeps those of closed connections.
func sourceOf(i int) net.IP {
	return net.IPv4(127, 0, 0, byte(1+i%32))
}

func wrongStatus(got, want int) error {
	return fmt.Errorf("status %d instead of %d", got, want)
}

// Probe sends one request of the load, once, and reports whether the answer to it is as
// expected.
func Probe(ctx context.Context, target Target, load Load) error {
	if load.Kind != Requests {
		return errors.New("only requests can be a probe")
	}
	r, err := newRun(target, load)
	if err != nil {
		return err
	}
	r.deadline = time.Now().Add(grace)
	if end, ok := ctx.Deadline(); ok && end.Before(r.deadline) {
		r.deadline = end
	}
	c := client{run: r, result: &Result{}, source: sourceOf(0)}
	c.reader.buf = make([]byte, 64<<10)
	defer c.hangUp()
	_, err = c.exchange()
	return err
}
