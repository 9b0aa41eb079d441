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
	"go.uber.org/zap/zapcore"
)

const (
	// probeInterval is the delay before a reconnection attempt, after a failure and
	// after each failed attempt.
	probeInterval = time.Second

	// setupTimeout is the timeout for connecting. No request waits for that.
	setupTimeout = time.Second

	// maxWaiting is how many requests may wait for Redis at a time; others queue for
	// their turn. The queue of a connection, which blocks when it is full, has twice as
	// many places.
	maxWaiting = 512
)

// errDown reports that Redis has failed and has not been reconnected yet.
var errDown = errors.New("redis is not available")

// server is a Redis and its availability. While it does not answer, no request asks it:
// one goroutine tries to reconnect from time to time.
type server struct {
	options rueidis.ClientOption
	timeout time.Duration

	link  atomic.Pointer[link] // nil while Redis does not answer
	tried chan struct{}        // closed after the first attempt to connect
	ctx   atomic.Pointer[sharedContext]

	mu      sync.Mutex
	loggers []*zap.Logger // of the limiters that use the server, the oldest config first
	done    chan struct{} // closed with mu held, when no limiter uses the server any more
}

// link is the set of connections to Redis, from a successful connect until a failure.
type link struct {
	client  rueidis.Client
	waiting chan struct{} // a semaphore for the requests that may wait
}

// newServer returns a server, and starts connecting in the background. Until that is done,
// take waits, within its timeout.
func newServer(options rueidis.ClientOption, timeout time.Duration, prefix string, logger *zap.Logger) *server {
	options.Dialer.Timeout = setupTimeout
	options.ConnWriteTimeout = max(setupTimeout, timeout)
	options.PipelineMultiplex = -1 // one connection to each server, established in advance
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
			s.heal(key, start, err)
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
		go l.client.Close() // takes a second if Redis does not answer
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

// logger returns the logger of the oldest config that uses the server. A newer config may
// still be rejected, and then its log is lost.
func (s *server) logger() *zap.Logger {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.loggers) == 0 {
		return zap.NewNop()
	}
	return s.loggers[0]
}

// dial connects to a server, over TLS if config is not nil.
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

// yieldingConn yields the processor after each Write, so that other goroutines can queue
// their queries and the next Write sends them all at once. Under load that halves the cost
// of a query; otherwise it costs nothing.
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

// up returns the link, or nil if there is none. It waits for the first attempt to connect.
func (s *server) up(ctx context.Context) *link {
	select {
	case <-s.tried:
		return s.link.Load()
	case <-ctx.Done():
		return nil
	}
}

// take runs the script on a bucket whose key begins with prefix. It returns within the
// timeout.
func (s *server) take(prefix, key string, args []string) (time.Duration, error) {
	// Do not use the request's context: a query that has been sent counts even if the
	// client disconnects, and a disconnect is not a failure of Redis.
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

// refill fills a bucket, and reports whether it existed. It makes the key expire with a
// command that the script uses too, so that operators need not allow another command.
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

// deadline returns a context that ends when the timeout of a request that starts now
// expires. Requests that start within a quarter of the timeout share a context, so some
// wait up to a quarter less. A context for each request would be a fifth of the cost of a
// query.
func (s *server) deadline(now time.Time) context.Context {
	shared := s.ctx.Load()
	if shared == nil || now.Sub(shared.start) > s.timeout/4 {
		ctx, cancel := context.WithDeadline(context.Background(), now.Add(s.timeout))
		context.AfterFunc(ctx, cancel) // shared, so not canceled before its deadline
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
	// With a cluster or sentinels, the library may first have to find the right server,
	// or wait for another call that does, and ignores the context meanwhile.
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

// exec runs the script, and releases the request's place in l.waiting.
func (l *link) exec(ctx context.Context, key string, args []string) (time.Duration, error) {
	defer func() { <-l.waiting }()
	wait, err := takeScript.Exec(ctx, l.client, []string{key}, args).AsInt64()
	return time.Duration(wait), err
}

// reach connects to all nodes of a cluster in advance, because the addresses may name only
// some of them and a request must not wait for a connection. It ignores nodes that do not
// answer: the probe that follows fails if it needs one of them.
func (l *link) reach() {
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, node := range l.client.Nodes() {
		wg.Go(func() { node.Do(ctx, node.B().Ping().Build()) })
	}
	wg.Wait()
}

// fail closes l and starts reconnecting, unless that has been done already. key is the key
// for the probe.
func (s *server) fail(l *link, key string, err error) {
	if !s.link.CompareAndSwap(l, nil) {
		return // another request was first, or the server is closed
	}
	s.logFailed(err)
	start := time.Now()
	go func() {
		l.client.Close() // takes a second if Redis does not answer
		s.heal(key, start, err)
	}()
}

// heal tries to reconnect until Redis answers or the server is closed. err is the error that has been
// logged. The first error of another kind is logged too: after a broken connection, only that shows
// that the password is wrong.
func (s *server) heal(key string, since time.Time, err error) {
	logged := map[string]bool{kind(err): true}
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
		level := zapcore.WarnLevel
		if logged[kind(err)] {
			level = zapcore.DebugLevel
		}
		logged[kind(err)] = true
		s.logger().Log(level, "redis still does not answer",
			zap.Strings("addresses", s.options.InitAddress),
			zap.Error(err))
	}
}

// connect establishes a new link if Redis runs the script in time.
func (s *server) connect(key string) error {
	options := s.options
	options.InitAddress = slices.Clone(options.InitAddress)
	client, err := rueidis.NewClient(options)
	if err != nil {
		return err
	}
	l := &link{client, make(chan struct{}, maxWaiting)}
	l.reach()
	// The first run may have to load the script. The second must be as fast as a request
	// needs it to be.
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

// closed reports whether no limiter uses the server any more.
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

// kind returns the metrics label for an error.
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
