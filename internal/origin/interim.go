// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package origin

import (
	"net/http"
	"net/textproto"
	"sync"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/h1"
)

// maxInterim is how many interim responses to a request an origin may send at once. It
// may send one more per second, so that long requests can report progress.
const maxInterim = 100

const errInterim = h1.ProtocolError("the origin sends too many interim responses")

// interimLimit counts the interim responses to a request.
type interimLimit struct {
	count int
	first time.Time
}

// check counts an interim response, and returns an error if that exceeds a limit. If the
// response means that the origin is working on the request, it restarts the timeout.
func (l *interimLimit) check(status int, fields http.Header, clock *headClock) error {
	if l.count++; l.count == 1 {
		l.first = time.Now()
	}
	switch {
	case l.count > maxInterim+int(time.Since(l.first)/time.Second):
		return errInterim
	case h1.CountLines(fields) > h1.MaxFields:
		return h1.ErrTooManyFields
	case status == http.StatusProcessing || status == http.StatusEarlyHints:
		clock.recordProgress()
	}
	return nil
}

// maxInterimWaiting is how many interim responses are queued for a slow client. Further
// ones are dropped, since they are only informational.
const maxInterimWaiting = 8

// interimQueue forwards interim responses from an HTTP/2 origin. http.Transport reports
// them on the goroutine that reads the connection, which serves many clients and must not
// block for one of them. So a separate goroutine writes them to the client while there are
// any. Nothing else may write to the client before end has returned.
type interimQueue struct {
	write func(status int, fields http.Header) // sends one to the client
	clock *headClock

	mu       sync.Mutex
	limit    interimLimit
	err      error // why the origin's interim responses ended the exchange
	waiting  []interimResponse
	writing  chan struct{} // closed when the goroutine ends; nil: there is none
	ended    bool
	panicked any // the value that write panicked with
}

type interimResponse struct {
	status  int
	fields  http.Header
	written chan struct{} // closed once it has been written; may be nil
}

// got1xx implements httptrace.ClientTrace.Got1xxResponse.
func (q *interimQueue) got1xx(status int, fields textproto.MIMEHeader) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err == nil {
		q.err = q.limit.check(status, http.Header(fields), q.clock)
	}
	if q.err != nil {
		return q.err
	}
	if status != http.StatusContinue && len(q.waiting) < maxInterimWaiting { // sendContinue sends the 100
		q.add(interimResponse{status: status, fields: http.Header(fields)})
	}
	return nil
}

// sendContinue sends 100 (Continue) to the client, and returns when it has been written. It
// sends nothing if end has been called.
func (q *interimQueue) sendContinue() {
	passed := make(chan struct{})
	q.mu.Lock()
	if q.ended {
		close(passed)
	} else {
		q.add(interimResponse{status: http.StatusContinue, written: passed})
	}
	q.mu.Unlock()
	<-passed
}

// add queues a response. The caller holds q.mu.
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

// run writes the queued responses, and returns when there are none left.
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
		if next.written != nil {
			close(next.written)
		}
	}
}

// pass writes one response. It catches a panic, which would end the process, so that end
// can raise it on the goroutine of the exchange.
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

// end closes the queue, and returns when all queued responses have been written.
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

// any reports whether an interim response has arrived.
func (q *interimQueue) any() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.limit.count > 0
}

// error returns the error that interim responses ended the exchange with, if any.
func (q *interimQueue) error() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}
