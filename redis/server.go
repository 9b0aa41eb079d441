// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/rueidis"
	"go.uber.org/zap"
)

const (
	// probeInterval is how long after a failure, and after each attempt in
	// vain, Redis is tried again.
	probeInterval = time.Second

	// setupTimeout bounds an attempt to connect: no request waits for one.
	setupTimeout = time.Second

	// maxWaiting is how many requests may wait for Redis at a time; more wait
	// for their turn. The queue of a connection, which blocks when it is full,
	// has twice as many places.
	maxWaiting = 512
)

// errDown is why requests are not counted between a failure and the attempt
// that brings Redis back.
var errDown = errors.New("redis is not available")

// server is a Redis and whether it answers. While it does not, nobody asks it:
// one goroutine tries it now and then, with connections of its own.
type server struct {
	options rueidis.ClientOption
	timeout time.Duration

	link  atomic.Pointer[link] // nil while Redis does not answer
	tried chan struct{}        // closed when it is known for the first time
	ctx   atomic.Pointer[sharedContext]

	mu      sync.Mutex
	loggers []*zap.Logger // of those who want to ask; the first is in a config that has been there for longest
	done    chan struct{} // closed with mu held, when nobody wants to ask any more
}

// link are the connections to Redis from when it comes up until it fails.
type link struct {
	client  rueidis.Client
	waiting chan struct{} // has a place for each request that may wait
}

// newServer begins to connect. Meanwhile take waits, but no longer than it
// would for Redis.
func newServer(options rueidis.ClientOption, timeout time.Duration, prefix string, logger *zap.Logger) *server {
	options.Dialer.Timeout = setupTimeout
	options.ConnWriteTimeout = max(setupTimeout, timeout)
	options.PipelineMultiplex = -1 // one connection to each server, which is there when requests come
	options.ReadBufferEachConn, options.WriteBufferEachConn = 32<<10, 32<<10
	options.DisableCache = true
	options.DialCtxFn = dial
	s := &server{options: options, timeout: timeout, tried: make(chan struct{}), loggers: []*zap.Logger{logger}, done: make(chan struct{})}
	go func() {
		start := time.Now()
		key := probeKey(prefix, "")
		err := s.connect(key)
		if err != nil && !s.closed() {
			s.logFailed(err)
		}
		close(s.tried)
		if err != nil {
			s.heal(key, start)
		}
	}()
	return s
}

// Destruct implements caddy.Destructor.
func (s *server) Destruct() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.done)
	if l := s.link.Swap(nil); l != nil {
		go l.client.Close() // which takes a second if Redis is silent
	}
	return nil
}

func (s *server) addLogger(logger *zap.Logger) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loggers = append(s.loggers, logger)
}

func (s *server) removeLogger(logger *zap.Logger) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.loggers, logger); i >= 0 {
		s.loggers = slices.Delete(s.loggers, i, i+1)
	}
}

// logger is one of a config that is in use: that of a newer one may yet be
// rejected, and nobody reads its log then.
func (s *server) logger() *zap.Logger {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.loggers) == 0 {
		return zap.NewNop()
	}
	return s.loggers[0]
}

// dial connects to a server, over TLS if there is a config for it.
func dial(ctx context.Context, address string, dialer *net.Dialer, config *tls.Config) (net.Conn, error) {
	var conn net.Conn
	var err error
	if config == nil {
		conn, err = dialer.DialContext(ctx, "tcp", address)
	} else {
		conn, err = (&tls.Dialer{NetDialer: dialer, Config: config}).DialContext(ctx, "tcp", address)
	}
	if err != nil {
		return nil, err
	}
	return yieldingConn{conn}, nil
}

// yieldingConn lets others go first after each Write, which is of all questions
// that had come by then: so that those who have one can ask it, and the next
// Write is of them all. That halves what a question costs when there are many,
// and costs nothing when there are not.
type yieldingConn struct{ net.Conn }

func (c yieldingConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	runtime.Gosched()
	return n, err
}

// down reports whether Redis is known not to answer.
func (s *server) down() bool {
	select {
	case <-s.tried:
		return s.link.Load() == nil
	default:
		return false
	}
}

// up returns the link, or nil if there is none. It waits until that is known.
func (s *server) up(ctx context.Context) *link {
	select {
	case <-s.tried:
		return s.link.Load()
	case <-ctx.Done():
		return nil
	}
}

// take runs the script on a bucket whose key begins with prefix. That takes no
// longer than the timeout.
func (s *server) take(prefix, key string, args []string) (time.Duration, error) {
	// Not the request's context: what has been sent is counted, even if the
	// client leaves, and its leaving is not Redis's failure.
	start := time.Now()
	ctx := s.deadline(start)
	l := s.up(ctx)
	if l == nil {
		return 0, errDown
	}
	wait, err := l.take(ctx, key, args)
	metrics.duration.Observe(time.Since(start).Seconds())
	if err != nil {
		metrics.errors.WithLabelValues(kind(err)).Inc()
		s.fail(l, probeKey(prefix, key), err)
		return 0, err
	}
	return wait, nil
}

