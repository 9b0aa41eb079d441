// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package load sends requests to a proxy in a closed loop: each client sends its next
// request when it has the whole answer to the one before. It checks each answer and counts
// what it finds. It connects to the loopback interface only.
package load

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Kind says what clients do.
type Kind int

// The kinds of a load.
const (
	Requests    Kind = iota // requests on connections that are kept
	Connections             // each request on a new connection
	Connects                // each operation opens a tunnel and closes it
	Download                // content through tunnels, from the origin
	Upload                  // content through tunnels, to the origin
)

// Target is what the load is for.
type Target struct {
	Server  string // the address and port that clients connect to
	Origin  string // the address and port in requests
	Reverse bool   // the server is not a forward proxy: requests have the form for origins
}

// Load says what clients do and what they expect.
type Load struct {
	Kind     Kind
	Clients  int
	Content  int // bytes in each request; with 0, its method is GET, else POST
	Path     string
	Status   int
	Want     []byte // the content of each answer
	AnyBytes bool   // instead of Want: any content will do
	Warm     time.Duration
	Duration time.Duration

	// Received returns how much the origin has received. It counts for an Upload.
	Received func() int64
	// Begin and End are called when the measurement begins and when it ends.
	Begin, End func()
}

// Result is what clients found. Errors include those before the measurement began.
type Result struct {
	Operations int64
	Bytes      int64 // content of answers, or what went through tunnels
	Errors     int64
	FirstError string
	Reopened   int64 // connections that the server ended after an answer
	Elapsed    time.Duration
	Latency    Histogram
}

// The phases of a run.
const (
	warming int32 = iota
	measuring
	over
)

// grace is how long operations may take to finish after the measurement has ended. What
// takes longer is an error.
const grace = 5 * time.Second

// extension is how much longer a measurement may take in which nothing was done.
const extension = 5 * time.Second

// pause is how long a client waits after an error, so that it does not use up the ports.
const pause = 10 * time.Millisecond

// run is a Run in progress.
type run struct {
	Load
	server   netip.AddrPort
	target   Target
	request  []byte
	deadline time.Time
	phase    atomic.Int32
	seen     atomic.Bool // something was done, or failed, since the measurement began
}

// Run applies the load to the target until it has lasted for Warm and Duration, or ctx is
// cancelled. If nothing was done by then, it goes on for a while until something is. The error is for a target that is not on the loopback interface, and for a
// cancelled ctx. What fails at the target is counted in the result.
func Run(ctx context.Context, target Target, load Load) (*Result, error) {
	r, err := newRun(target, load)
	if err != nil {
		return nil, err
	}
	return r.drive(ctx), ctx.Err()
}

// drive runs all clients and returns what they found together.
func (r *run) drive(ctx context.Context) *Result {
	results := make([]Result, r.Clients)
	var clients sync.WaitGroup
	for i := range results {
		c := client{run: r, result: &results[i], source: sourceOf(i)}
		clients.Go(c.loop)
	}
	total := &Result{}
	sleep(ctx, r.Warm)
	if r.Begin != nil {
		r.Begin()
	}
	received := r.received()
	begin := time.Now()
	r.phase.Store(measuring)
	sleep(ctx, r.Duration)
	for end := time.Now().Add(extension); !r.seen.Load() && r.received() == received && time.Now().Before(end) && ctx.Err() == nil; {
		sleep(ctx, time.Millisecond)
	}
	r.phase.Store(over)
	total.Elapsed = time.Since(begin)
	total.Bytes = r.received() - received
	if r.End != nil {
		r.End()
	}
	clients.Wait()
	for i := range results {
		total.add(&results[i])
	}
	return total
}

func newRun(target Target, load Load) (*run, error) {
	r := &run{Load: load, target: target, deadline: time.Now().Add(load.Warm + load.Duration + extension + grace)}
	var err error
	if r.server, err = loopback(target); err != nil {
		return nil, err
	}
	r.request = requestFor(target, &load)
	return r, nil
}

