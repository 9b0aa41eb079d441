// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"github.com/puzpuzpuz/xsync/v4"

	"github.com/asyncproxy/caddy-async-proxy/internal/client"
)

// Checking a password against its hash takes about a second of CPU time. The mechanisms in this
// file keep that from stalling the proxy. They also prevent a client that guesses passwords, or a
// job with an old password, from locking out other clients behind the same address:
//
//   - loginGate limits how many passwords are checked at once.
//   - credentialSet caches the results. Credentials that were accepted before are neither
//     checked again nor limited, and those that were rejected are not checked again.
//   - process.failedLogins has a bucket of failed logins for each client. A login that finds no
//     token waits a while for one, so that a user with the right password gets in beside a
//     client that guesses one password after another. Many concurrent guesses may still take
//     all tokens during that wait.

const (
	// loginPatience limits how long a login waits for a token, and then again how long it
	// waits for its turn to be checked.
	loginPatience = 15 * time.Second

	// maxLoginLine limits how many logins of one client wait at once.
	maxLoginLine = 100

	// loginRetry is the Retry-After time of a login that was not checked.
	loginRetry = 5 * time.Second

	// maxFailedLogins and maxFailedLoginsPer keep sums of times within an int64 of
	// nanoseconds.
	maxFailedLogins    = 1_000_000
	maxFailedLoginsPer = caddy.Duration(365 * 24 * time.Hour)

	defaultFailedLogins    = 10
	defaultFailedLoginsPer = caddy.Duration(time.Minute)
)

var (
	errFailedLogins = errors.New("too many failed logins by the client")
	errLoginsBusy   = errors.New("too many passwords are waiting to be checked")
)

// loginGate checks one login of each client at a time, and a limited number in all. Other
// logins wait.
type loginGate struct {
	slots    chan struct{}
	patience time.Duration

	mu    sync.Mutex
	lines map[client.Key]*loginLine
}

// loginLine is the queue of one client's logins.
type loginLine struct {
	turn chan struct{} // full while a login has its turn
	n    int           // logins that have their turn or wait for it
}

func newLoginGate(slots int, patience time.Duration) *loginGate {
	return &loginGate{slots: make(chan struct{}, slots), patience: patience, lines: make(map[client.Key]*loginLine)}
}

// enter waits for the client's turn. It returns errLoginsBusy if that takes too long or too
// many logins wait, or the cause of ctx's end. On success the caller must call leave.
func (g *loginGate) enter(ctx context.Context, key client.Key) error {
	g.mu.Lock()
	line := g.lines[key]
	if line == nil {
		line = &loginLine{turn: make(chan struct{}, 1)}
		g.lines[key] = line
	}
	if line.n >= maxLoginLine {
		g.mu.Unlock()
		return errLoginsBusy
	}
	line.n++
	g.mu.Unlock()

	deadline := time.Now().Add(g.patience)
	err := acquire(ctx, line.turn, deadline)
	if err != nil {
		g.quit(key, line)
		return err
	}
	if err = acquire(ctx, g.slots, deadline); err != nil {
		<-line.turn
		g.quit(key, line)
	}
	return err
}

// leave ends the turn that enter has begun.
func (g *loginGate) leave(key client.Key) {
	<-g.slots
	g.mu.Lock()
	line := g.lines[key]
	g.mu.Unlock()
	<-line.turn
	g.quit(key, line)
}

func (g *loginGate) quit(key client.Key, line *loginLine) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if line.n--; line.n == 0 {
		delete(g.lines, key)
	}
}

