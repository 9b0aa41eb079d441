// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
	"github.com/asyncproxy/caddy-async-proxy/internal/tunnel"
)

// Bulk data is spliced through a pipe, which is then reused. Where the kernel refuses that,
// the relay copies.
func TestRelaySplices(t *testing.T) {
	const size = 16 << 20
	for name, errno := range map[string]unix.Errno{
		"allowed": 0, "forbidden": unix.EPERM, "not there": unix.ENOSYS, "not for this socket": unix.EINVAL,
	} {
		t.Run(name, func(t *testing.T) {
			tunnel.ClosePipes()
			from, in := socketPair(t)
			to, out := socketPair(t)
			rig := &relayRig{dst: to, result: make(chan relayResult, 1)}
			go func() {
				if errno != 0 {
					if err := refuseSplice(errno); err != nil {
						t.Error(err)
					}
				}
				rig.run(to, from)
				end(to)
			}()
			go func() {
				sendBulk(t, "the source", in, 1, size)
				end(in)
			}()
			receiveBulk(t, "the destination", out, 1, size)
			if res := <-rig.result; res.readErr != io.EOF || res.writeErr != nil || rig.copied.Load() != size {
				t.Errorf("the relay ended with %v, %v after %d bytes; want EOF after %d", res.readErr, res.writeErr, rig.copied.Load(), size)
			}
			if errno == 0 && len(tunnel.Pipes) != 1 {
				t.Errorf("%d pipes were used, want 1", len(tunnel.Pipes))
			}
		})
	}
}

// A fast-path client's bulk response is not copied either.
func TestClientConnWriterSplices(t *testing.T) {
	from, in := socketPair(t)
	to, _ := socketPair(t)
	if _, err := in.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	w := &responseWriter{client: newClientConn(unitListener(nil), newReadConn(to.(*net.TCPConn), nil), false)}
	w.reset(false, false)
	w.Header()["Content-Length"] = []string{"1000"}
	w.WriteHeader(http.StatusOK)
	result := make(chan error, 1)
	go func() {
		if err := refuseSplice(unix.EPERM); err != nil {
			t.Error(err)
		}
		_, err := w.ReadFrom(io.LimitReader(from, 1000))
		result <- err
	}()
	if err := <-result; !errors.Is(err, unix.EPERM) {
		t.Errorf("ReadFrom without splice: %v", err)
	}
}

// WaitWritable returns when the socket accepts data again, or at its deadline.
func TestWaitWritable(t *testing.T) {
	near, far := socketPair(t)
	socket := near.(*net.TCPConn)
	if err := tcpconn.WaitWritable(socket); err != nil {
		t.Errorf("with room in the buffer: %v", err)
	}
	_ = socket.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := io.CopyN(near, zeros{}, 64<<20); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the socket accepted 64 MiB: %v", err)
	}
	_ = socket.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if err := tcpconn.WaitWritable(socket); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("with a full buffer: %v", err)
	}
	_ = socket.SetWriteDeadline(time.Now().Add(patience))
	go func() { _, _ = io.Copy(io.Discard, far) }()
	if err := tcpconn.WaitWritable(socket); err != nil {
		t.Errorf("with room again: %v", err)
	}
}

// refuseSplice makes splice(2) fail for the rest of the calling goroutine, which keeps its
// thread to itself.
func refuseSplice(errno unix.Errno) error {
	runtime.LockOSThread()
	const number = 0 // offset of the system call number in seccomp_data
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SPLICE, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	_, _, failure := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program)))
	if failure != 0 {
		return failure
	}
	return nil
}
