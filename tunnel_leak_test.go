// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// A stream that the client has reset is freed although the target goes on sending and the
// connection stays open: no deadline's timer keeps it alive.
func TestResetStreamsLeaveNoMemory(t *testing.T) {
	const each = 200
	var handlers sync.WaitGroup
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer handlers.Done()
		control := http.NewResponseController(w)
		writer := &caddyhttp.IdleTimeoutWriter{
			ResponseWriterWrapper: &caddyhttp.ResponseWriterWrapper{ResponseWriter: w}, Ctrl: control,
			Deadline: caddyhttp.IdleDeadline{Timeout: time.Minute}, ClearBetweenWrites: true,
		}
		reader := &caddyhttp.IdleTimeoutReader{
			ReadCloser: r.Body, Ctrl: control,
			Deadline: caddyhttp.IdleDeadline{Timeout: time.Minute}, ClearBetweenReads: true,
		}
		r.Body = reader
		p := newStreamPeer(writer, r.WithContext(caddyhttp.ContextWithIdleTimeouts(r.Context(), reader, writer)))
		_, _ = p.Write([]byte("before the reset"))
		<-r.Context().Done()
		_, _ = p.Write([]byte("after the reset"))
		_, _ = p.Read(make([]byte, 1))
	}))
	server.Config.Protocols = new(http.Protocols)
	server.Config.Protocols.SetUnencryptedHTTP2(true)
	server.Start()
	defer server.Close()
	c := &tunnelClient{t: t, protocol: "h2c", proxy: server.Listener.Addr().String(), shared: 10 * each}
	resetStreams := func() int64 {
		t.Helper()
		handlers.Add(each)
		if err := concurrently(each, 8, func(int) error {
			conn, err := c.try("target.example:443", "")
			if err == nil {
				conn.Reset()
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		handlers.Wait()
		return liveHeap()
	}
	resetStreams()
	before := resetStreams()
	if grown := resetStreams() - before; grown > each*500 {
		t.Errorf("%d streams left %d bytes", each, grown)
	}
}

// liveHeap returns the number of heap bytes in use.
func liveHeap() int64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.GC() // the second collection also frees what pools hold
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// deadlines records the deadlines that are set.
type deadlines struct {
	*httptest.ResponseRecorder
	read, write []time.Time
}

func (d *deadlines) SetReadDeadline(at time.Time) error {
	d.read = append(d.read, at)
	return nil
}

func (d *deadlines) SetWriteDeadline(at time.Time) error {
	d.write = append(d.write, at)
	return nil
}

// A stream sets no deadline per read or write. The operator's timeouts for whole requests
// apply; over HTTP/3 the stream sets them itself.
func TestStreamPeerSetsNoDeadlines(t *testing.T) {
	due := time.Now().Add(time.Hour)
	for _, row := range []struct {
		name  string
		major int
		due   time.Time
		want  int
	}{
		{"HTTP/2", 2, time.Time{}, 0},
		{"HTTP/2 with timeouts", 2, due, 0}, // net/http has its own timers
		{"HTTP/3", 3, time.Time{}, 0},
		{"HTTP/3 with timeouts", 3, due, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			set := &deadlines{ResponseRecorder: httptest.NewRecorder()}
			control := http.NewResponseController(set)
			body := &caddyhttp.IdleTimeoutReader{
				ReadCloser: io.NopCloser(strings.NewReader("up")), Ctrl: control,
				Deadline: caddyhttp.IdleDeadline{Timeout: time.Minute, HardDeadline: row.due},
			}
			w := &caddyhttp.IdleTimeoutWriter{
				ResponseWriterWrapper: &caddyhttp.ResponseWriterWrapper{ResponseWriter: set}, Ctrl: control,
				Deadline: caddyhttp.IdleDeadline{Timeout: time.Minute, HardDeadline: row.due},
			}
			r := httptest.NewRequest(http.MethodConnect, "https://target.example:443", body)
			r = r.WithContext(caddyhttp.ContextWithIdleTimeouts(r.Context(), body, w))
			r.ProtoMajor = row.major
			p := newStreamPeer(w, r)
			if _, err := p.Write([]byte("down")); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(p); err != nil || string(got) != "up" {
				t.Fatalf("read %q, %v", got, err)
			}
			if len(set.read) != row.want || len(set.write) != row.want {
				t.Errorf("deadlines for reads %v and for writes %v, want %d each", set.read, set.write, row.want)
			}
			for _, at := range append(set.read, set.write...) {
				if !at.Equal(due) {
					t.Errorf("deadline %v, want %v", at, due)
				}
			}
		})
	}
}
