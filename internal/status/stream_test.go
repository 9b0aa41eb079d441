// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestFeedTakesOneSnapshotASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var taken int
		f := newFeed(func(now time.Time) Snapshot {
			taken++
			return Snapshot{Refusals: RefusalList{Refusals: []Refusal{{Client: "192.0.2.7"}}}}
		})
		time.Sleep(time.Hour)
		if taken != 0 {
			t.Errorf("%d snapshots were taken without a viewer", taken)
		}
		var viewers []*viewer
		for range maxViewers {
			viewers = append(viewers, f.subscribe(false))
		}
		if f.subscribe(true) != nil {
			t.Error("one more than maxViewers was accepted")
		}
		f.unsubscribe(viewers[0])
		viewers[0] = f.subscribe(true)
		synctest.Wait()
		first := <-viewers[1].events
		if !bytes.HasPrefix(first, []byte("event: snapshot\ndata: {")) || !bytes.HasSuffix(first, []byte("}\n\n")) || bytes.Count(first, []byte("\n")) != 3 {
			t.Errorf("the event is %q", first)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if taken != 11 {
			t.Errorf("%d snapshots were taken in 10 s, want 11", taken)
		}
		// No viewer has read since: each holds the oldest event, and all hold the same one.
		a, b, masked := <-viewers[2].events, <-viewers[3].events, <-viewers[0].events
		if &a[0] != &b[0] {
			t.Error("the snapshot is encoded for each viewer")
		}
		if !bytes.Contains(a, []byte(`"192.0.2.7"`)) || bytes.Contains(masked, []byte("192.0.2.7")) || !bytes.Contains(masked, []byte(`"192.0.2.0/24"`)) {
			t.Errorf("one got %s\nthe other %s", a, masked)
		}
		for _, v := range viewers {
			f.unsubscribe(v)
		}
		time.Sleep(time.Hour)
		if taken != 11 {
			t.Errorf("%d snapshots were taken after the last viewer had left", taken-11)
		}
	})
}

// TestStreamSendsTheHistoryOnce checks that a viewer gets each step once, and that snapshots have no
// history.
func TestStreamSendsTheHistoryOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := emptyView()
		v.in.Started = time.Now()
		v.history = newHistory(v.in.Started, func() sums { return sums{} })
		time.Sleep(17 * time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		w := httptest.NewRecorder()
		ended := make(chan struct{})
		go func() {
			(&Page{View: v}).stream(w, httptest.NewRequest("GET", "/events", nil).WithContext(ctx))
			close(ended)
		}()
		time.Sleep(14500 * time.Millisecond)
		cancel()
		<-ended
		var order []string
		for event := range strings.SplitSeq(strings.TrimSuffix(w.Body.String(), "\n\n"), "\n\n") {
			name, data, _ := strings.Cut(strings.TrimPrefix(event, "retry: 1000\n"), "\ndata: ")
			name = strings.TrimPrefix(name, "event: ")
			if name == "history" {
				var h History
				if err := json.Unmarshal([]byte(data), &h); err != nil {
					t.Fatal(err)
				}
				name += fmt.Sprint(" ", len(h.Tunnels), " from ", h.Start.Sub(v.in.Started))
			} else if strings.Contains(data, "step_seconds") {
				t.Errorf("%s has a history", name)
			}
			if name != "snapshot" || !slices.Contains(order, name) {
				order = append(order, name)
			}
		}
		if want := []string{"hello", "history 3 from 0s", "snapshot", "history 1 from 15s", "history 1 from 20s", "history 1 from 25s"}; !slices.Equal(order, want) {
			t.Errorf("events %q, want %q", order, want)
		}
	})
}

// BenchmarkSnapshotEvent encodes the largest possible snapshot, as happens once a second
// whatever the number of viewers.
func BenchmarkSnapshotEvent(b *testing.B) {
	var snap Snapshot
	for i := range 200 {
		name := fmt.Sprintf("2001:db8:%x:%x::/64", i, i*i)
		if i < 100 {
			snap.Clients.Clients = append(snap.Clients.Clients, Client{Client: name, Zone: "default", Tokens: 7.5, Burst: 10, Refill: 0.5, Requests: 123456, LastSeen: time.Now()})
			snap.Refusals.Refusals = append(snap.Refusals.Refusals, Refusal{Last: time.Now(), Client: name, Target: "www.example.com:443", Status: 403, Reason: "destination_ip_prohibited", Detail: "This proxy does not connect to 10.0.0.7, which is a private address; its option allow opens it."})
		}
		snap.Tunnels.Tunnels = append(snap.Tunnels.Tunnels, Tunnel{ID: uint64(i), Client: name, Target: "www.example.com:443", Address: "198.51.100.7:443", Proto: "HTTP/2.0", Started: time.Now(), BytesUp: 123456, BytesDown: 1234567})
	}
	b.ReportAllocs()
	for b.Loop() {
		b.SetBytes(int64(len(snapshotEvent(snap))))
	}
}

// watch opens the page's stream and returns its body and a function that reads one event.
func watch(t *testing.T, server *httptest.Server) (body io.Closer, next func()) {
	t.Helper()
	res, err := server.Client().Get(server.URL + "/events")
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatal(res, err)
	}
	t.Cleanup(func() { res.Body.Close() })
	r := bufio.NewReader(res.Body)
	return res.Body, func() {
		t.Helper()
		for {
			switch line, err := r.ReadString('\n'); {
			case err != nil:
				t.Fatal(err)
			case line == "\n":
				return
			}
		}
	}
}

// waitForViewers waits until v has n viewers.
func waitForViewers(t *testing.T, v *View, n int) {
	t.Helper()
	viewers := func() int {
		v.feed.mu.Lock()
		defer v.feed.mu.Unlock()
		return len(v.feed.viewers)
	}
	for deadline := time.Now().Add(time.Minute); viewers() != n; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("got %d viewers, want %d", viewers(), n)
		}
	}
}

func TestViewersAreCapped(t *testing.T) {
	v := emptyView()
	server := newServer(t, v)
	var bodies []io.Closer
	for range maxViewers {
		body, _ := watch(t, server)
		bodies = append(bodies, body)
	}
	res, err := server.Client().Get(server.URL + "/events")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(res.Body)
	if res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("Retry-After") == "" || !bytes.Contains(text, []byte("limit of 20")) {
		t.Errorf("the response to one more: %s, Retry-After %q: %s", res.Status, res.Header.Get("Retry-After"), text)
	}
	bodies[0].Close()
	waitForViewers(t, v, maxViewers-1)
	_, next := watch(t, server)
	next()
}

// TestStuckViewer checks that a viewer that does not read is dropped, and blocks nothing
// until then.
func TestStuckViewer(t *testing.T) {
	v := emptyView()
	v.in.Versions = func() Versions {
		return Versions{Version: strings.Repeat("more than the buffers of a connection hold", 1<<18)}
	}
	v.feed.writeTimeout = 2 * time.Second // enough for the viewer that reads
	server := newServer(t, v)
	stuck, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer stuck.Close()
	fmt.Fprint(stuck, "GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
	waitForViewers(t, v, 1)
	body, next := watch(t, server)
	for range 3 {
		next()
	}
	body.Close()
	waitForViewers(t, v, 0)
}
