// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

// readerFunc is an io.Reader.
type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// eachSilentOrigin runs a test with an upload to an origin that never responds, over HTTP/1
// and over HTTP/2.
func eachSilentOrigin(t *testing.T, test func(t *testing.T, client *Client, out *Request)) {
	over := make(chan struct{})
	t.Cleanup(func() { close(over) }) // before the servers close
	silent := func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		select {
		case <-over:
		case <-r.Context().Done():
		}
	}
	for name, overTLS := range map[string]bool{"HTTP/1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			var authority string
			if overTLS {
				authority, _, _ = conntest.HTTP2Server(t, silent)
			} else {
				server := httptest.NewServer(http.HandlerFunc(silent))
				t.Cleanup(server.Close)
				authority = server.Listener.Addr().String()
			}
			client, err := NewClient(Config{Dial: dialTCP, Limits: &Limits{Pings: DefaultPings, Exit: t.Context()}})
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			test(t, client, &Request{
				Method: http.MethodPost, OverTLS: overTLS, Authority: authority, Target: "/", Host: authority, Header: http.Header{},
				Body: &RequestBody{Length: 3, Count: func(int64) {}}, Interim: func(int, http.Header, int, int) {},
			})
		})
	}
}

// An exchange that ends without a response leaves no read of the client's body behind.
func TestFailureEndsReading(t *testing.T) {
	eachSilentOrigin(t, func(t *testing.T, client *Client, out *Request) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stopped, returned := make(chan struct{}), new(atomic.Bool)
		out.StopBody = func() { close(stopped) }
		out.Body.Reader = readerFunc(func(p []byte) (int, error) {
			cancel()
			<-stopped
			time.Sleep(10 * time.Millisecond)
			returned.Store(true)
			return 0, os.ErrDeadlineExceeded
		})
		x := client.NewExchange(ctx, out)
		if _, err := x.Do(); err == nil {
			t.Fatal("there is a response")
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			x.Close()
		}()
		select {
		case <-stopped:
		case <-time.After(time.Minute):
			t.Fatal("the client's body is still being read")
		}
		if <-done; !returned.Load() {
			t.Error("Close returned before the read did")
		}
	})
}

// The client's cut-off of its body, and not the disconnect that comes with it, is the reason
// for the failure.
func TestCutOffBodyIsTheReason(t *testing.T) {
	eachSilentOrigin(t, func(t *testing.T, client *Client, out *Request) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		out.StopBody = func() {}
		out.Body.Reader = readerFunc(func(p []byte) (int, error) {
			cancel() // as net/http does before it returns the error
			time.Sleep(senderGrace / 10)
			return 0, io.ErrUnexpectedEOF
		})
		x := client.NewExchange(ctx, out)
		defer x.Close()
		if _, err := x.Do(); !errors.As(err, new(*RequestBodyError)) {
			t.Errorf("got %v, want the failure of the body", err)
		}
	})
}
