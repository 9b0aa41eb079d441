// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// An origin that does not read a large head blocks neither the proxy nor a client that
// disconnects.
func TestUnreadLargeHead(t *testing.T) {
	for _, leaves := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			near, far := net.Pipe()
			defer far.Close()
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			x := &Exchange{
				ctx: ctx, conn: newPooledConn(near, "origin.test:80"), limits: &Limits{HeaderTimeout: time.Minute},
				Request: &Request{
					Method: http.MethodGet, Target: "/", Host: "origin.test",
					Header: http.Header{"A": {strings.Repeat("a", smallHead)}},
				},
			}
			defer x.conn.Close()
			if leaves {
				time.AfterFunc(time.Second, leave)
			}
			bound := time.AfterFunc(time.Hour, func() {
				t.Error("the write has no deadline")
				_ = far.Close()
			})
			defer bound.Stop()
			err := x.writeHead(0, true)
			if err == nil || errors.Is(err, os.ErrDeadlineExceeded) == leaves {
				t.Errorf("client disconnects = %v: got %v", leaves, err)
			}
		})
	}
}

// A response that is delimited by the end of the connection is cut off if a write has seen
// a reset, although the read sees only EOF.
func TestResetSeenByWriter(t *testing.T) {
	for _, failure := range []error{syscall.ECONNRESET, syscall.EPIPE} {
		body := &RequestBody{Reader: strings.NewReader("x"), Length: 1, Count: func(int64) {}}
		near, far := net.Pipe()
		defer far.Close()
		conn := newPooledConn(failingWrites{near, failure}, "origin.test:80")
		s := newBodySender(conn, newBodyReader(&Request{Body: body}, &conn.clock, nil))
		go s.run()
		s.proceed(true)
		response := &ResponseBody{Body: h1.Body{R: bufio.NewReader(strings.NewReader("part")), Remaining: -1}, sender: s}
		_, err := io.ReadAll(response)
		if reset := failure == syscall.ECONNRESET; (err == io.ErrUnexpectedEOF) != reset {
			t.Errorf("after %v: %v", failure, err)
		}
	}
}

type failingWrites struct {
	net.Conn
	err error
}

func (c failingWrites) Write([]byte) (int, error) { return 0, c.err }
