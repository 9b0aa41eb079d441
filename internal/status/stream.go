// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package status

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"
)

const (
	// snapshotInterval is how often viewers receive a snapshot.
	snapshotInterval = time.Second

	// maxViewers bounds the cost of serving viewers.
	maxViewers = 20

	// viewerWriteTimeout is the write timeout for one snapshot. A server that shuts down may
	// have to wait this long for a stalled viewer.
	viewerWriteTimeout = 5 * time.Second
)

// feed takes one snapshot per second for all viewers of all pages while there are any. The
// pages share it because they show the whole process.
//
// All methods are safe for concurrent use.
type feed struct {
	takeSnapshot func(now time.Time) Snapshot
	writeTimeout time.Duration // viewerWriteTimeout

	mu      sync.Mutex
	viewers map[*viewer]struct{}
	stop    chan struct{} // closing it ends run, which runs while there are viewers
}

// viewer is one subscriber of the feed.
type viewer struct {
	masked bool
	events chan []byte // holds one event: a slow viewer misses later ones
}

func newFeed(take func(now time.Time) Snapshot) *feed {
	return &feed{takeSnapshot: take, writeTimeout: viewerWriteTimeout, viewers: make(map[*viewer]struct{})}
}

// subscribe adds a viewer, which must be removed by unsubscribe. It returns nil if there are already
// maxViewers.
func (f *feed) subscribe(masked bool) *viewer {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.viewers) == maxViewers {
		return nil
	}
	v := &viewer{masked: masked, events: make(chan []byte, 1)}
	f.viewers[v] = struct{}{}
	if len(f.viewers) == 1 {
		f.stop = make(chan struct{})
		go f.run(f.stop)
	}
	return v
}

func (f *feed) unsubscribe(v *viewer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.viewers, v)
	if len(f.viewers) == 0 {
		close(f.stop)
	}
}

func (f *feed) run(stop <-chan struct{}) {
	ticker := time.NewTicker(snapshotInterval)
	defer ticker.Stop()
	for now := time.Now(); ; {
		f.publish(now)
		select {
		case <-stop:
			return
		case now = <-ticker.C:
		}
	}
}

// publish sends a snapshot to all viewers. It is encoded once, and a second time if some
// viewers get masked clients.
func (f *feed) publish(now time.Time) {
	f.mu.Lock()
	viewers := slices.Collect(maps.Keys(f.viewers))
	f.mu.Unlock()
	snap := f.takeSnapshot(now)
	for _, masked := range []bool{false, true} { // masking modifies the snapshot, so it comes last
		var event []byte
		for _, v := range viewers {
			if v.masked != masked {
				continue
			}
			if event == nil {
				if masked {
					snap.mask()
				}
				event = snapshotEvent(snap)
			}
			select {
			case v.events <- event:
			default:
			}
		}
	}
}

func snapshotEvent(snap Snapshot) []byte { return encodeEvent("snapshot", snap) }

// encodeEvent returns an event with data as JSON.
func encodeEvent(name string, data any) []byte {
	text, err := json.Marshal(data) // contains no line breaks, which would split the event
	if err != nil {
		return fmt.Appendf(nil, "event: failure\ndata: %q\n\n", err.Error())
	}
	return slices.Concat([]byte("event: "+name+"\ndata: "), text, []byte("\n\n"))
}

// stream sends events (https://html.spec.whatwg.org/multipage/server-sent-events.html)
// until the client disconnects, or the config or the process ends. It sends the whole history once,
// and then each step of it when it has ended.
func (p *Page) stream(w http.ResponseWriter, r *http.Request) {
	feed := p.View.feed
	viewer := feed.subscribe(p.MaskClients)
	if viewer == nil {
		w.Header().Set("Retry-After", "10")
		writeError(w, http.StatusServiceUnavailable, fmt.Sprintf("The limit of %d concurrent viewers is reached; try again later.", maxViewers))
		return
	}
	defer feed.unsubscribe(viewer)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no") // disables buffering in an nginx in front
	controller := http.NewResponseController(w)
	defer func() { _ = controller.SetWriteDeadline(time.Time{}) }()
	send := func(event []byte) bool {
		_ = controller.SetWriteDeadline(time.Now().Add(feed.writeTimeout))
		_, err := w.Write(event)
		return err == nil && controller.Flush() == nil
	}
	sent := int64(0) // the last step of the history that the viewer has
	sendHistory := func() bool {
		steps := p.View.history.after(sent, time.Now())
		if sent > 0 && len(steps.Tunnels) == 0 {
			return true
		}
		sent = steps.lastStep()
		return send(encodeEvent("history", steps))
	}
	hello := fmt.Appendf(nil, "retry: 1000\nevent: hello\ndata: {\"page\":%q,\"actions\":%t,\"masked\":%t}\n\n", version(), p.Actions, p.MaskClients)
	if !send(hello) || r.Method == http.MethodHead || !sendHistory() {
		return
	}
	for {
		select {
		case <-r.Context().Done():
			return
		case <-p.Done:
			return
		case event := <-viewer.events:
			if !sendHistory() || !send(event) {
				return
			}
		}
	}
}