// acquire sends to a channel, and waits until the deadline if it is full. It only watches
// ctx, and with it the client's connection, if it has to wait.
func acquire(ctx context.Context, tokens chan struct{}, deadline time.Time) error {
	select {
	case tokens <- struct{}{}:
		return nil
	default:
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case tokens <- struct{}{}:
		return nil
	case <-timer.C:
		return errLoginsBusy
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// provisionFailedLogins acquires the proxy's buckets of failed logins, which close
// releases.
func (p *proxy) provisionFailedLogins() error {
	if len(p.auth) == 0 || p.config.FailedLogins < 0 {
		return nil
	}
	limits := p.config.limits(&p.config.Options)
	limits.Burst, limits.Refill = int64(p.config.FailedLogins), float64(p.config.FailedLogins)/time.Duration(p.config.FailedLoginsPer).Seconds()
	var err error
	p.failedLogins, err = acquireTable(p.process.failedLogins, limits)
	return err
}

// repeatsKey returns the key of a client's bucket for credentials that are known to be wrong.
// Repeating them is not a guess and takes no failed-login token, but it is limited too.
func repeatsKey(key client.Key) client.Key { return key.Variant("repeats") }

// credentialKey identifies the credentials of a request without revealing them.
type credentialKey [sha256.Size]byte

// credentialSecret makes the keys useless outside this process.
var credentialSecret = func() (secret [32]byte) {
	_, _ = rand.Read(secret[:]) // never fails
	return secret
}()

// credentialSet is a bounded set in two generations. A look-up moves an entry to the newer one. When
// that holds half of the maximum, it becomes the older one, and the former older one is dropped. The
// zero value is not usable.
type credentialSet struct {
	half int
	gens atomic.Pointer[[2]*xsync.Map[credentialKey, struct{}]] // newest first
}

func newCredentialSet(size int) *credentialSet {
	s := &credentialSet{half: size / 2}
	s.gens.Store(&[2]*xsync.Map[credentialKey, struct{}]{newCredentials(), newCredentials()})
	return s
}

func newCredentials() *xsync.Map[credentialKey, struct{}] {
	return xsync.NewMap[credentialKey, struct{}]()
}

func (s *credentialSet) has(key credentialKey) bool {
	g := s.gens.Load()
	if _, ok := g[0].Load(key); ok {
		return true
	}
	_, ok := g[1].Load(key)
	if ok {
		s.add(key)
	}
	return ok
}

func (s *credentialSet) add(key credentialKey) {
	g := s.gens.Load()
	if g[0].Size() >= s.half {
		s.gens.CompareAndSwap(g, &[2]*xsync.Map[credentialKey, struct{}]{newCredentials(), g[0]})
		g = s.gens.Load()
	}
	g[0].Store(key, struct{}{})
}

func (s *credentialSet) remove(key credentialKey) {
	for _, m := range s.gens.Load() {
		m.Delete(key)
	}
}

// basicLogin is the user name and password of Basic credentials.
type basicLogin struct {
	user     string
	password string
	ok       bool // they are well-formed
}

// readBasic parses credentials as net/http's Request.BasicAuth does.
func readBasic(credentials string) basicLogin {
	const scheme = "Basic "
	if len(credentials) < len(scheme) || !strings.EqualFold(credentials[:len(scheme)], scheme) {
		return basicLogin{}
	}
	decoded, err := base64.StdEncoding.DecodeString(credentials[len(scheme):])
	if err != nil {
		return basicLogin{}
	}
	user, password, ok := strings.Cut(string(decoded), ":")
	return basicLogin{user, password, ok}
}

// basicKey includes the account's current hash, so that a result for the key stays true.
func basicKey(provider *caddyauth.HTTPBasicAuth, login basicLogin) credentialKey {
	return credentialsKey("http_basic", string(provider.HashRaw), provider.Accounts[login.user].Password, login.user, login.password)
}

// credentialsKey hashes parts, each with its length, so that different parts never make the
// same key.
func credentialsKey(parts ...string) credentialKey {
	buf := append(make([]byte, 0, 512), credentialSecret[:]...)
	for _, part := range parts {
		buf = binary.AppendUvarint(buf, uint64(len(part)))
		buf = append(buf, part...)
	}
	return sha256.Sum256(buf)
}

// sleep waits for d, or returns the cause of ctx's end.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
