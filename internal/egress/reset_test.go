// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/net/http2"

	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

func TestIsConnReset(t *testing.T) {
	windows := runtime.GOOS == "windows"
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{syscall.ECONNRESET, true},
		{&net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}, true},
		{fmt.Errorf("reading: %w", streamError{http2.ErrCodeCancel}), true},
		{&net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("wsarecv", syscall.Errno(10054))}, windows},  // WSAECONNRESET
		{&net.OpError{Op: "write", Net: "tcp", Err: os.NewSyscallError("wsasend", syscall.Errno(10053))}, windows}, // WSAECONNABORTED
		{syscall.EPIPE, false},
		{io.EOF, false},
		{net.ErrClosed, false},
		{errors.New("reset"), false},
		{nil, false},
	} {
		if got := tcpconn.IsReset(tc.err); got != tc.want {
			t.Errorf("%v: %v, want %v", tc.err, got, tc.want)
		}
		if got := IsClosed(tc.err); got != (tc.want || tc.err == syscall.EPIPE || tc.err == io.EOF) {
			t.Errorf("%v: closed %v", tc.err, got)
		}
	}
}
