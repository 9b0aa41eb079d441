// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

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
	// snapshotInterval is how often those who look are told.
	snapshotInterval = time.Second

	// maxViewers bounds what looking at the process costs it.
	maxViewers = 20

	// viewerPatience is how long a viewer may take for a snapshot until it
	// counts as gone. A server that stops waits for it as long.
	viewerPatience = 5 * time.Second
)

// statusFeed is the process's, as what it shows is.
var statusFeed = newFeed(takeSnapshot)

// feed makes one snapshot a second for all viewers, as long as there are some.
//
// All methods are safe for concurrent use.
type feed struct {
	take func(now time.Time) snapshot

	mu      sync.Mutex
	viewers map[*viewer]struct{}
	stop    chan struct{} // ends run, which is there while there are viewers
}

// viewer is somebody who looks.
type viewer struct {
	masked bool
	events chan []byte // at most one: a viewer that is slow misses some
}

func newFeed(take func(now time.Time) snapshot) *feed {
	return &feed{take: take, viewers: make(map[*viewer]struct{})}
}

// join returns a viewer, to be followed by leave; or nil if there are
// maxViewers already.
func (f *feed) join(masked bool) *viewer {
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

func (f *feed) leave(v *viewer) {
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

// publish tells all viewers. The snapshot is taken and written out once, and
// once more if there are viewers for whom clients are masked.
func (f *feed) publish(now time.Time) {
	f.mu.Lock()
	viewers := slices.Collect(maps.Keys(f.viewers))
	f.mu.Unlock()
	snap := f.take(now)
	for _, masked := range []bool{false, true} { // masking changes the snapshot
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

func snapshotEvent(snap snapshot) []byte {
	data, err := json.Marshal(snap) // has no line breaks
	if err != nil {
		return fmt.Appendf(nil, "event: failure\ndata: %q\n\n", err.Error())
	}
	return slices.Concat([]byte("event: snapshot\ndata: "), data, []byte("\n\n"))
}

// stream sends events (https://html.spec.whatwg.org/multipage/server-sent-events.html)
// until the client leaves, or the config or the process ends.
func (s *Status) stream(w http.ResponseWriter, r *http.Request) {
	viewer := statusFeed.join(s.MaskClients)
	if viewer == nil {
		w.Header().Set("Retry-After", "10")
		statusError(w, http.StatusServiceUnavailable, fmt.Sprintf("The limit of %d concurrent viewers is reached; try again later.", maxViewers))
		return
	}
	defer statusFeed.leave(viewer)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no") // for an nginx in front
	controller := http.NewResponseController(w)
	defer func() { _ = controller.SetWriteDeadline(time.Time{}) }()
	send := func(event []byte) bool {
		_ = controller.SetWriteDeadline(time.Now().Add(viewerPatience))
		_, err := w.Write(event)
		return err == nil && controller.Flush() == nil
	}
	hello := fmt.Appendf(nil, "retry: 1000\nevent: hello\ndata: {\"page\":%q,\"actions\":%t,\"masked\":%t}\n\n", statusVersion(), s.Actions, s.MaskClients)
	if !send(hello) || r.Method == http.MethodHead {
		return
	}
	for {
		select {
		case <-r.Context().Done():
			return
		case <-s.ended:
			return
		case event := <-viewer.events:
			if !send(event) {
				return
			}
		}
	}
}