// refill fills a bucket, and reports whether it was there. It has the key expire
// by a command that the script uses, too, so that no other has to be allowed.
func (s *server) refill(ctx context.Context, key string) (found bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	l := s.up(ctx)
	if l == nil {
		return false, errDown
	}
	err = l.client.Do(ctx, l.client.B().Set().Key(key).Value("").Xx().PxMilliseconds(1).Build()).Error()
	if rueidis.IsRedisNil(err) {
		return false, nil
	}
	return err == nil, err
}

// deadline is a context that ends when a request that comes now has waited for
// long enough. All that come within a quarter of the timeout have the same, so
// that some wait for a quarter less: one for each would be a fifth of what a
// question costs.
func (s *server) deadline(now time.Time) context.Context {
	shared := s.ctx.Load()
	if shared == nil || now.Sub(shared.start) > s.timeout/4 {
		ctx, cancel := context.WithDeadline(context.Background(), now.Add(s.timeout))
		context.AfterFunc(ctx, cancel) // it is for everybody, to its end
		shared = &sharedContext{ctx, now}
		s.ctx.Store(shared)
	}
	return shared
}

type sharedContext struct {
	context.Context
	start time.Time
}

func (l *link) take(ctx context.Context, key string, args []string) (time.Duration, error) {
	select {
	case l.waiting <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	if l.client.Mode() == rueidis.ClientModeStandalone {
		return l.exec(ctx, key, args)
	}
	// For a cluster or sentinels the library may first have to find out whom to
	// ask, or wait for another who does, and minds no context then.
	type answer struct {
		wait time.Duration
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		wait, err := l.exec(ctx, key, args)
		answered <- answer{wait, err}
	}()
	select {
	case a := <-answered:
		return a.wait, a.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// exec runs the script, and gives the place up that the request had.
func (l *link) exec(ctx context.Context, key string, args []string) (time.Duration, error) {
	defer func() { <-l.waiting }()
	wait, err := takeScript.Exec(ctx, l.client, []string{key}, args).AsInt64()
	return time.Duration(wait), err
}

// reach connects to all nodes of a cluster, of which the addresses may name only
// some: a request cannot wait for as long as that may take. Those that do not
// answer are the probe's matter, or nobody's.
func (l *link) reach() {
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, node := range l.client.Nodes() {
		wg.Go(func() { node.Do(ctx, node.B().Ping().Build()) })
	}
	wg.Wait()
}

// fail gives l up, once, and has somebody see to it that there is another one.
// key is what to try it with.
func (s *server) fail(l *link, key string, err error) {
	if !s.link.CompareAndSwap(l, nil) {
		return // another request was first, or the server is closed
	}
	s.logFailed(err)
	start := time.Now()
	go func() {
		l.client.Close() // which takes a second if Redis is silent
		s.heal(key, start)
	}()
}

// heal tries again and again until Redis answers, or nobody wants it to any
// more.
func (s *server) heal(key string, since time.Time) {
	for {
		select {
		case <-s.done:
			return
		case <-time.After(probeInterval):
		}
		err := s.connect(key)
		if err == nil {
			s.logger().Info("redis answers again",
				zap.Strings("addresses", s.options.InitAddress),
				zap.Duration("after", time.Since(since)))
			return
		}
		s.logger().Debug("redis still does not answer",
			zap.Strings("addresses", s.options.InitAddress),
			zap.Error(err))
	}
}

// connect makes a new link, if Redis takes tokens in time.
func (s *server) connect(key string) error {
	options := s.options
	options.InitAddress = slices.Clone(options.InitAddress)
	client, err := rueidis.NewClient(options)
	if err != nil {
		return err
	}
	l := &link{client, make(chan struct{}, maxWaiting)}
	l.reach()
	// At first the script may have to be loaded; then it must do in what any request has.
	for _, timeout := range []time.Duration{setupTimeout, s.timeout - s.timeout/4} {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		_, err = l.take(ctx, key, probeArgs)
		cancel()
		if err != nil {
			client.Close()
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed() {
		go client.Close()
		return errDown
	}
	s.link.Store(l)
	return nil
}

// closed reports whether nobody wants to ask any more.
func (s *server) closed() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

func (s *server) logFailed(err error) {
	s.logger().Warn("redis does not answer; clients are not counted together until it does",
		zap.Strings("addresses", s.options.InitAddress),
		zap.Error(err))
}

// kind is the label of an error in the metrics.
func kind(err error) string {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	case isAnswer(err):
		return "answer"
	default:
		return "connection"
	}
}

func isAnswer(err error) bool {
	_, ok := rueidis.IsRedisErr(err)
	return ok
}
