// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package tunnel

import (
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// relayRows are our relay and alternatives. The CPU time is this process's: it includes the
// work of the two outer ends, which is the same in all rows.
var relayRows = []struct {
	name string
	copy func(dst, src net.Conn)
}{
	{"relay", func(dst, src net.Conn) {
		var copied flow
		relay(dst, src, &copied)
	}},
	{"splice", func(dst, src net.Conn) { io.Copy(dst, src) }},
	{"copy", func(dst, src net.Conn) {
		io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, 32<<10))
	}},
}

// cpuTime returns the CPU time that this process has used.
func cpuTime(b *testing.B) time.Duration {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkRelayBulk measures bulk data in one direction, one MiB per operation.
func BenchmarkRelayBulk(b *testing.B) {
	const size = 1 << 20
	for _, row := range relayRows {
		b.Run(row.name, func(b *testing.B) {
			src, in := conntest.Pair(b)
			dst, out := conntest.Pair(b)
			go row.copy(dst, src)
			go func() {
				for data := make([]byte, 256<<10); ; {
					if _, err := in.Write(data); err != nil {
						return
					}
				}
			}()
			received := make([]byte, 256<<10)
			receive := func(n int) {
				for ; n > 0; n -= len(received) {
					if _, err := io.ReadFull(out, received); err != nil {
						b.Fatal(err)
					}
				}
			}
			receive(8 * size) // lets the TCP windows open
			b.SetBytes(size)
			before, n := cpuTime(b), 0
			for b.Loop() {
				receive(size)
				n++
			}
			b.ReportMetric(float64(cpuTime(b)-before)/float64(n)/(size>>10), "cpu-ns/KB")
			in.Close()
			out.Close()
		})
	}
}

// BenchmarkRelayPingPong sends a message of 64 bytes there and back, through one relay per
// direction.
func BenchmarkRelayPingPong(b *testing.B) {
	for _, row := range relayRows {
		b.Run(row.name, func(b *testing.B) {
			near, client := conntest.Pair(b)
			far, target := conntest.Pair(b)
			go row.copy(far, near)
			go row.copy(near, far)
			go func() {
				for message := make([]byte, 64); ; {
					if _, err := io.ReadFull(target, message); err != nil {
						return
					}
					target.Write(message)
				}
			}()
			message := make([]byte, 64)
			before, n := cpuTime(b), 0
			for b.Loop() {
				client.Write(message)
				if _, err := io.ReadFull(client, message); err != nil {
					b.Fatal(err)
				}
				n++
			}
			b.ReportMetric(float64(cpuTime(b)-before)/float64(n), "cpu-ns/op")
			client.Close()
			target.Close()
		})
	}
}

// BenchmarkRelayIdle measures what a silent tunnel holds: descriptors besides its two
// sockets, and memory besides theirs, after it has carried little or much. One operation is
// all tunnels.
func BenchmarkRelayIdle(b *testing.B) {
	const tunnels = 500
	for _, carried := range []int{64, 256 << 10} {
		for _, row := range relayRows {
			b.Run(fmt.Sprintf("after-%d/%s", carried, row.name), func(b *testing.B) {
				var held usage
				for b.Loop() {
					held = idleTunnels(b, tunnels, carried, row.copy)
				}
				b.ReportMetric(float64(held.descriptors)/tunnels, "fds/tunnel")
				b.ReportMetric(float64(held.heap+held.stacks)/tunnels, "B/tunnel")
				b.ReportMetric(0, "ns/op") // meaningless here
			})
		}
	}
}

func idleTunnels(b *testing.B, n, carried int, relay func(dst, src net.Conn)) usage {
	type tun struct{ client, near, far, target net.Conn }
	tunnels := make([]tun, n)
	for i := range tunnels {
		t := &tunnels[i]
		t.near, t.client = conntest.Pair(b)
		t.far, t.target = conntest.Pair(b)
	}
	tcpconn.ClosePipes()
	before := usageOf(b)
	var ended atomic.Int64
	run := func(dst, src net.Conn) {
		relay(dst, src)
		ended.Add(1)
	}
	data := make([]byte, carried)
	for _, t := range tunnels {
		go run(t.far, t.near)
		go run(t.near, t.far)
		for _, way := range []struct{ from, to net.Conn }{{t.client, t.target}, {t.target, t.client}} {
			go way.from.Write(data)
			if _, err := io.CopyN(io.Discard, way.to, int64(carried)); err != nil {
				b.Fatal(err)
			}
		}
	}
	tcpconn.ClosePipes()
	held := usageOf(b).since(before)
	for _, t := range tunnels {
		for _, conn := range []net.Conn{t.client, t.near, t.far, t.target} {
			conn.Close()
		}
	}
	for ended.Load() < int64(2*n) {
		time.Sleep(time.Millisecond)
	}
	return held
}
