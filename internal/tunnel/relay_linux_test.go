// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// Bulk data is spliced through a pipe, which is then reused. Where the kernel refuses that,
// the relay copies.
func TestRelaySplices(t *testing.T) {
	const size = 16 << 20
	for name, errno := range map[string]unix.Errno{
		"allowed": 0, "forbidden": unix.EPERM, "not there": unix.ENOSYS, "not for this socket": unix.EINVAL,
	} {
		t.Run(name, func(t *testing.T) {
			tcpconn.ClosePipes()
			from, in := conntest.Pair(t)
			to, out := conntest.Pair(t)
			rig := &relayRig{dst: to, result: make(chan relayResult, 1)}
			go func() {
				if errno != 0 {
					if err := conntest.RefuseSplice(errno); err != nil {
						t.Error(err)
					}
				}
				rig.run(to, from)
				end(to)
			}()
			go func() {
				conntest.SendBulk(t, "the source", in, 1, size)
				end(in)
			}()
			conntest.ReceiveBulk(t, "the destination", out, 1, size)
			if res := <-rig.result; res.readErr != io.EOF || res.writeErr != nil || rig.copied.Load() != size {
				t.Errorf("the relay ended with %v, %v after %d bytes; want EOF after %d", res.readErr, res.writeErr, rig.copied.Load(), size)
			}
			if errno == 0 && len(tcpconn.Pipes) != 1 {
				t.Errorf("%d pipes were used, want 1", len(tcpconn.Pipes))
			}
		})
	}
}

// Bulk data that arrives in bursts is passed on as it arrives, without a small message in front
// of each burst.
func TestRelaySplicesWholeBursts(t *testing.T) {
	const bursts, size = 100, 32 << 10
	rig := newRelayRig(t, conntest.Pair, conntest.Pair)
	data, received := make([]byte, size), make([]byte, size)
	for range bursts {
		if _, err := rig.in.Write(data); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(rig.out, received); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := rig.dst.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info *unix.TCPInfo
	if err := conn.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); err != nil || info == nil {
		t.Fatal(err)
	}
	if n := info.Data_segs_out; n > bursts*3/2 {
		t.Errorf("%d bursts were passed on in %d segments", bursts, n)
	}
	_ = end(rig.in)
	<-rig.result
}

// A burst through a buffer ends when the socket has no more bytes, also if a full read was the
// last one: it neither waits nor reads again and again.
func TestBurstFromASocketEnds(t *testing.T) {
	from, in := conntest.Pair(t)
	to, _ := conntest.Pair(t)
	conn, err := from.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var copied flow
	r := &socketRelay{dst: to, conn: conn, copied: &copied}
	size := int64(len(tcpconn.Buffer{}))
	if _, err := in.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	for copied.Load() < size { // the bytes may arrive in parts
		if readErr, writeErr := relayBurst(to, r, &copied); readErr != syscall.EAGAIN && readErr != nil || writeErr != nil {
			t.Fatalf("%v, %v after %d bytes", readErr, writeErr, copied.Load())
		}
	}
	if readErr, writeErr := relayBurst(to, r, &copied); readErr != syscall.EAGAIN || writeErr != nil {
		t.Errorf("with a silent socket: %v, %v; want %v", readErr, writeErr, syscall.EAGAIN)
	}
}

// An idle relay waits for its source without a buffer or a pipe.
func TestIdleRelaysHoldNothing(t *testing.T) {
	const n, size = 500, 64 << 10
	stack := int64(6 << 10) // upper bound per relay
	if conntest.Race {
		stack *= 2
	}
	for _, carried := range []int64{0, 1, size} {
		t.Run(fmt.Sprintf("after %d bytes", carried), func(t *testing.T) {
			rigs := make([]*relayRig, n)
			ends := make([][2]net.Conn, n) // each relay's source and destination
			for i := range rigs {
				rigs[i] = &relayRig{result: make(chan relayResult, 1)}
				ends[i][0], rigs[i].in = conntest.Pair(t)
				ends[i][1], rigs[i].out = conntest.Pair(t)
			}
			tcpconn.ClosePipes()
			before := usageOf(t)
			for i, rig := range rigs {
				go rig.run(ends[i][1], ends[i][0])
			}
			payload, received := make([]byte, carried), make([]byte, carried)
			for _, rig := range rigs {
				go rig.in.Write(payload)
				if _, err := io.ReadFull(rig.out, received); err != nil {
					t.Fatal(err)
				}
			}
			var held usage
			defer func() { t.Logf("%d relays hold %+v", n, held) }()
			for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
				tcpconn.ClosePipes()
				held = usageOf(t).since(before)
				if held.descriptors == 0 && held.heap < n*2<<10 && held.stacks < n*stack {
					break
				}
				if time.Since(start) > 20*time.Second {
					t.Fatal("idle relays do hold something")
				}
			}
			for _, rig := range rigs {
				end(rig.in)
				if res := <-rig.result; res.readErr != io.EOF {
					t.Errorf("the relay ended with %v, want EOF", res.readErr)
				}
			}
		})
	}
}

// usage is the resources that this process uses.
type usage struct {
	descriptors  int
	heap, stacks int64
}

func (u usage) since(before usage) usage {
	return usage{u.descriptors - before.descriptors, u.heap - before.heap, u.stacks - before.stacks}
}

func usageOf(t testing.TB) usage {
	t.Helper()
	runtime.GC()
	runtime.GC() // empties the pools' victim caches
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{descriptors(t), int64(m.HeapAlloc), int64(m.StackInuse)}
}

// If no descriptors are left for a pipe, the relay copies.
func TestRelayWithoutPipes(t *testing.T) {
	rig := newRelayRig(t, conntest.Pair, conntest.Pair)
	tcpconn.ClosePipes()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	if p, err := tcpconn.NewPipe(); err == nil {
		p.Release(false)
		t.Fatal("pipes can be created: this test tests nothing")
	}
	go func() {
		io.Copy(struct{ io.Writer }{rig.in}, conntest.Bulk(1, 16<<20))
		end(rig.in)
	}()
	go func() {
		<-rig.result
		end(rig.dst)
	}()
	conntest.ReceiveBulk(t, "the other side", rig.out, 1, 16<<20)
}

// descriptors counts this process's open descriptors.
func descriptors(t testing.TB) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names) - 1 // without the directory's own
}
