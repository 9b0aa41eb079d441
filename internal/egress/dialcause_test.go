// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package egress

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// A connection is stale if its peer has closed it after an earlier request, or has silently
// died. What the peer has sent, and our own timeout, say nothing of the kind.
func TestIsStale(t *testing.T) {
	for _, row := range []struct {
		err           error
		fresh, reused bool
	}{
		{io.EOF, false, true},
		{syscall.ECONNRESET, false, true},
		{&os.SyscallError{Syscall: "write", Err: syscall.EPIPE}, false, true},
		{fmt.Errorf("on a stream: %w", errMuxSilent), true, true},
		{os.ErrDeadlineExceeded, false, false},
		{h1.ErrHeadTooLarge, false, false},
		{h1.ProtocolError("not HTTP"), false, false},
		{errors.New("tls: bad record MAC"), false, false},
	} {
		if fresh, reused := IsStale(row.err, false), IsStale(row.err, true); fresh != row.fresh || reused != row.reused {
			t.Errorf("%v: %v on a new connection, %v on a reused one; want %v and %v", row.err, fresh, reused, row.fresh, row.reused)
		}
	}
}
