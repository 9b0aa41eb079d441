// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"maps"
	"net/http"
	"net/textproto"
	"sync"
	"time"
)

// maxInterim is how many interim responses to a request an origin may send at once. It
// may send one more each second, so that a long request can report its progress.
const maxInterim = 100

const errInterim = protocolError("the origin sends too many interim responses")

// interimLimit counts the interim responses to a request.
type interimLimit struct {
	count int
	first time.Time
}

// take counts one, and reports whether it is within the limit.
func (l *interimLimit) take() bool {
	if l.count++; l.count == 1 {
		l.first = time.Now()
	}
	return l.count <= maxInterim+int(time.Since(l.first)/time.Second)
}

// isProgress reports whether an interim response says that the request is being worked
// on, so that the time for its response begins anew.
func isProgress(status int) bool {
	return status == http.StatusProcessing || status == http.StatusEarlyHints
}

// waitsForInvitation reports whether the handler must send 100 (Continue) before the body
// is read. Otherwise net/http sends it with the first read: on the goroutine that reads,
// into a buffer that the handler may be writing to. Over HTTP/2 that is harmless.
func waitsForInvitation(r *http.Request) bool {
	return r.ProtoMajor != 2 && r.ProtoAtLeast(1, 1) && expectsContinue(r)
}

// passInterim passes an interim response on that was received in the given version, or
// says 100 (Continue), which is between each two neighbours and has no fields. It must
// not be called by two goroutines at once. HTTP/1.0 has no interim responses.
func (h *Handler) passInterim(w http.ResponseWriter, r *http.Request, status int, fields http.Header, major, minor int) {
	if !r.ProtoAtLeast(1, 1) {
		return
	}
	header := w.Header()
	saved := maps.Clone(header)
	clear(header)
	if status != http.StatusContinue {
		removeHopByHop(fields)
		h.via.add(fields, major, minor)
		maps.Copy(header, fields)
	}
	limitWrite(r)
	w.WriteHeader(status)
	clear(header)
	maps.Copy(header, saved)
}

// maxInterimWaiting is how many interim responses wait for a client that takes them
// slowly. Further ones are dropped: they may get lost, the final response tells all.
const maxInterimWaiting = 8

// interimQueue passes on what http.Transport reports on the goroutine that reads a
// connection to an HTTP/2 origin, which must not wait for one client as it serves many.
// A goroutine writes the responses while there are some. The handler does not write
// before end has returned.
type interimQueue struct {
	write func(status int, fields http.Header) // to the client
	heard func()                               // is called for responses that isProgress; may be nil

	mu       sync.Mutex
	limit    interimLimit
	failed   error // why the origin's interim responses ended the exchange
	waiting  []interimResponse
	writing  chan struct{} // closed when the goroutine has ended; nil: there is none
	ended    bool
	panicked any // what write panicked with
}

type interimResponse struct {
	status int
	fields http.Header
	passed chan struct{} // closed afterwards; may be nil
}

// got implements httptrace.ClientTrace.Got1xxResponse.
func (q *interimQueue) got(status int, fields textproto.MIMEHeader) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case !q.limit.take():
		q.failed = errInterim
	case countLines(http.Header(fields)) > maxFields:
		q.failed = errTooManyFields
	}
	if q.failed != nil {
		return q.failed
	}
	if isProgress(status) && q.heard != nil {
		q.heard()
	}
	if status != http.StatusContinue && len(q.waiting) < maxInterimWaiting { // 100 is for invite to say
		q.add(interimResponse{status: status, fields: http.Header(fields)})
	}
	return nil
}

// invite says 100 (Continue) to the client, and returns when that has been written, or
// when the final response has come before.
func (q *interimQueue) invite() {
	passed := make(chan struct{})
	q.mu.Lock()
	if q.ended {
		close(passed)
	} else {
		q.add(interimResponse{status: http.StatusContinue, passed: passed})
	}
	q.mu.Unlock()
	<-passed
}

// add is called with the lock held.
func (q *interimQueue) add(res interimResponse) {
	if q.ended {
		return
	}
	q.waiting = append(q.waiting, res)
	if q.writing == nil {
		q.writing = make(chan struct{})
		go q.run()
	}
}

// run writes what waits, and ends with it.
func (q *interimQueue) run() {
	for {
		q.mu.Lock()
		if len(q.waiting) == 0 {
			close(q.writing)
			q.writing = nil
			q.mu.Unlock()
			return
		}
		next := q.waiting[0]
		q.waiting = q.waiting[1:]
		failed := q.panicked != nil
		q.mu.Unlock()
		if !failed {
			q.pass(next)
		}
		if next.passed != nil {
			close(next.passed)
		}
	}
}

// pass writes one response. A panic is the handler's, and must not end the process.
func (q *interimQueue) pass(res interimResponse) {
	defer func() {
		if p := recover(); p != nil {
			q.mu.Lock()
			q.panicked = p
			q.mu.Unlock()
		}
	}()
	q.write(res.status, res.fields)
}

// end returns when all that waits has been written, and nothing more will be.
func (q *interimQueue) end() {
	q.mu.Lock()
	q.ended = true
	writing := q.writing
	q.mu.Unlock()
	if writing != nil {
		<-writing
	}
	if p := q.panicked; p != nil {
		q.panicked = nil
		panic(p)
	}
}

// any reports whether there was an interim response.
func (q *interimQueue) any() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.limit.count > 0
}

// error returns what was wrong with the interim responses, if anything was.
func (q *interimQueue) error() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.failed
}
