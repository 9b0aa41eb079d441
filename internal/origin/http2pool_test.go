// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//lint:file-ignore SA1019 net/http offers no way to ping an HTTP/2 connection, or to ask for its state

package origin

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
)

func dialTCP(ctx context.Context, authority string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", authority)
}

func (o *http2Pool) ask(ctx context.Context, authority string) (int, error) {
	wait := newHeadTimer(ctx, 0)
	defer wait.end()
	r, err := http.NewRequestWithContext(wait.ctx, http.MethodGet, "https://"+authority+"/", nil)
	if err != nil {
		return 0, err
	}
	res, err := o.transport.RoundTrip(r)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

// Concurrent requests share one connection, which is rechecked for each request that finds
// it open. It closes with its pool, after the last response.
func TestHTTP2OriginsShare(t *testing.T) {
	answer := make(chan struct{})
	var asked, judged atomic.Int64
	authority, opened, open := conntest.HTTP2Server(t, func(http.ResponseWriter, *http.Request) {
		asked.Add(1)
		<-answer
	})
	o, err := newHTTP2Pool(dialTCP, newPool(nil))
	if err != nil {
		t.Fatal(err)
	}
	o.recheck = func(_ context.Context, name string, _ net.Conn, to netip.AddrPort) error {
		if judged.Add(1); name != authority || to.String() != authority {
			t.Errorf("rechecked %s at %v, want %s", name, to, authority)
		}
		return nil
	}
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if status, err := o.ask(t.Context(), authority); status != http.StatusOK {
				t.Errorf("%d, %v", status, err)
			}
		})
	}
	conntest.Eventually(t, "all requests to wait", func() bool { return asked.Load() == 20 })
	if n := opened.Load(); n != 1 || o.count() != 0 || judged.Load() != 19 {
		t.Errorf("%d connections, %d of them idle, %d rechecks; want 1 busy connection and 19 rechecks", n, o.count(), judged.Load())
	}
	o.close()
	if n := open.Load(); n != 1 {
		t.Error("the connection closed under its requests")
	}
	close(answer)
	all.Wait()
	conntest.Eventually(t, "the connection to end", func() bool { return open.Load() == 0 })
	if _, err := o.ask(t.Context(), authority); err != nil { // of a handler whose config was replaced
		t.Error(err)
	}
	conntest.Eventually(t, "the late request's connection to close, too", func() bool { return open.Load() == 0 })

	o, _ = newHTTP2Pool(dialTCP, newPool(nil))
	if _, err := o.ask(t.Context(), authority); err != nil || o.count() != 1 {
		t.Errorf("%v; %d idle connections, want one", err, o.count())
	}
	forbidden := errors.New("forbidden")
	o.recheck = func(context.Context, string, net.Conn, netip.AddrPort) error { return forbidden }
	if _, err := o.ask(t.Context(), authority); !errors.Is(err, forbidden) || !errors.As(err, new(*DialError)) {
		t.Errorf("%v, want forbidden", err)
	}
	if o.close(); o.count() != 0 {
		t.Error("idle connections are left after close")
	}
	conntest.Eventually(t, "the idle connection to end", func() bool { return open.Load() == 0 })
}

// A request that is canceled while it dials fails alone: requests that wait for the same
// dial start another. A failed dial fails all of them.
func TestHTTP2OriginsDial(t *testing.T) {
	authority, _, _ := conntest.HTTP2Server(t, func(http.ResponseWriter, *http.Request) {})
	var dials atomic.Int64
	begun := make(chan struct{}, 10)
	refused := errors.New("refused")
	failing := make(chan struct{})
	o, err := newHTTP2Pool(func(ctx context.Context, authority string) (net.Conn, error) {
		begun <- struct{}{}
		switch dials.Add(1) {
		case 1:
			<-ctx.Done()
			return nil, ctx.Err()
		case 2:
			<-failing
			return nil, refused
		}
		return dialTCP(ctx, authority)
	}, newPool(nil))
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	first, leave := context.WithCancel(t.Context())
	errs := make(chan error, 3)
	go func() { _, err := o.ask(first, authority); errs <- err }()
	<-begun
	for range 2 {
		go func() { _, err := o.ask(t.Context(), authority); errs <- err }()
	}
	leave()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want the first request's cancellation", err)
	}
	<-begun
	time.AfterFunc(20*time.Millisecond, func() { close(failing) }) // by then the third request waits too, or dials itself
	for range 2 {
		if err := <-errs; err != nil && !errors.Is(err, refused) {
			t.Error(err)
		}
	}
	if _, err := o.ask(t.Context(), authority); err != nil {
		t.Errorf("after a failed dial: %v", err)
	}
}

// A failed dial fails all requests that wait for it, even if the one that dialed ends
// before they notice.
func TestHTTP2OriginsDialFailsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int64
		refused := errors.New("refused")
		failing := make(chan struct{})
		o, err := newHTTP2Pool(func(context.Context, string) (net.Conn, error) {
			dials.Add(1)
			<-failing
			return nil, refused
		}, newPool(nil))
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				ctx, end := context.WithCancel(t.Context())
				defer end()
				if _, err := o.get(ctx, "origin.test:443"); !errors.Is(err, refused) {
					t.Errorf("%v, want refused", err)
				}
			})
		}
		synctest.Wait()
		close(failing)
		all.Wait()
		if n := dials.Load(); n != 1 {
			t.Errorf("%d dials, want one", n)
		}
	})
}