func (r *run) received() int64 {
	if r.Kind != Upload || r.Received == nil {
		return 0
	}
	return r.Received()
}

func (total *Result) add(other *Result) {
	total.Operations += other.Operations
	total.Bytes += other.Bytes
	total.Errors += other.Errors
	total.Reopened += other.Reopened
	if total.FirstError == "" {
		total.FirstError = other.FirstError
	}
	total.Latency.AddAll(&other.Latency)
}

// sleep waits for d, or until ctx is cancelled.
func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// client is one of the clients of a run.
type client struct {
	*run
	result *Result
	source net.IP // the address it connects from
	conn   net.Conn
	reader reader
}

// loop runs until the measurement is over.
func (c *client) loop() {
	c.reader.buf = make([]byte, 64<<10)
	if c.Kind == Download || c.Kind == Upload {
		c.reader.buf = make([]byte, 256<<10)
	}
	operation := c.exchange
	switch c.Kind {
	case Connects:
		operation = c.openAndClose
	case Download:
		operation = c.download
	case Upload:
		operation = c.sendAll
	}
	for c.phase.Load() != over {
		start := time.Now()
		n, err := operation()
		if err != nil {
			c.fail(err)
			continue
		}
		if c.phase.Load() == measuring {
			c.note()
			c.result.Operations++
			c.result.Bytes += int64(n)
			c.result.Latency.Add(time.Since(start))
		}
	}
	c.hangUp()
}

// fail counts an error. The next operation uses another connection.
func (c *client) fail(err error) {
	c.result.Errors++
	if c.result.FirstError == "" {
		c.result.FirstError = err.Error()
	}
	c.note()
	c.hangUp()
	time.Sleep(pause)
}

// note notes that something has happened. It is cheap if that is known.
func (c *client) note() {
	if !c.seen.Load() {
		c.seen.Store(true)
	}
}

func (c *client) hangUp() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// dial connects to the server.
func (c *client) dial() error {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: c.source}, Deadline: c.deadline}
	conn, err := dialer.Dial("tcp", c.server.String())
	if err != nil {
		return err
	}
	c.conn = conn
	c.reader.source, c.reader.unread = conn, nil
	return conn.SetDeadline(c.deadline)
}

// exchange sends a request and reads the answer to it. It returns the length of its
// content. A server may end a connection between requests without a word, so what fails
// before the first byte of an answer is sent again on a new connection.
func (c *client) exchange() (int, error) {
	kept := c.conn != nil
	n, begun, err := c.attempt()
	if err != nil && kept && !begun && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.hangUp()
		c.countReopened()
		n, _, err = c.attempt()
	}
	return n, err
}

// attempt sends a request, on a new connection if there is none, and reads the answer. It
// reports whether an answer had begun, too.
func (c *client) attempt() (n int, begun bool, err error) {
	if c.conn == nil {
		if err := c.dial(); err != nil {
			return 0, false, err
		}
	}
	if _, err := c.conn.Write(c.request); err != nil {
		return 0, false, err
	}
	head, err := c.reader.head()
	if err != nil {
		return 0, len(c.reader.unread) > 0, err
	}
	if head.status != c.Status {
		return 0, true, wrongStatus(head.status, c.Status)
	}
	check := checker{want: c.Want, any: c.AnyBytes}
	if err := c.reader.rest(&head, &check); err != nil {
		return 0, true, err
	}
	if len(c.reader.unread) > 0 {
		return 0, true, errors.New("more content than the answer has")
	}
	switch {
	case c.Kind == Connections:
		c.hangUp()
	case head.closes:
		c.hangUp()
		c.countReopened()
	}
	return check.at, true, nil
}

func (c *client) countReopened() {
	if c.phase.Load() == measuring {
		c.result.Reopened++
	}
}
