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
	"testing"
	"testing/synctest"
	"time"
)

// pipeExchange sends a request to an origin at the other end of a pipe. It returns the
// outcome and the synthetic time that it took.
func pipeExchange(ctx context.Context, timeout time.Duration, answer func(w io.Writer)) (*http.Response, time.Duration, error) {
	ended := make(chan struct{})
	dial := func(context.Context, string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go func() {
			defer close(ended)
			defer theirs.Close()
			if _, err := http.ReadRequest(bufio.NewReader(theirs)); err == nil {
				answer(theirs)
			}
		}()
		return ours, nil
	}
	x := &Exchange{pool: newPool(dial), ctx: ctx, limits: &Limits{HeaderTimeout: timeout}, Request: &Request{
		Method: http.MethodGet, Authority: "origin:80", Target: "/", Host: "origin", Header: http.Header{},
		Interim: func(int, http.Header, int, int) {},
	}}
	start := time.Now()
	res, err := x.doHTTP1()
	took := time.Since(start)
	x.Close()
	<-ended
	return res, took, err
}

// A 102 or 103 restarts the response-header timeout, up to ten times the timeout in total.
func TestProgressRestartsTimeout(t *testing.T) {
	const timeout = 3 * time.Second
	for _, row := range []struct {
		interim string
		pause   time.Duration
		n       int
		want    time.Duration
		err     error
	}{
		{"102 Processing", 2 * time.Second, 5, 10 * time.Second, nil},
		{"103 Early Hints", 2 * time.Second, 5, 10 * time.Second, nil},
		{"102 Processing", 2 * time.Second, 100, maxTimeouts * timeout, os.ErrDeadlineExceeded},
		{"102 Processing", 4 * time.Second, 5, timeout, os.ErrDeadlineExceeded},
		{"100 Continue", 2 * time.Second, 5, timeout, os.ErrDeadlineExceeded},
		{"102 Processing", 200 * time.Millisecond, 110, 22 * time.Second, nil},
		{"102 Processing", 0, maxInterim + 1, 0, errInterim},
	} {
		synctest.Test(t, func(t *testing.T) {
			_, took, err := pipeExchange(t.Context(), timeout, func(w io.Writer) {
				for range row.n {
					if _, err := io.WriteString(w, "HTTP/1.1 "+row.interim+"\r\n\r\n"); err != nil {
						return
					}
					time.Sleep(row.pause)
				}
				_, _ = io.WriteString(w, "HTTP/1.1 204 No Content\r\n\r\n")
			})
			if !errors.Is(err, row.err) || took < row.want || took > row.want+timeout/8 {
				t.Errorf("%d of %s, every %v: %v after %v, want %v after %v", row.n, row.interim, row.pause, err, took, row.err, row.want)
			}
		})
	}
}

// The same applies to origins that speak HTTP/2.
func TestHTTP2ProgressRestartsTimeout(t *testing.T) {
	const timeout = 3 * time.Second
	for _, row := range []struct {
		pause time.Duration
		want  time.Duration
	}{
		{0, timeout}, {2 * time.Second, maxTimeouts * timeout}, {4 * time.Second, timeout},
	} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			wait := newHeadTimer(t.Context(), timeout)
			defer wait.end()
			wait.setTurn(true)
			for row.pause > 0 && wait.ctx.Err() == nil {
				select {
				case <-wait.ctx.Done():
				case <-time.After(row.pause):
					wait.recordProgress()
				}
			}
			<-wait.ctx.Done()
			if took := time.Since(start); took < row.want || took > row.want+row.pause || !wait.expired() {
				t.Errorf("progress every %v: ended after %v, want %v", row.pause, took, row.want)
			}
		})
	}
}
